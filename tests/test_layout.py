"""The shape of the package, read from its source: who imports whom, how long things are, what is annotated."""
from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1] / "netproxy"

# What a room's modules may import of the other rooms; errors, interfaces and its own room are always allowed.
# The package itself is its version.
ALLOWED = {
    "__main__": {"cli"},
    "report": {"config", "dialer", "protocol", "router"},
    "figures": {"", "observe"},
    "inside": {"config", "figures", "observe"},
    "service": {"", "config", "daemon", "listener", "machinery", "observe"},
    "machinery": {"access", "config", "dialer", "listener", "net", "observe", "relay", "resolver", "router"},
    "relays": {"config", "handler", "listener", "machinery", "relay"},
    "tunnels": {"access", "config", "dialer", "handler", "listener", "machinery", "net", "protocol", "relay", "tunnel"},
    "cli": {"", "service", "access", "config", "daemon", "dialer", "handler", "listener", "net", "observe", "protocol", "relay", "router"},
    "daemon": {"", "report", "inside", "machinery", "relays", "tunnels", "resolver", "access", "config", "dialer", "handler", "listener", "net", "observe", "protocol", "relay", "router"},
    "handler": {"protocol", "net", "relay", "access"},
    "dialer": {"protocol", "net"},
    "tunnel": {"protocol", "net"},
    "relay": {"net"},
    "listener": {"net"},
    "resolver": {"protocol", "net"},
    "errors": set(), "interfaces": set(), "": set(),
    "router": set(), "config": set(), "protocol": set(), "net": set(), "access": set(), "observe": set(),
}
FOR_ALL = {"errors", "interfaces"}
SCHEMA = "netproxy.config.schema"
READERS_OF_SCHEMA = {"daemon", "inside", "machinery", "relays", "tunnels", "service", "report"}       # besides config/ itself and every factory
LATE = {"yaml", "ssl", "ctypes", "hashlib", "hmac", "argparse", "difflib", "json", "getpass", "traceback",
        "maxminddb", "copy", "glob"}
LATE_OURS = {("config", "netproxy.config.tunnels"),
             ("daemon", "netproxy.report"),
             ("config", "netproxy.config.names"), ("config", "netproxy.config.rules"),
             *(("dialer", f"netproxy.dialer.{name}") for name in ("http", "socks4", "socks5", "uot")),      # of few daemons
             ("daemon", "netproxy.resolver.factory"), ("daemon", "netproxy.router.factory"), ("handler", "netproxy.handler.dns"),
             ("cli", "netproxy.service"), ("cli", "netproxy.observe.console"), ("cli", "netproxy.observe.control"), ("inside", "netproxy.observe.control"),
             ("inside", "netproxy.figures"), ("inside", "netproxy.observe.site"), ("inside", "netproxy.observe.web"), ("observe", "netproxy.observe.page"),
             ("cli", "netproxy.observe.top"), ("daemon", "netproxy.tunnels"), ("tunnels", "netproxy.net.tls"),
             ("cli", "netproxy.access.users"), ("net", "netproxy.net.vectors"),      # hashlib's, ctypes'
             ("handler", "netproxy.net.tls"), ("dialer", "netproxy.net.tls"), ("resolver", "netproxy.net.tls")}      # and ssl's ways in
NOT_IN_A_CODEC = {"socket", "ssl", "select", "threading", "time", "logging"}
OF_SOCKET_IN_A_CODEC = {"inet_ntop", "inet_pton", "AF_INET", "AF_INET6"}

MODULE_LINES, FUNCTION_LINES, PARAMETERS, OF_CONSTRUCTORS, ENTRIES = 400, 60, 5, 7, 12

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Import(NamedTuple):
    module: str             # as written, "netproxy.net.stream"
    name: str               # what is taken of it, "" for all
    line: int
    late: bool              # within a function


class Module:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        self.room = (self.name.split(".") + [""])[1]
        self.text = path.read_text()
        self.tree = ast.parse(self.text)
        self.imports = list(self._imports(self.tree, False))

    def _imports(self, node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, "", child.lineno, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{self.path}:{child.lineno}: a relative import"
                yield from (Import(child.module or "", alias.name, child.lineno, late) for alias in child.names)
            yield from self._imports(child, late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    def ours(self) -> Iterator[tuple[str, Import]]:
        """The modules of ours that it imports, whole names."""
        for one in self.imports:
            if one.module.split(".")[0] == "netproxy":
                whole = f"{one.module}.{one.name}"
                yield (whole if whole in NAMES else one.module), one

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))

    def at(self, node: Function | Import) -> str:
        line = node.line if isinstance(node, Import) else node.lineno
        return f"{self.path.relative_to(ROOT.parent)}:{line}"


PATHS = sorted(ROOT.rglob("*.py"))
NAMES = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__") for path in PATHS}
MODULES = [Module(path) for path in PATHS]


def room_of(name: str) -> str:
    return (name.split(".") + [""])[1]


def test_every_room_has_its_rule() -> None:
    assert {module.room for module in MODULES} <= set(ALLOWED)


def test_imports_go_downward_only() -> None:
    wrong = [f"{module.at(one)}: {module.room or 'netproxy'} imports {name}"
             for module in MODULES for name, one in module.ours()
             if room_of(name) not in ALLOWED[module.room] | FOR_ALL | {module.room} and name != SCHEMA]
    assert not wrong


def test_only_factories_know_the_schema() -> None:
    wrong = [module.at(one) for module in MODULES for name, one in module.ours()
             if name == SCHEMA and module.room not in READERS_OF_SCHEMA | {"config"}
             and module.path.name != "factory.py"]
    assert not wrong


def test_codecs_do_no_io() -> None:
    wrong = [f"{module.at(one)}: {one.module} {one.name}"
             for module in MODULES if module.room == "protocol" for one in module.imports
             if one.module.split(".")[0] in NOT_IN_A_CODEC
             and not (one.module == "socket" and one.name in OF_SOCKET_IN_A_CODEC)]
    assert not wrong


def test_imports_within_functions_are_the_costly_ones_only() -> None:
    ours = {one: (module.room, name) for module in MODULES for name, one in module.ours()}
    wrong = [f"{module.at(one)}: {one.module}" for module in MODULES for one in module.imports
             if one.late and one.module not in LATE and ours.get(one) not in LATE_OURS]
    assert not wrong


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Not counting what is imported late, when all modules are there."""
    imports = {module.name: {name for name, one in module.ours() if not one.late} for module in MODULES}

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        for other in imports.get(name, set()):
            walk(other, (*path, name))
    for name in imports:
        walk(name, ())


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
class TestModule:
    def test_is_short(self, module: Module) -> None:
        assert len(module.text.splitlines()) <= MODULE_LINES

    def test_functions_are_short(self, module: Module) -> None:
        wrong = [module.at(function) for function in module.functions()
                 if (function.end_lineno or 0) - function.lineno + 1 > FUNCTION_LINES]
        assert not wrong

    def test_functions_take_few_parameters(self, module: Module) -> None:
        wrong = [f"{module.at(function)}: {function.name} takes {len(parameters(function))}" for function in module.functions()
                 if len(parameters(function)) > (OF_CONSTRUCTORS if function.name == "__init__" else PARAMETERS)]
        assert not wrong

    def test_everything_is_annotated(self, module: Module) -> None:
        wrong = [f"{module.at(function)}: {function.name}" for function in module.functions()
                 if function.returns is None or any(one.annotation is None for one in parameters(function))]
        assert not wrong

    def test_says_what_it_is(self, module: Module) -> None:
        assert not module.text.strip() or module.path.name == "__init__.py" or ast.get_docstring(module.tree)


def parameters(function: Function) -> list[ast.arg]:
    """All but self and cls."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return every[1:] if every and every[0].arg in ("self", "cls") else every


@pytest.mark.parametrize("folder", [ROOT, *sorted({path.parent for path in PATHS} - {ROOT})], ids=lambda folder: folder.name)
def test_a_folder_has_few_entries(folder: Path) -> None:
    """In the package itself, rooms and modules are counted apart."""
    modules = [path for path in folder.glob("*.py") if path.parent != ROOT or path.name != "__init__.py"]
    rooms = [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(modules) <= ENTRIES and len(rooms) <= ENTRIES
    assert folder == ROOT or not rooms


def test_package_files_are_empty_but_for_the_version() -> None:
    wrong = [str(module.path) for module in MODULES
             if module.path.name == "__init__.py" and module.path.parent != ROOT and module.text.strip()]
    assert not wrong
