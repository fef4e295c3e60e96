"""Datagram sockets of one level of batching, and ways to fill and read an arena."""

from __future__ import annotations

import socket
import struct
from typing import Any

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Batch, PacketConn, Run
from netproxy.net import datagram
from netproxy.net.datagram_socket import DatagramSocket
from netproxy.net.udp_sockets import UdpSocketFactory
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
        """Put datagrams into the arena, far apart; return them as a run.

        All but the last must have the same length.
        """
        offsets = []
        for number, payload in enumerate(payloads):
            at = number * datagram.PITCH if len(payloads) <= datagram.SLOTS else number * 2048
            self.arena.view[at : at + len(payload)] = payload
            offsets.append(at)
        return Run(offsets, len(payloads[0]), len(payloads[-1]))

    def receive(self, local: DatagramSocket, count: int) -> list[tuple[bytes, Any]]:
        """Return the next `count` datagrams with their peers' keys."""
        received: list[tuple[bytes, Any]] = []
        while len(received) < count:
            assert Task(local.wait).result()
            received += cut(local.receive(self.arena))
        return received


def cut(batch: Batch) -> list[tuple[bytes, Any]]:
    """Return the datagrams of a batch with their peers' keys."""
    datagrams = []
    for offsets, length, last, key in batch.spans:
        datagrams += [
            (bytes(batch.arena.view[at : at + (last if at == offsets[-1] else length)]), key)
            for at in offsets
        ]
    return datagrams


def receive(conn: PacketConn, count: int) -> list[tuple[bytes, Address]]:
    """Return the next `count` datagrams of a packet connection with their sources."""
    arena, received = datagram.Arena(), []
    while len(received) < count:
        assert Task(conn.wait).result()
        received += [(data, conn.source(key)) for data, key in cut(conn.receive(arena))]
    return received


def train(client: socket.socket, payloads: list[bytes], local: DatagramSocket) -> None:
    """Send datagrams of one length as one message; the kernel cuts it or hands it over whole."""
    segment = (datagram.SOL_UDP, datagram.UDP_SEGMENT, struct.pack("=H", len(payloads[0])))
    client.sendmsg([b"".join(payloads)], [segment], 0, (*local.address,))


def without_trains(local: DatagramSocket) -> None:
    """Let a socket send singly, as on a kernel without UDP_SEGMENT."""
    local._segment_limit = 0
