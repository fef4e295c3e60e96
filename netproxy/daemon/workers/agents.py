"""Tunnel agents of all workers: their connections and streams come to the worker that has them.

The session of an agent lives in the worker that accepted its control connection.  A further
connection of the agent that another worker has accepted is handed over.  A flow of another
worker that leaves by the agent gets the work connection as a descriptor.  The state of TLS
cannot be handed over: those connections are relayed between the two workers.
"""

from __future__ import annotations

import contextlib
import socket
from functools import partial

from netproxy.daemon.workers.hand_over import parse_given
from netproxy.daemon.workers.messages import (
    Message,
    MessageError,
    close_all,
    message_pair,
    parse_address,
    receive,
    send,
)
from netproxy.errors import DialError, NetProxyError, Reason, StreamError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
from netproxy.listener.accepted import Lifetime
from netproxy.listener.handshake_driver import Connection
from netproxy.net.stream import Stream
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import BridgePort, OpenRequest
from netproxy.tunnel.control.login import Arrival
from netproxy.tunnel.dialer import TunnelDialer
from netproxy.tunnel.control.session import tunnel_failure
from netproxy.typed import TYPE_CHECKING, Callable, Sequence

if TYPE_CHECKING:
    from netproxy.daemon.runtime import Runtime
    from netproxy.daemon.tunnels.tunnels import Tunnels
    from netproxy.daemon.workers.hand_over import HandOvers, Joints
    from netproxy.daemon.workers.registry import AgentRegistry
    from netproxy.interfaces import connections
    from netproxy.interfaces.connections import Handshake, Wait
    from netproxy.tunnel.control.login import AgentLogin

AGENT, AGENT_STREAM = "agent", "agent stream"
"""The kinds of messages: a connection of an agent, and a request for a stream."""
HANDSHAKE_SECONDS = 10.0
"""For the handshake of an agent whose connection was handed over."""
NO_DESCRIPTOR = "this worker has no descriptor left for the stream"


class AgentsOfOthers:
    """The agents that other workers have (tunnel.elsewhere.OtherWorkers)."""

    def __init__(self, hand_overs: HandOvers, registry: AgentRegistry) -> None:
        self._hand_overs = hand_overs
        self._registry = registry

    def is_elsewhere(self, agent: str) -> bool:
        """Return whether another worker has the session of an agent."""
        holder = self._registry.holder(agent)
        return holder is not None and not self._hand_overs.is_own(holder)

    def note_begin(self, agent: str) -> bool:
        """Note that the agent's session is here; return False if another worker has one."""
        return self._registry.add(agent)

    def note_end(self, agent: str) -> None:
        """Note that the agent's session here has ended."""
        self._registry.remove(agent)

    def hand_over(self, login: AgentLogin) -> Wait | None:
        """Give a proven connection of an agent to the worker of its session (OtherWorkers)."""
        client, port, is_sealed = login.arrival
        fields: dict[str, object] = {
            "kind": AGENT,
            "client": client,
            "port": port,
            "sealed": is_sealed,
            "hello": tunnel.encode_hello(login.hello).hex(),
            "nonce": login.nonce.hex(),
        }
        try:
            return self._hand_overs.give(self._holder(login.hello.name), login.stream, fields)
        except (DialError, MessageError) as error:
            raise StreamError(str(error)) from error

    def open(self, agent: str, request: OpenRequest, seconds: float) -> Stream:
        """Return a stream that the agent has accepted (OtherWorkers)."""
        with contextlib.ExitStack() as closing:
            ends = [closing.enter_context(sock) for sock in (*message_pair(), *socket.socketpair())]
            outcome, far_outcome, near, far = ends
            fields = _request_fields(agent, request, seconds)
            sent = Message(fields, b"", [far_outcome.fileno(), far.fileno()])
            try:
                self._hand_overs.tell(self._holder(agent), sent)
                far_outcome.close()
                message = receive(outcome, seconds)
            except (MessageError, EOFError, OSError, ValueError) as error:
                said = f"the worker of the agent does not answer: {error}"
                raise tunnel_failure(agent, Reason.GENERAL, said) from error
            if message is None or not message.is_whole:
                said = "the agent did not answer in time" if message is None else NO_DESCRIPTOR
                raise tunnel_failure(agent, Reason.TIMEOUT, said)
            return _opened(message, near)

    def _holder(self, agent: str) -> int:
        holder = self._registry.holder(agent)
        if holder is None:
            said = f"agent '{agent}' is not connected"
            raise tunnel_failure(agent, Reason.HOST_UNREACHABLE, said)
        return holder


def _request_fields(agent: str, request: OpenRequest, seconds: float) -> dict[str, object]:
    return {
        "kind": AGENT_STREAM,
        "agent": agent,
        "network": request.network,
        "client": request.client,
        "target": request.target,
        "is_service": isinstance(request.target, BridgePort),
        "seconds": seconds,
    }


def _opened(message: Message, near: socket.socket) -> Stream:
    """Return the stream of a request's outcome.  Raises DialError.

    `near` is this worker's end of the relay of a stream within TLS.
    """
    outcome = message.fields
    if "reason" in outcome:
        reason, detail = Reason[str(outcome["reason"])], str(outcome["detail"])
        said, hop = str(outcome["said"]), str(outcome["hop"])
        raise DialError(reason, detail, said, hop, bool(outcome["upstream"]))
    sock = message.sockets()[0] if message.descriptors else near.dup()
    sock.setblocking(False)
    return Stream(sock, message.data)


class AgentTaker:
    """Takes connections of agents that other workers have accepted."""

    def __init__(self, tunnels: Callable[[], Tunnels | None], runtime: Runtime) -> None:
        """`tunnels()` returns those of this worker."""
        self._tunnels = tunnels
        self._runtime = runtime

    def __call__(self, message: Message) -> None:
        """Go on with the connection where the other worker has stopped."""
        sockets, tunnels = message.sockets(), self._tunnels()
        try:
            if tunnels is not None:
                self._take(message, sockets, tunnels)
                return
        except BaseException:
            close_all(sockets)
            raise
        close_all(sockets)

    def _take(self, message: Message, sockets: Sequence[socket.socket], tunnels: Tunnels) -> None:
        fields = message.fields
        client, nonce = parse_address(fields["client"]), bytes.fromhex(str(fields["nonce"]))
        arrival = Arrival(client, int(str(fields["port"])), bool(fields["sealed"]))
        hello = bytes.fromhex(str(fields["hello"]))
        stream, lifetime = parse_given(message, sockets, HANDSHAKE_SECONDS, hello)
        if lifetime is not None:
            # If the other worker dies, the connection is not counted any more.
            Lifetime(lifetime, stream, _do_nothing).begin(self._runtime.poller)
        handshake = tunnels.bridge.take_over(stream, arrival, nonce)
        self._runtime.serving.begin(Connection(stream, client), handshake)


def _do_nothing() -> None:
    """Do nothing."""


class StreamTaker:
    """Takes requests of other workers for streams of agents."""

    def __init__(
        self, tunnels: Callable[[], Tunnels | None], runtime: Runtime, joints: Joints
    ) -> None:
        """`tunnels()` returns those of this worker.  `joints` relays what is within TLS."""
        self._tunnels = tunnels
        self._runtime = runtime
        self._joints = joints

    def __call__(self, message: Message) -> None:
        """Have a thread open the stream, as many clients as there are in turn."""
        outcome, far = message.sockets()
        task = partial(self._serve, message, outcome, far)
        client = parse_address(message.fields["client"]).host
        if not self._runtime.connections.submit(task, client=client):
            with outcome, far, contextlib.suppress(MessageError):
                error = DialError(Reason.GENERAL, said="no thread is left for the stream")
                send(outcome, Message(_failure(error)))

    def _serve(self, message: Message, outcome: socket.socket, far: socket.socket) -> None:
        """Open a stream, and tell the other worker the outcome.  Blocks."""
        with outcome, far:
            try:
                stream = self._open(message)
            except DialError as error:
                with contextlib.suppress(MessageError):
                    send(outcome, Message(_failure(error)))
                return
            try:
                self._hand_back(stream, outcome, far)
            except (NetProxyError, MessageError, OSError):
                stream.close()

    def _open(self, message: Message) -> connections.Stream:
        """Raises DialError."""
        fields, tunnels = message.fields, self._tunnels()
        agent = str(fields["agent"])
        if tunnels is None:
            raise tunnel_failure(agent, Reason.HOST_UNREACHABLE, "the bridge has stopped")
        client, asked = parse_address(fields["client"]), parse_address(fields["target"])
        dialer: TunnelDialer = tunnels.dialer(Address(agent, 0), float(str(fields["seconds"])))
        target = BridgePort(*asked) if fields["is_service"] else asked
        return dialer.open(OpenRequest(str(fields["network"]), client, target))

    def _hand_back(
        self, stream: connections.Stream, outcome: socket.socket, far: socket.socket
    ) -> None:
        """Give a plain stream away, relay one within TLS.

        Raises MessageError, OSError, StreamError.
        """
        if stream.plain:
            work, unread = stream.detach()
            send(outcome, Message({}, unread, [work.fileno()]))
            stream.close()
            return
        near = Stream(far.dup())
        near.socket.setblocking(False)
        send(outcome, Message({}))
        connection = Connection(near, UNSPECIFIED_ADDRESS)
        self._runtime.serving.begin(connection, _join(near, stream, self._joints))


def _join(near: connections.Stream, stream: connections.Stream, joints: Joints) -> Handshake:
    """Relay a stream of an agent to another worker.  A generator that needs nothing."""
    yield from ()
    return joints.join(near, stream)


def _failure(error: DialError) -> dict[str, object]:
    return {
        "reason": error.reason.name,
        "detail": error.detail,
        "said": error.said,
        "hop": error.hop,
        "upstream": error.upstream,
    }
