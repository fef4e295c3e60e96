"""Flows for dialers: whoever asks is the same client."""
from __future__ import annotations

from netproxy.interfaces import Address, Flow

CLIENT = Address("192.0.2.1", 5)


def tcp_to(target: Address) -> Flow:
    return Flow("tcp", CLIENT, target, "main", "")


def udp_to(target: Address) -> Flow:
    return Flow("udp", CLIENT, target, "main", "")
