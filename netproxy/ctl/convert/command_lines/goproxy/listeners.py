"""What all listeners of goproxy have in common: ports, TLS, limits, and where they leave from."""

from __future__ import annotations

import re

from netproxy.ctl.convert.command_lines import tls
from netproxy.ctl.convert.command_lines.gost.nodes import Endpoint, parse_endpoint
from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.goproxy.options import Options
    from netproxy.ctl.convert.draft.draft import Value

DEFAULT_PORT = "33080"
_EACH = "is the rate of a client's connections together, rather than of each"
_TRANSPORT = "clients connect by TCP, or TLS within it"
_FILES = ("proxy.crt", "proxy.key")
"""The certificate that goproxy takes if none is named."""
_INTERFACE = re.compile(r"[A-Za-z][\w.-]*\Z")
_RATE = re.compile(r"(?i)([0-9]{1,12})([KMGT]?)B?\Z")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_NOT_CARRIED = ("-z", "-m", "--c")
"""What a listener of netproxyd cannot undo."""


def listener_ends(options: Options) -> list[Endpoint]:
    """Return the addresses of -p.  Raises ValueError if one is no address."""
    ends = [
        parse_endpoint(text.strip().replace(": ", ":"))
        for text in (options.text("-p") or f":{DEFAULT_PORT}").split(",")
        if text.strip()
    ]
    for end in ends:
        if not end.ports[0]:
            raise ValueError("a port is expected")
    return ends


def lost_reason(options: Options) -> str:
    """Return why a command cannot be a listener, "" if it can be one."""
    transport = options.text("-t") or "tcp"
    if transport not in ("tcp", "tls", "udp"):
        return f"{transport}: {_TRANSPORT}"
    given = [name for name in _NOT_CARRIED if options.has(name)]
    return f"{given[0]} makes its bytes readable for goproxy alone" if given else ""


def tls_settings(options: Options) -> dict[str, Value]:
    """Return the keys of TLS of a listener; {} without -t tls."""
    if options.text("-t") != "tls":
        return {}
    certificate, key = options.text("-C") or _FILES[0], options.text("-K") or _FILES[1]
    keys = tls.files(certificate, key)
    if not options.flag("--local-tls-single"):
        # Clients show a certificate that this one, or --ca, has signed.
        keys["client_ca"] = options.text("--ca") or certificate
    return keys


def limits(options: Options) -> dict[str, Value]:
    """Return the limits of a listener."""
    settings: dict[str, Value] = {}
    if connections := options.number("--max-conns"):
        settings["connections"] = connections
    if rate := options.number("--max-conns-rate"):
        settings["connection_rate_per_client"] = f"{rate}/s"
    for name, key in (("--port-rate", "rate"), ("--ip-rate", "rate_per_client")):
        if amount := _rate(options.text(name)):
            settings[key] = amount
    for name in ("-l", "--rate-limit"):
        amount = _rate(options.text(name))
        if amount and "rate_per_client" not in settings:
            settings["rate_per_client"] = amount
            options.changed(name, _EACH)
        elif amount:
            options.lost(name, "a client has one rate, for its connections together")
    return settings


def bind_of(options: Options, end: Endpoint) -> str:
    """Return what direct connections of a listener leave from, "" for what the system chooses."""
    for text in options.texts("--bind-ip"):
        host, _, port = text.rpartition(":")
        if port != end.port:
            continue
        host = host.strip("[]")
        if networks.is_host(host) or (_INTERFACE.match(host) and "," not in host):
            return host
        options.lost("--bind-ip", "names several addresses", "write a prefix as bind, with rotate")
    return "incoming" if options.flag("--bind-listen", "-B") else ""


def _rate(text: str) -> str:
    """Return a number of bytes a second as the configuration writes it, "" for no limit."""
    match = _RATE.match(text)
    if not match or not int(match[1]):
        return ""
    return f"{int(match[1]) * _UNITS[match[2].upper()] * 8}bit/s"
