"""Connections to one of several addresses: which wins, how all fail, and when a dial ends."""

from __future__ import annotations

import errno
import socket
import threading
from typing import Any, Sequence

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net import connect as connect_module
from netproxy.net import syscalls
from netproxy.net.connect import AbortableDials, connect
from netproxy.net.socket_options import SocketOptions, tune
from tests.support.sockets import (
    HAS_IPV6,
    SECONDS,
    Task,
    address_of,
    black_hole,
    listen,
    refusing,
    wait_until,
)

needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 on this machine")


def reason(addresses: Sequence[Address], seconds: float = SECONDS) -> Reason:
    with pytest.raises(DialError) as caught:
        connect(addresses, seconds)
    return caught.value.reason


def test_connected_socket_does_not_block_and_is_tuned() -> None:
    with (
        listen() as listening,
        connect([address_of(listening)], 2.0) as sock,
        listening.accept()[0],
    ):
        assert sock.getpeername() == listening.getsockname()
        assert sock.gettimeout() == 0
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


@pytest.mark.parametrize("addresses", [1, 2])
def test_connected_socket_notices_a_target_that_vanishes(addresses: int) -> None:
    """Hazard 86: a connection to the only address, and the winner of several."""
    with (
        listen() as listening,
        connect([address_of(listening)] * addresses, 2.0) as sock,
        listening.accept()[0],
    ):
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


@needs_ipv6
def test_ipv6_address_is_connected_to() -> None:
    with (
        listen("::1") as listening,
        connect([address_of(listening)], 2.0) as sock,
        listening.accept()[0],
    ):
        assert sock.family == socket.AF_INET6


def test_refused_connection_names_its_address() -> None:
    with refusing() as address:
        with pytest.raises(DialError) as caught:
            connect([address], 2.0)
    assert caught.value.reason is Reason.REFUSED
    assert str(caught.value) == f"{address}: connection refused"


def test_no_address_is_an_unknown_name() -> None:
    assert reason([]) is Reason.NAME


def test_broadcast_address_fails_at_once() -> None:
    """255.255.255.255 gives EACCES or ENETUNREACH, whatever the routes of this machine."""
    assert reason([Address("255.255.255.255", 9)]) in (Reason.NETWORK_UNREACHABLE, Reason.DENIED)


def test_second_address_is_tried_at_once_when_the_first_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connect_module, "ATTEMPT_DELAY", 10 * SECONDS)
    with refusing() as first, listen() as listening:
        with connect([first, address_of(listening)], 30.0) as sock, listening.accept()[0]:
            assert sock.getpeername() == listening.getsockname()


@needs_ipv6
def test_other_family_is_tried_when_the_first_refuses() -> None:
    with refusing("::1") as first, listen() as listening:
        with connect([first, address_of(listening)], 2.0) as sock, listening.accept()[0]:
            assert sock.family == socket.AF_INET


def test_second_address_is_tried_when_the_first_is_silent() -> None:
    """Hazard 90: long before the deadline."""
    with black_hole() as first, listen() as listening:
        with connect([first, address_of(listening)], 3600.0) as sock, listening.accept()[0]:
            assert sock.getpeername() == listening.getsockname()


def test_deadline_is_for_all_addresses_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 90: the third is not tried any more."""
    begin, tried = connect_module._begin, []

    def count(address: Address, options: SocketOptions) -> Any:
        tried.append(address)
        return begin(address, options)

    monkeypatch.setattr(connect_module, "_begin", count)
    monkeypatch.setattr(connect_module, "ATTEMPT_DELAY", 10 * SECONDS)
    with black_hole() as first, black_hole() as second, black_hole() as third:
        assert reason([first, second, third], 0.3) is Reason.TIMEOUT
        assert third not in tried


def test_dial_of_0_seconds_times_out() -> None:
    with black_hole() as address:
        assert reason([address], 0.0) is Reason.TIMEOUT


def test_last_failure_is_raised() -> None:
    with black_hole() as silent, refusing() as address:
        assert reason([address, silent], 0.1) is Reason.TIMEOUT
        assert reason([address, Address("255.255.255.255", 9)]) is not Reason.REFUSED


def test_deadline_of_many_days_is_accepted() -> None:
    """A configuration may say "connect: 30d"."""
    with (
        listen() as listening,
        connect([address_of(listening)], 30 * 86400.0),
        listening.accept()[0],
    ):
        pass


def test_socket_that_connects_to_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 91: source and target port are the same."""
    with refusing() as address:
        pass

    class SamePort(socket.socket):
        def connect_ex(self, target: Any) -> int:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(target)
            return super().connect_ex(target)

    monkeypatch.setattr(socket, "socket", SamePort)
    assert reason([address]) is Reason.REFUSED


# -- dials that another thread aborts


@pytest.mark.parametrize("addresses", [1, 2])
def test_aborted_dial_fails_at_once(addresses: int) -> None:
    with black_hole() as first, black_hole() as second:
        dials, watching = AbortableDials(), threading.Event()

        def dial() -> None:
            with dials.watched():
                watching.set()
                connect([first, second][:addresses], 3600.0)

        task = Task(dial)
        assert watching.wait(SECONDS)
        wait_until(lambda: sum(map(len, dials._sockets.values())) == addresses)
        dials.abort()
        with pytest.raises(DialError):
            task.result()
        assert not dials._sockets


def test_abort_ends_later_dials_but_no_established_connection() -> None:
    with listen() as listening:
        dials = AbortableDials()
        with dials.watched():
            sock = connect([address_of(listening)], 2.0)
        with sock, listening.accept()[0] as peer:
            dials.abort()
            sock.send(b"!")
            assert peer.recv(1) == b"!"
            with dials.watched(), pytest.raises(DialError):
                connect([address_of(listening)], 2.0)
            with connect([address_of(listening)], 2.0):  # outside of watched()
                pass


def test_families_alternate_and_the_first_address_stays_first() -> None:
    four = [Address(f"192.0.2.{number}", 1) for number in (1, 2)]
    six = [Address(f"2001:db8::{number}", 1) for number in (1, 2, 3)]
    order = connect_module._interleave
    assert order(six + four) == [six[0], four[0], six[1], four[1], six[2]]
    assert order(four + six) == [four[0], six[0], four[1], six[1], six[2]]
    assert order([]) == []


def test_tune_of_a_socket_that_is_not_tcp_does_no_harm() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        tune(ours)
    tune(ours)


@pytest.mark.parametrize("others", [(), (Address("192.0.2.2", 9),)])
def test_refusal_of_the_kernel_is_not_told_as_one_of_our_rules(
    monkeypatch: pytest.MonkeyPatch, others: tuple[Address, ...]
) -> None:
    """As a firewall of this machine does it."""
    monkeypatch.setattr(syscalls, "connect", lambda sock, family, address: errno.EPERM)
    with pytest.raises(DialError) as caught:
        connect([Address("192.0.2.1", 9), *others], SECONDS)
    error = caught.value
    assert (error.reason, error.decided_by("rules[0]")) == (Reason.DENIED, "")
    assert error.why == "not permitted by the kernel of this machine"
    assert error.said == "Operation not permitted"
    assert error.tried[0] == ("192.0.2.1:9", "Operation not permitted")
