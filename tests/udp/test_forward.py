"""UDP listeners with a fixed target: forwarding, order, filtering, and when sessions end."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from tests.support.handlers import LOCALHOST, descriptors, eventually
from tests.support.relays import Running, UdpPort, running, sessions_threads
from tests.support.sockets import Task
from tests.udp.flows import ICMP_PACE, Arrivals, SendPlan, pieces, put_on

LISTENER = "listeners: [{protocol: udp, listen: '127.0.0.1:0', target: '%s'%s}]"
COUNT = 6000


@contextmanager
def forward(target: Address | str, level: str, more: str = "") -> Iterator[tuple[Running, Address]]:
    with running(LISTENER % (target, more) + level) as relay:
        yield relay, Address(LOCALHOST, relay.port)


def check_echo(
    client: UdpPort, entrance: Address, target: UdpPort, data: bytes = b"ping"
) -> Address:
    """Send a datagram to the target and one back; return the address that the target saw.

    The reply must come from the listener.
    """
    client.send(data, entrance)
    seen = target.expect(data)
    target.send(data[::-1], seen)
    assert client.receive() == (data[::-1], entrance)
    return seen


def test_datagrams_go_to_the_target_and_replies_come_back(level: str) -> None:
    with (
        UdpPort() as target,
        forward(target.address, level) as (relay, entrance),
        UdpPort() as first,
        UdpPort() as second,
    ):
        seen = [
            check_echo(client, entrance, target, data)
            for client in (first, second, first)
            for data in (b"ping", b"", b"x" * 60_000)
        ]
        assert len(set(seen)) == 2
        assert relay.state() == {"associations": 0, "sessions": 2, "entries": 2}
        assert not relay.drops()


def test_payload_is_not_taken_for_a_header(level: str) -> None:
    with UdpPort() as target, forward(target.address, level) as (_, entrance), UdpPort() as client:
        for data in (b"\0\0\0\1\x7f\0\0\1\0\x50data", b"\0\0\1\1", b"\5\1\0"):
            check_echo(client, entrance, target, data)


def test_target_by_name_is_reached_and_replies(level: str) -> None:
    with (
        UdpPort("::") as target,
        forward(f"localhost:{target.address.port}", level) as (_, entrance),
        UdpPort() as client,
    ):
        client.send(b"by name", entrance)
        seen = target.expect(b"by name")
        target.send(b"back", seen)
        assert client.receive() == (b"back", entrance)


def test_datagrams_of_a_banned_client_are_dropped_for_that_reason(level: str) -> None:
    with (
        UdpPort() as target,
        forward(target.address, level) as (relay, entrance),
        UdpPort() as client,
    ):
        relay.daemon.standing.ban_client(LOCALHOST)
        client.send(b"banned", entrance)
        eventually(lambda: relay.drops() == {"client banned": 1})

        def refused() -> list[str]:
            return [line for line in relay.log.lines if line.startswith("msg=refused")]

        # The record follows the counter.
        eventually(refused)
        (record,) = refused()
        assert 'decided="netproxyctl ban"' in record
        relay.daemon.standing.unban(LOCALHOST)
        check_echo(client, entrance, target)


@pytest.mark.parametrize("shape", ["singles", "trains", "mixed"])
def test_order_is_kept_in_both_directions(level: str, shape: str) -> None:
    with UdpPort() as target, forward(target.address, level) as (_, entrance), UdpPort() as client:
        seen = check_echo(client, entrance, target)
        check_order(shape, client, target, entrance)
        check_order(shape, target, client, seen)


def check_order(shape: str, sender: UdpPort, receiver: UdpPort, to: Address) -> None:
    """Send a flow at full rate and check the order in which it arrives."""
    plan, arrived = SendPlan(pieces(shape, COUNT), 1), threading.Event()
    arrivals = Arrivals(plan)

    def put(flow: int, data: bytes, stride: int) -> None:
        put_on(sender.socket, data, stride, to)

    sending = Task(plan.send_all, put, arrived)
    try:
        while not arrivals.complete:
            arrivals.enter(receiver.receive()[0])
    finally:
        arrived.set()
        sending.result()
    # So many have arrived that the others were in order as well.
    assert arrivals.count > COUNT / 20


def test_senders_outside_clients_are_dropped_and_counted(level: str) -> None:
    more = ", clients: [127.0.0.0/24]"
    with (
        UdpPort() as target,
        forward(target.address, level, more) as (relay, entrance),
        UdpPort() as client,
    ):
        check_echo(client, entrance, target)
        before, state = descriptors(), relay.state()
        for at in range(500):
            with UdpPort(f"127.1.{at >> 8}.{at & 255}") as sender_elsewhere:
                put_on(sender_elsewhere.socket, b"let me in" * 2, 9, entrance)
                assert sender_elsewhere.silent()
        relay.wait_for_count("drops", "client not allowed", 1000)
        assert (descriptors(), relay.state(), sessions_threads()) == (before, state, 1)
        check_echo(client, entrance, target)
        assert target.silent() and not relay.log.limited_keys


@pytest.mark.parametrize(
    "more, port_passes, host_passes",
    [
        ("", True, False),
        (", udp: {filtering: address-dependent}", True, False),
        (", udp: {filtering: endpoint-independent}", True, True),
        (", udp: {filtering: address-and-port-dependent}", False, False),
    ],
)
def test_filtering_decides_which_sources_may_reply(
    level: str, more: str, port_passes: bool, host_passes: bool
) -> None:
    """Nobody logs in here, so that by default only the target's address may reply."""
    with UdpPort() as target, forward(target.address, level, more) as (relay, entrance):
        with UdpPort() as client, UdpPort() as port, UdpPort("127.0.0.3") as host:
            seen = check_echo(client, entrance, target)
            for other, passes in ((port, port_passes), (host, host_passes)):
                other.send(b"unasked", seen)
                if passes:
                    assert client.receive() == (b"unasked", entrance)
                check_echo(client, entrance, target)
            assert relay.drops().get("filtered", 0) == 2 - port_passes - host_passes


def test_replies_do_not_keep_a_session_alive(level: str) -> None:
    """REQ-6, hazard 35.  Nobody logs in here, so that anyone could keep a session open."""
    with (
        UdpPort() as target,
        forward(target.address, level) as (relay, entrance),
        UdpPort() as client,
    ):
        relay.daemon._runtime.janitor.stop()
        seen = check_echo(client, entrance, target)
        relay.sweep(0)
        target.send(b"inbound", seen)
        assert client.receive()[0] == b"inbound"
        relay.sweep(150)
        assert relay.state()["sessions"] == 1
        relay.sweep(300)
        assert relay.state() == {"associations": 0, "sessions": 0, "entries": 0}
        eventually(lambda: not sessions_threads())
        assert check_echo(client, entrance, target) != seen


def test_target_that_refuses_is_counted_and_may_come_back(level: str) -> None:
    with UdpPort() as gone:
        address = gone.address
    with forward(address, level) as (relay, entrance), UdpPort() as client:
        for number in range(1, 6):
            time.sleep(ICMP_PACE)
            client.send(b"anybody?", entrance)
            relay.wait_for_count("icmp", "refused", number)
        with UdpPort(address.host, address.port) as target:
            check_echo(client, entrance, target)
        assert not relay.drops() and relay.state()["sessions"] == 1
