"""The configuration that a conversion makes: plain values, with a comment for where each is from.

Converters fill a Draft; netproxy.ctl.convert.draft.writer writes it as YAML.  Pure.
"""

from __future__ import annotations

import re
from urllib.parse import quote

from netproxy.config.sections.users import NAME_LIMIT, foreign_hash
from netproxy.config.url import parse_hop
from netproxy.interfaces.listeners import HASH_PREFIX
from netproxy.typed import TYPE_CHECKING, Iterable, Mapping, NamedTuple, TypeAlias, Union

if TYPE_CHECKING:
    from netproxy.ctl.convert.notes import Directive, Notes

Value: TypeAlias = Union[str, int, bool, "list[Value]", "dict[str, Value]"]
"""A value of the configuration."""

UNUSABLE_HASH = "scrypt$16384$8$1$" + "A" * 22 + "==$" + "A" * 43 + "="
"""A hash of no password: nobody can log in with it."""
BLOCKED = "flows that would use it are refused, rather than sent direct: name another upstream"
RESERVED = ("direct", "block", "auto")
"""Names that no upstream can have."""
_SECRET_IN_URL = "its URL has a password: better write !file and the name of a file with the URL"
_PLAIN = "a password in plain text: better write its hash (netproxyctl hash-password), or !file"


class Entry:
    """A value of the configuration and the comments above it."""

    __slots__ = ("value", "comments")

    def __init__(self, value: Value, comments: Iterable[str] = ()) -> None:
        self.value = value
        self.comments = list(comments)

    @property
    def settings(self) -> dict[str, Value]:
        """The value of an entry that is a mapping."""
        assert isinstance(self.value, dict)
        return self.value

    def comes_from(self, *directives: Directive | None) -> None:
        """Add comments that name the directives which the value comes from."""
        for directive in directives:
            if directive is not None and directive.shown not in self.comments:
                self.comments.append(directive.shown)


class Draft:
    """The configuration: its lists and mappings of entries, and its other sections."""

    def __init__(self) -> None:
        self.remarks: list[str] = []
        """Comments at the beginning of the file."""
        self.listeners: list[Entry] = []
        self.upstreams: dict[str, Entry] = {}
        self.rules: list[Entry] = []
        self.users: dict[str, Entry] = {}
        self._origins: tuple[Directive | None, ...] = ()
        self.sections: dict[str, Entry] = {}
        """All other keys of the top level."""

    def listener(self, settings: dict[str, Value], *origins: Directive | None) -> Entry:
        """Add a listener and return it."""
        entry = Entry(settings)
        entry.comes_from(*origins)
        self.listeners.append(entry)
        return entry

    def rule(self, settings: Mapping[str, Value], *origins: Directive | None) -> Entry:
        """Add a rule and return it.  Several from one directive have its comment once."""
        entry = Entry(dict(settings))
        entry.comes_from(*origins)
        if origins and origins == self._origins:
            entry.comments.clear()
        self._origins = origins
        self.rules.append(entry)
        return entry

    def put(self, path: str, value: Value, *origins: Directive | None) -> None:
        """Set a key of another section, such as "timeouts.connect", or a key of the top level."""
        first, *rest = path.split(".")
        entry = self.sections.setdefault(first, Entry({} if rest else value))
        entry.comes_from(*origins)
        if not rest:
            entry.value = value
            return
        settings = entry.settings
        for key in rest[:-1]:
            inner = settings.setdefault(key, {})
            assert isinstance(inner, dict)
            settings = inner
        settings[rest[-1]] = value

    def upstream(self, name: str, value: Value, *origins: Directive | None) -> str:
        """Add an upstream unless there is one like it; return its name, which may get a number."""
        for known, entry in self.upstreams.items():
            if entry.value == value:
                entry.comes_from(*origins)
                return known
        free = name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "proxy"
        number = 2
        while free in self.upstreams or free in RESERVED:
            free, number = f"{name}-{number}", number + 1
        entry = self.upstreams[free] = Entry(value)
        entry.comes_from(*origins)
        url = value.get("url") if isinstance(value, dict) else value
        if isinstance(url, str) and re.search(r"://[^/@]*:[^/@]*@", url):
            entry.comments.append(_SECRET_IN_URL)
        return free

    def user(self, name: str, password: str | None, *origins: Directive | None) -> Entry:
        """Add a user; `password` None: the old program's hash cannot be checked here."""
        if password is None:
            entry = Entry({"password": UNUSABLE_HASH})
            entry.comes_from(*origins)
            entry.comments.append(
                f"nobody can log in with this: netproxyctl hash-password --user {name}"
            )
        elif _is_taken_for_a_hash(password):
            from netproxy.access.users import hash_password  # late: few files have such a password

            entry = Entry({"password": hash_password(password)})
            entry.comes_from(*origins)
        else:
            entry = Entry({"password": password})
            entry.comes_from(*origins)
            entry.comments.append(_PLAIN)
        self.users[name] = entry
        return entry


def is_user_name(name: str) -> bool:
    """Return whether a user can have a name: RFC 1929 and HTTP Basic limit it."""
    return 0 < len(name.encode(errors="replace")) <= NAME_LIMIT and ":" not in name


def _is_taken_for_a_hash(password: str) -> bool:
    """Return whether the configuration would not read a text as a plain password."""
    is_null = password in ("~", "null", "Null", "NULL")
    is_odd = "${" in password or not password.isprintable()
    return is_null or is_odd or password.startswith(HASH_PREFIX) or bool(foreign_hash(password))


class Proxy(NamedTuple):
    """A proxy of the old configuration that becomes an upstream."""

    scheme: str
    host: str
    port: int
    user: str = ""
    password: str = ""

    @property
    def url(self) -> str:
        """Its URL.  Raises ValueError, whose text has no secret, if it cannot be an upstream."""
        login = quote(self.user, safe="")
        login += ":" + quote(self.password, safe="") if self.password else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        url = f"{self.scheme}://{login + '@' if login else ''}{host}:{self.port}"
        parse_hop(url)
        return url


def add_proxy(draft: Draft, notes: Notes, proxy: Proxy, *origins: Directive) -> str:
    """Add a proxy as an upstream and return its name.

    A proxy that cannot be one becomes "block": flows must not go direct in its place.
    """
    try:
        url = proxy.url
    except ValueError as error:
        notes.lost(origins[0], f"the proxy cannot be an upstream: {error}", BLOCKED)
        return "block"
    return draft.upstream(proxy.host, url, *origins)
