"""What the dialers through another proxy share: reaching it, and saying which hop failed why."""

from __future__ import annotations

import threading
from typing import Any, Callable, NamedTuple

from netproxy.errors import DeadlineError, DialError, ProtocolError, Reason, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer
from netproxy.interfaces.services import Counter
from netproxy.net.stream import Stream

# Connections to one target by one proxy that wait at once while none gets through, for clients at the proxy's own address:
# that is how two proxies look that are each other's upstream.  A chain of so many proxies is none that anybody means.
LOOP_LIMIT = 64
TARGETS_LIMIT = 4096  # targets a guard keeps count of
# These a proxy says of itself; with any other it speaks of the target.
OWN_FAULTS = frozenset({Reason.AUTHENTICATION, Reason.PROTOCOL})


class Services(NamedTuple):
    """What packet connections need of the daemon."""

    watch: Callable[
        [Stream, Callable[[], None]], None
    ]  # calls once when something comes; the call must not block
    submit: Callable[[Callable[[], None]], bool]  # work that may block, on another thread
    counter: Counter


class LoopGuard:
    """Ends connections that go in circles between this proxy and another: SOCKS has no field that would tell of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _waiting
        self._waiting: dict[
            Address, list[int]
        ] = {}  # by target: how many wait, and have begun since one got through

    def enter(self, target: Address) -> None:
        """DialError(LOOP); else leave() is to be called."""
        with self._lock:
            if target not in self._waiting and len(self._waiting) >= TARGETS_LIMIT:
                self._waiting.clear()
            counts = self._waiting.setdefault(target, [0, 0])
            if min(counts) >= LOOP_LIMIT:
                raise DialError(Reason.LOOP, str(target))
            counts[0] += 1
            counts[1] += 1

    def leave(self, target: Address, through: bool) -> None:
        with self._lock:
            counts = self._waiting.get(target, [1, 0])
            counts[0] -= 1
            counts[1] = 0 if through else counts[1]
            if counts[0] <= 0:
                self._waiting.pop(target, None)


class Hop(NamedTuple):
    """One proxy on the way: where it is and how it is reached."""

    name: str  # of the way out, in records and rules
    label: str  # of this proxy, in errors: "hop 2 of 'office' (http://proxy.example:8080)"
    server: Address
    via: Dialer  # the hop before it, in the end a direct one
    seconds: float  # for the proxy's handshake
    user: str = ""
    password: str = ""  # in no message, name or log
    secure: Callable[[Stream], None] | None = None  # the TLS handshake with it, where it has one
    guard: LoopGuard | None = None

    def __repr__(self) -> str:
        return self.label

    def open(self, flow: Flow, greet: Callable[[Stream], None], wanted: str = "") -> Stream:
        """A stream to the proxy on which `greet` has made the wanted connection.

        DialError names the hop and, where it broke off, what was `wanted` of it.
        """
        try:
            stream = self.via.dial(flow.to_hop(self.server))
        except DialError as error:
            if not error.hop:
                error.hop, error.detail = (
                    self.label,
                    "" if error.detail == str(self.server) else error.detail,
                )
            error.upstream = True
            raise
        try:
            stream.limit(self.seconds)
            if self.secure is not None:
                self.secure(stream)
            self._greet(stream, flow, greet)
            stream.limit(None)
            return stream
        except BaseException as error:
            stream.close()
            if (translated := self._translate(error, wanted)) is error:
                raise
            raise translated from error

    def _greet(self, stream: Stream, flow: Flow, greet: Callable[[Stream], None]) -> None:
        if self.guard is None or not self._is_suspect(stream, flow):
            greet(stream)
            return
        self.guard.enter(flow.target)
        through = False
        try:
            greet(stream)
            through = True
        finally:
            self.guard.leave(flow.target, through)

    @staticmethod
    def _is_suspect(stream: Stream, flow: Flow) -> bool:
        """Whether the client is where the proxy is: then its connection may have come from there."""
        try:
            return stream.peer_address().host == flow.client.host
        except StreamError:
            return False

    def fixed_for(self, dialer: Any, flow: Flow) -> Any:
        """`dialer`, which has this hop as `_hop`, or one like it by the way that groups before the hop have chosen."""
        via = self.via.fixed_for(flow.to_hop(self.server, flow.network))
        if via is self.via:
            return dialer
        from copy import copy  # late: who has groups before a hop needs it

        other = copy(dialer)
        other._hop = self._replace(via=via)
        return other

    def _translate(self, error: BaseException, wanted: str) -> BaseException:
        """An error of the proxy's or the connection to it, with the hop's name."""
        failure = error
        if isinstance(error, DeadlineError):
            failure = DialError(Reason.TIMEOUT, wanted)
        elif isinstance(error, ProtocolError):
            failure = DialError(Reason.PROTOCOL, wanted, str(error))
        elif isinstance(error, StreamError):
            failure = DialError(Reason.GENERAL, wanted, str(error))
        if isinstance(failure, DialError):
            failure.hop = self.label
            failure.upstream = failure is not error or failure.reason in OWN_FAULTS
        return failure
