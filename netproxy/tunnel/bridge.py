"""The bridge: authenticates agents by name and token, and keeps their control connections.

A Handler for the connections of agents.  The handshake runs on a thread of the connection's
own.  After it a control connection holds no thread: its agent's messages or the heartbeat wake
it.  A wrong token and an unknown name get the same refusal, after a delay.
"""

from __future__ import annotations

import os
import select
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Mapping, NamedTuple, Protocol

from netproxy.errors import NetProxyError
from netproxy.interfaces.connections import READABLE, Blocking, Wait
from netproxy.interfaces.services import Refusal
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import Hello, Welcome
from netproxy.tunnel.control import ControlConnection
from netproxy.tunnel.ports import RightsTable, SessionPorts
from netproxy.tunnel.sessions import AgentSession, AgentSessions, WorkStream

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handshake, Stream
    from netproxy.interfaces.services import Counter, Log
    from netproxy.protocol.tunnel import TunnelMessage
    from netproxy.tunnel.ports import AgentRights, PortOpener

CHALLENGE_SECONDS = 2.0
"""For an agent to answer a ping when another agent asks for its name."""

AGENTS = "tunnel.bridge.agents"
"""The key that decides which agents may connect."""

BRIDGE = "tunnel-bridge"
"""The listener in records of refused agents."""

ANSWER_SECONDS = 10.0  # to send the rest of a handshake that was delayed


class RefusalDelays(Protocol):
    """Computes the delay of a refusal: access.backoff.BackOff."""

    def next_delay(self, host: str, now: float) -> float:
        """Count one more failure of a client's host; return its delay in seconds."""


class Bridge:
    """Handles the connections of agents.  Thread: any."""

    def __init__(
        self,
        sessions: AgentSessions,
        opener: PortOpener,
        back_off: RefusalDelays,
        counter: Counter,
        log: Log,
    ) -> None:
        """Begin without configured agents: configure() must follow."""
        self._sessions = sessions
        self._opener = opener
        self._counter = counter
        self._log = log
        self._rights = RightsTable()
        # The token of unknown names: they cost the same work as known ones.
        self._decoy_token = os.urandom(tunnel.PROOF_SIZE)
        self._back_off = back_off
        # Guards `challenged` of the sessions.
        self._lock = threading.Lock()
        self._stopping = False

    def configure(self, agents: Mapping[str, AgentRights]) -> None:
        """Apply the rights of a configuration; connected agents keep the ports still allowed."""
        before = self._rights.replace(agents)
        for session in self._sessions.all():
            old, new = before.get(session.name), agents.get(session.name)
            if old is None or new is None or new.token != old.token:
                self._end(session, "removed from the configuration", tunnel.WITHDRAWN)
            elif new.ports != old.ports:
                session.ports.apply_rights()

    def stop(self) -> None:
        """Tell the agents, and close their ports; running streams continue."""
        self._stopping = True
        for session in self._sessions.all():
            self._end(session, "this bridge is stopping", tunnel.STOPPING)

    def describe(self) -> list[dict[str, object]]:
        """Return the sessions for netproxyctl."""
        return [session.describe() for session in self._sessions.all()]

    # -- the handshake

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Handle a connection of an agent (interfaces.connections.Handler)."""
        hello = yield from tunnel.read_hello(stream)
        nonce = os.urandom(tunnel.NONCE_SIZE)
        stream.reply(tunnel.encode_challenge(nonce))
        proof = yield from stream.read_exactly(tunnel.PROOF_SIZE)
        wait: Wait | None = yield Blocking(
            partial(self._check_proof, stream, client, hello, nonce, proof)
        )
        return wait

    def _check_proof(
        self, stream: Stream, client: Address, hello: Hello, nonce: bytes, proof: bytes
    ) -> Wait | None:
        rights = self._rights.get(hello.name)
        token = self._decoy_token if rights is None else rights.token
        expected = tunnel.agent_proof(token, hello, nonce)
        if not tunnel.secrets_equal(proof, expected) or rights is None:
            return self._refuse_later(stream, client, hello)
        login = _AgentLogin(stream, client, hello, nonce, token)
        if hello.kind == tunnel.WORK:
            self._add_work(login)
            return None
        return self._claim_name(login)

    def _refuse_later(self, stream: Stream, client: Address, hello: Hello) -> Wait:
        self._note_refusal(client, hello, tunnel.NOT_PROVEN, AGENTS)
        return Wait(
            ((stream.socket, select.POLLRDHUP),),
            self._back_off.next_delay(client.host, time.monotonic()),
            partial(_refuse_unless_closed, stream),
            idle=True,
        )

    def _note_refusal(self, client: Address, hello: Hello, reason: int, decided: str) -> None:
        text, asked = tunnel.REFUSALS[reason], f"agent '{hello.name}'"
        refusal = Refusal("tunnel_handshakes", text, BRIDGE, client.host, asked, decided)
        self._counter.refuse(refusal)

    def _refuse(self, login: _AgentLogin, reason: int, decided: str) -> None:
        self._note_refusal(login.client, login.hello, reason, decided)
        login.stream.write(tunnel.encode_refusal(reason))

    def _add_work(self, login: _AgentLogin) -> None:
        session = self._sessions.get(login.hello.name)
        if session is None or not tunnel.secrets_equal(login.hello.session, session.identifier):
            self._refuse(login, tunnel.NO_SESSION, "the agent's sessions")
            return
        if not session.has_room:
            self._refuse(login, tunnel.TOO_MANY, "the limit of idle work connections")
            return
        login.stream.write(login.welcome(session.identifier))
        login.stream.limit(None)
        work = WorkStream(login.stream, session)
        if not session.add(work):
            work.close()

    # -- who owns a name

    def _claim_name(self, login: _AgentLogin) -> Wait | None:
        """Give the name to the agent, or find out whether the agent that has it still answers."""
        holder = self._sessions.get(login.hello.name)
        if holder is None:
            return self._begin_session(login)
        with self._lock:
            already_challenged, holder.challenged = holder.challenged, True
        if already_challenged:
            self._refuse(login, tunnel.NAME_IN_USE, "another agent claims the name")
            return None
        asked = time.monotonic()
        holder.control.ping()
        return Wait(
            ((login.stream.socket, select.POLLRDHUP),),
            CHALLENGE_SECONDS,
            partial(self._decide, login, holder, asked),
            idle=True,
        )

    def _decide(
        self, login: _AgentLogin, holder: AgentSession, asked: float, closed: bool
    ) -> Wait | None:
        """Decide whose the name is; `asked` is when the holder was pinged (monotonic)."""
        with self._lock:
            holder.challenged = False
        if closed:
            return None
        login.stream.limit(ANSWER_SECONDS)
        if holder.control.last_pong >= asked and not holder.ended:
            decided = f"the agent that answers from {holder.client.host}"
            self._refuse(login, tunnel.NAME_IN_USE, decided)
            return None
        self._end(holder, f"replaced by the agent from {login.client.host}", tunnel.REPLACED)
        return self._begin_session(login)

    def _begin_session(self, login: _AgentLogin) -> Wait | None:
        session = self._session(login)
        if not self._sessions.add(session):
            self._refuse(login, tunnel.NAME_IN_USE, "another agent claims the name")
            return None
        # Read after the session was added: a later configure() finds the session itself.
        rights = self._rights.get(session.name)
        if self._stopping or rights is None or rights.token != login.token:
            self._sessions.remove(session)
            if self._stopping:
                self._refuse(login, tunnel.NAME_IN_USE, "the bridge stops")
            else:
                self._refuse(login, tunnel.NOT_PROVEN, AGENTS)
            return None
        # Only the stream's end tells of a connection for which no thread or memory is left.
        login.stream.on_close(partial(self._end, session, "the connection was lost"))
        try:
            session.control.begin(login.welcome(session.identifier))
        except NetProxyError:
            self._end(session, "the connection was lost in its handshake")
            raise
        self._counter.count("tunnel_handshakes", "agent")
        self._log.info("tunnel: agent '%s' connected from %s", session.name, session.client)
        return self._wait(session)

    def _session(self, login: _AgentLogin) -> AgentSession:
        # Once the session can be found, other threads may send to the agent: their messages are
        # held back until the welcome has been sent.
        control = ControlConnection(login.stream, begun=False)
        name = login.hello.name
        ports = SessionPorts(name, control, self._rights, self._opener, self._log)
        identifier = os.urandom(tunnel.SESSION_SIZE)
        return AgentSession(name, identifier, login.client, control, ports)

    # -- a control connection

    def _wait(self, session: AgentSession) -> Wait | None:
        """Wait for a message or for the next heartbeat."""
        if session.ended:
            return None
        try:
            seconds = session.control.heartbeat(time.monotonic())
        except NetProxyError as error:
            self._end(session, str(error))
            return None
        return Wait(
            ((session.control.stream.socket, READABLE),), seconds, partial(self._resume, session)
        )

    def _resume(self, session: AgentSession, ready: bool) -> Wait | None:
        if ready:
            try:
                for message in session.control.receive():
                    self._obey(session, message)
            except NetProxyError as error:
                self._end(session, str(error))
                return None
        return self._wait(session)

    def _obey(self, session: AgentSession, message: TunnelMessage) -> None:
        if message.kind == tunnel.REGISTER:
            services, session.is_exit = tunnel.parse_register(message.value)
            session.ports.serve(services)
        elif message.kind == tunnel.CLOSE:
            reason = tunnel.parse_number(message.value)
            self._log.debug(
                "tunnel: agent '%s' closes its connection: %s",
                session.name,
                tunnel.reason_text(tunnel.CLOSINGS, reason),
            )

    def _end(self, session: AgentSession, why: str, closing: int = 0) -> None:
        """End a session, for the log's reason `why`; `closing` is the reason the agent is told."""
        if not session.end():
            return
        if closing:
            session.control.close(closing)
        session.ports.close()
        # The ports are closed first, so that the next agent of this name gets them at once.
        self._sessions.remove(session)
        session.control.stream.shutdown()
        self._log.info("tunnel: agent '%s' disconnected: %s", session.name, why)


class _AgentLogin(NamedTuple):
    """The connection of an agent whose proof is valid, before its welcome."""

    stream: Stream
    client: Address
    hello: Hello
    nonce: bytes
    """The bridge's."""
    token: bytes

    def __repr__(self) -> str:
        return f"_AgentLogin({self.hello.name!r})"

    def welcome(self, session: bytes) -> bytes:
        """Return the bytes of the welcome; from now on the connection is not shed."""
        self.stream.handshaking = False
        proof = tunnel.bridge_proof(self.token, self.hello, self.nonce, session)
        return tunnel.encode_welcome(Welcome(proof, session))


def _refuse_unless_closed(stream: Stream, closed: bool) -> None:
    """Send the refusal that was delayed."""
    if not closed:
        stream.limit(ANSWER_SECONDS)
        stream.write(tunnel.encode_refusal(tunnel.NOT_PROVEN))
