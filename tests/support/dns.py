"""DNS messages for tests, written byte by byte without the codec that they test."""

from __future__ import annotations

import struct

HEADER = struct.Struct(">6H")
# A pointer to the name of the question.
ASKED = b"\xc0\x0c"
RD, QR, AA, TC, RA, AD, CD = 0x0100, 0x8000, 0x0400, 0x0200, 0x0080, 0x0020, 0x0010


def name(text: str) -> bytes:
    """Return a name on the wire, not compressed.  The text has no escapes."""
    labels = [label for label in text.encode().split(b".") if label]
    return b"".join(bytes((len(label),)) + label for label in labels) + b"\0"


def question(text: str, qtype: int = 1, qclass: int = 1) -> bytes:
    """Return a question."""
    return name(text) + struct.pack(">HH", qtype, qclass)


def query(asked: bytes, *additionals: bytes, id: int = 0x1234, flags: int = RD) -> bytes:
    """Return a query with the question `asked`."""
    header = HEADER.pack(id, flags, 1, 0, 0, len(additionals))
    return header + asked + b"".join(additionals)


def record(owner: bytes, rtype: int, ttl: int, data: bytes, rclass: int = 1) -> bytes:
    """Return a resource record."""
    return owner + struct.pack(">HHIH", rtype, rclass, ttl, len(data)) + data


def a(ttl: int, address: bytes = b"\xc0\0\2\1", owner: bytes = ASKED) -> bytes:
    """Return an A record, of 192.0.2.1 by default."""
    return record(owner, 1, ttl, address)


def cname(owner: bytes, ttl: int, target: bytes) -> bytes:
    """Return a CNAME record."""
    return record(owner, 5, ttl, target)


def soa(ttl: int, minimum: int, owner: bytes = b"\0") -> bytes:
    """Return a SOA record."""
    names = name("ns.test") + name("hostmaster.test")
    return record(owner, 6, ttl, names + struct.pack(">5I", 1, 7200, 3600, 86400, minimum))


def option(code: int, data: bytes = b"") -> bytes:
    """Return an option of EDNS."""
    return struct.pack(">HH", code, len(data)) + data


def opt(size: int = 1232, extended: int = 0, options: bytes = b"") -> bytes:
    """Return an OPT.  `extended` is its TTL field: upper bits of RCODE, version and flags."""
    return record(b"\0", 41, extended, options, size)


def answer(
    asked: bytes,
    answers: tuple[bytes, ...] = (),
    authorities: tuple[bytes, ...] = (),
    additionals: tuple[bytes, ...] = (),
    flags: int = QR | RD | RA,
) -> bytes:
    """Return an answer to the question `asked`."""
    records = b"".join((*answers, *authorities, *additionals))
    counts = len(answers), len(authorities), len(additionals)
    return HEADER.pack(0x1234, flags, 1, *counts) + asked + records
