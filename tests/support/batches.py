"""Datagram sockets of one level of batching, and what a test needs to fill and to read an arena."""

from __future__ import annotations

import socket
import struct
from typing import Any

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Batch, PacketConn, Run
from netproxy.net import datagram
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.datagram_socket import DatagramSocket
from tests.support.doubles import Counts, Lines
from tests.support.sockets import Task


class BatchRig:
    """A listening and an outgoing socket of one level, and an arena to receive into."""

    def __init__(self, level: str) -> None:
        self.counts, self.log = Counts(), Lines()
        self.datagrams = UdpSocketFactory(self.counts, self.log, level)
        self.arena = self.datagrams.arena()
        self.opened: list[DatagramSocket] = []

    def listen(self, host: str = "127.0.0.1", tag: bytes = b"") -> DatagramSocket:
        self.opened.append(self.datagrams.listen(Address(host, 0), tag))
        return self.opened[-1]

    def outgoing(self) -> DatagramSocket:
        self.opened.append(self.datagrams.outgoing())
        return self.opened[-1]

    def put(self, *payloads: bytes) -> Run:
        """A run of these, which are of one length but for the last; far apart in the arena."""
        offsets = []
        for number, payload in enumerate(payloads):
            at = number * datagram.PITCH if len(payloads) <= datagram.SLOTS else number * 2048
            self.arena.view[at : at + len(payload)] = payload
            offsets.append(at)
        return Run(offsets, len(payloads[0]), len(payloads[-1]))

    def receive(self, local: DatagramSocket, count: int) -> list[tuple[bytes, Any]]:
        """The next `count` datagrams and their peers' keys."""
        found: list[tuple[bytes, Any]] = []
        while len(found) < count:
            assert Task(local.wait).result()
            found += cut(local.receive(self.arena))
        return found


def cut(batch: Batch) -> list[tuple[bytes, Any]]:
    found = []
    for offsets, length, last, key in batch.spans:
        found += [
            (bytes(batch.arena.view[at : at + (last if at == offsets[-1] else length)]), key)
            for at in offsets
        ]
    return found


def receive(conn: PacketConn, count: int) -> list[tuple[bytes, Address]]:
    """The next `count` datagrams of a packet connection and their sources."""
    arena, found = datagram.Arena(), []
    while len(found) < count:
        assert Task(conn.wait).result()
        found += [(data, conn.source(key)) for data, key in cut(conn.receive(arena))]
    return found


def train(client: socket.socket, payloads: list[bytes], local: DatagramSocket) -> None:
    """One send that the kernel cuts, or hands over as it is."""
    segment = (datagram.SOL_UDP, datagram.UDP_SEGMENT, struct.pack("=H", len(payloads[0])))
    client.sendmsg([b"".join(payloads)], [segment], 0, (*local.address,))


def without_trains(local: DatagramSocket) -> None:
    local._segment_limit = 0
