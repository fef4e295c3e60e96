"""Collects the errors and warnings of one configuration, without its secrets.

A mistake may put a secret where none belongs, such as the URL of a proxy where an address belongs.
Errors leave out what comes from the environment or from !file, and the passwords of URLs.
"""

from __future__ import annotations

from netproxy.errors import ConfigError, printable
from netproxy.typed import TYPE_CHECKING, Iterator

if TYPE_CHECKING:
    from netproxy.config.tree.node import Node

MASK = "..."
"""Stands in an error for what it does not repeat."""
# user:password@ and all before it: what is not a URL may look like anything.  Text, because `re`
# compiles it.
_CREDENTIALS = r"[^\s']*:[^\s']*@"


class Problems:
    """Errors and warnings of one configuration, in the order in which they were found."""

    def __init__(self) -> None:
        self.errors: list[ConfigError] = []
        self.warnings: list[str] = []
        self._unread: set[str] = set()
        """The values that could not be read, by their paths: "listeners[0].tls"."""
        self._exposed: set[str] = set()
        """The files that a warning of exposed() names."""
        self._root: Node | None = None
        self._hidden: frozenset[str] | None = None
        """The hidden values of the tree; None until the first error."""

    def hide_values_of(self, root: Node) -> None:
        """Do not repeat the hidden values of the whole tree in errors."""
        self._root, self._hidden = root, None

    def check(self) -> None:
        """Raise ConfigError with all errors, one a line, if there are any."""
        if self.errors:
            raise ConfigError.joined(self.errors)

    def add(self, message: str, place: str, unread: str = "") -> None:
        """Add an error: the configuration cannot be used.

        `unread`: the path of the value that could not be read, "" if the error is another one.
        """
        if unread:
            self._unread.add(unread)
        if self._hidden is None:
            self._hidden = frozenset(_hidden_values(self._root) if self._root else ())
        self.errors.append(ConfigError(_masked(message, self._hidden), place))

    def is_unread(self, path: str) -> bool:
        """Return whether a value could not be read, or anything within it.

        Another error about it would most likely follow from that.
        """
        inner = (f"{path}.", f"{path}[")
        return path in self._unread or any(other.startswith(inner) for other in self._unread)

    def is_unread_as_a_whole(self, path: str) -> bool:
        """Return whether nothing of a value could be read."""
        return path in self._unread

    def warn(self, message: str, place: str) -> None:
        """Add a warning: the configuration can be used, but probably should not."""
        self.warnings.append(printable(f"{place}: {message}"))

    def check_secret(self, node: Node) -> None:
        """Warn once for each file whose secrets every user of the machine can read."""
        path = node.source.path
        if node.source.exposed and path not in self._exposed:
            self._exposed.add(path)
            message = f"every user of this machine can read this secret: chmod o-r {path}"
            self.warn(message, node.place)


def _hidden_values(node: Node) -> Iterator[str]:
    """Yield the values of a tree that come from elsewhere."""
    if not isinstance(node.value, str):
        for child in node.value.values() if isinstance(node.value, dict) else node.value:
            yield from _hidden_values(child)
    elif node.source.is_hidden and node.value:
        yield node.value


def _masked(message: str, hidden: frozenset[str]) -> str:
    """Return a message without passwords of URLs, and without the hidden values that it names."""
    for value in hidden:
        for begin, end in ("''", "[]"):
            message = message.replace(f"{begin}{value}{end}", f"{begin}{MASK}{end}")
    import re  # late: 0.5 MiB, and few configurations have errors

    return re.sub(_CREDENTIALS, f"{MASK}@", message)
