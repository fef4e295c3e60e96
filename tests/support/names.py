"""Host names that no codec accepts (hazard 10)."""

from __future__ import annotations

REFUSED_NAMES = {
    "empty": b"",
    "255 bytes": b".".join([b"a" * 63] * 4),
    "255 bytes in one label": b"a" * 255,
    "NUL": b"a\0b",
    "CRLF": b"a\r\nHost: b",
    "space": b"a b",
    "two dots": b"a..b",
    "label of 64 bytes": b"a" * 64 + b".com",
    "not ASCII": "bücher".encode(),
    "slash": b"a/b",
    "at": b"a@b",
    "IPv4 out of range": b"256.1.1.1",
}
