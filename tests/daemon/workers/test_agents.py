"""Connections of tunnel agents that a worker hands over to the one that has their session."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Iterator

import pytest

from netproxy.daemon.workers.agents import AGENT, AgentTaker
from netproxy.daemon.workers.hand_over import HandOvers
from netproxy.daemon.workers.messages import Message, message_pair, receive
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Handshake
from netproxy.net.stream import Stream, poll_watched
from netproxy.tunnel.control.login import Arrival
from tests.support.sockets import SECONDS, read_exactly, tcp_pair, wait_until
from tests.support.tcp import TcpRig

CLIENT = Address("192.0.2.1", 4000)
ARRIVAL = Arrival(CLIENT, 7000, True)


class EchoingBridge:
    """A bridge that returns what it reads."""

    def take_over(self, stream: Stream, arrival: Arrival, nonce: bytes) -> Handshake:
        assert (arrival, nonce) == (ARRIVAL, b"nonce")
        while data := (yield from stream.read_some(100)):
            stream.reply(data)
        return None


@pytest.fixture
def rig() -> Iterator[TcpRig]:
    rig = TcpRig()
    yield rig
    rig.close()


def taker(rig: TcpRig, has_tunnels: bool) -> AgentTaker:
    tunnels = SimpleNamespace(bridge=EchoingBridge()) if has_tunnels else None
    runtime = SimpleNamespace(poller=rig.poller, serving=rig.serving)
    return AgentTaker(lambda: tunnels, runtime)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("has_tunnels", [True, False])
def test_agent_is_counted_where_it_was_accepted_until_its_end(
    rig: TcpRig, has_tunnels: bool
) -> None:
    with tcp_pair() as (accepted, agent):
        fields = {"kind": AGENT, "hello": b"hello".hex(), "nonce": b"nonce".hex()}
        fields |= {"client": CLIENT, "port": ARRIVAL.port, "sealed": ARRIVAL.is_sealed}
        inbox, outbox = message_pair()
        with inbox, outbox:
            stream = Stream(accepted, b" and more")
            wait = HandOvers([outbox, outbox]).give(1, stream, fields)
            # Else it would be among the handshakes that may be shed.
            assert wait is not None and not stream.handshaking
            message = receive(inbox, SECONDS)
        assert isinstance(message, Message)
        taker(rig, has_tunnels)(message)
        if has_tunnels:
            assert read_exactly(agent, 14) == b"hello and more"
            assert not poll_watched(wait.watched, 0)
            agent.shutdown(socket.SHUT_WR)
        assert agent.recv(1) == b""
        assert poll_watched(wait.watched, SECONDS)
        stream.close()
    wait_until(rig.all_ended)


def test_agent_that_is_malformed_is_closed(rig: TcpRig) -> None:
    inbox, outbox = message_pair()
    with inbox, outbox, tcp_pair() as (accepted, agent):
        stream = Stream(accepted)
        HandOvers([outbox, outbox]).give(1, stream, {"kind": AGENT, "client": CLIENT})
        message = receive(inbox, SECONDS)
        assert isinstance(message, Message)
        with pytest.raises(KeyError):
            taker(rig, True)(message)
        assert agent.recv(1) == b""
        stream.close()
