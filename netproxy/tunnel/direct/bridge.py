"""The bridge's part in direct paths: has clients and agents try them, for flows that it relays.

A client is another NetProxy whose request for connect-udp the rules have led to an agent.  The
bridge has admitted the flow and relays it; it tells both sides where the other one is, with keys
for the two alone.  A flow under a limit of bytes stays relayed, as only its relay can count them.
Thread: any.
"""

from __future__ import annotations

import os
import threading
from functools import partial

from netproxy.interfaces.accounts import UNLIMITED
from netproxy.net.address import from_sockaddr
from netproxy.net.frames.framed import FramedConn
from netproxy.protocol.tunnels import direct
from netproxy.protocol.tunnels.direct import DirectOffer
from netproxy.protocol.tunnels.path import ID_SIZE, KEY_SIZE
from netproxy.tunnel.direct.attempts import AttemptState
from netproxy.tunnel.direct.end import COUNTER
from netproxy.tunnel.direct.pairs import ClientSide, Pair, RelayedFlow
from netproxy.tunnel.path.flows import PathFlow
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.answers import DirectRow
    from netproxy.interfaces.datagrams import DatagramSocket, RelayedSession, WishingStream
    from netproxy.interfaces.services import Counter
    from netproxy.tunnel.direct.attempts import Addresses
    from netproxy.tunnel.path.bridge import BridgePaths
    from netproxy.tunnel.path.path import Path
    from netproxy.tunnel.control.session import AgentSession
    from netproxy.tunnel.control.sessions import AgentSessions

CLIENTS_LIMIT, CLIENTS_PER_USER = 256, 16
"""Clients that may ask for direct paths at once: each has a path to the bridge, with its keys."""

LINGER_SECONDS = 30.0
"""A client is kept for so long after its last stream: its next flow may be direct at once."""

STATES = {AttemptState.UP: "direct", AttemptState.TRYING: "trying"}
"""How people are told of them; all others are "relayed"."""


class DirectServices(NamedTuple):
    """What direct paths need of the bridge and its daemon."""

    paths: BridgePaths
    sessions: AgentSessions
    has_quota: Callable[[str], bool]
    """Returns whether a quota counts the bytes of a user."""
    counter: Counter


class DirectOffers:
    """All clients of direct paths, and their pairs (interfaces.datagrams.Introducer)."""

    def __init__(self, services: DirectServices) -> None:
        self._services = services
        self.enabled = False
        """Whether the configuration in force has direct paths."""
        # Guards all below, and every ClientSide, Pair and RelayedFlow.  Sending never waits.
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, bytes], ClientSide] = {}
        self._pairs: dict[int, Pair] = {}
        self._sockets: Sequence[DatagramSocket] = ()
        """Those that the clients' paths lead to."""

    # -- a new stream; thread: a pool's

    def introduce(self, stream: WishingStream) -> None:
        """Let the datagrams of a stream go directly, if they go to an agent that permits it."""
        if not self.enabled:
            return
        agents = self._agents()
        with self._lock:
            client = self._client_of(stream)
            if client is None:
                self._services.counter.count(COUNTER, "too many clients")
                return
            # Known first: what is sent to the client may go by it.
            client.streams[stream] = None
            client.streams[stream] = self._begin(client, stream, agents)
            session = stream.session()
            if session is not None and self._is_limited(session):
                self._services.counter.count(COUNTER, "limited")

    def _agents(self) -> dict[object, AgentSession]:
        """Return the agents that permit direct paths, by their paths to the bridge."""
        agents = self._services.sessions.all()
        return {agent.path: agent for agent in agents if agent.path and agent.takes_direct}

    def _begin(
        self, client: ClientSide, stream: WishingStream, agents: Mapping[object, AgentSession]
    ) -> RelayedFlow | None:
        """Return the flow of a stream, None if there is none that may go directly."""
        session = stream.session()
        conn = session.conn.deliverer if session is not None else None
        relayed = conn.beside if isinstance(conn, FramedConn) else None
        if session is None or not isinstance(relayed, PathFlow) or not relayed.is_addressed:
            return None
        agent = agents.get(relayed.path)
        path = agent.path if agent is not None else None
        if agent is None or path is None or relayed.closed or self._is_limited(session):
            return None
        pair = self._pair_of(client, agent, path)
        flow = RelayedFlow(session, stream, pair, relayed)
        if client.path is None:
            client.path = self._services.paths.begin(client.name, client, stream.port)
        if pair.is_offered:
            self._tell(flow)
        return flow

    def _is_limited(self, session: RelayedSession) -> bool:
        """Return whether a rate or a quota counts the bytes of a session."""
        account = session.account
        return (
            account.up.mark != UNLIMITED
            or account.down.mark != UNLIMITED
            or self._services.has_quota(session.flow.user)
        )

    def _client_of(self, stream: WishingStream) -> ClientSide | None:
        """Return the client of a stream; None if there are too many."""
        user, host = stream.flow.user, stream.flow.client.host
        key = user, stream.identifier
        client = self._clients.get(key)
        if client is None:
            of_user = sum(other == user for other, _ in self._clients)
            if len(self._clients) >= CLIENTS_LIMIT or of_user >= CLIENTS_PER_USER:
                return None
            if not self._clients:
                self._sockets = tuple(self._services.paths.sockets)
            name = f"client '{user}' at {host}" if user else f"client {host}"
            client = self._clients[key] = ClientSide(key, name)
        return client

    def _pair_of(self, client: ClientSide, agent: AgentSession, path: Path) -> Pair:
        """Return the pair of a client and an agent, to which `path` leads."""
        pair = client.pairs.get(agent)
        if pair is not None and pair.path is path and pair.control is agent.control:
            return pair
        if pair is not None:
            for call in self._drop(pair):
                call()
        pair = client.pairs[agent] = Pair(client, agent, path)
        self._pairs[pair.number] = pair
        return pair

    @staticmethod
    def _tell(flow: RelayedFlow) -> None:
        flow.pair.flows_begun += 1
        flow.tell(flow.pair.flows_begun)

    # -- what an agent says

    def take_state(self, agent: AgentSession, value: bytes, now: float) -> None:
        """Note what an agent says of direct paths.  Raises ProtocolError."""
        state = direct.parse_state(value)
        with self._lock:
            pair = self._pairs.get(state.pair)
            if pair is None or pair.agent is not agent:
                return
            before = pair.attempts.state
            pair.attempts.reported(state.up, now)
            pair.rtt = state.microseconds / 1e6 if state.up else 0.0
            after = pair.attempts.state
        if (before is AttemptState.UP) is not (after is AttemptState.UP):
            self._services.counter.count(COUNTER, "up" if state.up else "down")

    # -- time; thread: the janitor's

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Return the calls that begin attempts, and that end what is not used any more."""
        calls: list[Callable[[], None]] = []
        sockets = tuple(self._services.paths.sockets)
        agents = self._agents()
        with self._lock:
            is_usable = self.enabled and sockets == self._sockets
            self._sockets = sockets
            for client in list(self._clients.values()):
                self._look_after(client, agents, now)
                is_unused = not client.streams and now - client.used >= LINGER_SECONDS
                if is_unused or not is_usable:
                    calls += self._forget(client)
                    continue
                for agent, pair in list(client.pairs.items()):
                    if agents.get(pair.path) is not agent or pair.control is not agent.control:
                        del client.pairs[agent]
                        calls += self._drop(pair)
                    elif (addresses := self._due(pair, now)) is not None:
                        calls.append(partial(self._offer, pair, addresses))
        return calls

    def _look_after(
        self, client: ClientSide, agents: Mapping[object, AgentSession], now: float
    ) -> None:
        """Forget streams and flows that have ended; begin the flows that have come since.

        A stream outlives its session if that is killed, or if its agent disconnects.  A limit may
        come and go while a session runs.
        """
        for stream, flow in list(client.streams.items()):
            if stream.closed:
                del client.streams[stream]
                continue
            client.used = now
            if flow is not None:
                has_ended = (
                    flow.relayed.closed
                    or stream.session() is not flow.session
                    or flow.pair.number not in self._pairs
                )
                if not has_ended and not self._is_limited(flow.session):
                    continue
                flow.end()
            client.streams[stream] = self._begin(client, stream, agents)

    def _forget(self, client: ClientSide) -> list[Callable[[], None]]:
        del self._clients[client.key]
        calls = [call for pair in client.pairs.values() for call in self._drop(pair)]
        if client.path is not None:
            calls.append(partial(self._services.paths.end, client.path))
        return calls

    def _drop(self, pair: Pair) -> list[Callable[[], None]]:
        """Forget a pair; return the calls that tell both sides."""
        del self._pairs[pair.number]
        agent = pair.agent
        message = direct.encode_end(pair.number)
        return [partial(side.send, message) for side in (agent.control, pair.client)]

    def _due(self, pair: Pair, now: float) -> Addresses | None:
        """Return the addresses for an attempt that is due, None if none is."""
        if not pair.flows():
            return None
        addresses = _address_of(pair.client.path), _address_of(pair.path)
        client, agent = addresses
        known: Addresses | None = None
        if client is not None and agent is not None and (":" in client.host) is (":" in agent.host):
            known = client, agent
        return known if pair.attempts.tick(now, known) else None

    def _offer(self, pair: Pair, addresses: Addresses) -> None:
        """Begin an attempt: tell both sides, and then their flows."""
        client, agent = addresses
        offer = DirectOffer(
            pair.number,
            os.urandom(ID_SIZE),
            os.urandom(ID_SIZE),
            os.urandom(KEY_SIZE),
            os.urandom(KEY_SIZE),
            client,
        )
        self._services.counter.count(COUNTER, "attempt")
        with self._lock:
            pair.control.send(direct.encode_offer(offer))
            pair.client.send(direct.encode_offer(offer.mirrored(agent)))
            pair.is_offered = True
            for flow in pair.flows():
                if not flow.number:
                    self._tell(flow)

    # -- for people

    def describe_direct(self) -> list[DirectRow]:
        """Return the pairs, for netproxyctl."""
        rows: list[DirectRow] = []
        with self._lock:
            for pair in self._pairs.values():
                flows, state = len(pair.flows()), STATES.get(pair.attempts.state, "relayed")
                peer = f"{pair.client.name} and agent '{pair.agent.name}'"
                rows.append({"peer": peer, "state": state, "rtt": pair.rtt, "flows": flows})
        return rows


def _address_of(path: Path | None) -> Address | None:
    """Return where the other side of a path is, as it has proven; None if it is not known."""
    remote = path.remote if path is not None and path.up else None
    if remote is None or not remote.validated:
        return None
    return from_sockaddr(remote.destination.sockaddr)
