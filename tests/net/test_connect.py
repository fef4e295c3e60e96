"""Connections to one of several addresses: who wins, what is said when none does, and when it ends."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Sequence

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net import connect as connect_module
from netproxy.net.connect import AbortableDials, connect
from netproxy.net.socket_options import tune
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


def reason(addresses: Sequence[Address], seconds: float = 2.0) -> Reason:
    with pytest.raises(DialError) as caught:
        connect(addresses, seconds)
    return caught.value.reason


def test_a_connection_does_not_block_and_is_tuned() -> None:
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
def test_a_target_that_vanishes_is_noticed(addresses: int) -> None:
    """HAZARDS 86: by a connection to the only address, and by the winner of several."""
    with (
        listen() as listening,
        connect([address_of(listening)] * addresses, 2.0) as sock,
        listening.accept()[0],
    ):
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


@needs_ipv6
def test_an_ipv6_address() -> None:
    with (
        listen("::1") as listening,
        connect([address_of(listening)], 2.0) as sock,
        listening.accept()[0],
    ):
        assert sock.family == socket.AF_INET6


def test_nobody_listens() -> None:
    with refusing() as address:
        with pytest.raises(DialError) as caught:
            connect([address], 2.0)
    assert caught.value.reason is Reason.REFUSED
    assert str(caught.value) == f"{address}: connection refused"


def test_no_address_at_all() -> None:
    assert reason([]) is Reason.NAME


def test_a_network_without_a_way() -> None:
    """255.255.255.255 is no host: EACCES or ENETUNREACH, at once, whatever this machine's routes."""
    assert reason([Address("255.255.255.255", 9)]) in (Reason.NETWORK_UNREACHABLE, Reason.DENIED)


def test_the_second_is_tried_when_the_first_refuses() -> None:
    with refusing() as first, listen() as listening:
        started = time.monotonic()
        with connect([first, address_of(listening)], 2.0) as sock, listening.accept()[0]:
            assert sock.getpeername() == listening.getsockname()
        assert time.monotonic() - started < connect_module.ATTEMPT_DELAY  # and was not waited for


@needs_ipv6
def test_the_other_family_is_tried_when_the_first_refuses() -> None:
    with refusing("::1") as first, listen() as listening:
        with connect([first, address_of(listening)], 2.0) as sock, listening.accept()[0]:
            assert sock.family == socket.AF_INET


def test_the_second_is_tried_when_the_first_is_silent() -> None:
    """HAZARDS 90."""
    with black_hole() as first, listen() as listening:
        started = time.monotonic()
        with connect([first, address_of(listening)], 5.0) as sock, listening.accept()[0]:
            assert sock.getpeername() == listening.getsockname()
        assert connect_module.ATTEMPT_DELAY * 0.9 <= time.monotonic() - started < 1.0


def test_the_deadline_is_for_all_addresses_together() -> None:
    """HAZARDS 90."""
    with black_hole() as first, black_hole() as second, black_hole() as third:
        started = time.monotonic()
        assert reason([first, second, third], 0.3) is Reason.TIMEOUT
        assert 0.27 <= time.monotonic() - started < 0.9


def test_no_time_at_all() -> None:
    with black_hole() as address:
        assert reason([address], 0.0) is Reason.TIMEOUT


def test_the_last_failure_is_named() -> None:
    with black_hole() as silent, refusing() as address:
        assert reason([address, silent], 0.1) is Reason.TIMEOUT
        assert reason([address, Address("255.255.255.255", 9)]) is not Reason.REFUSED


def test_a_deadline_of_many_days() -> None:
    """What a configuration may say: connect: 30d."""
    with (
        listen() as listening,
        connect([address_of(listening)], 30 * 86400.0),
        listening.accept()[0],
    ):
        pass


def test_a_port_that_connects_to_itself_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """HAZARDS 91: source and target port are the same."""
    with refusing() as address:
        pass

    class SamePort(socket.socket):
        def connect_ex(self, target: Any) -> int:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(target)
            return super().connect_ex(target)

    monkeypatch.setattr(socket, "socket", SamePort)
    assert reason([address]) is Reason.REFUSED


# -- dials that somebody else ends


@pytest.mark.parametrize("addresses", [1, 2])
def test_a_dial_that_is_ended_fails_at_once(addresses: int) -> None:
    with black_hole() as one, black_hole() as other:
        dials, watching = AbortableDials(), threading.Event()

        def dial() -> None:
            with dials.watched():
                watching.set()
                connect([one, other][:addresses], 60.0)

        began, task = time.monotonic(), Task(dial)
        assert watching.wait(SECONDS)
        wait_until(lambda: sum(map(len, dials._under_way.values())) == addresses)
        dials.abort()
        with pytest.raises(DialError):
            task.result()
        assert time.monotonic() - began < SECONDS and not dials._under_way


def test_what_is_dialled_after_the_end_fails_and_what_was_dialled_before_lives() -> None:
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
            with connect([address_of(listening)], 2.0):  # by nobody whom they watch
                pass


def test_families_take_turns_and_the_first_address_stays_the_first() -> None:
    four = [Address(f"192.0.2.{number}", 1) for number in (1, 2)]
    six = [Address(f"2001:db8::{number}", 1) for number in (1, 2, 3)]
    order = connect_module._interleave
    assert order(six + four) == [six[0], four[0], six[1], four[1], six[2]]
    assert order(four + six) == [four[0], six[0], four[1], six[1], six[2]]
    assert order([]) == []


def test_tuning_what_is_no_tcp_does_no_harm() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        tune(ours)
    tune(ours)
