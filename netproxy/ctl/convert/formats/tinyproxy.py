"""Converts tinyproxy.conf(5).

Tinyproxy checks each request in this order: the client, the login, ConnectPort, the filter; then
the last Upstream that matches decides.  The rules come in the same order.
"""

from __future__ import annotations

import re

from netproxy.ctl.convert.terms import networks, patterns
from netproxy.ctl.convert.formats.tinyproxy_lines import (
    LEVELS,
    LOST,
    NO_PAGES,
    SWITCHES,
    TEMPLATES,
    UNNEEDED,
    Line,
    read_lines,
)
from netproxy.ctl.convert.draft.draft import Proxy, Value, add_proxy, is_user_name
from netproxy.ctl.convert.draft.listeners import permit, tell_of_guarded_targets
from netproxy.ctl.convert.source import ConversionError
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Entry
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.source import Source

_UPSTREAM = re.compile(
    r"(http|socks4|socks5)\s+(?:([^:\s]*):([^@]*)@)?(\[[^\]]+\]|[^\s:]+):(\d+)(?:\s+\"([^\"]+)\")?",
    re.IGNORECASE,
)
_SCHEMES = {"http": "http", "socks4": "socks4a", "socks5": "socks5h"}
_NO_DOTS = "regex:^[^.]*$"


def convert(source: Source, draft: Draft, notes: Notes) -> None:
    """Fill the draft with what the file says."""
    lines: dict[str, list[Line]] = {}
    for line in read_lines(source, notes):
        lines.setdefault(line.key, []).append(line)
    _Conversion(source, draft, notes, lines).run()


class _Conversion:
    def __init__(
        self, source: Source, draft: Draft, notes: Notes, lines: dict[str, list[Line]]
    ) -> None:
        self._source, self._draft, self._notes, self._lines = source, draft, notes, lines

    def run(self) -> None:
        for key, lines in self._lines.items():
            for line in lines:
                self._simple(key, line)
        self._users()
        self._listener()
        self._connect_ports()
        self._filter()
        self._upstreams()
        tell_of_guarded_targets(self._draft, self._notes)

    def _take(self, key: str) -> list[Line]:
        """Return the lines of a key, which are carried."""
        lines = self._lines.get(key, [])
        self._notes.carried(*(line.directive for line in lines))
        return lines

    def _is_on(self, key: str) -> bool:
        lines = self._lines.get(key, [])
        return bool(lines) and lines[-1].words[:1] in (["yes"], ["Yes"], ["on"], ["On"])

    def _simple(self, key: str, line: Line) -> None:
        """Note a directive that needs no other one."""
        notes, directive = self._notes, line.directive
        if key in UNNEEDED:
            notes.unneeded(directive, UNNEEDED[key])
        elif key in TEMPLATES:
            if line.word.endswith(f"/{TEMPLATES[key]}"):
                notes.unneeded(directive, "is the page that comes with tinyproxy")
            else:
                notes.lost(directive, NO_PAGES)
        elif key in SWITCHES and not self._is_on(key):
            notes.unneeded(directive, "is off")
        elif key in LOST:
            notes.lost(directive, *LOST[key])
        elif key == "loglevel":
            level = LEVELS.get(line.word.lower(), "info")
            self._draft.put("log.level", level, directive)
            notes.carried(directive)
        elif key == "logfile":
            why = "netproxyd writes its log to standard error, which the service manager keeps"
            notes.changed(directive, why, "log.file is a file for finished connections")
        elif key == "timeout" and line.word.isdigit() and int(line.word):
            self._draft.put("timeouts.tcp_idle", f"{line.word}s", directive)
            notes.carried(directive)

    # -- the listener

    def _listener(self) -> None:
        ports, listens = self._take("port"), self._take("listen")
        if not ports or not ports[-1].word.isdigit():
            raise ConversionError(f"{self._source.name}: has no Port")
        for line in listens:
            if not networks.is_network(line.word):
                self._notes.lost(line.directive, "is not an address")
        hosts = [line.word for line in listens if networks.is_network(line.word)]
        hosts = hosts or ([""] if not listens else ["127.0.0.1"])
        clients = self._clients()
        for host in hosts:
            settings: dict[str, Value] = {
                "protocol": "http",
                "listen": networks.listen_text(host, ports[-1].word),
                "network": ["tcp"],
            }
            if self._draft.users:
                settings["auth"] = "required"
            origins = [line.directive for line in ports[-1:] + listens]
            entry = self._draft.listener(settings, *origins)
            self._bind(settings, entry.comments)
            self._limit(settings, entry)
            permit(entry, clients)

    def _limit(self, settings: dict[str, Value], entry: Entry) -> None:
        limits = self._take("maxclients")
        if limits and limits[-1].word.isdigit() and int(limits[-1].word):
            settings["limits"] = {"connections": int(limits[-1].word)}
            entry.comes_from(limits[-1].directive)

    def _bind(self, settings: dict[str, Value], comments: list[str]) -> None:
        binds = self._take("bind")
        for line in binds:
            if not networks.is_host(line.word):
                self._notes.lost(line.directive, "is not an address")
            elif "bind" in settings:
                self._notes.lost(line.directive, "a listener has one address to bind")
            else:
                settings["bind"] = line.word
                comments.append(line.directive.shown)
        same = self._take("bindsame")
        if self._is_on("bindsame"):
            settings["bind"] = "incoming"
            comments.append(same[-1].directive.shown)

    def _clients(self) -> list[str] | None:
        """Return the networks that may connect; None if everybody may."""
        access = [*self._take("allow"), *self._take("deny")]
        access.sort(key=_number)
        if not access:
            return None
        rules: list[tuple[bool, str]] = []
        for line in access:
            where, permitted = line.word, line.key == "allow"
            if where.lower() == "localhost":
                rules += [(permitted, "127.0.0.1"), (permitted, "::1")]
            elif networks.is_network(where):
                rules.append((permitted, networks.parse_network(where)))
            else:
                why = "clients are known by their addresses, not by names"
                self._notes.lost(line.directive, why, "write their networks into clients")
        clients = networks.first_match(rules)
        if clients is None:
            # Without an Allow nobody may connect.
            self._notes.changed(None, "no Allow admits anybody: only this machine may connect")
            return ["127.0.0.1"]
        return clients

    def _users(self) -> None:
        for line in self._take("basicauth"):
            if len(line.words) == 2 and is_user_name(line.word):
                self._draft.user(line.word, line.words[1], line.directive)
            else:
                self._notes.lost(line.directive, "is not a user and a password")

    # -- the rules

    def _connect_ports(self) -> None:
        lines = self._take("connectport")
        ports: list[Value] = []
        for line in lines:
            if not line.word.isdigit() or int(line.word) > networks.LAST_PORT:
                self._notes.lost(line.directive, "is not a port")
            elif line.word != "0":
                ports.append(line.word)
        if lines:
            rule: dict[str, Value] = {"command": "connect"}
            rule |= {"not": {"port": ports}} if ports else {}
            self._draft.rule({**rule, "via": "block"}, *(line.directive for line in lines))

    def _filter(self) -> None:
        lines = self._lines.get("filter", [])
        if not lines or self._is_on("filterurls"):
            for line in lines:
                self._notes.lost(line.directive, "FilterURLs: netproxyd compares names alone")
            return
        directive = lines[-1].directive
        names, addresses = self._filter_patterns(lines[-1])
        conditions: dict[str, Value] = {"domain": names} if names else {}
        conditions |= {"ip": addresses} if addresses else {}
        if self._is_on("filterdefaultdeny"):
            # Another rule for each kind: the keys of `not` are joined by "or".
            rule: dict[str, Value] = {"not": conditions} if conditions else {}
            self._draft.rule({**rule, "via": "block"}, directive)
        else:
            for key, values in conditions.items():
                self._draft.rule({key: values, "via": "block"}, directive)
        self._notes.carried(directive)

    def _filter_patterns(self, line: Line) -> tuple[list[Value], list[Value]]:
        """Return the patterns of names and the addresses of the file of the filter."""
        names: list[Value] = []
        addresses: list[Value] = []
        try:
            (file,) = self._source.included(line.word)
        except ConversionError as error:
            self._notes.lost(line.directive, str(error), "write its names into a domain_file")
            return names, addresses
        kinds = self._lines.get("filtertype", [])
        kind = kinds[-1].word.lower() if kinds else "bre"
        extended = kind == "ere" or self._is_on("filterextended")
        for number, text in enumerate(file.text.splitlines(), 1):
            word = re.sub(r"(?<!\\)#.*", "", text.strip()).partition(" ")[0]
            if not word:
                continue
            directive = self._notes.directive(file.name, number, word)
            plain = word.strip("^$").replace("\\.", ".")
            try:
                if networks.is_network(plain):
                    addresses.append(plain)
                elif kind == "fnmatch":
                    names.append(patterns.from_wildcards(word))
                else:
                    names.append(patterns.from_expression(word, extended))
            except ValueError as error:
                self._notes.lost(directive, str(error), "write names into a domain_file")
                continue
            self._notes.carried(directive)
        return names, addresses

    def _upstreams(self) -> None:
        """Add the rules of upstreams, the last one first, and the default."""
        for line in reversed(self._lines.get("upstream", [])):
            self._notes.carried(line.directive)
            if line.words[:1] == ["none"] and len(line.words) == 2:
                self._site_rule(line, line.words[1], "direct")
                continue
            match = _UPSTREAM.fullmatch(line.text.strip())
            if not match:
                self._notes.lost(line.directive, "is not an upstream that tinyproxy knows")
                continue
            kind, user, password, host, port, site = match.groups()
            via = self._upstream(line, Proxy(kind.lower(), host, int(port), user or "", password))
            if site:
                self._site_rule(line, site, via)
            else:
                self._draft.put("default", via, line.directive)

    def _upstream(self, line: Line, proxy: Proxy) -> str:
        if proxy.host == "0.0.0.0":
            # The manual's way to null-route names.
            return "block"
        scheme, password = _SCHEMES[proxy.scheme], proxy.password or ""
        if scheme == "socks4a" and password:
            self._notes.changed(line.directive, "SOCKS4 has no password")
            password = ""
        host = proxy.host.strip("[]")
        named = proxy._replace(scheme=scheme, host=host, password=password)
        return add_proxy(self._draft, self._notes, named, line.directive)

    def _site_rule(self, line: Line, site: str, via: str) -> None:
        if site == ".":
            key, value = "domain", _NO_DOTS
        elif networks.is_network(site):
            key, value = "ip", networks.parse_network(site)
        else:
            key, value = "domain", f"*{site}" if site.startswith(".") else site
        self._draft.rule({key: value, "via": via}, line.directive)


def _number(line: Line) -> int:
    return line.directive.number
