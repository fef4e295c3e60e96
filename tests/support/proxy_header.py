"""PROXY version 1 as a proxy in front of us sends it; NetProxy itself only reads it."""

from __future__ import annotations

from netproxy.interfaces.addresses import V4_MAPPED_PREFIX, Address, ip_text
from netproxy.protocol.proxy_protocol import _pack_pair


def encode_v1(source: Address, destination: Address) -> bytes:
    """One line; ValueError where either is a name."""
    packed = _pack_pair(source, destination)
    family = 4 if len(packed[0]) == 4 else 6
    hosts = " ".join(map(_text, packed))
    return f"PROXY TCP{family} {hosts} {source.port} {destination.port}\r\n".encode("ascii")


def _text(packed: bytes) -> str:
    if packed.startswith(
        V4_MAPPED_PREFIX
    ):  # section 2.1 has hexadecimal groups only, no dots within IPv6
        return "::ffff:" + packed[12:].hex(":", 2)
    return ip_text(packed)
