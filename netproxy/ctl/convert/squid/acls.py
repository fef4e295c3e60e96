"""The access lists of squid.conf: what each `acl` matches, as conditions of rules."""

from __future__ import annotations

import re

from netproxy.ctl.convert.draft.draft import is_user_name
from netproxy.ctl.convert.source import ConversionError
from netproxy.ctl.convert.squid.lines import unquoted
from netproxy.ctl.convert.terms import networks
from netproxy.ctl.convert.terms.conditions import ANY, ANY_USER, CannotCombine, Match, both, wanting
from netproxy.ctl.convert.terms.patterns import from_expression
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.squid.lines import Line

FILE_LIMIT = 100
"""Names of a file that are written into the rules; a longer file is named by domain_file."""
REQUESTS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"}
"""The methods of requests that are forwarded."""
_DAYS = {
    **{"S": "sun", "M": "mon", "T": "tue", "W": "wed", "H": "thu", "F": "fri", "A": "sat"},
    "D": "mon-fri",
}
_NEVER_PROTO = {"CACHE_OBJECT", "FTP", "GOPHER", "URN", "WAIS", "WHOIS"}
_ALWAYS = ("annotate_transaction", "annotate_client")
_PATHS = "netproxyd looks at no paths and fields, which TLS hides in any case"
_UNSAYABLE = {
    **dict.fromkeys(
        ("url_regex", "urlpath_regex", "urllogin", "browser", "referer_regex", "req_mime_type")
        + ("req_header", "rep_mime_type", "rep_header", "http_status", "hier_code", "note", "tag"),
        _PATHS,
    ),
    **dict.fromkeys(
        ("srcdomain", "srcdom_regex", "arp", "eui64"), "clients are known by their addresses alone"
    ),
    **dict.fromkeys(("src_as", "dst_as"), "write the networks of the AS into an ip_file"),
    **dict.fromkeys(
        ("external", "ident", "ident_regex", "ext_user", "ext_user_regex", "user_cert", "ca_cert"),
        "logins are by name and password",
    ),
    "proxy_auth_regex": "users are named one by one",
    "max_user_ip": "the addresses of a user are not counted",
    "maxconn": "connections are limited for a listener, not in rules",
    "random": "rules do not throw dice",
}


class Acl(NamedTuple):
    """An access list."""

    name: str
    kind: str
    lines: tuple[Line, ...]

    @property
    def values(self) -> list[str]:
        """The values of all its lines, without flags such as -i."""
        words = (word for line in self.lines for word in line.words[2:])
        return [word for word in words if not re.fullmatch(r"[-+][a-zA-Z](=\S*)?", word)]


class Acls:
    """The access lists of a file, with those that squid has by itself."""

    def __init__(self, lines: Sequence[Line], ports: dict[str, list[str]], notes: Notes) -> None:
        """`ports`: the names of listeners by the port and the name that the file gives them."""
        self._notes, self._ports = notes, ports
        self._acls: dict[str, Acl] = {}
        self._used: set[str] = set()
        # The lists that are being read: one can be made of others.
        self._open: list[str] = []
        for line in lines:
            if len(line.words) < 2:
                notes.lost(line.directive, "has no name or no type")
                continue
            name, kind = line.words[:2]
            earlier = self._acls[name].lines if name in self._acls else ()
            self._acls[name] = Acl(name, kind, (*earlier, line))

    def find(self, name: str) -> Acl | None:
        """Return an access list of the file."""
        return self._acls.get(name)

    def alternatives(self, name: str) -> list[Match]:
        """Return the matches of which any is enough; [] if nothing can match.

        Raises CannotCombine if no rule can say it.
        """
        self._used.add(name)
        acl = self._acls.get(name)
        if acl is None:
            if name not in _BUILT_IN:
                raise CannotCombine(f"there is no acl {name}")
            return list(_BUILT_IN[name])
        if acl.kind in _UNSAYABLE:
            raise CannotCombine(f"{acl.kind}: {_UNSAYABLE[acl.kind]}")
        if acl.kind in _ALWAYS:
            return [ANY]
        if acl.kind in ("any-of", "all-of"):
            return self._made_of_others(acl)
        if acl.kind in ("localport", "myport", "myportname"):
            return self._listeners(acl)
        reader = _READERS.get(acl.kind)
        if reader is None:
            raise CannotCombine(f"the acl type {acl.kind} is not known")
        return reader(acl)

    def _made_of_others(self, acl: Acl) -> list[Match]:
        if acl.name in self._open:
            raise CannotCombine(f"the acl {acl.name} is made of itself")
        self._open.append(acl.name)
        try:
            if acl.kind == "any-of":
                return [match for value in acl.values for match in self.alternatives(value)]
            return [match for line in acl.lines if (match := self._all(line)) is not None]
        finally:
            self._open.pop()

    def _all(self, line: Line) -> Match | None:
        """Return what matches all lists of an all-of line.  Raises CannotCombine."""
        whole: Match | None = ANY
        for name in line.words[2:]:
            found = self.alternatives(name)
            if len(found) > 1:
                raise CannotCombine("all-of: a list with several kinds of values")
            whole = both(whole, found[0]) if whole is not None and found else None
        return whole

    def note_all(self) -> None:
        """Note the outcome of each `acl` line, once all rules have been read."""
        for acl in self._acls.values():
            for line in acl.lines:
                if acl.name not in self._used:
                    self._notes.unneeded(line.directive, "is used by nothing that is carried")
                    continue
                try:
                    self.alternatives(acl.name)
                except CannotCombine as error:
                    self._notes.lost(line.directive, str(error))
                else:
                    self._notes.carried(line.directive)

    def _listeners(self, acl: Acl) -> list[Match]:
        names = [name for value in acl.values for name in self._ports.get(value, [])]
        return [wanting("listener", names)] if names else []


def _clients(acl: Acl) -> list[Match]:
    found = _addresses(acl)
    return [ANY] if found is None else [wanting("client", found)] if found else []


def _targets(acl: Acl) -> list[Match]:
    found = _addresses(acl)
    return [ANY] if found is None else [wanting("ip", found)] if found else []


def _addresses(acl: Acl) -> list[str] | None:
    """Return the networks of an access list; None for all addresses."""
    found: list[str] = []
    for value in _values(acl):
        if value in ("all", "0/0"):
            return None
        if value in ("ipv4", "ipv6"):
            found.append(networks.EVERYBODY[value == "ipv6"])
            continue
        span = re.fullmatch(r"([0-9A-Fa-f.:]+)-([0-9A-Fa-f.:]+)(/\d+)?", value)
        try:
            if span:
                found += networks.parse_span(span[1], span[2])
            else:
                found.append(networks.parse_network(value))
        except ValueError:
            raise CannotCombine(f"'{value}' is a name, or no address") from None
    return found


def _values(acl: Acl) -> list[str]:
    """Return the values, with those of the files that stand in quotes.  Raises CannotCombine."""
    values: list[str] = []
    for value in acl.values:
        if not (value.startswith('"') or value.startswith("parameters(")):
            values.append(value)
            continue
        try:
            (file,) = acl.lines[0].source.included(
                unquoted(value.removeprefix("parameters")).strip("()")
            )
        except ConversionError as error:
            raise CannotCombine(str(error)) from error
        bare = (line.partition("#")[0].strip() for line in file.text.splitlines())
        values += [line for line in bare if line]
    return values


def _names(acl: Acl) -> list[Match]:
    if files := _long_files(acl):
        return [wanting("domain_file", files)]
    values = _values(acl)
    hosts = [value for value in values if networks.is_network(value)]
    names = [value for value in values if value not in hosts]
    wrong = [name for name in names if not re.fullmatch(r"\.?[\w-]+(\.[\w-]+)*\.?", name)]
    if wrong:
        raise CannotCombine(f"'{wrong[0]}' is not a name")
    matches = [wanting("domain", names)] if names else []
    return matches + ([wanting("ip", hosts)] if hosts else [])


def _long_files(acl: Acl) -> list[str]:
    """Return the files of an access list that has files alone, if one of them is long."""
    if not all(value.startswith('"') for value in acl.values):
        return []
    paths = [acl.lines[0].source.resolve(unquoted(value)) for value in acl.values]
    return paths if len(_values(acl)) > FILE_LIMIT else []


def _expressions(acl: Acl) -> list[Match]:
    try:
        return [wanting("domain", [from_expression(value, True) for value in _values(acl)])]
    except ValueError as error:
        raise CannotCombine(str(error)) from error


def _port_numbers(acl: Acl) -> list[Match]:
    try:
        spans = [networks.parse_port_range(value) for value in _values(acl)]
    except ValueError as error:
        raise CannotCombine(str(error)) from error
    return [wanting("port", [networks.port_text(span) for span in spans])]


def _methods(acl: Acl) -> list[Match]:
    methods = {value.upper() for value in acl.values}
    if methods & REQUESTS and not REQUESTS <= methods:
        raise CannotCombine("the methods of requests are not told apart, except CONNECT")
    commands = [*(["connect"] if "CONNECT" in methods else [])]
    commands += ["http"] if methods & REQUESTS else []
    # PURGE and the like are about caches: nobody sends them to a proxy that has none.
    return [wanting("command", commands)] if commands else []


def _protocols(acl: Acl) -> list[Match]:
    protocols = {value.upper() for value in acl.values}
    if protocols <= _NEVER_PROTO:
        return []
    if protocols - _NEVER_PROTO == {"HTTP"}:
        return [wanting("command", ["http"])]
    raise CannotCombine("netproxyd does not see the protocol of a URL within TLS")


def _times(acl: Acl) -> list[Match]:
    found: list[str] = []
    for line in acl.lines:
        words = line.words[2:]
        times = [word for word in words if ":" in word]
        days = "".join(word for word in words if ":" not in word)
        if len(times) > 1 or not set(days) <= set(_DAYS):
            raise CannotCombine(f"'{' '.join(words)}' is not a time")
        named = ",".join(_DAYS[day] for day in days)
        found.append(f"{named} {times[0] if times else ''}".strip())
    return [wanting("hours", found)]


def _users(acl: Acl) -> list[Match]:
    names = _values(acl)
    if not all(map(is_user_name, names)):
        raise CannotCombine("a name that no user can have")
    return [wanting("user", [ANY_USER] if "REQUIRED" in names else names)]


_READERS: dict[str, Callable[[Acl], list[Match]]] = {
    "src": _clients,
    "dst": _targets,
    "dstdomain": _names,
    "dstdom_regex": _expressions,
    "port": _port_numbers,
    "method": _methods,
    "proto": _protocols,
    "time": _times,
    "proxy_auth": _users,
}
_BUILT_IN: dict[str, tuple[Match, ...]] = {
    "all": (ANY,),
    "CONNECT": (wanting("command", ["connect"]),),
    "localhost": (wanting("client", ["127.0.0.1", "::1"]),),
    "to_localhost": (wanting("ip", ["127.0.0.0/8", "0.0.0.0", "::1", "::"]),),
    "to_linklocal": (wanting("ip", ["169.254.0.0/16", "fe80::/10"]),),
    # The pages of squid's cache manager.
    "manager": (),
}
