"""Reads the file that `users_file` names: one user a line, `name:hash[:key=value,...]`.

The keys are those of the section `users`, in one word each.  Passwords in plain text are refused:
such files are made by programs, and are copied.  Hashes are in no message.
"""

from __future__ import annotations

from netproxy.config.schema import UserConfig
from netproxy.config.sections.upstreams import UpstreamReader
from netproxy.config.sections.users import HOW_TO_HASH, foreign_hash, read_user
from netproxy.config.tree.node import MapReader, Node, Source
from netproxy.config.tree.problems import Problems
from netproxy.config.tree.parse import is_exposed
from netproxy.errors import cannot_read, open_regular
from netproxy.interfaces.listeners import HASH_PREFIX
from netproxy.typed import Mapping, NamedTuple

SIZE_LIMIT = 16 << 20
"""Bytes of the file: some 100,000 users."""
ERRORS_LIMIT = 20
"""Lines whose errors are told; of the others only the number is."""
PATHS: dict[str, tuple[str, ...]] = {
    **{
        key: ("limits", key)
        for key in (
            *("connections", "sessions", "connection_rate"),
            *("rate", "rate_up", "rate_down", "burst"),
        )
    },
    "quota_day": ("limits", "quota", "day"),
    "quota_month": ("limits", "quota", "month"),
    "quota_total": ("limits", "quota", "total"),
    **{key: (key,) for key in ("expires", "upstream", "bind", "rotate")},
}
"""The keys of a line, each with its place in `users.NAME`."""


class _Line(NamedTuple):
    """A line of the file, and where it is."""

    text: str
    number: int
    source: Source

    def place(self, column: int) -> str:
        """Return the place of a column, which counts from 0."""
        return f"{self.source.path}:{self.number}:{column + 1}"


class UsersFileReader:
    """Reads a file of users.  `places`: the users of the section `users`, with their places."""

    def __init__(
        self, upstreams: UpstreamReader, places: Mapping[str, str], problems: Problems
    ) -> None:
        self._upstreams = upstreams
        self._places = dict(places)
        self._problems = problems

    def read(self, path: str, place: str) -> dict[str, UserConfig]:
        """Return the users by name.  `place`: where the configuration names the file."""
        try:
            with open_regular(path) as file:
                raw = file.read(SIZE_LIMIT + 1)
                source = Source(path, is_exposed(file))
        except OSError as error:
            message = f"users_file: {path} cannot be read: {cannot_read(error, path)}"
            self._problems.add(message, place)
            return {}
        if len(raw) > SIZE_LIMIT:
            self._problems.add(f"users_file: {path} is larger than {SIZE_LIMIT} bytes", place)
            return {}
        users: dict[str, UserConfig] = {}
        wrong = 0
        for number, line in enumerate(raw.split(b"\n"), 1):
            errors = len(self._problems.errors)
            self._line(line, number, source, users)
            if len(self._problems.errors) > errors:
                wrong += 1
                # All lines of a file of another program are wrong in the same way.
                if wrong > ERRORS_LIMIT:
                    del self._problems.errors[errors:]
        if wrong > ERRORS_LIMIT:
            self._problems.add(f"and {wrong - ERRORS_LIMIT} more lines", path)
        return users

    def _line(self, line: bytes, number: int, source: Source, users: dict[str, UserConfig]) -> None:
        """Add the user of a line, if it has one, or report what is wrong with the line."""
        try:
            text = line.rstrip(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            self._problems.add("is not UTF-8", f"{source.path}:{number}:{error.start + 1}")
            return
        if text.strip() and not text.lstrip().startswith("#"):
            self._user(_Line(text, number, source), users)

    def _user(self, line: _Line, users: dict[str, UserConfig]) -> None:
        """Add the user of a line, or report what is wrong with the line."""
        name, colon, rest = line.text.partition(":")
        if not colon:
            self._problems.add("is not a user (expected name:hash[:key=value,...])", line.place(0))
            return
        if name != name.strip() or not name.isprintable():
            message = "the name has a blank at its begin or end, or a control character"
            self._problems.add(message, line.place(0))
            return
        if name in self._places:
            message = f"the user '{name}' is already given in {self._places[name]}"
            self._problems.add(message, line.place(0))
            return
        self._places[name] = line.place(0)
        node = self._node(line, rest)
        if node is not None:
            section = MapReader(node, f"users.{name}", self._problems)
            users[name] = read_user(name, section, self._upstreams)

    def _node(self, line: _Line, rest: str) -> Node | None:
        """Return a line as what `users.NAME` would be; None, reported, without a valid hash."""
        column = len(line.text) - len(rest)
        password, _, options = rest.partition(":")
        password = password.rstrip()
        if not password.startswith(HASH_PREFIX):
            # Some hashes of other programs have colons.  Not for the lines that are right: it
            # takes most of the time of a long file.
            kind = foreign_hash(password) or foreign_hash(rest.strip())
            what = f"a hash of the kind {kind}, which NetProxy does not check" if kind else ""
            message = f"the password is {what or 'not a hash'}: {HOW_TO_HASH}"
            self._problems.add(message, line.place(column))
            return None
        tree = {"password": Node(password, line.place(column), "", line.source)}
        self._add_options(line, options, tree)
        return Node(tree, line.place(0), "", line.source)

    def _add_options(self, line: _Line, options: str, tree: dict[str, Node]) -> None:
        """Add the keys of a line to the tree of its user."""
        column = len(line.text) - len(options)
        for option in options.split(",") if options.strip() else ():
            key, equals, value = option.partition("=")
            place = line.place(column + len(option) - len(option.lstrip()))
            value_place = line.place(column + len(key) + 1)
            column += len(option) + 1
            key = key.strip()
            path = PATHS.get(key)
            if path is None or not equals:
                self._problems.add(_key_error(key, bool(equals)), place)
                continue
            inner = tree
            for name in path[:-1]:
                nested = inner.setdefault(name, Node({}, place, place, line.source)).value
                assert isinstance(nested, dict)  # no path ends where another one goes on
                inner = nested
            if path[-1] in inner:
                self._problems.add(f"the key '{key}' is given twice", place)
                continue
            inner[path[-1]] = Node(value.strip(), value_place, place, line.source)


def _key_error(key: str, has_value: bool) -> str:
    if key in PATHS and not has_value:
        return f"the key '{key}' has no value (expected {key}=value)"
    from netproxy.config.tree.hints import EDITS_LIMIT, suggestion  # late: only for an error

    return f"unknown key '{key}'{suggestion(key, tuple(PATHS), EDITS_LIMIT)}"
