"""DNS messages for tests, written out byte by byte and not with the codec that they test."""

from __future__ import annotations

import struct

HEAD = struct.Struct(">6H")
ASKED = b"\xc0\x0c"  # a pointer to the name of the question
RD, QR, AA, TC, RA, AD, CD = 0x0100, 0x8000, 0x0400, 0x0200, 0x0080, 0x0020, 0x0010


def name(text: str) -> bytes:
    """A name without anything odd in it, not compressed."""
    return (
        b"".join(bytes((len(label),)) + label for label in text.encode().split(b".") if label)
        + b"\0"
    )


def question(text: str, kind: int = 1, klass: int = 1) -> bytes:
    return name(text) + struct.pack(">HH", kind, klass)


def query(asked: bytes, *additionals: bytes, id: int = 0x1234, flags: int = RD) -> bytes:
    return HEAD.pack(id, flags, 1, 0, 0, len(additionals)) + asked + b"".join(additionals)


def record(owner: bytes, kind: int, ttl: int, data: bytes, klass: int = 1) -> bytes:
    return owner + struct.pack(">HHIH", kind, klass, ttl, len(data)) + data


def a(ttl: int, address: bytes = b"\xc0\0\2\1", owner: bytes = ASKED) -> bytes:
    return record(owner, 1, ttl, address)


def cname(owner: bytes, ttl: int, target: bytes) -> bytes:
    return record(owner, 5, ttl, target)


def soa(ttl: int, minimum: int, owner: bytes = b"\0") -> bytes:
    return record(
        owner,
        6,
        ttl,
        name("ns.test")
        + name("hostmaster.test")
        + struct.pack(">5I", 1, 7200, 3600, 86400, minimum),
    )


def option(code: int, data: bytes = b"") -> bytes:
    return struct.pack(">HH", code, len(data)) + data


def opt(size: int = 1232, extended: int = 0, options: bytes = b"") -> bytes:
    """`extended`: upper bits of the code, version and flags, as the 32 bits that they are."""
    return record(b"\0", 41, extended, options, size)


def answer(
    asked: bytes,
    answers: tuple[bytes, ...] = (),
    authorities: tuple[bytes, ...] = (),
    additionals: tuple[bytes, ...] = (),
    flags: int = QR | RD | RA,
) -> bytes:
    records = b"".join((*answers, *authorities, *additionals))
    return (
        HEAD.pack(0x1234, flags, 1, len(answers), len(authorities), len(additionals))
        + asked
        + records
    )
