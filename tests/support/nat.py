"""A NAT table on test doubles: a clock that stands still, workers that run when told to."""

from __future__ import annotations

from typing import Any, Iterable

import pytest

from netproxy.access.accounts.subject import Limits
from netproxy.interfaces.accounts import SharedGauge
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Run
from netproxy.interfaces.flows import Flow
from netproxy.net.datagram import PITCH, Arena, ArenaPool
from netproxy.relay import nat
from netproxy.relay.client import Client
from netproxy.relay.entry import Entry
from netproxy.relay.nat import NatTable
from netproxy.relay.quota import SessionLimits
from netproxy.relay.session import Session
from netproxy.relay.table.policy import NatDependencies, NatPolicy
from tests.support.accounts import account_book
from tests.support.doubles import Counts, Lines, Records
from tests.support.flows import OneUpstream
from tests.support.upstreams import FakeConn, FakeDialer, FakeSocket, FakePool

IDLE = 300.0
START = 1000.0
TARGET = "198.51.100.1:9000"
"""Not a name server's port: sessions to name servers end sooner."""
ENOUGH = 100
"""Sessions, where a test is about something else."""


class Clock:
    """Stands in for the time module."""

    def __init__(self) -> None:
        self.now = START

    def monotonic(self) -> float:
        return self.now


class NatRig:
    """A table without sockets, and what a test sees of it."""

    def __init__(self, workers: FakePool | None = None, shared: SharedGauge | None = None) -> None:
        self.counts, self.records, self.log = Counts(), Records(), Lines()
        self.workers = workers or FakePool()
        self.dialer = FakeDialer()
        self.arena = Arena()
        dials = names = self.workers.submit_fairly
        self.accounts = account_book()
        self.renewed: list[tuple[str, set[str]]] = []
        """The clients that have renewed their use of fake addresses, with these."""
        recorders = self.counts, self.records, self.accounts, self.log
        self.table = NatTable(
            NatPolicy(SessionLimits(ENOUGH, ENOUGH), IDLE),
            NatDependencies(ArenaPool(Arena), dials, names, *recorders, self._renew),
            shared,
        )
        self.clock = Clock()
        self.local = FakeSocket()

    def _renew(self, client: str, hosts: Iterable[str]) -> None:
        self.renewed.append((client, set(hosts)))

    def use_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the table take its time from `clock`."""
        monkeypatch.setattr(nat, "time", self.clock)

    def close(self) -> None:
        """Run what waits and close the table."""
        self.workers.eager = True
        self.workers.run()
        self.table.close()

    def policy(
        self, sessions: int = ENOUGH, per_client: int = ENOUGH, idle: float = IDLE, **more: Any
    ) -> None:
        """Set a policy; `more` has `per_user`, `symmetric` and `filtering`."""
        per_user = more.pop("per_user", {})
        users = {name: Limits(sessions=limit) for name, limit in per_user.items()}
        self.accounts.configure(users, {})
        self.table.set_policy(NatPolicy(SessionLimits(sessions, per_client), idle, **more))

    def client(
        self, port: int = 5000, host: str = "192.0.2.1", owner: object = "association"
    ) -> Client:
        """Add a client whose replies begin with their source in angle brackets."""
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
        """Ask for an entry through `dialer`, by default the rig's."""
        host, _, port = target.rpartition(":")
        flow = Flow("udp", client.address, Address(host, int(port)), "main", user)
        router = OneUpstream(dialer or self.dialer)
        return self.table.open((client.peer, target.encode()), client, flow, router)

    def opened(
        self, client: Client, target: str = TARGET, dialer: FakeDialer | None = None, user: str = ""
    ) -> Entry:
        """The same, which must not be refused."""
        entry = self.open(client, target, dialer, user)
        assert entry is not None
        return entry

    def send(self, entry: Entry, *payloads: bytes) -> None:
        """Send one run; all payloads but the last have the length of the first."""
        offsets = []
        for number, payload in enumerate(payloads):
            self.arena.view[number * PITCH : number * PITCH + len(payload)] = payload
            offsets.append(number * PITCH)
        self.table.forward(self.arena, entry, Run(offsets, len(payloads[0]), len(payloads[-1])))

    def answer(self, session: Session, source: tuple[str, int] = ("198.51.100.1", 9000)) -> None:
        """Send one datagram of six bytes from a source back to the client."""
        before = len(self.local.sent)
        conn_of(session).offer((b"answer", source))
        self.local.wait_for(before + 1)

    def waiting(self) -> int:
        """Return how many datagrams wait, of all entries."""
        return self.table._waiting.total

    def expire(self) -> int:
        """Sweep as the janitor does; return how many sessions were closed."""
        closes = self.table.expire(self.clock.now)
        for close in closes:
            close()
        return len(closes)

    def tick(self, seconds: float) -> int:
        """Sweep once in each of so many seconds; return how many sessions were closed."""
        closed = 0
        for _ in range(int(seconds)):
            self.later(1)
            closed += self.expire()
        return closed

    def later(self, seconds: float) -> None:
        """Move the clock on."""
        self.clock.now += seconds


def conn_of(session: Session) -> FakeConn:
    conn: Any = session.conn
    assert isinstance(conn, FakeConn)
    return conn
