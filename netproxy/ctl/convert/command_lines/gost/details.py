"""The keys of a listener that parameters of gost set."""

from __future__ import annotations

import re

from netproxy.ctl.convert.command_lines import tls
from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.gost.chain import Chain
    from netproxy.ctl.convert.command_lines.gost.nodes import Node
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Notes

_CERTIFICATE = (
    "gost makes a certificate of its own: here it must be in a file",
    "put cert.pem and key.pem there, or name others (docs/TUNNELS.md)",
)
_WITH_TLS = ("sps", "http", "socks5", "tcp", "dns")
_SHORTEST_IDLE = 120
"""Seconds after which a UDP session may end (RFC 4787); gost ends it after 5 without an answer."""
_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_RATE = re.compile(r"(?i)([0-9]{1,15})(?:([BKMGT])(?:i?B)?)?\Z")
_DURATION = re.compile(r"([0-9]{1,9})(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600}


def set_details(
    node: Node, settings: dict[str, Value], chain: Chain, draft: Draft, notes: Notes
) -> None:
    """Set the keys of a listener that come from parameters."""
    protocol = str(settings["protocol"])
    if protocol in ("sps", "http", "socks5") and "network" not in settings:
        is_relay = node.flag("udp")
        if not is_relay:
            settings["network"] = ["tcp"]
    if protocol != "dns" and chain.nodes:
        settings["upstream"] = chain.whole
    _set_exit(node, settings, chain, draft)
    if node.transport == "tls" and protocol in _WITH_TLS:
        _set_tls(node, settings, notes)
    if node.number("proxyProtocol"):
        settings["proxy_protocol"] = [*networks.EVERYBODY]
    if (version := node.number("handler.proxyProtocol")) and protocol == "tcp":
        settings["send_proxy"] = "v2" if version == 2 else "v1"
    if protocol == "tcp" and node.flag("sniffing"):
        settings["sniff"] = ["tls", "http"]
    elif protocol in ("sps", "http", "socks5"):
        node.unneeded("sniffing", "netproxyd records flows, not their content")
    _set_limits(node, settings)
    if protocol in ("udp", "tproxy"):
        _set_idle(node, settings)


def _set_exit(node: Node, settings: dict[str, Value], chain: Chain, draft: Draft) -> None:
    """Set what direct connections of a listener leave from."""
    interface, mark = node.text("interface"), node.number("so_mark")
    if chain.nodes:
        for key in ("interface", "so_mark"):
            node.unneeded(key, "nothing leaves directly")
        return
    if interface and settings["protocol"] != "dns":
        settings["bind"] = interface.split(",")[0]
    if mark and settings["protocol"] != "dns":
        name = draft.upstream("marked", {"url": "direct", "mark": mark}, node.directive)
        settings["upstream"] = name


def _set_tls(node: Node, settings: dict[str, Value], notes: Notes) -> None:
    certificate, key = node.text("certFile"), node.text("keyFile")
    if not certificate:
        certificate, key = "cert.pem", "key.pem"
        notes.changed(node.directive, *_CERTIFICATE)
    keys = tls.files(certificate, key)
    if authorities := node.text("caFile"):
        keys["client_ca"] = authorities
    settings["tls"] = keys


def _set_limits(node: Node, settings: dict[str, Value]) -> None:
    limits: dict[str, Value] = {}
    if connections := node.number("climiter"):
        limits["connections"] = connections
    if connections := node.number("climiter.client"):
        limits["connections_per_client"] = connections
    if requests := node.number("rlimiter.client"):
        limits["connection_rate_per_client"] = f"{requests}/s"
        node.changed("rlimiter.client", "counts connections, not requests within them")
    rates = {key: node.text(key) for key in ("limiter.in", "limiter.out") if node.has(key)}
    parsed = {amount for text in rates.values() if (amount := _amount(text))}
    if parsed:
        limits["rate"] = rate_text(max(parsed))
        if len(parsed) > 1 or len(rates) == 1:
            for key in rates:
                node.changed(key, "a listener has one rate for both directions")
    if limits:
        settings["limits"] = limits


def _set_idle(node: Node, settings: dict[str, Value]) -> None:
    idle = seconds(node.text("ttl")) if node.has("ttl") else 0
    if idle >= _SHORTEST_IDLE:
        settings["udp"] = {"idle_timeout": f"{idle}s"}
    elif idle:
        node.changed("ttl", "a session lasts 5m without traffic, one without replies 1m")


def rate_text(amount: int) -> str:
    """Return a number of bytes a second as the configuration writes it."""
    for unit, factor in (("MB", 1000_000), ("kB", 1000)):
        if amount % factor == 0:
            return f"{amount // factor}{unit}/s"
    return f"{amount * 8}bit/s"


def _amount(text: str) -> int:
    """Return the bytes a second of "100MB"; 0 for no limit."""
    match = _RATE.match(text.strip())
    return int(match[1]) * _UNITS[(match[2] or "B").upper()] if match else 0


def seconds(text: str) -> int:
    """Return the whole seconds of "1m30s" or "60"; 0 for what is no duration."""
    parts = _DURATION.findall(text)
    if "".join(number + unit for number, unit in parts) != text:
        return 0
    return int(sum(int(number) * _SECONDS[unit] for number, unit in parts))
