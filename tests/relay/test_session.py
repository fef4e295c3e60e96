"""The reader of a session: replies reach the client behind the header of their source."""

from __future__ import annotations

import threading
from typing import Callable

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.datagram import Arena, ArenaPool
from netproxy.relay import session as session_module
from netproxy.relay.client import Client
from netproxy.relay.table.policy import NatDependencies
from netproxy.relay.session import Session
from netproxy.relay.table.reply_sources import ENDPOINT_INDEPENDENT
from tests.support.accounts import account_book, free_account
from tests.support.doubles import Counts, Lines, Records
from tests.support.sockets import SECONDS
from tests.support.upstreams import FakeConn, FakeDialer, FakeSocket

SOURCE, OTHER = ("198.51.100.1", 53), ("198.51.100.2", 54)
FLOW = Flow("udp", Address("192.0.2.1", 5000), Address("198.51.100.1", 53), "main", "")


class SessionRig:
    """A session without a table, which it is itself."""

    def __init__(self, headers: bool = True) -> None:
        self.counts = Counts()
        self.local = FakeSocket()
        self.wrapped: list[Address] = []
        self.headers = headers
        client = Client("peer", FLOW.client, self.local, self._wrap, None)
        self.session = Session(
            client, FLOW, FakeDialer(), ENDPOINT_INDEPENDENT, 0.0, self, free_account()
        )
        self.conn = FakeConn()
        self.ended: list[tuple[Session, str, bool]] = []
        """Sessions that ended, why, and whether their upstream was closed by then."""

    def _wrap(self, source: Address) -> bytes:
        self.wrapped.append(source)
        return f"<{source}>".encode() if self.headers else b""

    def end_session(self, session: Session, reason: str) -> None:
        self.ended.append((session, reason, self.conn.closed.is_set()))

    def start(self) -> None:
        dependencies = NatDependencies(
            *(ArenaPool(Arena), no_work, no_work, self.counts, Records(), account_book(), Lines()),
            renew_fake=nothing_to_renew,
        )
        self.session.start(self.conn, dependencies)

    def stop(self) -> None:
        self.conn.shutdown()
        assert self.conn.closed.wait(SECONDS)


def nothing_to_renew(client: str, hosts: object) -> None:
    raise AssertionError("no session has fake addresses")


def no_work(task: Callable[[], None]) -> bool:
    raise AssertionError("a session has no work for a pool")


@pytest.fixture
def rig() -> SessionRig:
    return SessionRig()


def test_reply_comes_behind_the_header_of_its_source(rig: SessionRig) -> None:
    rig.conn.offer((b"one", SOURCE), (b"two", OTHER), (b"six", SOURCE))
    rig.start()
    rig.local.wait_for(3)
    assert sorted(rig.local.sent) == sorted(
        [
            (b"<198.51.100.1:53>one", "back to peer"),
            (b"<198.51.100.1:53>six", "back to peer"),
            (b"<198.51.100.2:54>two", "back to peer"),
        ]
    )
    rig.stop()


def test_header_is_encoded_once_for_each_source(rig: SessionRig) -> None:
    rig.start()
    for number in range(1, 6):
        rig.conn.offer((b"x", SOURCE))
        rig.local.wait_for(number)
    assert rig.wrapped == [Address(*SOURCE)]
    rig.stop()


def test_reply_without_header_is_the_payload_alone() -> None:
    rig = SessionRig(headers=False)
    rig.conn.offer((b"lone", SOURCE))
    rig.start()
    rig.local.wait_for(1)
    rig.conn.offer((b"a", SOURCE), (b"b", SOURCE))
    rig.local.wait_for(3)
    assert [data for data, _ in rig.local.sent] == [b"lone", b"a", b"b"]
    rig.stop()


def test_empty_reply_comes_as_an_empty_datagram(rig: SessionRig) -> None:
    rig.conn.offer((b"", SOURCE))
    rig.start()
    rig.local.wait_for(1)
    rig.conn.offer((b"x", SOURCE), (b"", SOURCE), (b"y", SOURCE))
    rig.local.wait_for(4)
    assert [data for data, _ in rig.local.sent] == [
        b"<198.51.100.1:53>" + data for data in (b"", b"x", b"", b"y")
    ]
    rig.stop()


def test_headers_of_sources_are_bounded(rig: SessionRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone may send to the session's port."""
    monkeypatch.setattr(session_module, "SOURCES_LIMIT", 4)
    rig.start()
    for port in range(1, 20):
        rig.conn.offer((b"x", ("198.51.100.1", port)))
        rig.local.wait_for(port)
    assert len(rig.session._headers) <= 4
    assert [data for data, _ in rig.local.sent] == [
        f"<198.51.100.1:{port}>x".encode() for port in range(1, 20)
    ]
    rig.stop()


def test_session_counts_bytes_and_datagrams_in_both_directions(rig: SessionRig) -> None:
    rig.conn.offer((b"four", SOURCE), (b"four", SOURCE), (b"2b", OTHER))
    rig.start()
    rig.local.wait_for(3)
    rig.stop()
    arena = Arena()
    rig.session.send(arena, arena.put(b"123"), rig.conn.prepare(FLOW))
    record = rig.session.record()
    assert (record.received, record.datagrams_received) == (10, 3)
    assert (record.sent, record.datagrams_sent) == (3, 1)
    assert (record.flow, record.upstream) == (FLOW, "fake")


def test_exception_in_one_batch_does_not_silence_the_session(rig: SessionRig) -> None:
    rig.conn.offer((b"x", "no source"))
    rig.start()
    rig.counts.wait_for("drops", "internal error")
    rig.conn.offer((b"y", SOURCE))
    rig.local.wait_for(1)
    rig.stop()


def test_reader_reports_its_end_and_closes_the_upstream(rig: SessionRig) -> None:
    rig.start()
    assert not rig.conn.closed.is_set() and not rig.ended
    rig.conn.shutdown()
    assert rig.conn.closed.wait(SECONDS)
    assert rig.ended == [(rig.session, "upstream closed", False)]


def test_kill_ends_the_session(rig: SessionRig) -> None:
    rig.session.kill()
    assert rig.ended == [(rig.session, "killed", False)]


def test_session_without_a_thread_raises_and_is_not_started(
    rig: SessionRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError):
        rig.start()
    rig.session.shutdown()
    assert not rig.conn.shut.is_set()
