"""Writes a database in MaxMind's format, after its published description.

It has a binary tree over the bits of addresses, and behind it the records that the leaves
lead to.
"""

from __future__ import annotations

import struct
from typing import Any, Mapping

from netproxy.interfaces.networks import IpNetwork

STRING, UINT16, UINT32, MAP = 2, 5, 6, 7
# Extended types.
UINT64, ARRAY = 9, 11
MARKER = b"\xab\xcd\xefMaxMind.com"
# Between the tree and the data.
GAP = bytes(16)


def database(entries: Mapping[str, Any], version: int = 4) -> bytes:
    """Return a database with a record for each network; all networks are of one family."""
    nodes: list[list[Any]] = [[None, None]]
    for text, value in entries.items():
        network = IpNetwork.parse(text)
        length = network.size * 8 - network.shift
        bits = [network.prefix >> (length - 1 - place) & 1 for place in range(length)]
        at = 0
        for bit in bits[:-1]:
            if nodes[at][bit] is None:
                nodes.append([None, None])
                nodes[at][bit] = len(nodes) - 1
            at = nodes[at][bit]
        nodes[at][bits[-1]] = (value,)
    data, tree = b"", b""
    for node in nodes:
        for leaf in node:
            number = len(nodes) if leaf is None else leaf
            if isinstance(leaf, tuple):
                number = len(nodes) + len(GAP) + len(data)
                data += _encode(leaf[0])
            tree += number.to_bytes(3, "big")
    metadata = {
        "binary_format_major_version": (UINT16, 2),
        "binary_format_minor_version": (UINT16, 0),
        "build_epoch": (UINT64, 1),
        "database_type": "Test-Country",
        "description": {"en": "a test's"},
        "ip_version": (UINT16, version),
        "languages": ["en"],
        "node_count": (UINT32, len(nodes)),
        "record_size": (UINT16, 24),
    }
    return tree + GAP + data + MARKER + _encode(metadata)


def _encode(value: Any) -> bytes:
    if isinstance(value, str):
        return _control(STRING, len(value)) + value.encode()
    if isinstance(value, dict):
        items = (_encode(key) + _encode(item) for key, item in value.items())
        return _control(MAP, len(value)) + b"".join(items)
    if isinstance(value, list):
        return _control(ARRAY, len(value)) + b"".join(map(_encode, value))
    kind, number = value
    packed = struct.pack(">Q", number).lstrip(b"\0")
    return _control(kind, len(packed)) + packed


def _control(kind: int, size: int) -> bytes:
    """Return the byte, or two, before a value."""
    assert size < 29
    return bytes((kind << 5 | size,)) if kind < 8 else bytes((size, kind - 7))
