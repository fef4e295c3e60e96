"""The agent: dials a bridge and keeps dialling it, and serves what the bridge opens.

One thread has the control connection: it dials, says which ports it wants, answers
pings, and begins anew, after a pause, when anything fails.  Work connections are dialled
in advance on the dial pool; while they wait they have no thread.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from netproxy.errors import (
    DialError,
    ListenError,
    NetProxyError,
    ProtocolError,
    Reason,
    StreamError,
)
from netproxy.interfaces.services import Log
from netproxy.net.connect import AbortableDials
from netproxy.net.stream import Stream, poll_streams
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import Hello, Service, Welcome
from netproxy.tunnel.control import Control
from netproxy.tunnel.pool import Submit, WorkPool

BACKOFF_LIMIT = 60.0  # seconds between two tries, at the most
BACKOFF_FIRST = 2.0
STEADY_SECONDS = 10.0  # a connection that has lived so long is no failure
LOOK_SECONDS = 1.0  # between two looks at whether work connections are missing

Dial = Callable[
    [Callable[[Stream], None]], Stream
]  # dials the bridge and has the call shake hands there; DialError


class Identity(NamedTuple):
    """What an agent proves to be."""

    name: str
    token: bytes

    def __repr__(self) -> str:
        return f"Identity({self.name!r})"


class Agent:
    def __init__(
        self,
        identity: Identity,
        dial: Dial,
        submit: Submit,
        serve: Callable[[Stream, WorkPool], None],
        log: Log,
    ) -> None:
        """`submit` runs a dial on a pool; `serve` takes a work connection over, on whatever thread."""
        self._identity = identity
        self._dial = dial
        self._submit = submit
        self._serve = serve
        self._log = log
        self._begun, self._stopped = threading.Event(), threading.Event()
        self._dials = AbortableDials()
        self._lock = threading.Lock()  # guards all below
        self._services: Sequence[Service] = ()
        self._leads_out = False
        self._link: _Link | None = None
        self._telling = (
            threading.Lock()
        )  # one REGISTER at a time, so that the last says what counts; sending does not wait
        self._tries = 0  # failures in a row
        self.thread = threading.Thread(target=self._run, name="tunnel-agent", daemon=True)

    def configure(self, services: Sequence[Service], leads_out: bool) -> None:
        """What it offers, at the start and on a reload."""
        with self._lock:
            self._services, self._leads_out = services, leads_out
            link = self._link
        if link is not None:
            self._register(link)

    def prepare(self) -> None:
        """Its thread, which does nothing before start(); ListenError."""
        try:
            self.thread.start()
        except RuntimeError as error:  # can't start new thread
            raise ListenError(f"tunnel agent: {error}") from error

    def start(self) -> None:
        """Dials from now on; cannot fail after prepare(), which it does where nobody has."""
        if self.thread.ident is None:
            self.prepare()
        self._begun.set()

    def stop(self, seconds: float) -> None:
        """No more connections, and none under way; streams that live go on.  Waits `seconds` for a name that is looked up."""
        self._stopped.set()
        self._begun.set()
        with self._lock:
            link = self._link
        if link is not None:
            link.pool.end()
            link.control.close(tunnel.STOPPING)
        self._dials.abort()
        if self.thread.is_alive():
            self.thread.join(seconds)

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def describe(self) -> dict[str, Any]:
        with self._lock:
            link = self._link
        if link is None:
            return {"name": self._identity.name, "connected": False, "tries": self._tries}
        return {
            "name": self._identity.name,
            "connected": True,
            "since": link.since,
            "rtt": link.control.rtt,
            **link.pool.describe(),
            "ports": {
                str(service): tunnel.OUTCOMES.get(outcome, "refused")
                for service, outcome in link.outcomes.items()
            },
        }

    # -- its thread

    def _run(self) -> None:
        self._begun.wait()
        while not self.stopped:
            self._tries += 1
            try:
                self._live()
            except NetProxyError as error:
                if not self.stopped:
                    self._log.limited(("tunnel", str(error)), "tunnel: %s", error)
            except Exception:
                self._log.exception("serving the tunnel")
            self._stopped.wait(backoff(self._tries))

    def _live(self) -> None:
        """One control connection, from its dial to its end."""
        welcome: list[Welcome] = []
        with self._dials.watched():
            stream = self._dial(
                lambda stream: welcome.append(self._shake_hands(stream, tunnel.CONTROL))
            )
        pool = WorkPool(
            lambda: self._dial_work(welcome[0].session), self._submit, self._serve, self._log
        )
        link = _Link(Control(stream), pool)
        with self._lock:
            self._link = link
        began = time.monotonic()  # a dial may fail late, and is a failure all the same
        try:
            if not self.stopped:
                self._log.info("tunnel: connected as '%s'", self._identity.name)
                self._register(link)
                self._watch(link)
        finally:
            with self._lock:
                self._link = None
            if time.monotonic() - began >= STEADY_SECONDS:
                self._tries = 1
            pool.end()
            stream.close()

    def _register(self, link: _Link) -> None:
        with self._telling:
            with self._lock:
                services, leads_out = self._services, self._leads_out
            link.control.send(tunnel.encode_register(services, leads_out))

    def _watch(self, link: _Link) -> None:
        control = link.control
        poll = select.poll()
        poll.register(control.stream.socket, select.POLLIN)
        while not self.stopped:
            seconds = control.beat(time.monotonic())
            link.pool.fill()
            if poll_streams(poll, min(seconds, LOOK_SECONDS)):
                for message in control.receive():
                    self._obey(link, message)

    def _obey(self, link: _Link, message: tunnel.Message) -> None:
        if message.kind == tunnel.WANT:
            link.pool.want(tunnel.parse_number(message.value))
        elif message.kind == tunnel.REGISTERED:
            link.outcomes = dict(tunnel.parse_registered(message.value))
            for service, outcome in link.outcomes.items():
                if outcome != tunnel.SERVED:
                    self._log.warning(
                        "tunnel: port %s is not served: %s",
                        service,
                        tunnel.OUTCOMES.get(outcome, "refused"),
                    )
        elif message.kind == tunnel.CLOSE:
            raise StreamError(
                f"the bridge closes: {tunnel.CLOSINGS.get(tunnel.parse_number(message.value), 'no reason that we know')}"
            )

    # -- connections

    def _shake_hands(self, stream: Stream, kind: int, session: bytes = b"") -> Welcome:
        """ProtocolError where the bridge is not ours, DialError where it refuses."""
        self._dials.note(stream.socket)  # not all streams are connect()'s
        identity = self._identity
        hello = Hello(kind, identity.name, os.urandom(tunnel.NONCE_SIZE), session)
        stream.write(tunnel.encode_hello(hello))
        nonce = _unless_refused(tunnel.read_challenge(stream))
        stream.write(tunnel.agent_proof(identity.token, hello, nonce))
        welcome = _unless_refused(tunnel.read_welcome(stream))
        if not tunnel.same(
            welcome.proof, tunnel.bridge_proof(identity.token, hello, nonce, welcome.session)
        ):
            raise ProtocolError("the bridge does not know our token")
        return welcome

    def _dial_work(self, session: bytes) -> Stream:
        def greet(stream: Stream) -> None:
            self._shake_hands(stream, tunnel.WORK, session)

        with self._dials.watched():
            return self._dial(greet)


class _Link:
    """A control connection, and what goes with it."""

    def __init__(self, control: Control, pool: WorkPool) -> None:
        self.control = control
        self.pool = pool
        self.since = time.time()
        self.outcomes: Mapping[Service, int] = {}  # of the services, as the bridge told


def _unless_refused(answer: Any) -> Any:
    if isinstance(answer, int):
        raise DialError(
            Reason.AUTHENTICATION,
            said=f"the bridge refuses: {tunnel.REFUSALS.get(answer, 'no reason that we know')}",
        )
    return answer


def backoff(tries: int) -> float:
    """Seconds to rest after so many failures in a row: 1 to 2, then twice that each time, and 30 to 60 in the end."""
    longest = min(BACKOFF_LIMIT, BACKOFF_FIRST * 2.0 ** min(tries - 1, 16))
    return longest / 2 * (1.0 + int.from_bytes(os.urandom(2), "big") / 65536)
