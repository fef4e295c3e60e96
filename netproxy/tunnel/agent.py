"""The agent: dials a bridge, keeps dialling it, and registers what it offers.

One thread keeps the control connection: it dials, registers, answers pings, and dials again
after a delay when anything fails.  A session with a datagram path is resumed at once, and its
datagrams go on meanwhile.  Work connections are dialled ahead on the dial pool (tunnel.pool) and
served elsewhere (tunnel.work).
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from functools import partial

from netproxy.errors import ListenError, NetProxyError, StreamError
from netproxy.net.stream import poll_streams
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import Registration
from netproxy.tunnel.control.bridge_session import BridgeSession
from netproxy.tunnel.control.dials import BridgeDials
from netproxy.tunnel.control.watch import ControlWatch
from netproxy.tunnel.pool import WorkPool
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.services import Log
    from netproxy.protocol.tunnel import BridgePort, TunnelMessage
    from netproxy.tunnel.control.dials import BegunSession, BridgeDialer
    from netproxy.tunnel.control.handshake import AgentIdentity
    from netproxy.tunnel.path.agent import AgentPaths
    from netproxy.tunnel.path.owner import PathServices
    from netproxy.tunnel.pool import Submit, WorkHandler

RECONNECT_FIRST = 2.0
RECONNECT_LIMIT = 60.0
"""Seconds: the longest delay after the first failure, and after many."""

STEADY_SECONDS = 10.0
"""A connection that lasted so long does not count as a failure."""

QUICK_SECONDS = 10.0
"""After the end of a connection that lasted the delay does not grow for so long: a bridge that is
started again is found soon."""

LOOK_SECONDS = 1.0
"""Between two looks whether work connections are missing."""


class Agent:
    """Keeps the control connection to a bridge, and a pool of work connections."""

    def __init__(
        self,
        identity: AgentIdentity,
        submit: Submit,
        handler: WorkHandler,
        log: Log,
        paths: PathServices | None = None,
    ) -> None:
        """Begin without a thread: prepare(), configure() and start() must follow.

        `submit` runs a dial on the dial pool; `handler` takes work connections over.  `paths`:
        what datagram paths need; None: the bridge is asked for none.
        """
        self._identity = identity
        self._dials = BridgeDials(identity)
        self._submit = submit
        self._handler = handler
        self._log = log
        self._path_services = paths
        self._begun, self._stopped = threading.Event(), threading.Event()
        # Guards _services, _is_exit and _session.
        self._lock = threading.Lock()
        self._services: Sequence[BridgePort] = ()
        self._is_exit = False
        self._session: BridgeSession | None = None
        # One REGISTER at a time, so that the last one tells the current state; never blocks.
        self._register_lock = threading.Lock()
        self._tries = 0
        """Failures in a row."""
        self._is_refused = False
        """True once a session that has lasted cannot be resumed: another one is begun at once."""
        self._lost = -math.inf
        """When the last connection that lasted has ended, in monotonic seconds."""
        self.thread = threading.Thread(target=self._run, name="tunnel-agent", daemon=True)

    def configure(
        self, dialer: BridgeDialer, services: Sequence[BridgePort], is_exit: bool
    ) -> None:
        """Apply a configuration: register the offer, and use `dialer` for all later dials."""
        self._dials.dialer = dialer
        with self._lock:
            self._services, self._is_exit = services, is_exit
            session = self._session
        if session is not None:
            session.pool.renew()
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
        if session is None or not session.is_connected:
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
            if self._is_quick:
                self._tries = 1
            if not self._is_refused:
                self._stopped.wait(reconnect_delay(self._tries))
            self._is_refused = False

    @property
    def _is_quick(self) -> bool:
        return time.monotonic() - self._lost < QUICK_SECONDS

    def _connect(self) -> None:
        """Begin a session, and keep it until it ends."""
        begun = self._dials.begin()
        pool, paths = self._pool(begun.identifier), self._paths(begun)
        session = BridgeSession(begun.identifier, begun.control, pool, paths)
        with self._lock:
            self._session = session
        # Begins here: a dial that fails late is a failure all the same.
        began = time.monotonic()
        try:
            if not self.stopped:
                self._log.info("tunnel: connected as '%s'", self._identity.name)
                self._keep_session(session)
        finally:
            with self._lock:
                self._session = None
            has_lasted = time.monotonic() - began >= STEADY_SECONDS
            if has_lasted:
                self._tries, self._lost = 1, time.monotonic()
            self._is_refused = self._is_refused and has_lasted
            session.close()

    def _pool(self, identifier: bytes) -> WorkPool:
        """Return a pool of work connections of a session."""
        dial = partial(self._dials.work, identifier)
        return WorkPool(dial, self._submit, self._handler, self._log)

    def _paths(self, begun: BegunSession) -> AgentPaths | None:
        """Return what takes the paths that the bridge offers within TLS, None to ask for none."""
        services = self._path_services
        if services is None or services.make_cipher is None or begun.control.plain:
            return None
        from netproxy.tunnel.path.agent import AgentPaths  # late: few agents have paths

        attach = partial(self._dials.attach, begun.identifier)
        return AgentPaths(services, self._submit, self._dials.datagrams(begun.control), attach)

    def _register(self, session: BridgeSession) -> None:
        with self._register_lock:
            with self._lock:
                services, is_exit = self._services, self._is_exit
            has_paths, is_direct = session.paths is not None, session.is_direct
            says = (session.reuses, has_paths, has_paths, is_direct)
            registration = Registration(services, is_exit, *says)
            session.control.send(tunnel.encode_register(registration))

    def _keep_session(self, session: BridgeSession) -> None:
        """Keep a session, on one control connection after the other."""
        while not self.stopped:
            self._register(session)
            try:
                self._keep(session)
            except NetProxyError as error:
                if self.stopped or not session.is_resumable:
                    raise
                self._log.info("tunnel: connecting again, while datagrams go on: %s", error)
                self._resume(session)

    def _resume(self, session: BridgeSession) -> None:
        """Dial another control connection for a session, as often as needed.

        Raises StreamError if the bridge refuses.
        """
        session.is_connected, self._lost = False, time.monotonic()
        paths, failures = session.paths, 0
        while not self.stopped:
            try:
                stream = self._dials.resume(session.identifier)
            except NetProxyError as error:
                said = "tunnel: no connection to the bridge: %s"
                self._log.limited(("tunnel", str(error)), said, error)
                # While UDP works the bridge is there, and TCP may be as well at any time.
                is_quick = self._is_quick or (paths is not None and paths.is_up)
                failures = 1 if is_quick else failures + 1
                self._stopped.wait(reconnect_delay(failures))
                continue
            if stream is None:
                self._is_refused = True
                raise StreamError("the bridge has ended the session: beginning another one")
            session.resume(stream, self._pool(session.identifier), self._dials.datagrams(stream))
            self._log.info("tunnel: connected again as '%s'", self._identity.name)
            return

    def _keep(self, session: BridgeSession) -> None:
        """Read the control connection, send heartbeats and dial work connections."""
        control, paths = session.control, session.paths
        watch = ControlWatch(control, paths) if paths is not None else None
        poll = select.poll()
        poll.register(control.stream.socket, select.POLLIN)
        while not self.stopped:
            now = time.monotonic()
            seconds = control.heartbeat(now)
            if watch is not None and session.is_resumable:
                watch.check(now)
            session.pool.fill()
            if paths is not None:
                paths.fill()
            if poll_streams(poll, min(seconds, LOOK_SECONDS)):
                for message in control.receive():
                    self._obey(session, message)

    def _obey(self, session: BridgeSession, message: TunnelMessage) -> None:
        paths = session.paths
        if message.kind == tunnel.WANT:
            session.pool.want(tunnel.parse_number(message.value))
        elif message.kind == tunnel.REGISTERED:
            session.outcomes = dict(tunnel.parse_registered(message.value))
            for service, outcome in session.outcomes.items():
                if outcome != tunnel.SERVED:
                    text = tunnel.reason_text(tunnel.OUTCOMES, outcome)
                    self._log.warning("tunnel: port %s is not served: %s", service, text)
        elif paths is not None and message.kind in tunnel.OF_PATHS:
            paths.obey(message)
        elif paths is not None and message.kind == tunnel.RESUMABLE:
            session.is_resumable = True
            paths.note_offered()
        elif message.kind == tunnel.CLOSE:
            session.is_resumable = False
            reason = tunnel.parse_number(message.value)
            text = tunnel.reason_text(tunnel.CLOSINGS, reason)
            raise StreamError(f"the bridge has closed the connection: {text}")


def reconnect_delay(failures: int) -> float:
    """Return the seconds until the next dial after so many failures in a row.

    1 to 2 after the first one, twice as many after each further one, in the end 30 to 60.  The
    random part keeps many agents from dialling at the same moment.
    """
    longest = min(RECONNECT_LIMIT, RECONNECT_FIRST * 2.0 ** min(failures - 1, 16))
    return longest / 2 * (1.0 + int.from_bytes(os.urandom(2), "big") / 65536)
