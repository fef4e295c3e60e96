"""Watches waiting connections: one epoll thread for all of them.

A connection that only waits is a Wait: it costs its descriptors and half a kilobyte, and
no pool thread.  An event, the end of the stream or the end of its time wakes it on a
thread of the pool.  A Wait that has a step, which never blocks, goes on here instead.

Deadlines within the next second are kept in order, and met to the millisecond.  The others are
looked through once a second.
"""

from __future__ import annotations

import os
import select
import threading
import time

from netproxy.listener.watch import NEVER, Deadlines, Watch
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Wait
    from netproxy.interfaces.services import Log
    from netproxy.listener.watch import WaitOwner

TICK = 1.0
"""Seconds between two looks at all deadlines."""
WAKE_UPS = 64
"""Bytes of the wake-up pipe that are read at once."""
NO_DESCRIPTOR = -1
"""What a timed step is told instead of a descriptor when its time is up."""


class Poller:
    """The epoll thread.  watch() may be called by any thread."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._epoll: select.epoll | None = None  # opened by start()
        self._wake_up_read = self._wake_up_write = -1  # the wake-up pipe
        # Guards _watches, what the epoll watches, and writing to the wake-up pipe.
        self._lock = threading.Lock()
        self._watches: dict[int, Watch] = {}
        self.accepting: set[WaitOwner] = set()  # of listening sockets: no connections
        self._near = Deadlines()  # those before the next look
        self._stopping = self._releasing_idle = False
        self._next_look = 0.0  # monotonic; written by the poller's thread alone
        self.thread = threading.Thread(target=self._run, name="poller", daemon=True)

    def __len__(self) -> int:
        """Return the number of connections that wait."""
        watches = {id(watch): watch for watch in list(self._watches.values())}
        return sum(watch.owner not in self.accepting for watch in watches.values())

    @property
    def watched(self) -> int:
        """The number of descriptors that are watched."""
        return len(self._watches)

    def start(self) -> None:
        """Open the epoll and start the thread.

        Raises OSError, RuntimeError if one of them cannot be had; stop() closes what was opened.
        """
        self._wake_up_read, self._wake_up_write = os.pipe()
        self._epoll = select.epoll()
        os.set_blocking(self._wake_up_write, False)
        self._epoll.register(self._wake_up_read, select.EPOLLIN)
        # Made anew: one of before a fork counts as ended in the child.
        self.thread = threading.Thread(target=self._run, name="poller", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Stop the thread and close everything."""
        self._stopping = True
        if self.thread.is_alive():  # start() may have failed
            with self._lock:
                self._wake_up()
            self.thread.join()
        with self._lock:  # a pool thread that has not ended in time may still call watch()
            if self._epoll is not None:
                self._epoll.close()
            for descriptor in (self._wake_up_read, self._wake_up_write):
                if descriptor >= 0:
                    os.close(descriptor)
            self._wake_up_read = self._wake_up_write = -1

    def watch(self, wait: Wait, owner: WaitOwner) -> None:
        """Watch for a wait's events and tell its owner, once.

        A wait with a step goes on by that, as long as each step returns another such wait.
        Raises OSError or ValueError if a descriptor cannot be watched.
        """
        if self._releasing_idle and wait.idle:
            owner.wake(wait, False)
            return
        if not wait.watched:
            owner.wake(wait, True)
            return
        watch = Watch(wait, owner)
        # Pool threads do what follows an event, so it is reported once; a step of this
        # thread may be told again.
        once = select.EPOLLONESHOT if watch.wait.step is None else 0
        epoll = self._epoll
        if epoll is None:
            raise ValueError("the poller has not been started")
        with self._lock:
            try:
                for descriptor, (_, events) in watch.descriptors.items():
                    # On Linux the events are those of poll(2).
                    epoll.register(descriptor, events | once)
                    self._watches[descriptor] = watch
            except BaseException:
                # Still under the lock: an event of the first descriptor may have come already.
                self._remove(watch, closed=False)
                raise
        # Only now: a look that has begun before has set the next one, or sees the watch.
        if watch.deadline < self._next_look:
            self._note_deadline(watch)

    def release_idle(self) -> None:
        """Wake idle waits as if their time were up, from now on."""
        self._releasing_idle = True
        self._release([watch for watch in list(self._watches.values()) if watch.wait.idle], False)

    def _run(self) -> None:
        epoll, near = self._epoll, self._near
        assert epoll is not None  # start() has opened it
        now = time.monotonic()
        while not self._stopping:
            if now >= near.first:
                self._wake_late(near.take(now), now)
            if now >= self._next_look:
                self._look(now)
            # A look may come late by the time that the last events have taken.
            seconds = self._next_look - now
            if near.first < self._next_look:
                seconds = max(0.0, near.first - time.monotonic())
            events = epoll.poll(seconds)
            now = time.monotonic()
            for descriptor, event in events:
                if descriptor == self._wake_up_read:
                    os.read(descriptor, WAKE_UPS)
                else:  # a frame of its own, so that no watch is kept
                    self._step(None, descriptor, event, now)

    def _step(self, watch: Watch | None, descriptor: int, event: int, now: float) -> None:
        """Go on with a watch after an event; None: with the one that watches the descriptor."""
        if watch is None:
            with self._lock:  # a watch that is being added has all its descriptors registered then
                watch = self._watches.get(descriptor)
            if watch is None:
                return
        wait = watch.wait
        if wait.step is None:
            self._release([watch], True)
            return
        try:
            following = wait.step(descriptor, event)
        except Exception as error:
            self._forget(watch, closed=False)
            self._end(watch, error)
            return
        if following is not wait:
            if following is None or following.step is None or not following.watched:
                self._leave(watch, following)
            else:
                self._watch_instead(watch, following, now)
        elif wait.seconds is not None and not wait.fixed:
            watch.deadline = now + wait.seconds

    def _look(self, now: float) -> None:
        """Wake what has waited for too long, and note the deadlines before the next look."""
        self._next_look = now + TICK
        late = []
        for watch in list(self._watches.values()):
            if watch.deadline <= now:
                late.append(watch)
            elif watch.deadline < self._next_look:
                self._note_deadline(watch)
        self._wake_late(late, now)

    def _wake_late(self, watches: list[Watch], now: float) -> None:
        """Tell watches that their time is up; one may be listed more than once."""
        for watch in watches:
            wait = watch.wait
            if watch.deadline > now:
                continue  # it was listed twice, and a step has returned another wait
            if not wait.timed or wait.step is None:
                self._release([watch], False)
            elif self._is_watched(watch):
                self._step(watch, NO_DESCRIPTOR, 0, now)

    def _is_watched(self, watch: Watch) -> bool:
        """Return whether a watch has not ended."""
        with self._lock:
            return any(self._watches.get(descriptor) is watch for descriptor in watch.descriptors)

    def _note_deadline(self, watch: Watch) -> None:
        """Have a deadline before the next look met in time.  Thread: any."""
        # The poller's thread waits for the deadline that was the first until now.
        if self._near.add(watch) and threading.get_ident() != self.thread.ident:
            with self._lock:
                self._wake_up()

    def _wake_up(self) -> None:
        """Wake the poller's thread.  Under the lock."""
        if self._wake_up_write >= 0:
            try:
                os.write(self._wake_up_write, b"!")
            except BlockingIOError:
                pass  # it has not read the last one yet

    def _leave(self, watch: Watch, wait: Wait | None) -> None:
        """End a watch whose step returned nothing, or a wait for a pool thread."""
        self._forget(watch, closed=wait is None)
        if wait is None:
            self._end(watch, None)
            return
        try:
            self.watch(wait, watch.owner)
        except (OSError, ValueError) as error:  # closed meanwhile, or the kernel has no memory
            watch.owner.cannot_watch(wait, error)

    def _end(self, watch: Watch, error: Exception | None) -> None:
        try:
            watch.owner.end(error)
        except Exception:  # the fault of one connection must not end the others
            self._log.exception("ending a watched connection")

    def _watch_instead(self, watch: Watch, wait: Wait, now: float) -> None:
        """Watch for another wait; only differences are told to the kernel.

        A relay passes here whenever a side ends.  A wait that cannot be watched is woken.
        """
        before = watch.follow(wait)
        # `now` is that of a whole batch of steps: a pause would end too early, and in vain.
        since = time.monotonic() if wait.timed else now
        watch.deadline = NEVER if wait.seconds is None else since + wait.seconds
        if watch.deadline < self._next_look:
            self._note_deadline(watch)
        epoll = self._epoll
        assert epoll is not None
        try:
            with self._lock:
                for descriptor in before:
                    if descriptor in watch.descriptors:
                        continue
                    # One that was closed may already belong to another connection.
                    if self._watches.get(descriptor) is watch:
                        del self._watches[descriptor]
                        self._unregister(descriptor)
                for descriptor, (watched, events) in watch.descriptors.items():
                    known = before.get(descriptor)
                    if known is None:
                        epoll.register(descriptor, events)
                        self._watches[descriptor] = watch
                    elif watched is not known[0]:
                        # A step may close what it has waited for; another one has its number.
                        self._renew(descriptor, events)
                    elif events != known[1]:
                        epoll.modify(descriptor, events)
        except (OSError, ValueError) as error:  # closed meanwhile, or the kernel has no memory
            self._forget(watch, closed=False)
            watch.owner.cannot_watch(wait, error)

    def _renew(self, descriptor: int, events: int) -> None:
        """Watch a number that belongs to another object now, perhaps to another file."""
        assert self._epoll is not None
        try:
            self._epoll.modify(descriptor, events)
        except FileNotFoundError:  # the kernel has forgotten the closed file
            self._epoll.register(descriptor, events)

    def _forget(self, watch: Watch, closed: bool) -> bool:
        """Stop watching; return whether it was still watched.

        `closed`: the descriptors are closed and may already belong to another connection.
        The kernel has forgotten closed ones by itself.
        """
        with self._lock:
            return self._remove(watch, closed)

    def _remove(self, watch: Watch, closed: bool) -> bool:
        """Do what _forget() does.  Under the lock."""
        known = False
        for descriptor in watch.descriptors:
            if self._watches.get(descriptor) is watch:
                del self._watches[descriptor]
                known = True
                if not closed:
                    self._unregister(descriptor)
        return known

    def _unregister(self, descriptor: int) -> None:
        assert self._epoll is not None
        try:
            self._epoll.unregister(descriptor)
        except (OSError, ValueError):
            pass  # closed after all

    def _release(self, watches: list[Watch], ready: bool) -> None:
        """Wake watches; one may be listed once for each of its descriptors."""
        for watch in watches:
            if not self._forget(watch, closed=False):
                continue  # woken a moment ago
            try:
                watch.owner.wake(watch.wait, ready)
            except Exception:  # the fault of one connection must not stop the others
                self._log.exception("waking a watched connection")
