"""What other modules use of `typing` at run time, for a fraction of its memory.

The module typing costs 0.7 MiB, and each Protocol and NamedTuple some kilobytes.  Type checkers
see typing itself.  At run time all Protocols are one empty class, type variables stand for
nothing, and named tuples share their methods.  No Protocol is asked at run time.
"""

from __future__ import annotations

from collections.abc import Callable as Callable
from collections.abc import Collection as Collection
from collections.abc import Container as Container
from collections.abc import Generator as Generator
from collections.abc import Hashable as Hashable
from collections.abc import Iterable as Iterable
from collections.abc import Iterator as Iterator
from collections.abc import Mapping as Mapping
from collections.abc import Sequence as Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO as IO
    from typing import Any as Any
    from typing import BinaryIO as BinaryIO
    from typing import ContextManager as ContextManager
    from typing import Final as Final
    from typing import Generic as Generic
    from typing import Literal as Literal
    from typing import NamedTuple as NamedTuple
    from typing import NoReturn as NoReturn
    from typing import Protocol as Protocol
    from typing import TextIO as TextIO
    from typing import TypeAlias as TypeAlias
    from typing import TypedDict as TypedDict
    from typing import TypeVar as TypeVar
    from typing import Union as Union
    from typing import overload as overload
else:
    from operator import itemgetter

    try:
        # What collections.namedtuple() reads fields with: a third of the time of a property.
        from _collections import _tuplegetter
    except ImportError:  # another interpreter than CPython

        def _tuplegetter(index, text):
            return property(itemgetter(index), doc=text)

    class _Nothing:
        """Stands for a type; any parameters leave it as it is."""

        __slots__ = ()

        def __getitem__(self, parameters):
            return self

    Any = BinaryIO = ContextManager = Final = IO = Literal = NoReturn = _Nothing()
    TextIO = TypeAlias = Union = Any

    def TypeVar(name, *constraints, **bounds):
        """Return what stands for a type variable."""
        return Any

    def overload(function):
        """Return the function, which the definition behind it replaces."""
        return function

    class Generic:
        """The base of generic classes."""

        __slots__ = ()

        def __class_getitem__(cls, parameters):
            return cls

    class _Shape(type):
        """Makes what type checkers alone read: all of it is one empty class."""

        def __new__(cls, name, bases, namespace, total=True):
            return Protocol if bases else type.__new__(cls, name, bases, namespace)

        def __getitem__(cls, parameters):
            return cls

    class Protocol(metaclass=_Shape):
        """Stands for all Protocols, and for the shapes of dictionaries."""

    TypedDict = Protocol

    class _NamedTuple(tuple):
        """The methods of named tuples, as collections.namedtuple() has them."""

        __slots__ = ()

        def __new__(cls, /, *values, **named):
            """Make the constructor of the class when it is first called: it takes 1 KiB.

            An idle daemon has many classes of which it makes no object.
            """
            owner = next(base for base in cls.__mro__ if "_fields" in vars(base))
            # As a lambda of named parameters, so that the interpreter itself assigns them.
            names = "".join(f"{field}, " for field in owner._fields)
            new = eval(f"lambda _class, {names}: _new(_class, ({names}))", {"_new": tuple.__new__})
            new.__defaults__, new.__name__ = owner._defaults, "__new__"
            owner.__new__ = staticmethod(new)
            return new(cls, *values, **named)

        @classmethod
        def _make(cls, values):
            made = tuple.__new__(cls, values)
            if len(made) != len(cls._fields):
                raise TypeError(f"{cls.__name__} has {len(cls._fields)} fields, not {len(made)}")
            return made

        def _replace(self, /, **changes):
            made = self._make(map(changes.pop, self._fields, self))
            if changes:
                raise ValueError(f"{type(self).__name__} has no fields {list(changes)}")
            return made

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def __repr__(self):
            fields = zip(self._fields, self, strict=True)
            text = ", ".join(f"{name}={value!r}" for name, value in fields)
            return f"{type(self).__name__}({text})"

        def __getnewargs__(self):
            return tuple(self)

    class _Fields(type):
        """Makes a named tuple of each class body."""

        def __new__(cls, name, bases, namespace):
            if not bases:
                return type.__new__(cls, name, bases, namespace)
            if "__annotate_func__" in namespace:
                # Python 3.14 evaluates annotations later, except those that are kept as texts.
                raise TypeError(f"{name}: its module needs from __future__ import annotations")
            fields = tuple(namespace.pop("__annotations__", ()))
            defaults = tuple(namespace.pop(field) for field in fields if field in namespace)
            getters = {field: _tuplegetter(index, None) for index, field in enumerate(fields)}
            made = {"_fields": fields, "__match_args__": fields, "_defaults": defaults}
            return type(name, (_NamedTuple,), {**namespace, **getters, "__slots__": (), **made})

    class NamedTuple(metaclass=_Fields):
        """The base of classes whose annotations are the fields of a tuple."""
