"""A session's reader: what comes from the upstream reaches the client behind the header of its source."""

from __future__ import annotations

import threading

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.datagram import Arena, ArenaPool
from netproxy.relay import session as session_module
from netproxy.relay.session import INDEPENDENT, Client, Session
from tests.support.doubles import Counts, Lines
from tests.support.upstreams import FakeConn, FakeDialer, FakeSocket

SOURCE, OTHER = ("198.51.100.1", 53), ("198.51.100.2", 54)
FLOW = Flow("udp", Address("192.0.2.1", 5000), Address("198.51.100.1", 53), "main", "")


class SessionRig:
    def __init__(self, headers: bool = True) -> None:
        self.counts = Counts()
        self.local = FakeSocket()
        self.wrapped: list[Address] = []
        self.headers = headers
        client = Client("peer", FLOW.client, self.local, self._wrap, None)
        self.session = Session(
            client, "mapping", FLOW, FakeDialer(), INDEPENDENT, 0.0, lambda session: None
        )
        self.conn = FakeConn()
        self.ended: list[tuple[Session, bool]] = []  # and whether its upstream was closed by then

    def _wrap(self, source: Address) -> bytes:
        self.wrapped.append(source)
        return f"<{source}>".encode() if self.headers else b""

    def _ended(self, session: Session) -> None:
        self.ended.append((session, self.conn.closed.is_set()))

    def start(self) -> None:
        self.session.start(self.conn, ArenaPool(Arena), self._ended, self.counts, Lines())

    def stop(self) -> None:
        self.conn.shutdown()
        assert self.conn.closed.wait(5)


@pytest.fixture
def rig() -> SessionRig:
    return SessionRig()


def test_each_datagram_comes_behind_the_header_of_its_source(rig: SessionRig) -> None:
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


def test_a_header_is_made_once_for_each_source(rig: SessionRig) -> None:
    rig.start()
    for number in range(1, 6):
        rig.conn.offer((b"x", SOURCE))
        rig.local.wait_for(number)
    assert rig.wrapped == [Address(*SOURCE)]
    rig.stop()


def test_no_header_is_no_header() -> None:
    rig = SessionRig(headers=False)
    rig.conn.offer((b"lone", SOURCE))
    rig.start()
    rig.local.wait_for(1)
    rig.conn.offer((b"a", SOURCE), (b"b", SOURCE))
    rig.local.wait_for(3)
    assert [data for data, _ in rig.local.sent] == [b"lone", b"a", b"b"]
    rig.stop()


def test_an_empty_datagram_comes_back_as_one(rig: SessionRig) -> None:
    rig.conn.offer((b"", SOURCE))
    rig.start()
    rig.local.wait_for(1)
    rig.conn.offer((b"x", SOURCE), (b"", SOURCE), (b"y", SOURCE))
    rig.local.wait_for(4)
    assert [data for data, _ in rig.local.sent] == [
        b"<198.51.100.1:53>" + data for data in (b"", b"x", b"", b"y")
    ]
    rig.stop()


def test_memory_for_sources_is_bounded(rig: SessionRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone may send to its port."""
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


def test_counts_both_ways(rig: SessionRig) -> None:
    rig.conn.offer((b"four", SOURCE), (b"four", SOURCE), (b"2b", OTHER))
    rig.start()
    rig.local.wait_for(3)
    rig.stop()
    rig.session.count_sent(Arena().put(b"123"))
    record = rig.session.record()
    assert (record.received, record.datagrams_received) == (10, 3)
    assert (record.sent, record.datagrams_sent) == (3, 1)
    assert (record.flow, record.upstream) == (FLOW, "fake")


def test_a_fault_in_one_batch_does_not_silence_the_session(rig: SessionRig) -> None:
    rig.conn.offer((b"x", "no source"))
    rig.start()
    rig.counts.wait_for("drops", "internal error")
    rig.conn.offer((b"y", SOURCE))
    rig.local.wait_for(1)
    rig.stop()


def test_the_reader_tells_of_its_end_and_closes_its_upstream(rig: SessionRig) -> None:
    rig.start()
    assert not rig.conn.closed.is_set() and not rig.ended
    rig.conn.shutdown()
    assert rig.conn.closed.wait(5)
    assert rig.ended == [(rig.session, False)]


def test_no_thread_is_no_session(rig: SessionRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError):
        rig.start()
    assert rig.session.conn is None
