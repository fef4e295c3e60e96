"""What a new target of a UDP client needs before datagrams may go: a dialled upstream, a resolved name.

Both are a worker's, while the target's datagrams wait in a bounded queue, so that
the listener's reader never blocks.  A failure rests for a while and is tried again
when a datagram asks for it.  Shares its table's lock.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Hashable, NamedTuple

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.datagrams import Run
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import Counter, Log
from netproxy.net.datagram import ArenaPool
from netproxy.relay.session import Client, Session

WAITING_LIMIT = 64  # datagrams that wait for one entry: a train of a new flow, not a buffer
WAITING_CLIENT = 256  # for one client: one with many slow names leaves room for the others
WAITING_TOTAL = 1024  # and in the whole table: 64 MiB of the largest, 1.5 MiB of ordinary ones
RETRY_SECONDS = 2.0  # after a failed dial or lookup, before a datagram may ask for another

Key = tuple[Hashable, bytes]
Submit = Callable[
    [Callable[[], None]], bool
]  # hands work to a bounded pool; False when that is full


class Workers(NamedTuple):
    dials: Submit
    names: Submit  # a pool of its own: a name server that is silent must hold up no dial


class Entry:
    """One target of one client endpoint.  `destination` is set once and for all when datagrams may go."""

    __slots__ = (
        "key",
        "client",
        "flow",
        "session",
        "destination",
        "permitted",
        "waiting",
        "retry_at",
        "preparing",
        "gone",
    )

    def __init__(self, key: Key, client: Client, flow: Flow) -> None:
        self.key = key
        self.client = client
        self.flow = flow
        self.session: Any = None  # a Session, once its way out is known
        self.destination: Any = None
        self.permitted: Any = None  # the same, from the moment on that answers from there may come
        self.waiting: (
            list[bytes] | None
        ) = []  # None: a lookup or dial has failed, retry_at says when next
        self.retry_at = 0.0
        self.preparing = (
            False  # a worker is at it, or will be: two would mix up the order of what waits
        )
        self.gone = False  # out of the table


class Opening:
    """Of one NatTable."""

    def __init__(
        self,
        lock: threading.Lock,
        workers: Workers,
        arenas: ArenaPool,
        ended: Callable[[Session], None],
        counter: Counter,
        log: Log,
    ) -> None:
        """`lock` guards entries and sessions with their queues, and is the table's own.

        `ended` is told of a session whose upstream has ended.
        """
        self._lock = lock
        self._workers = workers
        self._arenas = arenas
        self._ended = ended
        self._counter = counter
        self._log = log
        self.waiting = 0  # datagrams, of all entries

    # -- the reader thread of the listener

    def wait(self, arena: Any, entry: Entry, run: Run) -> bool:
        """Keeps a run until its entry is ready, or counts it; True where the entry has become ready meanwhile."""
        with self._lock:
            waiting = entry.waiting
            if waiting is not None and entry.destination is None:
                for at in run.offsets:
                    length = run.last if at == run.offsets[-1] else run.length
                    if (
                        len(waiting) < WAITING_LIMIT
                        and entry.client.waiting < WAITING_CLIENT
                        and self.waiting < WAITING_TOTAL
                    ):
                        waiting.append(bytes(arena.view[at : at + length]))
                        self._wait_for(entry.client, 1)
                    else:
                        self._counter.count("drops", "waiting queue full")
                return False
            ready = entry.destination is not None
        return ready or self._retry(arena, entry, run)

    def _retry(self, arena: Any, entry: Entry, run: Run) -> bool:
        """A datagram for an entry whose dial or lookup has failed: another try, when it is time."""
        if time.monotonic() < entry.retry_at:
            self._counter.count("drops", "target failed", len(run.offsets))
            return False
        with self._lock:
            if entry.gone:
                self._counter.count("drops", "evicted", len(run.offsets))
                return False  # a moment ago: the next datagram makes a new one
            entry.waiting = []
        ready = self.wait(arena, entry, run)
        self.advance(entry)
        return ready

    def advance(self, entry: Entry) -> None:
        """Starts what the entry needs next: its session's dial, unless that is under way, or its own preparation."""
        session = entry.session
        with self._lock:
            dial = session.conn is None
            if dial and (session.dialling or time.monotonic() < session.retry_at):
                if not session.dialling:
                    self.fail_entry(entry, session.retry_at, "upstream failed")
                return
            session.dialling = dial
        if not dial:
            self._prepare_soon(entry)
        elif not self._workers.dials(lambda: self._dial(session)):
            self._fail_session(session, "dial queue full")

    # -- workers

    def open_now(self, entry: Entry) -> None:
        """The same as advance(), on the thread that calls and to its end; DialError, and then the entry has failed."""
        session = entry.session
        with self._lock:
            dial = session.conn is None and not session.dialling
            session.dialling = session.dialling or dial
            entry.preparing = True
        try:
            if dial:
                self._start(session)
            if session.conn is None:
                raise DialError(Reason.GENERAL, f"{session.dialer.name} is being dialled")
            self._settle(entry, session.conn.prepare(entry.flow))
        except DialError as error:
            if dial and session.conn is None:
                self._fail_session(session, error.reason.value)
            else:
                self._fail(entry, error.reason.value)
            raise

    def _dial(self, session: Session) -> None:
        """Opens a session's upstream, then all entries that wait for it."""
        try:
            self._start(session)
        except DialError as error:
            self._log.limited(
                ("dial", session.dialer.name), "udp by %s: %s", session.dialer.name, error
            )
            self._fail_session(session, error.reason.value)
            return
        except Exception:
            self._fail_session(session, "internal error")
            raise
        with self._lock:
            waiting = list(session.entries.values())
        for entry in waiting:
            self._prepare_soon(entry)

    def _start(self, session: Session) -> None:
        conn = session.dialer.dial_packet(session.flow)
        try:
            session.start(conn, self._arenas, self._ended, self._counter, self._log)
        except RuntimeError as error:  # can't start new thread
            conn.close()
            raise DialError(Reason.GENERAL, str(error)) from error
        with self._lock:
            session.dialling = False
            gone = session.ended
        if gone:
            conn.shutdown()  # evicted while it was dialled

    def _prepare_soon(self, entry: Entry) -> None:
        """An address is ready at once; a name is a worker's, so that one slow lookup holds up no other target."""
        with self._lock:
            if entry.preparing or entry.destination is not None or entry.waiting is None:
                return
            entry.preparing = True
        if entry.flow.addresses or pack_ip(entry.flow.target.host) is not None:
            self._prepare(entry)
        elif not self._workers.names(lambda: self._prepare(entry)):
            self._fail(entry, "dial queue full")

    def _prepare(self, entry: Entry) -> None:
        try:
            destination = entry.session.conn.prepare(entry.flow)
        except DialError as error:
            self._fail(entry, error.reason.value)
        except Exception:
            self._fail(entry, "internal error")
            raise
        else:
            self._settle(entry, destination)

    def _settle(self, entry: Entry, destination: Any) -> None:
        """Sends what has waited; from then on datagrams go by themselves."""
        with self._lock:
            if entry.gone:
                return  # evicted meanwhile, and what waited with it
            entry.permitted = destination
            entry.session.permit(destination)
        arena = self._arenas.take()
        while True:
            with self._lock:
                waiting = entry.waiting or []
                self._wait_for(entry.client, -len(waiting))
                entry.waiting = []
                if (
                    not waiting
                ):  # none came meanwhile: from here on the reader sends itself, in order
                    entry.destination = destination
                    break
            for data in waiting:
                run = arena.put(data)
                entry.session.count_sent(run)
                entry.session.conn.send(arena, run, destination)
        self._arenas.give(arena)

    def _fail_session(self, session: Session, reason: str) -> None:
        with self._lock:
            session.dialling = False
            session.retry_at = time.monotonic() + RETRY_SECONDS
            for entry in session.entries.values():
                self.fail_entry(entry, session.retry_at, reason)

    def _fail(self, entry: Entry, reason: str) -> None:
        with self._lock:
            self.fail_entry(entry, time.monotonic() + RETRY_SECONDS, reason)

    # -- under the lock

    def _wait_for(self, client: Client, more: int) -> None:
        client.waiting += more
        self.waiting += more

    def fail_entry(self, entry: Entry, retry_at: float, reason: str) -> None:
        """What waits for it is counted as lost."""
        lost = len(entry.waiting or ())
        self._wait_for(entry.client, -lost)
        entry.waiting = None
        entry.preparing = False
        entry.retry_at = retry_at
        if lost:
            self._counter.count("drops", reason, lost)
