"""Converts redsocks.conf: transparent listeners and the proxies behind them."""

from __future__ import annotations

import re

from netproxy.ctl.convert.draft.draft import Proxy, Value, add_proxy
from netproxy.ctl.convert.draft.listeners import permit
from netproxy.ctl.convert.source import ConversionError
from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.source import Source

RULES = "the kernel's rules are not in this file: netproxyctl nft -c FILE prints them"
UNNEEDED = {
    "daemon": "the service manager runs the daemon",
    "user": "the service manager chooses the user (the unit has User=netproxy)",
    "group": "the service manager chooses the group",
    "chroot": "the unit confines the daemon",
    "rlimit_nofile": "the unit has LimitNOFILE=",
    "connpres_idle_timeout": "at the limit the client with most connections loses one",
    "max_accept_backoff": "without free descriptors netproxyd accepts more slowly",
    "min_accept_backoff": "without free descriptors netproxyd accepts more slowly",
    "listenq": "the queue has the length that the system permits",
    "udp_timeout": "a session without any reply ends after a minute",
    "max_pktqueue": "the queue is bounded",
    "inflight_max": "queries are bounded by client",
    "remote_timeout": "a server that is silent is asked again",
    "tcp_keepalive_probes": "the system has a number of its own",
    "tcp_keepalive_intvl": "the system has an interval of its own",
}
_SCHEMES = {
    **{"socks4": "socks4", "socks5": "socks5", "http-connect": "http", "http-relay": "http"},
    "https-connect": "https",
}
_PROXY_KEYS = ("ip", "port", "type", "login", "password")
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|([{}=;])|([^\s{}=;"]+)')
_COMMENT = re.compile(r'("(?:[^"\\\n]|\\.)*")|//[^\n]*|/\*.*?\*/|#[^\n]*', re.DOTALL)


class _Setting(NamedTuple):
    directive: Directive
    value: str


class _Section(NamedTuple):
    directive: Directive
    kind: str
    settings: dict[str, _Setting]

    def value(self, key: str, default: str = "") -> str:
        """Return the value of a key."""
        return self.settings[key].value if key in self.settings else default


def convert(source: Source, draft: Draft, notes: Notes) -> None:
    """Fill the draft with what the file says.  Raises ConversionError."""
    sections = _parse(source, notes)
    _Conversion(draft, notes, sections).run()


def _parse(source: Source, notes: Notes) -> list[_Section]:
    """Return the sections.  Raises ConversionError."""
    sections: list[_Section] = []
    words: list[str] = []
    current: _Section | None = None
    for number, line in enumerate(_without_comments(source.text).split("\n"), 1):
        for quoted, sign, plain in _TOKEN.findall(line):
            if sign == "{":
                name = words[-1].lower() if words else ""
                directive = notes.directive(source.name, number, f"{name} {{ ... }}")
                current = _Section(directive, name, {})
                sections.append(current)
            elif sign == "}":
                current = None
            elif sign == ";" and current is not None and words:
                _add_setting(current, words, (source.name, number), notes)
            elif sign in ("", "="):
                words.append(quoted or plain or sign)
                continue
            words = []
    if current is not None:
        raise ConversionError(f"{source.name}: the section {current.kind} has no end")
    return sections


def _without_comments(text: str) -> str:
    """Return a text in which comments are blanks, with all line breaks."""
    return _COMMENT.sub(lambda match: match[1] or re.sub(r"[^\n]", " ", match[0]), text)


def _add_setting(section: _Section, words: list[str], place: tuple[str, int], notes: Notes) -> None:
    key, value = words[0].lower(), " ".join(word for word in words[1:] if word != "=")
    shown = "***" if key == "password" else value
    directive = notes.directive(*place, f"{key} = {shown};")
    if key in section.settings:
        notes.unneeded(section.settings[key].directive, "is given again below")
    section.settings[key] = _Setting(directive, value)


class _Conversion:
    def __init__(self, draft: Draft, notes: Notes, sections: list[_Section]) -> None:
        self._draft, self._notes, self._sections = draft, notes, sections
        # The name server and the upstream of a redudp section for DNS.
        self._server: tuple[str, str] | None = None

    def run(self) -> None:
        converters = {
            "base": self._base,
            "redsocks": self._redsocks,
            "redudp": self._redudp,
            "dnstc": self._dnstc,
            "dnsu2t": self._dnsu2t,
        }
        # A dnstc section needs to know of the others.
        for section in sorted(self._sections, key=lambda section: section.kind == "dnstc"):
            if section.kind in converters:
                self._notes.carried(section.directive)
                converters[section.kind](section)
            else:
                self._notes.lost(section.directive, "the section is not known")
            self._note_rest(section)
        if any(
            "redirect" in str(e.value) or "tproxy" in str(e.value) for e in self._draft.listeners
        ):
            self._draft.remarks.append(RULES)
            self._notes.changed(None, RULES)

    def _note_rest(self, section: _Section) -> None:
        """Note the settings of a section that no converter has noted."""
        for key, setting in section.settings.items():
            if self._notes.is_noted(setting.directive):
                continue
            if section.kind in ("base", "redsocks", "redudp", "dnsu2t") and key in UNNEEDED:
                self._notes.unneeded(setting.directive, UNNEEDED[key])
            else:
                self._notes.lost(setting.directive, "is not supported")

    def _take(self, section: _Section, *keys: str) -> list[Directive]:
        """Note settings as carried; return their directives."""
        found = [section.settings[key].directive for key in keys if key in section.settings]
        self._notes.carried(*found)
        return found

    # -- sections

    def _base(self, section: _Section) -> None:
        draft, notes = self._draft, self._notes
        self._take(section, "redsocks_conn_max")
        if self._take(section, "log_debug") and section.value("log_debug") in ("on", "yes", "true"):
            draft.put("log.level", "debug", section.settings["log_debug"].directive)
        if self._take(section, "log_info") and section.value("log_info") in ("off", "no", "false"):
            draft.put("log.access", False, section.settings["log_info"].directive)
        if "log" in section.settings:
            why = "netproxyd writes its log to standard error, which the service manager keeps"
            notes.unneeded(section.settings["log"].directive, why)
        if "redirector" in section.settings:
            directive = section.settings["redirector"].directive
            if section.value("redirector") in ("iptables", "generic"):
                notes.unneeded(directive, "netproxyd asks Linux for the targets of connections")
            else:
                notes.lost(directive, "netproxyd runs on Linux alone")
        if section.value("tcp_keepalive_time") == "0":
            for key in ("tcp_keepalive_time", "tcp_keepalive_probes", "tcp_keepalive_intvl"):
                self._take(section, key)
        elif section.value("tcp_keepalive_time").isdigit():
            why = "connections to proxies are probed after 60s of silence"
            notes.changed(section.settings["tcp_keepalive_time"].directive, why, "keepalive")

    def _redsocks(self, section: _Section) -> None:
        settings: dict[str, Value] = {"protocol": "redirect", "listen": self._listen(section, "0")}
        # Redsocks tells its proxy addresses, never names.
        settings["sniff"] = []
        settings["upstream"] = self._proxy(section)
        self._limit(settings)
        origins = self._take(section, "local_ip", "local_port")
        entry = self._draft.listener(settings, section.directive, *origins)
        entry.comments.append("with `sniff` (without this line) the proxy is told names")
        permit(entry, None)
        if section.value("splice") in ("false", "no", "off"):
            self._draft.put("tcp.splice", False, *self._take(section, "splice"))
        self._take(section, "splice")
        for key, harmless in (("disclose_src", "false"), ("on_proxy_fail", "close")):
            if section.value(key, harmless) == harmless:
                self._take(section, key)
            elif key == "disclose_src":
                advice = "send_proxy of the upstream names the client"
                self._notes.lost(section.settings[key].directive, "no field is added", advice)

    def _limit(self, settings: dict[str, Value]) -> None:
        for base in self._sections:
            number = base.value("redsocks_conn_max")
            if base.kind == "base" and number.isdigit() and int(number):
                settings["limits"] = {"connections": int(number)}

    def _redudp(self, section: _Section) -> None:
        upstream = self._proxy(section, "socks5")
        settings: dict[str, Value] = {"listen": self._listen(section, "0"), "upstream": upstream}
        host, port = section.value("dest_ip"), section.value("dest_port")
        origins = self._take(section, "local_ip", "local_port", "dest_ip", "dest_port")
        if host and port:
            settings |= {"protocol": "udp", "target": networks.listen_text(host, port)}
            if port == "53" and networks.is_network(host):
                self._server = (host, upstream)
        else:
            settings |= {"protocol": "tproxy", "network": ["udp"]}
        stream = section.value("udp_timeout_stream")
        if stream.isdigit() and int(stream):
            settings["udp"] = {"idle_timeout": f"{stream}s"}
            origins += self._take(section, "udp_timeout_stream")
        permit(self._draft.listener(settings, section.directive, *origins), None)

    def _dnstc(self, section: _Section) -> None:
        origins = self._take(section, "local_ip", "local_port")
        if self._server is None:
            why = "netproxyd makes no truncated answers"
            advice = "write a listener with protocol: dns, and dns.servers with an upstream"
            for directive in (section.directive, *origins):
                self._notes.lost(directive, why, advice)
            return
        host, upstream = self._server
        self._dns_listener(section, [{"url": f"tcp://{host}", "upstream": upstream}])
        why = f"asks {host} by TCP through the proxy, where redsocks has clients do so"
        self._notes.changed(section.directive, why)

    def _dnsu2t(self, section: _Section) -> None:
        self._take(section, "local_ip", "local_port", "remote_ip", "remote_port")
        host = section.value("remote_ip", "127.0.0.1")
        if not networks.is_network(host):
            self._notes.lost(section.directive, "its server is not an address")
            return
        port = section.value("remote_port", "53")
        if networks.listen_text(host, port) == self._listen(section, "53"):
            self._notes.lost(section.directive, "its server is the listener itself")
            return
        self._dns_listener(section, [f"tcp://{networks.listen_text(host, port)}"])

    def _dns_listener(self, section: _Section, servers: list[Value]) -> None:
        settings: dict[str, Value] = {"protocol": "dns", "listen": self._listen(section, "53")}
        entry = self._draft.listener(settings, section.directive)
        permit(entry, None)
        known = self._draft.sections.get("dns")
        if known is None:
            self._draft.put("dns.servers", servers, section.directive)
        elif known.settings.get("servers") != servers:
            why = "all dns listeners ask the same servers: those of the first section"
            self._notes.changed(section.directive, why)

    # -- parts

    def _listen(self, section: _Section, default_port: str) -> str:
        host = section.value("local_ip", "127.0.0.1")
        port = section.value("local_port", default_port)
        is_fine = networks.is_network(host) and port.isdigit() and int(port) <= networks.LAST_PORT
        if not is_fine:
            raise ConversionError(
                f"{section.directive.place}: local_ip and local_port are no address"
            )
        return networks.listen_text(host, port)

    def _proxy(self, section: _Section, kind: str = "") -> str:
        """Return the upstream of a section."""
        origins = [section.directive, *self._take(section, *_PROXY_KEYS)]
        kind = kind or section.value("type", "socks5").lower()
        scheme = _SCHEMES.get(kind, kind)
        if kind == "http-relay":
            why = "asks the proxy for connections (CONNECT), and sends it no requests itself"
            self._notes.changed(section.settings["type"].directive, why)
        port = section.value("port")
        login, password = section.value("login"), section.value("password")
        if scheme == "socks4" and password:
            self._notes.changed(section.settings["password"].directive, "SOCKS4 has no password")
            password = ""
        number = int(port) if port.isdigit() else 0
        proxy = Proxy(scheme, section.value("ip"), number, login, password)
        return add_proxy(self._draft, self._notes, proxy, *origins)
