"""The bridge: authenticates agents by name and token, and keeps their control connections.

A Handler for the connections of agents.  The handshake runs on a thread of the connection's
own.  After it a control connection holds no thread: its agent's messages or the heartbeat wake
it.  A wrong token and an unknown name get the same refusal, after a delay.  A session whose
control connection is lost is held while its datagrams go on: the agent may resume it.
"""

from __future__ import annotations

import os
import time
from functools import partial

from netproxy.errors import NetProxyError
from netproxy.interfaces.connections import READABLE, Blocking, Wait
from netproxy.protocol import tunnel
from netproxy.tunnel.control.claims import NameClaims
from netproxy.tunnel.control.connection import ControlConnection
from netproxy.tunnel.control.login import AgentLogin, arrival_of
from netproxy.tunnel.control.refusals import AGENTS, HandshakeRefusals
from netproxy.tunnel.control.session import AgentSession
from netproxy.tunnel.control.sessions import AgentSessions
from netproxy.tunnel.ports import RightsTable, SessionPorts
from netproxy.tunnel.streams.work_stream import WorkStream
from netproxy.typed import TYPE_CHECKING, Mapping

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handshake, Stream
    from netproxy.interfaces.services import Counter, Log
    from netproxy.protocol.tunnel import Hello, TunnelMessage
    from netproxy.tunnel.control.login import Arrival
    from netproxy.tunnel.control.refusals import RefusalDelays
    from netproxy.tunnel.direct.bridge import DirectOffers
    from netproxy.tunnel.path.bridge import BridgePaths
    from netproxy.tunnel.ports import AgentRights, PortOpener


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
        sessions.give_up = partial(self._end, why="it has not connected again")
        self._opener = opener
        self._counter, self._log = counter, log
        self._rights = RightsTable()
        self._decoy_token = os.urandom(tunnel.PROOF_SIZE)  # unknown names cost the same work
        self._refusals = HandshakeRefusals(back_off, counter)
        self._claims = NameClaims(self._refusals, self._replace)
        self.paths: BridgePaths | None = None
        """Offers datagram paths to agents; None if no configuration has had any."""
        self.direct: DirectOffers | None = None  # has clients and agents talk directly
        self._stopping = False

    def configure(self, agents: Mapping[str, AgentRights]) -> None:
        """Apply the rights of a configuration; connected agents keep the ports still allowed."""
        before = self._rights.replace(agents)
        for session in self._sessions.all():
            session.renew()
            old, new = before.get(session.name), agents.get(session.name)
            if old is None or new is None or new.token != old.token:
                self._end(session, "removed from the configuration", tunnel.WITHDRAWN)
            elif new.ports != old.ports:
                session.ports.apply_rights()
            if self.paths is not None:
                self.paths.offer(session)

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
        check = partial(self._check_proof, stream, client, hello, nonce, proof)
        wait: Wait | None = yield Blocking(check)
        return wait

    def _check_proof(
        self, stream: Stream, client: Address, hello: Hello, nonce: bytes, proof: bytes
    ) -> Wait | None:
        rights = self._rights.get(hello.name)
        token = self._decoy_token if rights is None else rights.token
        expected = tunnel.agent_proof(token, hello, nonce)
        if not tunnel.secrets_equal(proof, expected) or rights is None:
            return self._refusals.refuse_later(stream, client, hello)
        login = AgentLogin(stream, arrival_of(stream, client), hello, nonce, token)
        elsewhere = self._sessions.elsewhere
        if elsewhere is not None and elsewhere.is_elsewhere(hello.name):
            return elsewhere.hand_over(login)
        return self._admit(login)

    def take_over(self, stream: Stream, arrival: Arrival, nonce: bytes) -> Handshake:
        """Go on with a connection that another worker has handed over, from its hello on."""
        hello = yield from tunnel.read_hello(stream)
        rights = self._rights.get(hello.name)
        if rights is None:  # a reload has removed the agent meanwhile
            return None
        login = AgentLogin(stream, arrival, hello, nonce, rights.token)
        wait: Wait | None = yield Blocking(partial(self._admit, login))
        return wait

    def _admit(self, login: AgentLogin) -> Wait | None:
        """Use the connection of an agent whose proof is valid."""
        if login.hello.kind == tunnel.CONTROL:
            holder = self._sessions.get(login.hello.name)
            return self._begin(login) if holder is None else self._claims.claim(login, holder)
        session = self._sessions.get(login.hello.name)
        if session is None or not tunnel.secrets_equal(login.hello.session, session.identifier):
            self._refusals.refuse(login, tunnel.NO_SESSION, "the agent's sessions")
            return None
        if login.hello.kind == tunnel.RESUME:
            return self._resume_session(login, session)
        if login.hello.kind == tunnel.ATTACH:
            self._attach_work(login, session)
        else:
            self._add_work(login, session)
        return None

    def _add_work(self, login: AgentLogin, session: AgentSession) -> None:
        if not session.has_room:
            self._refusals.refuse(login, tunnel.TOO_MANY, "the limit of idle work connections")
            return
        work = self._welcome_work(login, session)
        if not session.add(work):
            work.close()

    def _attach_work(self, login: AgentLogin, session: AgentSession) -> None:
        """Let a flow go on with this work connection."""
        flow = session.flow(login.hello.path, login.hello.flow)
        if flow is None:
            self._refusals.refuse(login, tunnel.NO_FLOW, "the agent's flows")
            return
        # From its welcome on the agent may close the connection before.
        flow.await_stream()
        try:
            work = self._welcome_work(login, session)
        except BaseException:
            flow.forgo()
            raise
        attach = flow.attach
        if attach is None or not attach(work):
            work.close()
            return
        self._counter.count("tunnel_handshakes", "attached")

    @staticmethod
    def _welcome_work(login: AgentLogin, session: AgentSession) -> WorkStream:
        login.stream.write(login.welcome(session.identifier))
        login.stream.limit(None)
        return WorkStream(login.stream, session)

    # -- the beginning of a session, and another control connection of one

    def _replace(self, login: AgentLogin, holder: AgentSession) -> Wait | None:
        """Give a name to another agent (claims.Replace)."""
        why = f"replaced by the agent from {login.arrival.client.host}"
        self._end(holder, why, tunnel.REPLACED)
        return self._begin(login)

    def _begin(self, login: AgentLogin) -> Wait | None:
        session = self._session(login)
        if not self._sessions.add(session):
            self._refusals.refuse(login, tunnel.NAME_IN_USE, "another agent claims the name")
            return None
        # Read after the session was added: a later configure() finds the session itself.
        is_token_valid = self._is_token_valid(login)
        if self._stopping or not is_token_valid:
            self._sessions.remove(session)
            reason = tunnel.NAME_IN_USE if is_token_valid else tunnel.NOT_PROVEN
            self._refusals.refuse(login, reason, "the bridge stops" if is_token_valid else AGENTS)
            return None
        wait = self._welcome(login, session, session.control)
        self._counter.count("tunnel_handshakes", "agent")
        self._log.info("tunnel: agent '%s' connected from %s", session.name, session.client)
        return wait

    def _is_token_valid(self, login: AgentLogin) -> bool:
        rights = self._rights.get(login.hello.name)
        return rights is not None and rights.token == login.token

    def _session(self, login: AgentLogin) -> AgentSession:
        # Once the session can be found, other threads may send to the agent: their messages are
        # held back until the welcome has been sent.
        control = ControlConnection(login.stream, begun=False)
        name = login.hello.name
        ports = SessionPorts(name, control, self._rights, self._opener, self._log)
        identifier = os.urandom(tunnel.SESSION_SIZE)
        return AgentSession(name, identifier, login.arrival, control, ports)

    def _resume_session(self, login: AgentLogin, session: AgentSession) -> Wait | None:
        """Go on with a session on another control connection, which is the agent's newest."""
        control = ControlConnection(login.stream, begun=False)
        is_refused = self._stopping or not self._is_token_valid(login)
        before = None if is_refused else session.resume(control, login.arrival)
        if before is None:
            self._refusals.refuse(login, tunnel.NO_SESSION, "the agent's sessions")
            return None
        before.stream.shutdown()
        wait = self._welcome(login, session, control)
        self._counter.count("tunnel_handshakes", "resumed")
        self._log.info("tunnel: agent '%s' goes on from %s", session.name, session.client)
        return wait

    def _welcome(
        self, login: AgentLogin, session: AgentSession, control: ControlConnection
    ) -> Wait | None:
        """Welcome a control connection; return what it waits for."""
        # Only the stream's end tells of a connection for which no thread or memory is left.
        login.stream.on_close(partial(self._lose, session, control, "the connection was lost"))
        try:
            control.begin(login.welcome(session.identifier))
        except NetProxyError:
            self._lose(session, control, "the connection was lost in its handshake")
            raise
        return self._wait(session, control)

    # -- a control connection

    def _wait(self, session: AgentSession, control: ControlConnection) -> Wait | None:
        """Wait for a message or for the next heartbeat."""
        if session.ended or session.control is not control:
            return None
        try:
            seconds = control.heartbeat(time.monotonic())
        except NetProxyError as error:
            self._lose(session, control, str(error))
            return None
        wake = partial(self._wake, session, control)
        return Wait(((control.stream.socket, READABLE),), seconds, wake)

    def _wake(self, session: AgentSession, control: ControlConnection, ready: bool) -> Wait | None:
        if ready:
            try:
                for message in control.receive():
                    if session.control is control:
                        self._obey(session, message)
            except NetProxyError as error:
                self._lose(session, control, str(error))
                return None
        return self._wait(session, control)

    def _obey(self, session: AgentSession, message: TunnelMessage) -> None:
        if message.kind == tunnel.REGISTER:
            services, *said = tunnel.parse_register(message.value)
            session.is_exit, session.reuses, session.takes_paths, *said = said
            session.resumes, session.takes_direct = said
            session.ports.serve(services)
            if self.paths is not None:
                self.paths.offer(session)
        elif message.kind == tunnel.DIRECT_STATE and self.direct is not None:
            self.direct.take_state(session, message.value, time.monotonic())
        elif message.kind == tunnel.CLOSE:
            session.resumes = False
            text = tunnel.reason_text(tunnel.CLOSINGS, tunnel.parse_number(message.value))
            self._log.debug("tunnel: agent '%s' closes its connection: %s", session.name, text)

    def _lose(self, session: AgentSession, control: ControlConnection, why: str) -> None:
        """Hold a session whose control connection is lost, if it may be resumed; else end it."""
        if session.control is not control or session.is_held:
            return
        if session.hold(control, time.monotonic()):
            self._log.info("tunnel: agent '%s' is to connect again: %s", session.name, why)
        else:
            self._end(session, why)

    def _end(self, session: AgentSession, why: str, closing: int = 0) -> None:
        """End a session, for the log's reason `why`; `closing` is the reason the agent is told."""
        if not session.end():
            return
        if closing:
            session.control.close(closing)
        session.ports.close()
        if self.paths is not None:
            self.paths.offer(session)
        # The ports are closed first, so that the next agent of this name gets them at once.
        self._sessions.remove(session)
        session.control.stream.shutdown()
        self._log.info("tunnel: agent '%s' disconnected: %s", session.name, why)
