"""Which protocol a client of an SPS port speaks, by its first byte.

SOCKS4 and SOCKS5 begin with their version, TLS with its handshake record type,
HTTP with a letter of its method; no two of them can be mistaken.  Pure.
"""
from __future__ import annotations

import enum


class Speech(enum.Enum):
    SOCKS4 = "socks4"
    SOCKS5 = "socks5"
    HTTP = "http"
    TLS = "tls"
    UNKNOWN = "unknown"


def detect(first: int) -> Speech:
    """`first` is the value of the first byte, 0-255."""
    if first == 0x05:
        return Speech.SOCKS5
    if first == 0x04:
        return Speech.SOCKS4
    if first == 0x16:
        return Speech.TLS
    if 0x41 <= first <= 0x5A or 0x61 <= first <= 0x7A:
        return Speech.HTTP
    return Speech.UNKNOWN
