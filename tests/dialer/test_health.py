"""Health checks: when they are due, what they ask, and what is told of their outcome.

The time is what expire() is told; servers are scripted, on loopback.
"""

from __future__ import annotations

import socket
import time
from typing import Any, Callable, Iterator

import pytest

from netproxy.dialer.direct import DirectDialer
from netproxy.dialer.group import GroupDialer, Member
from netproxy.dialer.health import NOBODY, Check, HealthChecks
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import Stream
from tests.dialer.test_group import TCP, Way, fault
from tests.support.doubles import Lines
from tests.support.sockets import HAS_IPV6, black_hole, read_to_end, refusing, server, wait_until
from tests.support.upstreams import Workers

TARGET = Address("198.51.100.7", 443)
NOW = 5000.0


class Rig:
    """Checks of the members of one group, on a pool that runs what it is given when it is told to."""

    def __init__(self, eager: bool = True) -> None:
        self.log, self.pool = Lines(), Workers(eager)
        self.begun = 0  # checks that were given to the pool, and taken
        self.health = HealthChecks(self._submit, self.log)

    def add(
        self,
        way: Any,
        target: Address = TARGET,
        path: bytes = b"",
        interval: float = 30.0,
        timeout: float = 2.0,
    ) -> Member:
        member = Member(getattr(way, "name", "a"), way, 1)
        self.health.checks = [
            *self.health.checks,
            Check("pool", member, target, way, path, interval, timeout),
        ]
        return member

    def tick(self, now: float) -> int:
        """One second of the janitor; how many checks it began."""
        before = self.begun
        for begin in self.health.expire(now):
            begin()
        return self.begun - before

    def _submit(self, task: Callable[[], None]) -> bool:
        taken = not self.pool.full
        self.begun += taken
        return self.pool.submit(task) and taken

    def lines(self) -> list[str]:
        assert all(level == "warning" for level, _ in self.log.lines)
        return [text for _, text in self.log.lines]


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def slow() -> Iterator[Rig]:
    """Checks wait until the test lets them run."""
    one = Rig(eager=False)
    yield one
    one.pool.run()


class TestDue:
    def test_at_once_and_then_after_each_interval(self, rig: Rig) -> None:
        way = Way("a")
        rig.add(way, interval=30.0)
        begun = [rig.tick(NOW + second) for second in range(91)]
        assert [second for second, count in enumerate(begun) if count] == [0, 30, 60, 90]
        assert len(way.flows) == 4

    def test_each_by_its_own_interval(self, rig: Rig) -> None:
        often, rarely = Way("often"), Way("rarely")
        rig.add(often, interval=1.0)
        rig.add(rarely, interval=10.0)
        for second in range(20):
            rig.tick(NOW + second)
        assert (len(often.flows), len(rarely.flows)) == (20, 2)

    def test_shorter_than_a_tick_is_each_tick(self, rig: Rig) -> None:
        rig.add(Way("a"), interval=0.5)
        assert [rig.tick(NOW + second) for second in range(3)] == [1, 1, 1]

    def test_never_two_at_once_for_one_member(self, slow: Rig) -> None:
        """A check that takes longer than its interval is waited for."""
        slow.add(Way("a"), interval=5.0)
        assert [slow.tick(NOW + second) for second in (0, 5, 60)] == [1, 0, 0]
        slow.pool.run()
        assert slow.tick(NOW + 61) == 1

    def test_never_two_at_once_for_a_member_that_is_listed_twice(self, slow: Rig) -> None:
        """As when a group is used by two names: both make a check of the same member, and both are due."""
        slow.add(Way("a"))
        slow.health.checks = [*slow.health.checks, *slow.health.checks]
        assert slow.tick(NOW) == 1
        assert len(slow.pool.tasks) == 1

    def test_nor_one_right_after_the_other(self, rig: Rig) -> None:
        """Though the first is done before the second's turn comes."""
        rig.add(Way("a"), interval=30.0)
        rig.health.checks = [*rig.health.checks, *rig.health.checks]
        assert [rig.tick(NOW + second) for second in (0, 1, 30)] == [1, 0, 1]

    def test_others_are_not_held_up_by_one_that_is_silent(self, slow: Rig) -> None:
        slow.add(Way("a"), interval=5.0)
        slow.tick(NOW)
        slow.add(Way("b"), interval=5.0)
        assert slow.tick(NOW + 1) == 1

    def test_again_the_next_second_where_the_pool_is_full(self, rig: Rig) -> None:
        way = Way("a")
        member = rig.add(way, interval=30.0)
        rig.pool.full = True
        rig.tick(NOW)
        assert (member.checking, way.flows) == (False, [])
        rig.pool.full = False
        assert rig.tick(NOW + 1) == 1
        assert len(way.flows) == 1

    def test_a_full_pool_is_no_news(self, rig: Rig) -> None:
        member = rig.add(Way("a"))
        rig.pool.full = True
        rig.tick(NOW)
        assert (member.up, rig.lines()) == (True, [])

    def test_no_longer_once_the_configuration_has_none(self, slow: Rig) -> None:
        member = slow.add(Way("a"))
        slow.tick(NOW)
        slow.health.checks = []
        assert slow.tick(NOW + 60) == 0
        slow.pool.run()
        assert (member.checking, member.up) == (False, True)


class TestAsking:
    def test_it_is_a_flow_of_nobodys(self, rig: Rig) -> None:
        way = Way("a")
        rig.add(way)
        rig.tick(NOW)
        assert way.flows == [Flow("tcp", NOBODY, TARGET, "", "")]

    def test_it_is_no_connection_of_the_members(self, rig: Rig) -> None:
        member = rig.add(Way("a"))
        rig.tick(NOW)
        assert (member.live, member.dialled, member.failed, member.latency) == (0, 0, 0, 0.0)

    def test_a_member_that_failed_may_be_asked_again_once_a_check_goes_well(self, rig: Rig) -> None:
        member = rig.add(Way("a"))
        for _ in range(10):
            member.note_failure(fault()())
        assert member.rests(time.monotonic())
        rig.tick(NOW)
        assert not member.rests(time.monotonic())
        assert not rig.lines()

    def test_who_is_down_is_dialled_again_once_a_check_goes_well(self, rig: Rig) -> None:
        way = Way("a")
        group = GroupDialer("pool", [rig.add(way)], "failover", 1.0)
        way.fails = fault(said="gone")
        rig.tick(NOW)
        way.fails = None
        with pytest.raises(DialError, match="^group 'pool': no live member: a: gone$"):
            group.dial(TCP)
        rig.tick(NOW + 30)
        group.dial(TCP).close()


class TestConnecting:
    def test_it_is_enough_to_connect(self, rig: Rig, direct: DirectDialer) -> None:
        """And the connection is closed without a byte."""
        got: list[bytes] = []
        with server(lambda sock: got.append(read_to_end(sock))) as address:
            member = rig.add(direct, address)
            rig.tick(NOW)
            wait_until(lambda: got)
        assert (member.up, got, rig.lines()) == (True, [b""], [])

    def test_a_port_that_refuses(self, rig: Rig, direct: DirectDialer) -> None:
        with refusing() as address:
            member = rig.add(direct, address)
            rig.tick(NOW)
        assert (member.up, member.error) == (False, f"{address}: connection refused")

    def test_a_port_that_does_not_answer(self, rig: Rig, direct: DirectDialer) -> None:
        direct._seconds = 0.1
        with black_hole() as address:
            member = rig.add(direct, address)
            rig.tick(NOW)
        assert (member.up, member.error) == (False, f"{address}: timed out")

    def test_a_proxy_that_refuses_the_target(self, rig: Rig) -> None:
        way = Way("a")
        way.fails = lambda: DialError(Reason.REFUSED, str(TARGET))
        member = rig.add(way)
        rig.tick(NOW)
        assert (member.up, member.error) == (False, f"{TARGET}: connection refused")


def answering(data: bytes, got: list[bytes] | None = None) -> Callable[[socket.socket], None]:
    """Reads a request and sends `data`."""

    def script(sock: socket.socket) -> None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += sock.recv(65536) or b"\r\n\r\n"
        if got is not None:
            got.append(request)
        sock.sendall(data)

    return script


class TestPath:
    """A page is asked for by HTTP/1.1; its status says whether all is well."""

    def check(
        self,
        direct: DirectDialer,
        script: Callable[[socket.socket], Any],
        timeout: float = 2.0,
        host: str = "127.0.0.1",
    ) -> tuple[Member, Address]:
        rig = Rig()
        with server(script, host) as address:
            member = rig.add(direct, address, b"/health?x=1", timeout=timeout)
            rig.tick(NOW)
        assert rig.lines() == (
            [] if member.up else [f"group 'pool': direct is down: {member.error}"]
        )
        return member, address

    def test_the_request(self, direct: DirectDialer) -> None:
        got: list[bytes] = []
        _, address = self.check(direct, answering(b"HTTP/1.1 200 OK\r\n\r\n", got))
        assert got == [
            b"GET /health?x=1 HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n"
            % str(address).encode()
        ]

    @pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
    def test_an_ipv6_host_has_brackets(self, direct: DirectDialer) -> None:
        got: list[bytes] = []
        _, address = self.check(direct, answering(b"HTTP/1.1 200 OK\r\n\r\n", got), host="::1")
        assert b"\r\nHost: [::1]:%d\r\n" % address.port in got[0]

    @pytest.mark.parametrize("status", [200, 204, 299, 301, 302, 304, 399])
    def test_these_are_well(self, direct: DirectDialer, status: int) -> None:
        member, _ = self.check(
            direct, answering(b"HTTP/1.1 %d Whatever\r\nContent-Length: 5\r\n\r\nhello" % status)
        )
        assert (member.up, member.error) == (True, "")

    @pytest.mark.parametrize("status", [400, 401, 404, 500, 502, 503, 599])
    def test_these_are_not(self, direct: DirectDialer, status: int) -> None:
        member, address = self.check(
            direct, answering(b"HTTP/1.1 %d Whatever\r\nContent-Length: 0\r\n\r\n" % status)
        )
        assert (member.up, member.error) == (False, f"{address} answered {status}")

    @pytest.mark.parametrize(
        "interim",
        [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"],
    )
    def test_an_interim_answer_is_none(self, direct: DirectDialer, interim: bytes) -> None:
        """RFC 9110 section 15.2: a client must be able to read them, though it did not ask for them."""
        member, _ = self.check(direct, answering(interim + b"HTTP/1.1 200 OK\r\n\r\n"))
        assert member.up

    @pytest.mark.parametrize(
        "answer, error",
        [
            (b"SSH-2.0-OpenSSH_9.2\r\n", "not an HTTP/1 status line"),
            (b"\x05\xff\r\n", "not an HTTP/1 status line"),
            (b"", "closed within a line"),
            (b"HTTP/1.1 200", "closed within a line"),
            (b"HTTP/1.1 200 OK\r\nA: b\r\n", "closed within a head"),
            (b"HTTP/1.1 200 OK\r\n b\r\n\r\n", ""),
        ],
    )
    def test_garbage_is_not(self, direct: DirectDialer, answer: bytes, error: str) -> None:
        member, _ = self.check(direct, answering(answer))
        assert not member.up and member.error
        assert error in member.error

    def test_silence_is_not_after_the_timeout(self, direct: DirectDialer) -> None:
        started = time.monotonic()
        member, _ = self.check(direct, read_to_end, timeout=0.1)
        assert (member.up, member.error) == (False, "out of time")
        assert time.monotonic() - started < 1.5

    def test_an_answer_that_drips_is_not_after_the_timeout(self, direct: DirectDialer) -> None:
        def drip(sock: socket.socket) -> None:
            try:
                sock.sendall(b"HTTP/1.1 200 OK\r\n")
                while sock.recv(65536):
                    pass
            except ConnectionError:
                pass

        member, _ = self.check(direct, drip, timeout=0.1)
        assert member.error == "out of time"


class TestNews:
    def test_is_told_once_for_each_change(self, rig: Rig) -> None:
        way = Way("a")
        rig.add(way, interval=1.0)
        for second, fails in enumerate([None, None, "x", "x", "y", None, None, "z", None]):
            way.fails = fault(Reason.GENERAL, said=fails) if fails else None
            rig.tick(NOW + second)
        assert rig.lines() == [
            "group 'pool': a is down: x",
            "group 'pool': a is up",
            "group 'pool': a is down: z",
            "group 'pool': a is up",
        ]

    def test_names_the_member_and_the_hop(self, rig: Rig) -> None:
        way = Way("office")
        way.fails = fault(Reason.TIMEOUT, hop="'office' (socks5://10.0.0.1:1080)")
        rig.add(way)
        rig.tick(NOW)
        assert rig.lines() == [
            "group 'pool': office is down: 'office' (socks5://10.0.0.1:1080): timed out"
        ]

    def test_of_one_member_is_none_of_another(self, rig: Rig) -> None:
        ways = [Way("a"), Way("b")]
        members = [rig.add(way) for way in ways]
        ways[1].fails = fault(said="x")
        rig.tick(NOW)
        assert ([member.up for member in members], rig.lines()) == (
            [True, False],
            ["group 'pool': b is down: x"],
        )


class TestFaults:
    @pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError])
    def test_an_exception_leaves_nothing_checking(self, rig: Rig, error: type[Exception]) -> None:
        """It goes on to the pool, which logs it; the member is down until the next check says otherwise."""
        way = Way("a")
        member = rig.add(way)
        way.fails = error
        with pytest.raises(error):
            rig.tick(NOW)
        assert (member.checking, member.up, member.error) == (False, False, "the check failed")
        assert rig.lines() == ["group 'pool': a is down: the check failed"]
        way.fails = None
        rig.tick(NOW + 30)
        assert (member.up, rig.lines()[1:]) == (True, ["group 'pool': a is up"])

    @pytest.mark.parametrize("path", [b"", b"/"])
    def test_a_stream_is_closed_and_not_left_to_be_collected(self, rig: Rig, path: bytes) -> None:
        """Its socket takes nothing, so that asking for a page fails."""
        closed: list[str] = []

        class Watched(Way):
            def dial(self, flow: Flow) -> Stream:
                stream = super().dial(flow)
                stream.on_close(lambda: closed.append("once"))
                return stream

        member = rig.add(Watched("a"), path=path)
        try:
            rig.tick(NOW)
        except AttributeError:
            assert path
        assert (closed, member.checking) == (["once"], False)

    def test_a_stream_is_closed_whatever_comes_of_it(self, rig: Rig, direct: DirectDialer) -> None:
        """The server sees the end of it; the fixture sees no descriptor left."""
        ended: list[bytes] = []

        def script(sock: socket.socket) -> None:
            sock.sendall(b"nonsense\r\n")
            ended.append(read_to_end(sock))

        with server(script) as address:
            rig.add(direct, address, b"/")
            rig.tick(NOW)
            wait_until(lambda: ended)
        assert ended[0].startswith(b"GET / HTTP/1.1\r\n")
