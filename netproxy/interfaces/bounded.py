"""A dictionary with a limit, for what strangers may fill."""

from __future__ import annotations

from netproxy.typed import Hashable, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class BoundedDict(dict[Key, Value]):
    """A dict of at most `limit` keys, oldest first.

    put() makes its key the newest one; it first removes the oldest keys if there is no room.
    Reading a key does not make it newer.  A limit of 0 keeps nothing; a limit that was
    lowered takes effect with the next put().

    Thread: not safe; the caller holds its lock around put() and pop().  A lone get() is one
    step of the interpreter and needs no lock.
    """

    __slots__ = ("limit",)

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def put(self, key: Key, value: Value) -> None:
        """Keep a value; remove the oldest keys if there is no room."""
        self.pop(key, None)
        if self.limit < 1:
            return
        while len(self) >= self.limit:
            del self[next(iter(self))]
        self[key] = value
