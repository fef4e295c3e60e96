"""What stands for `typing` at run time: named tuples, Protocols, generic classes."""

from __future__ import annotations

import ast
import copy
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from netproxy import typed
from netproxy.interfaces.addresses import Address, UnixAddress

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "netproxy").rglob("*.py"))


class Point(typed.NamedTuple):
    """A point."""

    x: int
    y: int = 2

    @property
    def total(self) -> int:
        return self.x + self.y


class TestNamedTuple:
    def test_fields_have_names_positions_and_defaults(self) -> None:
        assert Point(1) == Point(x=1, y=2) == (1, 2)
        assert (Point(1).x, Point(5).y, Point(3).total) == (1, 2, 5)
        assert repr(Point(1)) == "Point(x=1, y=2)"

    def test_wrong_fields_are_type_errors(self) -> None:
        for arguments, names in (((), {}), ((1, 2, 3), {}), ((1,), {"z": 1})):
            with pytest.raises(TypeError):
                Point(*arguments, **names)
        with pytest.raises(AttributeError):
            Point(1).x = 2  # type: ignore[misc]  # that is the test

    def test_replace_changes_named_fields_only(self) -> None:
        assert Point(1)._replace(y=5) == (1, 5)
        assert Point(1)._asdict() == {"x": 1, "y": 2}
        with pytest.raises(ValueError):
            Point(1)._replace(z=3)

    def test_make_wants_all_fields(self) -> None:
        assert Point._make([1, 2]) == Point(1)
        with pytest.raises(TypeError):
            Point._make([1])

    def test_copies_and_pickles_are_equal_and_of_the_class(self) -> None:
        for value in (Point(1), UnixAddress("unix:/a", 0), Address("a", 1)):
            for made in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
                assert made == value and type(made) is type(value)

    def test_subclass_keeps_its_class_when_it_is_replaced(self) -> None:
        assert type(UnixAddress("unix:/a", 0)._replace(port=0)) is UnixAddress

    def test_pattern_matches_by_position(self) -> None:
        match Point(1):
            case Point(x, y):
                assert (x, y) == (1, 2)

    def test_annotations_that_are_evaluated_later_are_an_error(self) -> None:
        """Those of Python 3.14: the class would have no fields."""
        with pytest.raises(TypeError, match="Empty: its module needs from __future__"):
            type(typed.NamedTuple)("Empty", (typed.NamedTuple,), {"__annotate_func__": len})

    def test_annotations_are_kept_as_texts(self) -> None:
        """See above."""
        for path in PATHS:
            tree = ast.parse(path.read_text())
            imported = {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
            has_class = any(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
            assert not has_class or "__future__" in imported, path


def test_daemon_does_not_load_typing() -> None:
    """All modules of the package, without typing: it costs an idle daemon 0.7 MiB."""
    code = "import sys, netproxy.daemon.main; print('typing' in sys.modules)"
    # Without site-packages, where coverage begins to measure, which needs typing.
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_shapes_have_no_code() -> None:
    """A class with code that derives from a Protocol would be the one empty class, too."""
    wrong = []
    for path in PATHS:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if path.name in ("__main__.py", "typed.py"):
            continue
        module = importlib.import_module(name)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and getattr(module, node.name) is typed.Protocol:
                methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
                wrong += [f"{name}.{node.name}" for method in methods if has_code(method)]
    assert not wrong


def has_code(function: ast.FunctionDef) -> bool:
    """Return whether a function has more than a docstring."""
    return len(function.body) > 1 or not ast.get_docstring(function)
