"""The bridge: whom agents dial.  It knows them by name and token, and opens the ports that they ask for and may have.

A Handler for agents' connections.  The handshake runs on the connection's thread; a
control connection has none after that, and is woken by what its agent says or by the
heartbeat.  Who cannot prove a name is told so late, and the same for a name that nobody has.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from netproxy.errors import ListenError, NetProxyError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.interfaces.services import Counter, Log
from netproxy.net.stream import Stream
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import Hello, Service, Welcome
from netproxy.tunnel.control import Control
from netproxy.tunnel.backoff import BackOff
from netproxy.tunnel.sessions import AgentSession, AgentSessions, Port, WorkStream

CHALLENGE_SECONDS = 2.0  # that an agent has to answer a ping when another one asks for its name
ANSWER_SECONDS = 10.0  # for the rest of a handshake that was made to wait


class PortRange(NamedTuple):
    """Ports that an agent may have, and the address that the bridge binds them on."""

    network: str
    host: str
    first: int
    last: int


class Rights(NamedTuple):
    """Of one agent."""

    token: bytes
    ports: Sequence[PortRange] = ()

    def __repr__(self) -> str:
        return f"Rights({self.ports!r})"

    def host_of(self, service: Service) -> str:
        """The address for one of its ports, "" where it may not have it."""
        return next(
            (
                one.host
                for one in self.ports
                if one.network == service.network and one.first <= service.port <= one.last
            ),
            "",
        )


# (agent, service, host) -> what closes it again; ListenError
OpenPort = Callable[[str, Service, str], Callable[[], None]]


class Bridge:
    def __init__(
        self, sessions: AgentSessions, open_port: OpenPort, counter: Counter, log: Log
    ) -> None:
        self._sessions = sessions
        self._open_port = open_port
        self._counter = counter
        self._log = log
        self._agents: Mapping[str, Rights] = {}  # replaced whole
        self._decoy = os.urandom(tunnel.PROOF_SIZE)  # the token of a name that nobody has
        self._doubts = BackOff()
        self._lock = threading.Lock()  # guards `challenged` of the links
        self._stopping = False

    def configure(self, agents: Mapping[str, Rights]) -> None:
        """Who may come, at the start and on a reload.  Agents that are here keep what they still may have."""
        before, self._agents = self._agents, agents
        for link in self._sessions.all():
            had, has = before.get(link.name), agents.get(link.name)
            if had is None or has is None or has.token != had.token:
                self._end(link, "it is not configured any more", tunnel.WITHDRAWN)
            elif has.ports != had.ports:
                self._serve_ports(link, None)

    def stop(self) -> None:
        """Ports are closed and agents told; streams that live go on."""
        self._stopping = True
        for link in self._sessions.all():
            self._end(link, "this bridge stops", tunnel.STOPPING)

    def describe(self) -> list[dict[str, Any]]:
        return [link.describe() for link in self._sessions.all()]

    # -- the handshake

    def handle(self, stream: Stream, client: Address) -> Wait | None:
        hello = tunnel.read_hello(stream)
        nonce = os.urandom(tunnel.NONCE_SIZE)
        stream.write(tunnel.encode_challenge(nonce))
        given = stream.read_exactly(tunnel.PROOF_SIZE)
        rights = self._agents.get(hello.name)
        token = self._decoy if rights is None else rights.token
        if not tunnel.same(given, tunnel.agent_proof(token, hello, nonce)) or rights is None:
            return self._refuse_late(stream, client, hello)
        proven = _Proven(stream, client, hello, nonce, token)
        return self._add_work(proven) if hello.kind == tunnel.WORK else self._claim(proven)

    def _refuse_late(self, stream: Stream, client: Address, hello: Hello) -> Wait:
        self._counter.count("tunnel_handshakes", "not proven")
        self._log.limited(
            ("tunnel proof", client.host),
            "tunnel: %s cannot prove that it is agent '%s'",
            client.host,
            hello.name,
        )

        def refuse(gone: bool) -> None:
            if not gone:
                stream.limit(ANSWER_SECONDS)
                stream.write(tunnel.encode_refusal(tunnel.NOT_PROVEN))

        return Wait(
            ((stream.socket, select.POLLRDHUP),),
            self._doubts.seconds(client.host, time.monotonic()),
            refuse,
            idle=True,
        )

    def _refuse(self, proven: _Proven, reason: int) -> None:
        self._counter.count("tunnel_handshakes", tunnel.REFUSALS[reason])
        proven.stream.write(tunnel.encode_refusal(reason))

    def _add_work(self, proven: _Proven) -> None:
        link = self._sessions.get(proven.hello.name)
        if link is None or not tunnel.same(link.session, proven.hello.session):
            return self._refuse(proven, tunnel.NO_SESSION)
        if not link.has_room:
            return self._refuse(proven, tunnel.TOO_MANY)
        proven.stream.write(proven.welcome(link.session))
        proven.stream.limit(None)
        work = WorkStream(proven.stream, link)
        if not link.add(work):
            work.close()
        return None

    # -- whose a name is

    def _claim(self, proven: _Proven) -> Wait | None:
        """The name is free, or it is seen whether the agent that has it still answers."""
        holder = self._sessions.get(proven.hello.name)
        if holder is None:
            return self._link(proven)
        with self._lock:
            refused, holder.challenged = holder.challenged, True
        if refused:
            return self._refuse(proven, tunnel.NAME_IN_USE)
        asked = time.monotonic()
        holder.control.ping()
        return Wait(
            ((proven.stream.socket, select.POLLRDHUP),),
            CHALLENGE_SECONDS,
            lambda gone: self._decide(proven, holder, asked, gone),
            idle=True,
        )

    def _decide(
        self, proven: _Proven, holder: AgentSession, asked: float, gone: bool
    ) -> Wait | None:
        with self._lock:
            holder.challenged = False
        if gone:
            return None
        proven.stream.limit(ANSWER_SECONDS)
        if holder.control.answered >= asked and not holder.ended:
            self._log.limited(
                ("tunnel name", holder.name),
                "tunnel: agent '%s' at %s is refused: the one at %s answers",
                holder.name,
                proven.client.host,
                holder.client.host,
            )
            return self._refuse(proven, tunnel.NAME_IN_USE)
        self._end(holder, f"the agent at {proven.client.host} took over", tunnel.REPLACED)
        return self._link(proven)

    def _link(self, proven: _Proven) -> Wait | None:
        session = os.urandom(tunnel.SESSION_SIZE)
        # others may have something to say to it as soon as it is among the links: its welcome comes first all the same
        link = AgentSession(
            proven.hello.name, Control(proven.stream, begun=False), session, proven.client
        )
        if not self._sessions.add(link):
            return self._refuse(proven, tunnel.NAME_IN_USE)
        # asked for once it is among the links: what is withdrawn later is withdrawn from it, too
        rights = self._agents.get(link.name)
        if self._stopping or rights is None or rights.token != proven.token:
            self._sessions.remove(link)
            return self._refuse(proven, tunnel.NAME_IN_USE if self._stopping else tunnel.NOT_PROVEN)
        # nothing else tells of a connection that no thread, or no memory, could be had for
        proven.stream.on_close(lambda: self._end(link, "the connection broke off"))
        try:
            link.control.begin(proven.welcome(session))
        except NetProxyError:
            self._end(link, "it left")
            raise
        self._counter.count("tunnel_handshakes", "agent")
        self._log.info("tunnel: agent '%s' connected from %s", link.name, link.client)
        return self._watch(link)

    # -- a control connection

    def _watch(self, link: AgentSession) -> Wait | None:
        if link.ended:
            return None
        try:
            seconds = link.control.beat(time.monotonic())
        except NetProxyError as error:
            return self._end(link, str(error))
        return Wait(
            ((link.control.stream.socket, READABLE),),
            seconds,
            lambda ready: self._resume(link, ready),
        )

    def _resume(self, link: AgentSession, ready: bool) -> Wait | None:
        if ready:
            try:
                for message in link.control.receive():
                    self._obey(link, message)
            except NetProxyError as error:
                return self._end(link, str(error))
        return self._watch(link)

    def _obey(self, link: AgentSession, message: tunnel.Message) -> None:
        if message.kind == tunnel.REGISTER:
            services, link.leads_out = tunnel.parse_register(message.value)
            self._serve_ports(link, services)
        elif message.kind == tunnel.CLOSE:
            self._log.debug(
                "tunnel: agent '%s' closes: %s",
                link.name,
                tunnel.CLOSINGS.get(tunnel.parse_number(message.value)),
            )

    def _end(self, link: AgentSession, why: str, closing: int = 0) -> None:
        """`closing`: the reason that the agent is told."""
        if not link.end():
            return
        if closing:
            link.control.close(closing)
        with link.ports_lock:
            ports = list(link.ports.values())
            link.ports.clear()
        for port in ports:
            port.close()
        self._sessions.remove(link)  # its name is free when its ports are
        link.control.stream.shutdown()
        self._log.info("tunnel: agent '%s' is gone: %s", link.name, why)

    # -- public ports

    def _serve_ports(self, link: AgentSession, services: Sequence[Service] | None) -> None:
        """These and no others, as far as the agent may have them; it is told which.  None: what it has asked for before."""
        outcomes: dict[Service, int] = {}
        with link.ports_lock:
            rights = self._agents.get(link.name) or Rights(b"")
            if services is None:
                services = [*link.ports, *link.refused]
            for service in [
                one
                for one, port in link.ports.items()
                if one not in services or port.host != rights.host_of(one)
            ]:
                link.ports.pop(service).close()
            for service in dict.fromkeys(services):
                outcomes[service] = (
                    tunnel.SERVED
                    if service in link.ports
                    else self._open(link, service, rights.host_of(service))
                )
            link.refused = {
                service: outcome
                for service, outcome in outcomes.items()
                if outcome != tunnel.SERVED
            }
            link.control.send(
                tunnel.encode_registered(list(outcomes.items()))
            )  # never waits; the last says what counts

    def _open(self, link: AgentSession, service: Service, host: str) -> int:
        """Under the link's lock."""
        if not host:
            self._log.limited(
                ("tunnel port", link.name, service),
                "tunnel: agent '%s' may not have port %s",
                link.name,
                service,
            )
            return tunnel.NOT_ALLOWED
        if link.ended:
            return tunnel.CANNOT_LISTEN
        try:
            link.ports[service] = Port(host, self._open_port(link.name, service, host))
        except ListenError as error:
            self._log.limited(
                ("tunnel port", link.name, service), "tunnel: agent '%s': %s", link.name, error
            )
            return tunnel.CANNOT_LISTEN
        return tunnel.SERVED


class _Proven(NamedTuple):
    """An agent's connection whose proof holds, before it is welcome."""

    stream: Stream
    client: Address
    hello: Hello
    nonce: bytes
    token: bytes

    def __repr__(self) -> str:
        return f"_Proven({self.hello.name!r})"

    def welcome(self, session: bytes) -> bytes:
        """What it is told; its connection is not dropped from here on to make room for others."""
        self.stream.welcome()
        proof = tunnel.bridge_proof(self.token, self.hello, self.nonce, session)
        return tunnel.encode_welcome(Welcome(proof, session))
