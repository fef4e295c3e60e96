"""Two sides of a path without sockets: packets go through a queue that a test may tamper with."""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from typing import Any, Callable, Hashable

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Batch, Run
from netproxy.net.datagram import Arena, ArenaPool, Destination
from netproxy.protocol.tunnels.path import PathOffer
from netproxy.tunnel.path.dependencies import PathDependencies
from netproxy.tunnel.path.flows import PathFlow
from netproxy.tunnel.path.keys import Epoch
from netproxy.tunnel.path.path import Path
from netproxy.tunnel.path.remote import Remote
from netproxy.tunnel.path.sealing import Cipher, Opener, Sealer
from netproxy.tunnel.path.table import PathTable
from tests.support.batches import cut
from tests.support.doubles import Counts

AGENT, BRIDGE, ELSEWHERE = ("127.0.0.1", 5000), ("127.0.0.9", 7000), ("127.0.0.7", 1)


class Forged(Exception):
    """What the cipher of tests raises."""


def make_cipher(key: bytes) -> Cipher:
    """Return an AEAD of the standard library: a keyed digest behind the text, which is masked."""

    def mask(nonce: bytes, text: bytes) -> bytes:
        stream = hashlib.shake_256(key + nonce).digest(len(text))
        return bytes(first ^ second for first, second in zip(text, stream, strict=True))

    def tag(nonce: bytes, text: bytes, data: bytes) -> bytes:
        return hmac.digest(key, nonce + data + text, "sha256")[:16]

    def encrypt(nonce: bytes, text: bytes, data: bytes) -> bytes:
        masked = mask(nonce, text)
        return masked + tag(nonce, masked, data)

    def decrypt(nonce: bytes, text: bytes, data: bytes) -> bytes:
        masked = text[:-16]
        if tag(nonce, masked, data) != text[-16:]:
            raise Forged
        return mask(nonce, masked)

    return Cipher(encrypt, decrypt, Forged)


class Side:
    """One side: its path, its table, and what it has delivered (path.PathOwner, table.Origin)."""

    def __init__(self, initiates: bool, address: tuple[str, int], make: Callable[..., Cipher]):
        self.counts = Counts()
        self.table = PathTable(self.counts)
        self.address_of_side = address
        self.out: list[tuple[bytes, tuple[str, int]]] = []
        """Packets that were sent, each with where to."""
        self.changes: list[str] = []
        self.renewals = 0
        self.alone: list[PathFlow] = []
        """Flows that go on without a stream."""
        self.refused: set[Hashable] = set()
        """Peers that may not send."""
        self._arenas = ArenaPool(Arena)
        self._initiates = initiates
        self._make = make
        self.path: Path

    def epoch(self, offer: PathOffer) -> Epoch:
        """Return the keys of an offer as this side has them."""
        make = self._make
        ids, keys = (offer.bridge_id, offer.agent_id), (offer.bridge_key, offer.agent_key)
        if self._initiates:
            ids, keys = ids[::-1], keys[::-1]
        return Epoch(ids[0], Sealer(make(keys[1]), ids[1]), Opener(make(keys[0])), 0.0)

    def begin(self, offer: PathOffer, renewal: float = float("inf")) -> None:
        """Make the path, whose keys are renewed after `renewal` seconds."""
        epoch = self.epoch(offer)
        dependencies = PathDependencies(self, self._arenas, self._initiates, renewal)
        self.path = Path(offer.number, epoch, dependencies)
        self.table.add(self.path, epoch)

    def send(self, arena: Any, run: Run, destination: Destination) -> None:
        """Send as a socket does; any arena."""
        for packet, _ in cut(Batch(arena, [(run.offsets, run.length, run.last, b"")])):
            self.out.append((packet, destination.sockaddr))

    def take(self, *packets: bytes, peer: tuple[str, int]) -> None:
        """Receive packets of one length in one train, or a lone one."""
        arena = Arena()
        length = len(packets[0])
        data = b"".join(packets)
        arena.view[: len(data)] = data
        offsets = range(0, (len(packets) - 1) * length + 1, max(1, length))
        self.table.take(Batch(arena, [(offsets, length, len(packets[-1]), peer)]), self)

    def drops(self) -> dict[str, int]:
        """Return the packets dropped, by reason."""
        counts = self.counts.counts.items()
        return {reason: count for (name, reason), count in counts if name == "drops"}

    # -- table.Origin and path.PathOwner

    def address(self, peer: Hashable) -> Address:
        return Address(*peer)  # type: ignore[misc]  # of this rig's peers

    def remote(self, peer: Hashable) -> Remote | None:
        if self._initiates:
            return None
        return Remote(self.send, Destination([], peer), peer)  # type: ignore[arg-type]  # as above

    def refused_by(self, peer: Hashable) -> str:
        return "clients" if peer in self.refused else ""

    def path_changed(self, path: Path, why: str) -> None:
        self.changes.append(why or ("up" if path.up else "down"))

    def wake(self) -> None:
        pass

    def carried(self, sent: int, received: int, too_long: int) -> None:
        pass

    def retire(self, epoch: Epoch) -> None:
        self.table.retire(epoch)

    def renew(self, path: Path) -> None:
        self.renewals += 1

    def left_alone(self, path: Path, flow: PathFlow) -> None:
        self.alone.append(flow)

    def agent_moved(self) -> None:
        self.changes.append("told to have moved")


class Pair:
    """Both sides, and the network between them."""

    def __init__(self, make: Callable[..., Cipher] = make_cipher) -> None:
        self.agent, self.bridge = Side(True, AGENT, make), Side(False, BRIDGE, make)
        offer = self.offer()
        for side in (self.agent, self.bridge):
            side.begin(offer)
        self.agent.path.lead_to(Remote(self.agent.send, Destination([], BRIDGE)))

    @staticmethod
    def offer() -> PathOffer:
        return PathOffer(1, 0, os.urandom(8), os.urandom(8), os.urandom(32), os.urandom(32))

    def come_up(self) -> None:
        """Exchange pings until both sides are up."""
        self.agent.path.tick(time.monotonic())
        self.exchange()
        assert self.agent.path.up and self.bridge.path.up
        self.settle_sizes()

    def settle_sizes(self) -> None:
        """Exchange what measures the path."""
        for _ in range(12):
            for side in (self.agent, self.bridge):
                side.path.tick(time.monotonic())
            self.exchange()

    def exchange(self) -> None:
        """Deliver all packets until none is left."""
        while self.agent.out or self.bridge.out:
            for side, other in ((self.agent, self.bridge), (self.bridge, self.agent)):
                packets, side.out = side.out, []
                for packet, _ in packets:
                    other.take(packet, peer=side.address_of_side)

    def flows(self, is_addressed: bool = False) -> tuple[Received, Received]:
        """Open a flow on both sides; return what each side receives."""
        first = self.bridge.path.flows.new(is_addressed)
        second = self.agent.path.flows.add(first.number, is_addressed)
        return Received(second), Received(first)


class Received:
    """A flow's end, and the datagrams that have come there."""

    def __init__(self, flow: PathFlow) -> None:
        self.flow = flow
        self.datagrams: list[tuple[bytes, Any]] = []
        self.batches: list[Any] = []
        flow.sink = self._take

    def _take(self, batch: Batch) -> None:
        self.batches.append(list(batch.spans))
        self.datagrams += cut(batch)

    def send(self, *payloads: bytes, prefix: bytes = b"") -> bool:
        """Send datagrams; all but the last have the length of the first."""
        arena, length = Arena(), len(payloads[0])
        offsets = []
        for number, payload in enumerate(payloads):
            at = number * 2048
            arena.view[at : at + len(payload)] = payload
            offsets.append(at)
        return self.flow.send(arena, Run(offsets, length, len(payloads[-1])), prefix)
