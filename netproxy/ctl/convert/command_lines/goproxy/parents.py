"""The parents of goproxy (-P): upstreams, groups of them, and a proxy in front (--jumper)."""

from __future__ import annotations

import re
from urllib.parse import unquote

from netproxy.ctl.convert.command_lines import ssh, tls
from netproxy.ctl.convert.command_lines.gost.nodes import parse_endpoint
from netproxy.ctl.convert.draft.draft import BLOCKED, Proxy
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.goproxy.options import Options
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Notes

_KINDS = {"http": "http", "socks": "socks", "socks5": "socks", "sps": "http", "ss": "ss"}
_SCHEMES = {
    **{("http", "tcp"): "http", ("http", "tls"): "https"},
    **{("socks", "tcp"): "socks5h", ("socks", "tls"): "socks5h+tls"},
}
_FORMS = {
    **{"http": ("http", "tcp", False), "https": ("http", "tls", False)},
    **{"https2": ("http", "tls", True), "socks5": ("socks", "tcp", False)},
    **{"socks5s": ("socks", "tls", False), "socks5s2": ("socks", "tls", True)},
}
"""Schemes of -P and --jumper: kind, transport, whether the client shows a certificate."""
_BALANCES = {
    **{"roundrobin": "round-robin", "leastconn": "least-connections"},
    **{"leasttime": "least-latency", "hash": "hash-client", "weight": "weighted"},
}
_TRANSPORT = "parents are reached by TCP, or TLS within it"
_NAME = "the parent's certificate must have the name of its host (tls.server_name says another)"
_OWN = {
    "-Z": "the encryption of goproxy is its own: write tls on both sides",
    "-M": "the compression of goproxy is its own",
}
SHORTEST_CHECK = 500
"""Milliseconds between health checks, and for each, as the configuration has it."""
_WEIGHT = re.compile(r"[?&]w=([0-9]{1,4})|#([0-9]{1,4})\Z")


class _Parent(NamedTuple):
    name: str
    weight: int


class Parents:
    """Adds the upstreams of a command."""

    def __init__(self, options: Options, draft: Draft, notes: Notes) -> None:
        self._options, self._draft, self._notes = options, draft, notes

    def add(self, default_kind: str) -> str:
        """Return the upstream of -P; "direct" without it."""
        options, draft = self._options, self._draft
        places = options.texts("-P")
        jumper = self.jumper()
        if not places:
            return jumper
        lost = [name for name in _OWN if options.has(name)]
        for name in lost:
            options.lost(name, _OWN[name], BLOCKED)
            options.lost("-P", f"is not reached without {name}")
        kind = _KINDS.get(options.text("-S"), default_kind) if self._has_kind() else default_kind
        transport = options.text("-T") or "tcp"
        if transport == "ssh":
            return self._ssh(places[0])
        parents = [self._parent(place, kind, transport) for place in places]
        if lost or any(parent.name == "block" for parent in parents):
            return "block"
        name = self._group(parents)
        if jumper == "direct":
            return name
        return "block" if jumper == "block" else draft.upstream("chain", [jumper, name])

    def jumper(self) -> str:
        """Return the upstream in front of the parents; "direct" if there is none."""
        options = self._options
        names = ["--jumper"] + (["-J"] if options.command not in ("sps", "dns") else [])
        url = options.text(*names)
        if not url:
            return "direct"
        return self.upstream_of_url(url, names[0] if options.has(names[0]) else names[-1])

    def upstream_of_url(self, url: str, option: str) -> str:
        """Return the upstream of a URL that an option has."""
        scheme, separator, rest = url.partition("://")
        form = _FORMS.get(scheme.lower())
        if not separator or form is None:
            self._options.lost(option, f"{scheme}: is no scheme of an upstream", BLOCKED)
            return "block"
        return self._proxy(rest, form, option)

    def _has_kind(self) -> bool:
        """Return whether -S is the kind of the parents: in others it is the key of ssh."""
        return self._options.command in ("sps", "dns") and self._options.has("-S")

    def _parent(self, place: str, kind: str, transport: str) -> _Parent:
        match = _WEIGHT.search(place)
        weight = int(match[1] or match[2]) if match else 1
        place = re.split(r"[?#]", place)[0]
        if "://" in place:
            return _Parent(self.upstream_of_url(place.replace(": //", "://"), "-P"), weight)
        if kind == "ss":
            self._options.lost("-S", "netproxyd does not speak Shadowsocks", BLOCKED)
            self._options.lost("-P", "is not reached without Shadowsocks")
            for name in ("-H", "-J"):
                self._options.lost(name, "is about Shadowsocks")
            return _Parent("block", weight)
        if transport not in ("tcp", "tls"):
            self._options.lost("-T", f"{transport}: {_TRANSPORT}", BLOCKED)
            self._options.lost("-P", f"is not reached without -T {transport}")
            return _Parent("block", weight)
        is_single = self._options.flag("--parent-tls-single")
        return _Parent(self._proxy(place, (kind, transport, not is_single), "-P"), weight)

    def _proxy(self, place: str, form: tuple[str, str, bool], option: str) -> str:
        """Add a proxy and return its name; "block" if it cannot be an upstream."""
        kind, transport, is_mutual = form
        login, _, server = place.rstrip("/").rpartition("@")
        user, _, password = login.partition(":")
        if not login and option == "-P":
            user, _, password = self._options.text("-A").partition(":")
        end = parse_endpoint(server)
        port = int(end.port) if re.fullmatch("[0-9]{1,5}", end.port) else 0
        scheme = _SCHEMES[kind, transport]
        try:
            url = Proxy(scheme, end.host, port, unquote(user), unquote(password)).url
        except ValueError as error:
            self._options.lost(option, f"the proxy cannot be an upstream: {error}", BLOCKED)
            return "block"
        keys = self._certificates(is_mutual) if transport == "tls" else {}
        value: Value = {"url": url, "tls": keys} if keys else url
        return self._draft.upstream(end.host, value, *self._options.origins(option))

    def _certificates(self, is_mutual: bool) -> dict[str, Value]:
        """Return the keys of TLS: both sides have the same certificate, unless told otherwise."""
        certificate, key = self._options.text("-C"), self._options.text("-K")
        authority = self._options.text("--ca") or certificate
        keys: dict[str, Value] = {"ca": authority} if authority and is_mutual else {}
        if is_mutual:
            keys |= tls.files(certificate, key)
            self._options.changed("-T", _NAME)
        return keys

    def _group(self, parents: list[_Parent]) -> str:
        options = self._options
        method = options.text("--lb-method") or "roundrobin"
        balance = _BALANCES.get(method, "round-robin")
        if balance == "hash-client" and options.flag("--lb-hashtarget"):
            balance = "hash-target"
        if options.flag("--lb-onlyha"):
            options.changed("--lb-onlyha", "the first member that is up, in their order")
            balance = "failover"
        if len(parents) == 1:
            return parents[0].name
        members: list[Value] = [parent.name for parent in parents]
        if balance == "weighted":
            members = [{"via": parent.name, "weight": parent.weight} for parent in parents]
        group: dict[str, Value] = {"members": members, "balance": balance}
        if check := self._health_check():
            group["health_check"] = check
        return self._draft.upstream("parents", group, *options.origins("-P"))

    def _health_check(self) -> dict[str, Value]:
        check: dict[str, Value] = {}
        for name, key in (("--lb-retrytime", "interval"), ("--lb-timeout", "timeout")):
            if milliseconds := self._options.number(name):
                check[key] = f"{max(milliseconds, SHORTEST_CHECK)}ms"
                if milliseconds < SHORTEST_CHECK:
                    self._options.changed(name, f"is at least {SHORTEST_CHECK}ms")
        return check

    def _ssh(self, place: str) -> str:
        """Return the upstream of an SSH server: a program."""
        options = self._options
        end = parse_endpoint(place)
        if not end.host or end.host.startswith("-"):
            options.lost("-P", "is not the address of a server", BLOCKED)
            return "block"
        options.changed("-T", ssh.DIFFERENT)
        options.lost("-D", ssh.NO_PASSWORD, "let it use a key")
        words = ssh.ssh_command(end.host, end.port, options.text("-u"), options.text("-S"))
        return self._draft.upstream(end.host, {"command": words}, *options.origins("-P"))
