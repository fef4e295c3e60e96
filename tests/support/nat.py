"""A NAT table on stand-ins: its clock stands still, its workers run when told, its upstreams have no sockets."""

from __future__ import annotations

from typing import Any, Hashable

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Run
from netproxy.interfaces.flows import Flow
from netproxy.net.datagram import PITCH, Arena, ArenaPool
from netproxy.relay.quota import SessionLimits
from netproxy.relay.nat import NatPolicy, NatTable
from netproxy.relay.entry import Entry, Workers as Submits
from netproxy.relay.session import Client, Session
from tests.support.flows import OneWay
from tests.support.doubles import Counts, Lines, Records
from tests.support.upstreams import FakeConn, FakeDialer, FakePool, FakeSocket

IDLE = 300.0
START = 1000.0
TARGET = "198.51.100.1:9000"  # not a name server's port: those sessions end sooner
ENOUGH = 100  # sessions, where the test is about something else


class Clock:
    """In the place of the time module."""

    def __init__(self) -> None:
        self.now = START

    def monotonic(self) -> float:
        return self.now


class NatRig:
    def __init__(self) -> None:
        self.counts, self.records, self.log = Counts(), Records(), Lines()
        self.workers = FakePool()
        self.dialer = FakeDialer()
        self.arena = Arena()
        self.table = NatTable(
            NatPolicy(SessionLimits(ENOUGH, ENOUGH), IDLE),
            ArenaPool(Arena),
            Submits(self.workers.submit, self.workers.submit),
            self.counts,
            self.records,
            self.log,
        )
        self.clock = Clock()
        self.local = FakeSocket()

    def policy(
        self, sessions: int = ENOUGH, per_client: int = ENOUGH, idle: float = IDLE, **more: Any
    ) -> None:
        """Another one from now on; `per_user`, `symmetric` and `filtering` as in NatPolicy and Caps."""
        caps = SessionLimits(sessions, per_client, more.pop("per_user", {}))
        self.table.set_policy(NatPolicy(caps, idle, **more))

    def client(
        self, port: int = 5000, host: str = "192.0.2.1", owner: Hashable = "association"
    ) -> Client:
        client = Client(
            (host, port),
            Address(host, port),
            self.local,
            lambda source: f"<{source}>".encode(),
            owner,
        )
        self.table.add_client(client)
        return client

    def open(
        self, client: Client, target: str = TARGET, dialer: FakeDialer | None = None, user: str = ""
    ) -> Entry | None:
        host, _, port = target.rpartition(":")
        flow = Flow("udp", client.address, Address(host, int(port)), "main", user)
        return self.table.open(
            (client.peer, target.encode()), client, flow, OneWay(dialer or self.dialer)
        )

    def send(self, entry: Entry, *payloads: bytes) -> None:
        """One run; all but the last have the length of the first."""
        offsets = []
        for number, payload in enumerate(payloads):
            self.arena.view[number * PITCH : number * PITCH + len(payload)] = payload
            offsets.append(number * PITCH)
        self.table.forward(self.arena, entry, Run(offsets, len(payloads[0]), len(payloads[-1])))

    def opened(
        self, client: Client, target: str = TARGET, dialer: FakeDialer | None = None, user: str = ""
    ) -> Entry:
        entry = self.open(client, target, dialer, user)
        assert entry is not None
        return entry

    def waiting(self) -> int:
        """Datagrams, of all entries."""
        return self.table._opening.waiting

    def expire(self) -> int:
        """As the janitor does it; how many it closed."""
        closes = self.table.expire(self.clock.now)
        for close in closes:
            close()
        return len(closes)

    def later(self, seconds: float) -> None:
        self.clock.now += seconds


def conn_of(session: Session) -> FakeConn:
    conn: Any = session.conn
    assert isinstance(conn, FakeConn)
    return conn
