"""The agent: dials a bridge, keeps dialling it, and registers what it offers.

One thread keeps the control connection: it dials, registers, answers pings, and dials again
after a delay when anything fails.  Work connections are dialled ahead on the dial pool
(tunnel.pool) and served elsewhere (tunnel.work).
"""

from __future__ import annotations

import os
import select
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Callable, Mapping, Protocol, Sequence

from netproxy.errors import ListenError, NetProxyError, StreamError
from netproxy.net.connect import AbortableDials
from netproxy.net.stream import poll_streams
from netproxy.protocol import tunnel
from netproxy.tunnel.control import ControlConnection
from netproxy.tunnel.handshake import AgentHandshake
from netproxy.tunnel.pool import WorkPool

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.services import Log
    from netproxy.protocol.tunnel import BridgePort, TunnelMessage
    from netproxy.tunnel.handshake import AgentIdentity
    from netproxy.tunnel.pool import Submit, WorkHandler

RECONNECT_FIRST = 2.0
RECONNECT_LIMIT = 60.0
"""Seconds: the longest delay after the first failure, and after many."""

STEADY_SECONDS = 10.0
"""A connection that lasted so long does not count as a failure."""

LOOK_SECONDS = 1.0
"""Between two looks whether work connections are missing."""


class BridgeDialer(Protocol):
    """Connects to the bridge.  Thread: any."""

    def dial(self, greet: Callable[[Stream], None]) -> Stream:
        """Return a connection on which `greet` has made the tunnel's handshake.

        Blocks.  Raises DialError, and then the connection is closed.
        """


class Agent:
    """Keeps the control connection to a bridge, and a pool of work connections."""

    def __init__(
        self, identity: AgentIdentity, submit: Submit, handler: WorkHandler, log: Log
    ) -> None:
        """Begin without a thread: prepare(), configure() and start() must follow.

        `submit` runs a dial on the dial pool; `handler` takes work connections over.
        """
        self._identity = identity
        self._dialer: BridgeDialer
        self._submit = submit
        self._handler = handler
        self._log = log
        self._begun, self._stopped = threading.Event(), threading.Event()
        self._dials = AbortableDials()
        # Guards _services, _is_exit and _session.
        self._lock = threading.Lock()
        self._services: Sequence[BridgePort] = ()
        self._is_exit = False
        self._session: _BridgeSession | None = None
        # One REGISTER at a time, so that the last one tells the current state; never blocks.
        self._register_lock = threading.Lock()
        self._tries = 0
        """Failures in a row."""
        self.thread = threading.Thread(target=self._run, name="tunnel-agent", daemon=True)

    def configure(
        self, dialer: BridgeDialer, services: Sequence[BridgePort], is_exit: bool
    ) -> None:
        """Apply a configuration: register the offer, and use `dialer` for all later dials."""
        self._dialer = dialer
        with self._lock:
            self._services, self._is_exit = services, is_exit
            session = self._session
        if session is not None:
            self._register(session)

    def prepare(self) -> None:
        """Start the thread, which does nothing before start().  Raises ListenError."""
        try:
            self.thread.start()
        except RuntimeError as error:
            # No thread is left.
            raise ListenError(f"tunnel agent: {error}") from error

    def start(self) -> None:
        """Begin to dial.  Cannot fail after prepare(), which is called if nobody has."""
        if self.thread.ident is None:
            self.prepare()
        self._begun.set()

    def stop(self, seconds: float) -> None:
        """End the session and all dials; running streams continue.

        Waits at most `seconds` for the thread, which may be looking a name up.
        """
        self._stopped.set()
        self._begun.set()
        with self._lock:
            session = self._session
        if session is not None:
            session.pool.end()
            session.control.close(tunnel.STOPPING)
        self._dials.abort()
        if self.thread.is_alive():
            self.thread.join(seconds)

    @property
    def stopped(self) -> bool:
        """Whether stop() was called."""
        return self._stopped.is_set()

    def describe(self) -> dict[str, object]:
        """Return the state for netproxyctl."""
        with self._lock:
            session = self._session
        if session is None:
            return {"name": self._identity.name, "connected": False, "tries": self._tries}
        return {"name": self._identity.name, "connected": True, **session.describe()}

    # -- the thread

    def _run(self) -> None:
        self._begun.wait()
        while not self.stopped:
            self._tries += 1
            try:
                self._connect()
            except NetProxyError as error:
                if not self.stopped:
                    self._log.limited(
                        ("tunnel", str(error)), "tunnel: no connection to the bridge: %s", error
                    )
            except Exception:
                self._log.exception("serving the tunnel")
            self._stopped.wait(reconnect_delay(self._tries))

    def _connect(self) -> None:
        """Dial a control connection and keep it until it ends."""
        handshake = AgentHandshake(self._dials, self._identity, tunnel.CONTROL)
        stream = self._dial(handshake)
        work_handshake = AgentHandshake(self._dials, self._identity, tunnel.WORK, handshake.session)
        pool = WorkPool(partial(self._dial, work_handshake), self._submit, self._handler, self._log)
        session = _BridgeSession(ControlConnection(stream), pool)
        with self._lock:
            self._session = session
        # Begins here: a dial that fails late is a failure all the same.
        began = time.monotonic()
        try:
            if not self.stopped:
                self._log.info("tunnel: connected as '%s'", self._identity.name)
                self._register(session)
                self._keep(session)
        finally:
            with self._lock:
                self._session = None
            if time.monotonic() - began >= STEADY_SECONDS:
                self._tries = 1
            pool.end()
            stream.close()

    def _dial(self, handshake: AgentHandshake) -> Stream:
        with self._dials.watched():
            return self._dialer.dial(handshake.run)

    def _register(self, session: _BridgeSession) -> None:
        with self._register_lock:
            with self._lock:
                services, is_exit = self._services, self._is_exit
            session.control.send(tunnel.encode_register(services, is_exit))

    def _keep(self, session: _BridgeSession) -> None:
        """Read the control connection, send heartbeats and dial work connections."""
        control = session.control
        poll = select.poll()
        poll.register(control.stream.socket, select.POLLIN)
        while not self.stopped:
            seconds = control.heartbeat(time.monotonic())
            session.pool.fill()
            if poll_streams(poll, min(seconds, LOOK_SECONDS)):
                for message in control.receive():
                    self._obey(session, message)

    def _obey(self, session: _BridgeSession, message: TunnelMessage) -> None:
        if message.kind == tunnel.WANT:
            session.pool.want(tunnel.parse_number(message.value))
        elif message.kind == tunnel.REGISTERED:
            session.outcomes = dict(tunnel.parse_registered(message.value))
            for service, outcome in session.outcomes.items():
                if outcome != tunnel.SERVED:
                    self._log.warning(
                        "tunnel: port %s is not served: %s", service, _outcome_text(outcome)
                    )
        elif message.kind == tunnel.CLOSE:
            reason = tunnel.parse_number(message.value)
            text = tunnel.reason_text(tunnel.CLOSINGS, reason)
            raise StreamError(f"the bridge has closed the connection: {text}")


class _BridgeSession:
    """A session with the bridge: its control connection and its work connections."""

    def __init__(self, control: ControlConnection, pool: WorkPool) -> None:
        self.control = control
        self.pool = pool
        self.since = time.time()
        self.outcomes: Mapping[BridgePort, int] = {}
        """Of the registered services, as the bridge has told (keys of tunnel.OUTCOMES)."""

    def describe(self) -> dict[str, object]:
        """Return the state for netproxyctl."""
        return {
            "since": self.since,
            "rtt": self.control.rtt,
            **self.pool.describe(),
            "ports": {
                str(service): _outcome_text(outcome) for service, outcome in self.outcomes.items()
            },
        }


def _outcome_text(outcome: int) -> str:
    return tunnel.reason_text(tunnel.OUTCOMES, outcome)


def reconnect_delay(failures: int) -> float:
    """Return the seconds until the next dial after so many failures in a row.

    1 to 2 after the first one, twice as many after each further one, in the end 30 to 60.  The
    random part keeps many agents from dialling at the same moment.
    """
    longest = min(RECONNECT_LIMIT, RECONNECT_FIRST * 2.0 ** min(failures - 1, 16))
    return longest / 2 * (1.0 + int.from_bytes(os.urandom(2), "big") / 65536)
