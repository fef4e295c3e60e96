"""Replies to clients that have written to fake addresses come from these.

A name whose addresses the daemon knows has 203.0.113.9 here (FakeDestination).
"""

from __future__ import annotations

from typing import Iterator

import pytest

from netproxy.errors import FlowRefused, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.relay.entry import Entry
from netproxy.relay.session import Session
from netproxy.relay.table import written_addresses
from netproxy.relay.table.reply_sources import ADDRESS_AND_PORT_DEPENDENT
from tests.support.flows import OneUpstream
from tests.support.nat import NatRig, conn_of
from tests.support.upstreams import FakeConn, FakeDestination, FakeDialer

FAKE, OTHER_FAKE, UNKNOWN = "198.18.0.16", "198.18.0.17", "198.18.0.99"
NAMES = {FAKE: "www.example", OTHER_FAKE: "other.example"}
RESOLVED, STRANGER = "203.0.113.9", "198.51.100.77"


class FakingRouter(OneUpstream):
    """A router that knows the names of fake addresses."""

    def named(self, flow: Flow) -> Flow:
        host = flow.target.host
        if host == UNKNOWN:
            raise FlowRefused(Reason.HOST_UNREACHABLE, said="unknown", decided="dns.fake")
        return (
            flow._replace(target=flow.target._replace(host=NAMES[host])) if host in NAMES else flow
        )


class NamingConn(FakeConn):
    """A connection through an upstream that resolves names itself."""

    def prepare(self, flow: Flow) -> FakeDestination:
        destination = super().prepare(flow)
        destination.sockaddr = (flow.target.host, flow.target.port)
        return destination


class Direct(FakeDialer):
    """A dialer whose connections know the addresses of names."""

    resolves_names = False


class Naming(FakeDialer):
    """A dialer that leaves names to its upstream."""

    def dial_packet(self, flow: Flow) -> FakeConn:
        conn = NamingConn()
        self.conns.append(conn)
        return conn


class Rig(NatRig):
    """A rig with one client."""

    def __init__(self, dialer: FakeDialer) -> None:
        super().__init__()
        self.router = FakingRouter(dialer)
        self.peer = self.client()

    def write(self, host: str, port: int = 9000) -> Entry | None:
        target = Address(host, port)
        flow = Flow("udp", self.peer.address, target, "main", "")
        key = self.peer.peer, str(target).encode()
        return self.table.open(key, self.peer, flow, self.router)

    def session(self, host: str, port: int = 9000) -> Session:
        entry = self.write(host, port)
        assert entry is not None
        return entry.session

    def reply(self, session: Session, host: str, port: int = 9000) -> str:
        """Return the source of which the client is told for a reply."""
        self.answer(session, (host, port))
        return self.local.sent[-1][0].decode().removesuffix("answer")[1:-1]


@pytest.fixture
def direct() -> Iterator[Rig]:
    rig = Rig(Direct())
    yield rig
    rig.close()


@pytest.fixture
def naming() -> Iterator[Rig]:
    rig = Rig(Naming())
    yield rig
    rig.close()


def test_reply_comes_from_the_fake_address_and_another_port_as_well(direct: Rig) -> None:
    session = direct.session(FAKE)
    assert session.flow.target == Address("www.example", 9000)
    assert direct.reply(session, RESOLVED) == f"{FAKE}:9000"
    assert direct.reply(session, RESOLVED, 1234) == f"{FAKE}:1234"
    assert direct.reply(session, STRANGER) == f"{STRANGER}:9000"


def test_source_that_has_replied_before_is_known_by_the_fake_address(direct: Rig) -> None:
    session = direct.session("198.51.100.1")
    assert direct.reply(session, RESOLVED) == f"{RESOLVED}:9000"
    assert direct.session(FAKE) is session
    assert direct.reply(session, RESOLVED) == f"{FAKE}:9000"


def test_target_that_the_client_has_written_to_by_its_address_stays_as_it_is(direct: Rig) -> None:
    """A peer may have an address of the server whose name the client knows: TURN is like this."""
    before = direct.session(RESOLVED, 50000)
    session = direct.session(FAKE, 3478)
    assert session is before is direct.session(RESOLVED, 50001)
    assert direct.reply(session, RESOLVED, 50000) == f"{RESOLVED}:50000"
    assert direct.reply(session, RESOLVED, 50001) == f"{RESOLVED}:50001"
    assert direct.reply(session, RESOLVED, 3478) == f"{FAKE}:3478"


def test_last_of_two_names_of_one_address_gets_its_replies(direct: Rig) -> None:
    session = direct.session(FAKE)
    assert direct.session(OTHER_FAKE) is session
    assert direct.reply(session, RESOLVED) == f"{OTHER_FAKE}:9000"


def test_addresses_of_one_session_are_bounded(direct: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_addresses, "TARGETS_LIMIT", 3)
    session = direct.session(FAKE, 1)
    for port in range(2, 20):
        direct.session(FAKE, port)
    written = session.sources._written
    assert written is not None and len(written._targets) == 3


def test_filtering_knows_the_source_by_its_own_address(direct: Rig) -> None:
    direct.policy(filtering=ADDRESS_AND_PORT_DEPENDENT)
    session = direct.session(FAKE)
    conn_of(session).offer((b"no", (STRANGER, 9000)), (b"no", (RESOLVED, 1)))
    assert direct.reply(session, RESOLVED) == f"{FAKE}:9000"
    assert len(direct.local.sent) == 1


def test_reply_of_an_unknown_address_is_that_of_the_only_name(naming: Rig) -> None:
    session = naming.session(FAKE)
    assert naming.reply(session, STRANGER) == f"{FAKE}:9000"
    assert naming.reply(session, STRANGER, 1234) == f"{FAKE}:1234"
    assert naming.reply(session, "www.example") == f"{FAKE}:9000"


def test_stranger_on_another_port_is_not_the_name_once_there_are_peers(naming: Rig) -> None:
    session = naming.session(FAKE)
    assert naming.session("198.51.100.1", 5000) is session
    assert naming.reply(session, "198.51.100.1", 5000) == "198.51.100.1:5000"
    assert naming.reply(session, STRANGER, 6000) == f"{STRANGER}:6000"
    assert naming.reply(session, STRANGER, 9000) == f"{FAKE}:9000"


def test_names_that_the_upstream_resolves_have_sessions_of_their_own(naming: Rig) -> None:
    first, second = naming.session(FAKE), naming.session(OTHER_FAKE)
    assert first is not second and naming.session(FAKE, 1) is first
    assert naming.session("198.51.100.1") is first and naming.session(OTHER_FAKE, 2) is second
    assert naming.reply(first, STRANGER) == f"{FAKE}:9000"
    assert naming.reply(second, STRANGER) == f"{OTHER_FAKE}:9000"


@pytest.mark.parametrize("rig", ["direct", "naming"])
def test_datagram_to_an_unknown_fake_address_is_dropped_and_counted(
    rig: str, request: pytest.FixtureRequest
) -> None:
    """Hazard 158."""
    at: Rig = request.getfixturevalue(rig)
    at.peer.owner = None
    assert at.write(UNKNOWN) is None
    assert at.counts.of("drops", "unknown") == 1
    assert [refusal.decided for refusal in at.counts.refusals] == ["dns.fake"]
    assert not at.table.clients and not at.table.entries
