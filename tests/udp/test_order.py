"""Order within a flow at full rate, in both directions; every byte that arrives is right.

What a full buffer loses is no failure here.  The last datagram of each flow is sent until it
has arrived.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any, Callable

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.socks5 import encode_header, header_length, parse_target
from tests.support.nat import NatRig
from tests.support.relays import Running, UdpClient, UdpPort
from tests.support.sockets import Task
from tests.udp.flows import Arrivals, SendPlan, pieces, put_on

COUNT = 10_000
SHAPES = ("singles", "trains", "mixed")


def run(
    plan: SendPlan, put: Callable[[int, bytes, int], None], receive: Callable[[Arrivals], None]
) -> None:
    """Send on another thread, receive on this one until the ends of all flows have arrived."""
    arrivals, arrived = Arrivals(plan), threading.Event()
    sending = Task(plan.send_all, put, arrived)
    try:
        while not arrivals.complete:
            receive(arrivals)
    finally:
        arrived.set()
        sending.result()
    # So many have arrived that the others were in order as well.
    assert arrivals.count > COUNT / 20


@pytest.mark.parametrize("shape", SHAPES)
def test_order_is_kept_from_client_to_target(relay: Running, shape: str) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        header = encode_header(target.address)
        plan = SendPlan(pieces(shape, COUNT), 1, lambda flow: header)
        run(
            plan,
            lambda flow, data, stride: put_on(client.socket, data, stride, client.bound),
            lambda arrivals: arrivals.enter(target.receive()[0]),
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_order_is_kept_from_target_to_client(relay: Running, shape: str) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        run(
            SendPlan(pieces(shape, COUNT), 1),
            lambda flow, data, stride: put_on(target.socket, data, stride, seen),
            lambda arrivals: arrivals.enter(client.receive()[0]),
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_order_is_kept_in_six_flows_to_targets_that_take_turns(relay: Running, shape: str) -> None:
    """Two clients to three targets each."""
    with UdpPort("0.0.0.0") as targets, ExitStack() as stack:
        addresses = [Address(f"127.6.0.{at + 1}", targets.address.port) for at in range(3)]
        clients = [stack.enter_context(UdpClient(relay.port)) for _ in range(2)]
        for client in clients:
            # Open every session first.
            for address in addresses:
                client.to(address, b"open")
                targets.expect(b"open")
        plan = SendPlan(pieces(shape, COUNT, 6), 6, lambda flow: encode_header(addresses[flow % 3]))
        peers: dict[int, Any] = {}

        def receive(arrivals: Arrivals) -> None:
            data, peer = targets.receive()
            assert peers.setdefault(arrivals.enter(data) // 3, peer) == peer

        run(
            plan,
            lambda flow, data, stride: put_on(
                clients[flow // 3].socket, data, stride, clients[flow // 3].bound
            ),
            receive,
        )
        assert len(set(peers.values())) == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_order_is_kept_in_four_flows_to_a_client_that_take_turns(
    relay: Running, shape: str
) -> None:
    """Four targets send to one client, each reply behind the header that names its source."""
    with UdpClient(relay.port) as client, ExitStack() as stack:
        targets = [stack.enter_context(UdpPort(f"127.0.0.{at + 1}")) for at in range(4)]
        seen = [client.check_echo(target) for target in targets][0]
        headers: dict[bytes, int] = {
            encode_header(target.address): at for at, target in enumerate(targets)
        }

        def receive(arrivals: Arrivals) -> None:
            data = client.socket.recv(65536)
            skip = header_length(data)
            assert headers[data[:skip]] == arrivals.enter(data[skip:]), parse_target(data[3:skip])

        run(
            SendPlan(pieces(shape, COUNT, 4), 4),
            lambda flow, data, stride: put_on(targets[flow].socket, data, stride, seen),
            receive,
        )


def test_datagrams_that_waited_for_a_lookup_stay_before_later_ones(
    rig: NatRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target is added at the moment its session's dial succeeds, and used while looked up."""
    rig.workers.eager = False
    client = rig.client()
    first = rig.opened(client)
    start = first.session.start.__func__
    named: list[Any] = []

    def start_and_then(session: Any, *arguments: Any) -> None:
        start(session, *arguments)
        named.append(rig.opened(client, "name.example:9"))

    monkeypatch.setattr("netproxy.relay.session.Session.start", start_and_then)
    # The dial.
    rig.workers.tasks.pop(0)()
    rig.send(named[0], b"1", b"2")
    conn: Any = named[0].session.conn

    def meanwhile() -> None:
        # Another worker runs, and then the reader thread sends.
        rig.workers.run()
        rig.send(named[0], b"3")

    conn.while_sending = meanwhile
    rig.workers.tasks.pop(0)()
    rig.workers.run()
    assert [data for data, _ in conn.sent] == [b"1", b"2", b"3"]
