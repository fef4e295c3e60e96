"""Health checks: when they are due, what they send, and what is logged about the result.

The time is what expire() is given; servers are scripted, on loopback.
"""

from __future__ import annotations

import socket
import time
from typing import Any, Callable, Iterator

import pytest

from netproxy.dialer.direct import DirectDialer
from netproxy.dialer.group import GroupDialer
from netproxy.dialer.health import CHECK_CLIENT, Check, HealthChecks
from netproxy.dialer.member import Member
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import Stream
from tests.dialer.doubles import TCP, StubDialer, fault
from tests.support.doubles import Lines
from tests.support.sockets import HAS_IPV6, black_hole, read_to_end, refusing, server, wait_until
from tests.support.upstreams import FakePool

TARGET = Address("198.51.100.7", 443)
NOW = 5000.0


class Rig:
    """Health checks of the members of one group, on a pool without threads."""

    def __init__(self, eager: bool = True) -> None:
        self.log, self.pool = Lines(), FakePool(eager)
        self.begun = 0
        """Checks that the pool has accepted."""
        self.health = HealthChecks(self._submit, self.log)

    def add(
        self,
        dialer: Any,
        target: Address = TARGET,
        path: bytes = b"",
        interval: float = 30.0,
        timeout: float = 2.0,
    ) -> Member:
        """Add a check of a new member with this dialer."""
        member = Member(dialer.name, dialer, 1)
        check = Check("pool", member, target, dialer, path, interval, timeout)
        self.health.checks = [*self.health.checks, check]
        return member

    def tick(self, now: float) -> int:
        """Do what the janitor does in one second; return how many checks began."""
        before = self.begun
        for begin in self.health.expire(now):
            begin()
        return self.begun - before

    def _submit(self, task: Callable[[], None]) -> bool:
        accepted = not self.pool.full
        self.begun += accepted
        return self.pool.submit(task) and accepted

    def lines(self) -> list[str]:
        """Return the log, which has only warnings."""
        assert all(level == "warning" for level, _ in self.log.lines)
        return [text for _, text in self.log.lines]


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def slow() -> Iterator[Rig]:
    """Checks that wait until the test runs the pool."""
    rig = Rig(eager=False)
    yield rig
    rig.pool.run()


class TestDue:
    def test_check_begins_at_once_and_then_after_each_interval(self, rig: Rig) -> None:
        dialer = StubDialer("a")
        rig.add(dialer, interval=30.0)
        begun = [rig.tick(NOW + second) for second in range(91)]
        assert [second for second, count in enumerate(begun) if count] == [0, 30, 60, 90]
        assert len(dialer.flows) == 4

    def test_each_check_has_its_own_interval(self, rig: Rig) -> None:
        often, rarely = StubDialer("often"), StubDialer("rarely")
        rig.add(often, interval=1.0)
        rig.add(rarely, interval=10.0)
        for second in range(20):
            rig.tick(NOW + second)
        assert (len(often.flows), len(rarely.flows)) == (20, 2)

    def test_interval_below_a_second_checks_every_second(self, rig: Rig) -> None:
        rig.add(StubDialer("a"), interval=0.5)
        assert [rig.tick(NOW + second) for second in range(3)] == [1, 1, 1]

    def test_member_is_not_checked_while_its_check_is_running(self, slow: Rig) -> None:
        """Even if the check takes longer than its interval."""
        slow.add(StubDialer("a"), interval=5.0)
        assert [slow.tick(NOW + second) for second in (0, 5, 60)] == [1, 0, 0]
        slow.pool.run()
        assert slow.tick(NOW + 61) == 1

    def test_member_with_two_checks_is_checked_once(self, slow: Rig) -> None:
        """A group with two names has two checks of each member, and both are due."""
        slow.add(StubDialer("a"))
        slow.health.checks = [*slow.health.checks, *slow.health.checks]
        assert slow.tick(NOW) == 1
        assert len(slow.pool.tasks) == 1

    def test_member_with_two_checks_is_not_checked_again_at_once(self, rig: Rig) -> None:
        """Even if the first check ends before the second is looked at."""
        rig.add(StubDialer("a"), interval=30.0)
        rig.health.checks = [*rig.health.checks, *rig.health.checks]
        assert [rig.tick(NOW + second) for second in (0, 1, 30)] == [1, 0, 1]

    def test_check_without_an_answer_does_not_delay_others(self, slow: Rig) -> None:
        slow.add(StubDialer("a"), interval=5.0)
        slow.tick(NOW)
        slow.add(StubDialer("b"), interval=5.0)
        assert slow.tick(NOW + 1) == 1

    def test_check_is_due_again_after_a_full_pool_refused_it(self, rig: Rig) -> None:
        dialer = StubDialer("a")
        member = rig.add(dialer, interval=30.0)
        rig.pool.full = True
        rig.tick(NOW)
        assert (member.checking, dialer.flows) == (False, [])
        rig.pool.full = False
        assert rig.tick(NOW + 1) == 1
        assert len(dialer.flows) == 1

    def test_full_pool_changes_no_state_and_logs_nothing(self, rig: Rig) -> None:
        member = rig.add(StubDialer("a"))
        rig.pool.full = True
        rig.tick(NOW)
        assert (member.up, rig.lines()) == (True, [])

    def test_removed_check_does_not_begin_but_a_running_one_ends(self, slow: Rig) -> None:
        member = slow.add(StubDialer("a"))
        slow.tick(NOW)
        slow.health.checks = []
        assert slow.tick(NOW + 60) == 0
        slow.pool.run()
        assert (member.checking, member.up) == (False, True)


class TestMember:
    def test_flow_of_a_check_has_no_listener_and_no_user(self, rig: Rig) -> None:
        dialer = StubDialer("a")
        rig.add(dialer)
        rig.tick(NOW)
        assert dialer.flows == [Flow("tcp", CHECK_CLIENT, TARGET, "", "")]

    def test_check_is_not_counted_as_a_dial_of_the_member(self, rig: Rig) -> None:
        member = rig.add(StubDialer("a"))
        rig.tick(NOW)
        assert (member.live, member.dialled, member.failed, member.latency) == (0, 0, 0, 0.0)

    def test_successful_check_ends_the_back_off_of_the_member(self, rig: Rig) -> None:
        member = rig.add(StubDialer("a"))
        for _ in range(10):
            member.note_failure(fault()())
        assert member.backs_off(time.monotonic())
        rig.tick(NOW)
        assert not member.backs_off(time.monotonic())
        assert not rig.lines()

    def test_down_member_is_dialled_again_after_a_successful_check(self, rig: Rig) -> None:
        dialer = StubDialer("a")
        group = GroupDialer("pool", [rig.add(dialer)], "failover", 1.0)
        dialer.fails = fault(said="gone")
        rig.tick(NOW)
        dialer.fails = None
        with pytest.raises(DialError, match="^group 'pool': all members are down: a: gone$"):
            group.dial(TCP)
        rig.tick(NOW + 30)
        group.dial(TCP).close()


class TestConnectionCheck:
    def test_check_without_a_path_connects_and_sends_nothing(
        self, rig: Rig, direct: DirectDialer
    ) -> None:
        got: list[bytes] = []
        with server(lambda sock: got.append(read_to_end(sock))) as address:
            member = rig.add(direct, address)
            rig.tick(NOW)
            wait_until(lambda: got)
        assert (member.up, got, rig.lines()) == (True, [b""], [])

    def test_refused_connection_marks_the_member_down(self, rig: Rig, direct: DirectDialer) -> None:
        with refusing() as address:
            member = rig.add(direct, address)
            rig.tick(NOW)
        assert (member.up, member.error) == (False, f"{address}: connection refused")

    def test_connection_timeout_marks_the_member_down(self, rig: Rig, direct: DirectDialer) -> None:
        direct._seconds = 0.1
        with black_hole() as address:
            member = rig.add(direct, address)
            rig.tick(NOW)
        assert (member.up, member.error) == (False, f"{address}: timed out")

    def test_proxy_that_refuses_the_target_marks_the_member_down(self, rig: Rig) -> None:
        dialer = StubDialer("a")
        dialer.fails = lambda: DialError(Reason.REFUSED, str(TARGET))
        member = rig.add(dialer)
        rig.tick(NOW)
        assert (member.up, member.error) == (False, f"{TARGET}: connection refused")


def answering(data: bytes, got: list[bytes] | None = None) -> Callable[[socket.socket], None]:
    """Return a script that reads a request and sends `data`."""

    def script(sock: socket.socket) -> None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += sock.recv(65536) or b"\r\n\r\n"
        if got is not None:
            got.append(request)
        sock.sendall(data)

    return script


class TestHttpCheck:
    """A check with a path sends an HTTP/1.1 request; the status decides."""

    def check(
        self,
        direct: DirectDialer,
        script: Callable[[socket.socket], Any],
        timeout: float = 2.0,
        host: str = "127.0.0.1",
    ) -> tuple[Member, Address]:
        """Check a scripted server once; return the member and the server's address."""
        rig = Rig()
        with server(script, host) as address:
            member = rig.add(direct, address, b"/health?x=1", timeout=timeout)
            rig.tick(NOW)
        expected = [] if member.up else [f"group 'pool': direct is down: {member.error}"]
        assert rig.lines() == expected
        return member, address

    def test_request_of_a_check_byte_for_byte(self, direct: DirectDialer) -> None:
        got: list[bytes] = []
        _, address = self.check(direct, answering(b"HTTP/1.1 200 OK\r\n\r\n", got))
        assert got == [
            b"GET /health?x=1 HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n"
            % str(address).encode()
        ]

    @pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")
    def test_ipv6_address_has_brackets_in_the_host_field(self, direct: DirectDialer) -> None:
        got: list[bytes] = []
        _, address = self.check(direct, answering(b"HTTP/1.1 200 OK\r\n\r\n", got), host="::1")
        assert b"\r\nHost: [::1]:%d\r\n" % address.port in got[0]

    @pytest.mark.parametrize("status", [200, 204, 299, 301, 302, 304, 399])
    def test_2xx_and_3xx_mark_the_member_up(self, direct: DirectDialer, status: int) -> None:
        member, _ = self.check(
            direct, answering(b"HTTP/1.1 %d Whatever\r\nContent-Length: 5\r\n\r\nhello" % status)
        )
        assert (member.up, member.error) == (True, "")

    @pytest.mark.parametrize("status", [400, 401, 404, 500, 502, 503, 599])
    def test_4xx_and_5xx_mark_the_member_down(self, direct: DirectDialer, status: int) -> None:
        member, address = self.check(
            direct, answering(b"HTTP/1.1 %d Whatever\r\nContent-Length: 0\r\n\r\n" % status)
        )
        assert (member.up, member.error) == (False, f"{address} answered {status}")

    @pytest.mark.parametrize(
        "interim",
        [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"],
    )
    def test_interim_response_is_skipped(self, direct: DirectDialer, interim: bytes) -> None:
        """RFC 9110 section 15.2: a client must be able to parse interim responses."""
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
    def test_malformed_response_marks_the_member_down(
        self, direct: DirectDialer, answer: bytes, error: str
    ) -> None:
        member, _ = self.check(direct, answering(answer))
        assert not member.up and member.error
        assert error in member.error

    def test_silent_server_marks_the_member_down_after_the_timeout(
        self, direct: DirectDialer
    ) -> None:
        member, _ = self.check(direct, read_to_end, timeout=0.1)
        assert (member.up, member.error) == (False, "out of time")

    def test_incomplete_response_marks_the_member_down_after_the_timeout(
        self, direct: DirectDialer
    ) -> None:
        def send_status_line(sock: socket.socket) -> None:
            try:
                sock.sendall(b"HTTP/1.1 200 OK\r\n")
                while sock.recv(65536):
                    pass
            except ConnectionError:
                pass

        member, _ = self.check(direct, send_status_line, timeout=0.1)
        assert member.error == "out of time"


class TestLog:
    def test_change_of_state_is_logged_once(self, rig: Rig) -> None:
        dialer = StubDialer("a")
        rig.add(dialer, interval=1.0)
        for second, said in enumerate([None, None, "x", "x", "y", None, None, "z", None]):
            dialer.fails = fault(Reason.GENERAL, said=said) if said else None
            rig.tick(NOW + second)
        assert rig.lines() == [
            "group 'pool': a is down: x",
            "group 'pool': a is up",
            "group 'pool': a is down: z",
            "group 'pool': a is up",
        ]

    def test_log_line_names_the_member_and_the_hop(self, rig: Rig) -> None:
        dialer = StubDialer("office")
        dialer.fails = fault(Reason.TIMEOUT, hop="'office' (socks5://10.0.0.1:1080)")
        rig.add(dialer)
        rig.tick(NOW)
        assert rig.lines() == [
            "group 'pool': office is down: 'office' (socks5://10.0.0.1:1080): timed out"
        ]

    def test_failed_check_of_one_member_does_not_affect_another(self, rig: Rig) -> None:
        dialers = [StubDialer("a"), StubDialer("b")]
        members = [rig.add(dialer) for dialer in dialers]
        dialers[1].fails = fault(said="x")
        rig.tick(NOW)
        assert ([member.up for member in members], rig.lines()) == (
            [True, False],
            ["group 'pool': b is down: x"],
        )


class TestExceptions:
    @pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError])
    def test_unexpected_exception_marks_the_member_down_and_ends_the_check(
        self, rig: Rig, error: type[Exception]
    ) -> None:
        """The pool logs the exception; the next check decides again."""
        dialer = StubDialer("a")
        member = rig.add(dialer)
        dialer.fails = error
        with pytest.raises(error):
            rig.tick(NOW)
        said = "the health check failed"
        assert (member.checking, member.up, member.error) == (False, False, said)
        assert rig.lines() == [f"group 'pool': a is down: {said}"]
        dialer.fails = None
        rig.tick(NOW + 30)
        assert (member.up, rig.lines()[1:]) == (True, ["group 'pool': a is up"])

    @pytest.mark.parametrize("path", [b"", b"/"])
    def test_stream_of_a_check_is_closed(self, rig: Rig, path: bytes) -> None:
        """Its socket is a double that cannot send, so a request fails."""
        closed: list[str] = []

        class Watched(StubDialer):
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

    def test_stream_is_closed_after_a_malformed_response(
        self, rig: Rig, direct: DirectDialer
    ) -> None:
        ended: list[bytes] = []

        def script(sock: socket.socket) -> None:
            sock.sendall(b"nonsense\r\n")
            ended.append(read_to_end(sock))

        with server(script) as address:
            rig.add(direct, address, b"/")
            rig.tick(NOW)
            wait_until(lambda: ended)
        assert ended[0].startswith(b"GET / HTTP/1.1\r\n")
