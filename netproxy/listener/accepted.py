"""A connection that a TCP listener has accepted.

It is counted twice: among the unfinished handshakes of its listener (listener.shedding), and
among the connections of its admission (access.limits).  Either of them may close it to make
room for another client.

A worker may give a connection to another one.  The worker that has accepted it counts it until
its end: a count that moved would for a moment be in both workers, or in none.
"""

from __future__ import annotations

import select
import socket
import threading

from netproxy.errors import StreamError
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.interfaces.listeners import EVICTED
from netproxy.listener.endings import refuse
from netproxy.listener.handshake_driver import Connection
from netproxy.net.stream import poll_watched
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.listeners import Admission, Resident
    from netproxy.listener.poller import Poller
    from netproxy.listener.tcp import TcpListener


class Lifetime:
    """Tells the worker that has accepted a connection when it has ended in this one.  A WaitOwner.

    It is one end of a socket pair; the other worker watches the other end.  A byte from there
    asks for the end of the connection.  If the other end is closed, the other worker has died.
    """

    __slots__ = ("_socket", "_stream", "_orphaned", "_wait", "_lock", "_has_ended")

    def __init__(self, sock: socket.socket, stream: Stream, orphaned: Callable[[], None]) -> None:
        """Close `sock` with the stream.  `orphaned` is called if the other worker has died."""
        sock.setblocking(False)
        self._socket, self._stream, self._orphaned = sock, stream, orphaned
        self._wait = Wait(((sock, READABLE),), None, self._resume, step=self._step)
        # Guards _has_ended and the end of the socket: a later one may get its number.
        self._lock = threading.Lock()
        self._has_ended = False

    def begin(self, poller: Poller) -> None:
        """Begin to watch.  If that cannot be done, this worker counts the connection."""
        self._stream.on_close(self._close)
        try:
            poller.watch(self._wait, self)
        except (OSError, ValueError):
            self.end(None)

    def _close(self) -> None:
        """Tell the other worker.  The poller closes the socket."""
        with self._lock:
            self._has_ended = True
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other worker has closed its end

    def _step(self, descriptor: int, events: int) -> Wait | None:
        try:
            if self._socket.recv(1):
                self._stream.shutdown()
                return self._wait
        except BlockingIOError:
            return self._wait
        except OSError:
            pass
        return None

    def _resume(self, ready: bool) -> Wait | None:
        """Not reached: the step does all, and has no deadline."""
        raise AssertionError

    def wake(self, wait: Wait, ready: bool) -> None:
        """Not reached, as _resume()."""
        raise AssertionError

    def cannot_watch(self, wait: Wait, error: Exception) -> None:
        """Not reached: the step returns no other wait."""
        raise AssertionError

    def end(self, error: Exception | None) -> None:
        """Close the socket; the connection has ended, or the other worker."""
        with self._lock:
            self._socket.close()
            has_ended = self._has_ended
        if not has_ended:
            self._orphaned()


class CountedElsewhere:
    """The admission of one connection that another worker counts (interfaces.listeners.Admission).

    This worker counts it from count_here() on: the other one has died.
    """

    def __init__(self, admission: Admission) -> None:
        """`admission` counts the connection then."""
        self._admission = admission
        # Guards counts_here and _has_left.
        self._lock = threading.Lock()
        self.counts_here = self._has_left = False
        self.residents: dict[Resident, None] = {}

    def enter(self, client: str) -> str:
        """Admit the client."""
        return ""

    def take_over(self, client: str) -> None:
        """Count nothing."""

    def decided_by(self, refusal: str, client: str) -> str:
        """Return "": nothing is refused."""
        return ""

    def count_here(self) -> None:
        """Count the connection in, unless it has ended."""
        with self._lock:
            if self._has_left:
                return
            self.counts_here = True
            for resident in self.residents:
                self._admission.take_over(resident.client.host)
                self._admission.residents[resident] = None

    def leave(self, client: str, resident: Resident | None = None) -> None:
        """Count the connection out, if it was counted here."""
        with self._lock:
            self._has_left = True
            self.residents.clear()
        if self.counts_here:
            self._admission.leave(client, resident)


class Accepted(Connection):
    """A connection that an admission has counted in (interfaces.listeners.Resident)."""

    __slots__ = ("listener", "admission")

    listener: TcpListener
    admission: Admission

    def listener_name(self) -> str:
        """Return the name of the listener, for records."""
        return self.listener.name

    # -- among the handshakes

    def has_unread(self) -> bool:
        """Return whether the socket holds bytes, or an end, that were not read yet."""
        try:
            return bool(poll_watched(((self.stream.socket, select.POLLIN),), 0))
        except (StreamError, ValueError):
            return True  # it has ended just now

    def left_handshake(self) -> None:
        """Count the handshake out."""
        self.listener.handshakes.leave(self)
        self.counted = ""

    # -- among the connections

    @property
    def handshaking(self) -> bool:
        """True until the client has said what it wants."""
        return self.stream.handshaking

    def idle(self) -> float:
        """Return the seconds since a byte came or went."""
        return self.stream.idle()

    def evict(self) -> None:
        """End: its client has most connections, and another client needs one.  Thread: any."""
        self.end_because(EVICTED)

    def end_because(self, why: str) -> None:
        """End for a reason of interfaces.listeners.DECIDED_BY.  Thread: any."""
        self.refused = self.stream.evicted = why
        self.stream.shutdown()

    def _note_eviction(self) -> None:
        """Count the connection as refused, and record it unless the record of its flow says so."""
        key, counter = ("connections_refused", EVICTED), self.serving.counter
        if self.stream.evicted:
            refuse(self, key, counter)
        else:
            counter.count(*key)

    def ended(self) -> None:
        """Close the stream, and count the connection out."""
        if self.refused == EVICTED:
            self._note_eviction()
        self.listener.forget(self)
        if self.stream.trace is not None:
            self.stream.trace.step("closed")
        self.stream.close()
        self.admission.leave(self.client.host, self)
