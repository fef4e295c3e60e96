"""Clients that have not finished their handshake: the oldest is shed beyond a limit."""

from __future__ import annotations

import socket
from functools import partial
from types import SimpleNamespace
from typing import Any, Callable

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Blocking, Handshake, Stream
from netproxy.listener.shedding import Handshakes
from netproxy.net.stream import complete
from tests.support.pools import Gate
from tests.support.sockets import SECONDS, nothing_comes, read_to_end, wait_until
from tests.support.tcp import TcpRig

LIMIT = 3
SHED = ("connections_refused", "too many handshakes")


class Bytewise:
    """A handler that returns each byte.  "w" ends the handshake, "." the connection."""

    def handle(self, stream: Stream, client: Address) -> Handshake:
        stream.limit(10 * SECONDS)
        while (byte := (yield from stream.read_some(1))) not in (b"", b"."):
            if byte == b"w":
                stream.handshaking = False
            stream.reply(byte)
        return None


class OnThread:
    """A handler that waits for one byte on a pool thread and returns it."""

    def handle(self, stream: Stream, client: Address) -> Handshake:
        byte = yield Blocking(partial(self._read, stream))
        stream.reply(byte)
        return None

    @staticmethod
    def _read(stream: Stream) -> bytes:
        return complete(stream.read_exactly(1))


class Demanding:
    """A handler that calls an early end a fault."""

    def handle(self, stream: Stream, client: Address) -> Handshake:
        yield from stream.read_exactly(2)
        return None


@pytest.fixture
def rig(make: Callable[..., TcpRig]) -> TcpRig:
    rig = make(LIMIT + 2)
    rig.handshakes = LIMIT
    rig.configure(Bytewise())
    rig.listener.start()
    return rig


def connect_silent(rig: TcpRig, number: int = 1, source: str = "") -> list[socket.socket]:
    """Connect clients that say nothing, each accepted before the next; the oldest is first.

    They come from the address `source`.
    """
    socks = []
    for _ in range(number):
        expected = len(rig.admission.entered) + 1
        socks.append(rig.connect(source=source))
        wait_until(lambda expected=expected: len(rig.admission.entered) == expected)
    wait_until(lambda: rig.counts.of("connections", "accepted") == len(rig.admission.entered))
    return socks


def exchange(sock: socket.socket, byte: bytes) -> bytes:
    """Send a byte and return the answer."""
    sock.sendall(byte)
    return sock.recv(1)


def connect_served(rig: TcpRig) -> socket.socket:
    """Connect a client that has finished its handshake."""
    (sock,) = connect_silent(rig)
    assert exchange(sock, b"w") == b"w"
    return sock


def test_silent_clients_up_to_the_limit_stay(rig: TcpRig) -> None:
    socks = connect_silent(rig, LIMIT)
    assert all(nothing_comes(sock) for sock in socks)
    assert [exchange(sock, b"x") for sock in socks] == [b"x"] * LIMIT
    assert rig.counts.of(*SHED) == 0 and rig.listener.live == LIMIT


def test_oldest_silent_client_is_shed_for_one_more(rig: TcpRig) -> None:
    socks = connect_silent(rig, LIMIT + 1)
    assert read_to_end(socks[0]) == b""
    rig.counts.wait_for(*SHED)
    assert [exchange(sock, b"x") for sock in socks[1:]] == [b"x"] * LIMIT
    wait_until(lambda: rig.listener.live == len(rig.admission.inside) == LIMIT)
    assert rig.counts.of(*SHED) == 1


def test_silent_clients_are_shed_in_the_order_they_came(rig: TcpRig) -> None:
    socks = connect_silent(rig, LIMIT)
    for number in range(LIMIT):
        socks += connect_silent(rig)
        assert read_to_end(socks[number]) == b""
        assert rig.counts.of(*SHED) == number + 1
        assert all(nothing_comes(sock, 0.01) for sock in socks[number + 1 :])
    wait_until(lambda: rig.listener.live == LIMIT)


def test_client_that_talks_within_its_handshake_is_shed_as_well(rig: TcpRig) -> None:
    """It sends a byte now and then, and never a whole request."""
    (oldest,) = connect_silent(rig)
    assert exchange(oldest, b"x") == b"x"
    connect_silent(rig, LIMIT)
    assert read_to_end(oldest) == b""
    assert rig.counts.of(*SHED) == 1


def test_client_with_a_finished_handshake_is_never_shed(rig: TcpRig) -> None:
    served = [connect_served(rig) for _ in range(LIMIT + 2)]
    assert rig.counts.of(*SHED) == 0
    silent = connect_silent(rig, 4 * LIMIT)
    for sock in silent[:-LIMIT]:
        assert read_to_end(sock) == b""
    staying = served + silent[-LIMIT:]
    assert [exchange(sock, b"x") for sock in staying] == [b"x"] * (2 * LIMIT + 2)
    assert rig.counts.of(*SHED) == 3 * LIMIT
    wait_until(lambda: rig.listener.live == 2 * LIMIT + 2)


def test_client_that_finishes_its_handshake_frees_a_place(rig: TcpRig) -> None:
    first, second, third = connect_silent(rig, LIMIT)
    assert exchange(first, b"w") == b"w"
    (fourth,) = connect_silent(rig)
    assert all(nothing_comes(sock) for sock in (first, second, third, fourth))
    assert rig.counts.of(*SHED) == 0
    connect_silent(rig)
    assert read_to_end(second) == b""
    assert exchange(first, b"x") == b"x" and rig.counts.of(*SHED) == 1


def test_client_is_served_among_many_silent_ones(rig: TcpRig) -> None:
    silent = connect_silent(rig, 5 * LIMIT)
    served = connect_served(rig)
    silent += connect_silent(rig, 5 * LIMIT)
    assert exchange(served, b"x") == b"x"
    served.sendall(b".")
    assert read_to_end(served) == b""
    assert [read_to_end(sock) for sock in silent[:-LIMIT]] == [b""] * (9 * LIMIT)
    assert rig.counts.of(*SHED) == 9 * LIMIT
    wait_until(lambda: rig.listener.live == len(rig.admission.inside) == LIMIT)


@pytest.mark.parametrize("by", ["the handler", "the client"])
def test_ended_connections_do_not_count(rig: TcpRig, by: str) -> None:
    (first,) = connect_silent(rig)
    for _ in range(3 * LIMIT):
        (sock,) = connect_silent(rig)
        if by == "the handler":
            sock.sendall(b".")
            assert read_to_end(sock) == b""
        else:
            sock.close()
        wait_until(lambda: rig.listener.live == 1)
    assert exchange(first, b"x") == b"x"
    assert rig.counts.of(*SHED) == 0 and len(rig.admission.entered) == 3 * LIMIT + 1


def test_refused_client_takes_no_place(rig: TcpRig) -> None:
    socks = connect_silent(rig, LIMIT)
    rig.admission.refusal = "not allowed"
    assert [read_to_end(rig.connect()) for _ in range(LIMIT)] == [b""] * LIMIT
    assert [exchange(sock, b"x") for sock in socks] == [b"x"] * LIMIT
    assert rig.counts.of(*SHED) == 0
    assert rig.counts.of("connections_refused", "not allowed") == LIMIT


def test_client_whose_handshake_holds_a_thread_is_shed_as_well(rig: TcpRig) -> None:
    rig.configure(OnThread())
    socks = connect_silent(rig, LIMIT + 1)
    assert read_to_end(socks[0]) == b""
    assert [exchange(sock, b"x") for sock in socks[1:]] == [b"x"] * LIMIT
    assert rig.counts.of(*SHED) == 1


def test_client_whose_bytes_were_not_read_yet_is_not_shed(make: Callable[..., TcpRig]) -> None:
    """In a burst the daemon is late, not the client."""
    rig, gate = make(1), Gate()
    rig.handshakes = LIMIT
    rig.configure(OnThread())
    rig.listener.start()
    assert rig.pool.submit(gate)
    first, second, third = connect_silent(rig, LIMIT)
    first.sendall(b"x")
    (fourth,) = connect_silent(rig)
    assert read_to_end(second) == b""
    gate.let_go()
    assert first.recv(1) == b"x"
    assert nothing_comes(third) and nothing_comes(fourth)
    assert rig.counts.of(*SHED) == 1


def test_shed_client_has_a_record(rig: TcpRig) -> None:
    connect_silent(rig, LIMIT + 2)
    rig.counts.wait_for(*SHED, 2)
    decided = "limits.handshakes"
    assert {(refusal.client, refusal.decided) for refusal in rig.counts.refusals} == {
        ("127.0.0.1", decided)
    }


@pytest.mark.parametrize("sent", [b"", b"x"])
def test_shed_client_is_counted_once(rig: TcpRig, sent: bytes) -> None:
    """Its end is the daemon's doing, and no fault of the client."""
    (oldest,) = connect_silent(rig)
    if sent:
        assert exchange(oldest, sent) == sent
    rig.configure(Demanding())
    socks = connect_silent(rig, 2 * LIMIT)
    for sock in [oldest, *socks[:LIMIT]]:
        assert read_to_end(sock) == b""
    wait_until(lambda: rig.listener.live == LIMIT)
    assert rig.outcomes() == {"accepted": 2 * LIMIT + 1}
    assert rig.counts.of(*SHED) == len(rig.counts.refusals) == LIMIT + 1
    assert not rig.log.lines


class TestFairness:
    """Hazard 137."""

    @pytest.mark.parametrize("attackers", [1, 2, 50])
    def test_attackers_take_no_handshake_of_a_good_client(
        self, make: Callable[..., TcpRig], attackers: int
    ) -> None:
        limit, rounds = 64, 12
        rig = make()
        rig.handshakes = limit
        rig.configure(Bytewise())
        rig.listener.start()
        sources = [f"127.0.1.{number + 1}" for number in range(attackers)]
        each = -(-2 * limit // attackers)
        flood(rig, sources * each)
        answers = []
        for _ in range(rounds):
            (good,) = connect_silent(rig)
            # More than all that are held come anew while the good client thinks.
            flood(rig, sources * each)
            answers.append(exchange(good, b"w"))
            close_early(rig, 2 * attackers * each)
        assert answers == [b"w"] * rounds
        assert rig.counts.of(*SHED) >= rounds * attackers * each

    def test_client_with_most_handshakes_loses_its_oldest(self, rig: TcpRig) -> None:
        few = connect_silent(rig, 1, "127.0.0.2")
        many = connect_silent(rig, LIMIT - 1, "127.0.0.3")
        few += connect_silent(rig, 1, "127.0.0.4")
        assert read_to_end(many[0]) == b""
        assert [exchange(sock, b"x") for sock in few + many[1:]] == [b"x"] * LIMIT

    def test_newcomer_of_the_client_with_most_takes_the_place_of_its_own(self, rig: TcpRig) -> None:
        few = connect_silent(rig, 1, "127.0.0.2")
        many = connect_silent(rig, 3 * LIMIT, "127.0.0.3")
        assert [read_to_end(sock) for sock in many[: 1 - LIMIT]] == [b""] * (2 * LIMIT + 1)
        assert [exchange(sock, b"x") for sock in few + many[1 - LIMIT :]] == [b"x"] * LIMIT

    def test_finished_handshakes_do_not_count_for_their_client(self, rig: TcpRig) -> None:
        """A client with many running connections is not the one that has most handshakes."""
        connect_silent(rig, 2 * LIMIT, "127.0.0.3")
        served = [connect_served(rig) for _ in range(2 * LIMIT)]
        (newest,) = connect_silent(rig)
        connect_silent(rig, LIMIT, "127.0.0.3")
        assert [exchange(sock, b"x") for sock in [*served, newest]] == [b"x"] * (2 * LIMIT + 1)

    def test_ended_attack_leaves_nothing_behind(self, rig: TcpRig) -> None:
        for sock in connect_silent(rig, 4 * LIMIT, "127.0.0.3"):
            sock.close()
        wait_until(rig.all_ended)
        handshakes = rig.listener.handshakes
        assert handshakes.room == LIMIT and not handshakes.uncounted
        served = [connect_silent(rig)[0] for _ in range(LIMIT)]
        before = rig.counts.of(*SHED)
        assert [exchange(sock, b"w") for sock in served] == [b"w"] * LIMIT
        assert rig.counts.of(*SHED) == before


class Shaking:
    """A Handshaking without a socket."""

    def __init__(self, host: str) -> None:
        self.client = Address(host, 1)
        self.stream: Any = SimpleNamespace(handshaking=True)
        self.counted = self.refused = ""
        self.unread = False

    def has_unread(self) -> bool:
        return self.unread


class TestHandshakes:
    def add(self, handshakes: Handshakes, *hosts: str) -> list[Shaking | None]:
        """Add a connection of each host; return what each has shed."""
        shed: list[Any] = []
        for host in hosts:
            handshakes.uncounted[Shaking(host)] = None
            full = len(handshakes.uncounted) > handshakes.room
            shed.append(handshakes.shed() if full else None)
        return shed

    @pytest.fixture
    def handshakes(self) -> Handshakes:
        handshakes = Handshakes()
        handshakes.set_limit(LIMIT)
        return handshakes

    def test_ipv6_network_is_one_client(self, handshakes: Handshakes) -> None:
        """Hazard 137."""
        self.add(handshakes, "2001:db8:1::1", "2001:db8:2::1", "2001:db8:1::2")
        (shed,) = self.add(handshakes, "2001:db8:3::1")
        assert shed is not None and shed.client.host == "2001:db8:1::1"

    def test_nothing_is_shed_while_all_candidates_have_sent_something(
        self, handshakes: Handshakes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Shaking, "has_unread", lambda self: True)
        assert self.add(handshakes, *["192.0.2.1"] * 2 * LIMIT) == [None] * 2 * LIMIT
        assert all(self.add(handshakes, *["192.0.2.1"] * LIMIT))

    def test_connection_that_left_meanwhile_is_not_counted(self, handshakes: Handshakes) -> None:
        gone = Shaking("192.0.2.1")
        handshakes.uncounted[gone] = None
        gone.stream.handshaking = False
        assert self.add(handshakes, *["192.0.2.2"] * LIMIT) == [None] * LIMIT
        assert not handshakes.leave(gone)


def flood(rig: TcpRig, sources: list[str]) -> None:
    """Connect a silent client from each address."""
    expected = len(rig.admission.entered) + len(sources)
    for source in sources:
        rig.connect(source=source)
    wait_until(lambda: rig.counts.of("connections", "accepted") == expected)


def close_early(rig: TcpRig, keep: int) -> None:
    """Close the clients that came first: they were shed long ago."""
    for sock in rig.clients[:-keep]:
        sock.close()
    del rig.clients[:-keep]

    def test_burst_of_a_good_client_loses_nothing_while_attackers_hold_the_limit(self) -> None:
        """Hazard 137: a page opens 20 connections at once.  Chance below the limit, as of
        OpenSSH's MaxStartups, would refuse most of them."""
        limit, burst = 256, 20
        handshakes = Handshakes()
        handshakes.set_limit(limit)
        attackers = [f"198.51.100.{number}" for number in range(8)]
        self.add(handshakes, *attackers * limit)
        shed = self.add(handshakes, *["192.0.2.1"] * burst)
        shed += self.add(handshakes, *attackers * limit)
        hosts = [connection.client.host for connection in shed if connection is not None]
        assert len(hosts) == burst + len(attackers) * limit
        assert "192.0.2.1" not in hosts

    def test_limit_may_change_while_there_are_handshakes(self, handshakes: Handshakes) -> None:
        assert self.add(handshakes, *["192.0.2.1"] * LIMIT) == [None] * LIMIT
        handshakes.set_limit(2 * LIMIT)
        assert self.add(handshakes, *["192.0.2.1"] * LIMIT) == [None] * LIMIT
        handshakes.set_limit(LIMIT)
        assert all(self.add(handshakes, *["192.0.2.1"] * LIMIT))
