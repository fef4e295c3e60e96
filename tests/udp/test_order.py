"""Order within a flow at full rate, both ways: what is delivered has rising numbers, and every byte of it is right.

What a full buffer loses is no fault here; the last of each flow is sent until it has arrived.
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
from tests.udp.flows import Ledger, Stream, pieces, put_on

COUNT = 10_000
SHAPES = ("singles", "trains", "mixed")


def run(
    stream: Stream, put: Callable[[int, bytes, int], None], receive: Callable[[Ledger], None]
) -> None:
    """A thread pours, this one receives until the ends of all flows are there."""
    ledger, arrived = Ledger(stream), threading.Event()
    pouring = Task(stream.pour, put, arrived)
    try:
        while not ledger.complete:
            receive(ledger)
    finally:
        arrived.set()
        pouring.result()
    assert ledger.count > COUNT / 20  # of so many that the rest must have been in order as well


@pytest.mark.parametrize("shape", SHAPES)
def test_up(relay: Running, shape: str) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        header = encode_header(target.address)
        stream = Stream(pieces(shape, COUNT), 1, lambda flow: header)
        run(
            stream,
            lambda flow, data, stride: put_on(client.socket, data, stride, client.bound),
            lambda ledger: ledger.enter(target.receive()[0]),
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_down(relay: Running, shape: str) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        run(
            Stream(pieces(shape, COUNT), 1),
            lambda flow, data, stride: put_on(target.socket, data, stride, seen),
            lambda ledger: ledger.enter(client.receive()[0]),
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_up_in_six_flows_that_take_turns(relay: Running, shape: str) -> None:
    """Two clients to three targets each."""
    with UdpPort("0.0.0.0") as targets, ExitStack() as stack:
        addresses = [Address(f"127.6.0.{at + 1}", targets.address.port) for at in range(3)]
        clients = [stack.enter_context(UdpClient(relay.port)) for _ in range(2)]
        for client in clients:
            for address in addresses:  # so that all of the way is there
                client.to(address, b"open")
                targets.expect(b"open")
        stream = Stream(pieces(shape, COUNT, 6), 6, lambda flow: encode_header(addresses[flow % 3]))
        peers: dict[int, Any] = {}

        def receive(ledger: Ledger) -> None:
            data, peer = targets.receive()
            assert peers.setdefault(ledger.enter(data) // 3, peer) == peer

        run(
            stream,
            lambda flow, data, stride: put_on(
                clients[flow // 3].socket, data, stride, clients[flow // 3].bound
            ),
            receive,
        )
        assert len(set(peers.values())) == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_down_in_four_flows_that_take_turns(relay: Running, shape: str) -> None:
    """Of four targets to one client, each behind the header that names it."""
    with UdpClient(relay.port) as client, ExitStack() as stack:
        targets = [stack.enter_context(UdpPort(f"127.0.0.{at + 1}")) for at in range(4)]
        seen = [client.check_echo(target) for target in targets][0]
        headers: dict[bytes, int] = {
            encode_header(target.address): at for at, target in enumerate(targets)
        }

        def receive(ledger: Ledger) -> None:
            data = client.socket.recv(65536)
            skip = header_length(data)
            assert headers[data[:skip]] == ledger.enter(data[skip:]), parse_target(data[3:skip])

        run(
            Stream(pieces(shape, COUNT, 4), 4),
            lambda flow, data, stride: put_on(targets[flow].socket, data, stride, seen),
            receive,
        )


def test_what_waited_for_a_name_stays_before_what_came_later(
    rig: NatRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that comes at the very moment at which its session's dial succeeds, sent to while it is looked up."""
    rig.workers.eager = False
    client = rig.client()
    first = rig.opened(client)
    start = first.session.start.__func__
    named: list[Any] = []

    def start_and_then(session: Any, *arguments: Any) -> None:
        start(session, *arguments)
        named.append(rig.opened(client, "name.example:9"))

    monkeypatch.setattr("netproxy.relay.session.Session.start", start_and_then)
    rig.workers.tasks.pop(0)()  # the dial
    rig.send(named[0], b"1", b"2")
    conn: Any = named[0].session.conn

    def meanwhile() -> None:  # another worker, and then the reader
        rig.workers.run()
        rig.send(named[0], b"3")

    conn.while_sending = meanwhile
    rig.workers.tasks.pop(0)()
    rig.workers.run()
    assert [data for data, _ in conn.sent] == [b"1", b"2", b"3"]
