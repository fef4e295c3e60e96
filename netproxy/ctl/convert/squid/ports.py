"""http_port and https_port of squid.conf: the listeners."""

from __future__ import annotations

import re

from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Entry, Value
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.squid.lines import Line

_ADDRESS = re.compile(r"(?:(\[[^\]]+\]|[^:\s]*):)?(\d+)")
_IGNORED = re.compile(
    r"(connection-auth(=.*)?|disable-pmtu-discovery=.*|tcpkeepalive(=.*)?|no-connection-auth|"
    r"allow-direct|ignore-cc|worker-queues|generate-host-certificates=.*|"
    r"dynamic_cert_mem_cache_size=.*|options=.*|cipher=.*|dhparams=.*|tls-dh=.*|tls-min-version=.*|"
    r"sslcontext=.*|sslflags=.*|tls-no-npn|no_session_reuse|protocol=.*|version=.*)"
)
_MODES = {"intercept": "redirect", "transparent": "redirect", "tproxy": "tproxy"}
_BUMP = "netproxyd opens no TLS of clients: CONNECT is relayed as it is"
_ACCEL = "netproxyd is no reverse proxy: use a web server"


class Ports(NamedTuple):
    """The listeners, and what access lists call them."""

    entries: list[Entry]
    names: dict[str, list[str]]
    """The names of listeners, by port and by the name that squid.conf gives."""
    with_header: list[Entry]
    """Those whose connections begin with a PROXY header."""


def add_ports(lines: Sequence[Line], draft: Draft, notes: Notes) -> Ports:
    """Add the listeners."""
    ports = Ports([], {}, [])
    taken: set[str] = set()
    for line in lines:
        match = _ADDRESS.fullmatch(line.word)
        options = line.words[1:]
        if not match or int(match[2]) > networks.LAST_PORT:
            notes.lost(line.directive, "is not a port or an address with a port")
            continue
        if "accel" in options or any(option.startswith("defaultsite=") for option in options):
            notes.lost(line.directive, _ACCEL)
            continue
        notes.carried(line.directive)
        host, port = (match[1] or "").strip("[]"), match[2]
        mode = next((_MODES[option] for option in options if option in _MODES), "http")
        settings: dict[str, Value] = {"protocol": mode, "listen": networks.listen_text(host, port)}
        settings["network"] = ["tcp"]
        if mode == "redirect":
            del settings["network"]
        given = [option[5:] for option in options if option.startswith("name=")]
        name = re.sub(r"[^\w.-]", "-", given[-1]) if given else f"{mode}-{port}"
        while name in taken:
            name += "-2"
        taken.add(name)
        if name != f"{mode}-{port}":
            settings["name"] = name
        _add_tls(line, options, settings, notes)
        _note_options(line, options, notes)
        entry = draft.listener(settings, line.directive)
        ports.entries.append(entry)
        if "require-proxy-header" in options:
            ports.with_header.append(entry)
        for key in {port, line.word, *given}:
            ports.names.setdefault(key, []).append(name)
    return ports


def _add_tls(line: Line, options: Sequence[str], settings: dict[str, Value], notes: Notes) -> None:
    if line.tag != "https_port":
        return
    values = dict(option.partition("=")[::2] for option in options)
    certificate = values.get("tls-cert") or values.get("cert") or ""
    key = values.get("tls-key") or values.get("key") or ""
    if not certificate or settings["protocol"] != "http":
        notes.lost(line.directive, "needs a certificate here", "it is a listener without TLS now")
        return
    tls: dict[str, Value] = {"certificate": certificate}
    tls |= {"key": key} if key else {}
    authorities = values.get("tls-cafile") or values.get("clientca") or ""
    tls |= {"client_ca": authorities} if authorities else {}
    settings["tls"] = tls


def _note_options(line: Line, options: Sequence[str], notes: Notes) -> None:
    for option in options:
        key = option.partition("=")[0]
        if option in ("ssl-bump", "intercept", "transparent", "tproxy") or key in ("name",):
            continue
        if key in ("tls-cert", "cert", "tls-key", "key", "tls-cafile", "clientca", "capath"):
            continue
        if not (_IGNORED.fullmatch(option) or option == "require-proxy-header"):
            notes.lost(line.directive, f"the option {key} has no counterpart")
    if "ssl-bump" in options:
        notes.lost(line.directive, _BUMP)
    if "tproxy" in options:
        notes.changed(line.directive, "targets see the daemon's address, not that of the client")
    if {"intercept", "transparent", "tproxy"} & set(options):
        advice = "netproxyctl nft prints them"
        notes.changed(line.directive, "the kernel's rules are not in this file", advice)
