"""Reads what a listener looks for in the first bytes of connections: `sniff` and its companions."""

from __future__ import annotations

from netproxy.config.schema import TRANSPARENT, SniffConfig
from netproxy.config.tree.node import MapReader

PROTOCOLS = ("tcp", "redirect", "tproxy")
"""Protocols whose clients do not wait for an answer before they send."""
KINDS = ("tls", "http")
_DIALS = ("address", "name")
_COMPANIONS = ("sniff_dial", "sniff_except")
_PORT_LIMIT = 65535


def read_sniff(section: MapReader, protocol: str) -> SniffConfig:
    """Take what a listener looks for: TLS and HTTP at transparent listeners, else nothing."""
    given = [key for key in ("sniff", *_COMPANIONS) if section.has(key)]
    kinds = section.values("sniff", _kind)
    dial = section.choice("sniff_dial", _DIALS, _DIALS[0])
    skipped = section.values("sniff_except", _ports)
    if protocol not in PROTOCOLS:
        for key in given:
            message = f"has no meaning for the protocol {protocol}"
            section.add_error(key, f"{message}: only {', '.join(PROTOCOLS)} have it")
        return SniffConfig()
    if protocol in TRANSPARENT and "sniff" not in given:
        kinds = KINDS
    if not kinds:
        for key in [key for key in given if key != "sniff"]:
            section.add_error(key, "has no meaning without sniff: [tls, http]", given=("sniff",))
    if protocol not in TRANSPARENT and dial == "name":
        section.add_error("sniff_dial", f"the protocol {protocol} has a fixed target")
    skipped = skipped if "sniff_except" in given else SniffConfig().skipped
    return SniffConfig(kinds, skipped, dial == "name")


def _kind(text: str) -> str:
    if text not in KINDS:
        raise ValueError(f"'{text}' is not {' or '.join(KINDS)}")
    return text


def _ports(text: str) -> range:
    """Return the ports of "25" or "8000-8100".  Raises ValueError."""
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not (text.isascii() and first.isdigit() and last.isdigit()):
        raise ValueError(f"'{text}' is not a port or a range of ports FIRST-LAST")
    if not 0 < int(first) <= int(last) <= _PORT_LIMIT:
        raise ValueError(f"'{text}' is not within 1-{_PORT_LIMIT}, in ascending order")
    return range(int(first), int(last) + 1)
