"""Watches waiting connections: one epoll thread for all of them.

A connection that only waits is a Wait: it costs its descriptors and half a kilobyte, and
no pool thread.  An event, the end of the stream or the end of its time wakes it on a
thread of the pool.  A Wait that has a step, which never blocks, goes on here instead.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Wait
    from netproxy.interfaces.services import Log

# Seconds between two looks at the deadlines, and the least even if deadlines are near:
# each look goes through everything that waits.  A wait may end that much too late.
TICK, SHORTEST_TICK = 1.0, 0.1
# Bytes of the wake-up pipe that are read at once.
WAKE_UPS = 64
_NEVER = float("inf")


class WaitOwner(Protocol):
    """What a wait belongs to.  Called on the thread that calls watch(), or the poller's.

    No method may block.
    """

    def wake(self, wait: Wait, ready: bool) -> None:
        """Go on elsewhere, once; `ready` is False if the time is up."""

    def cannot_watch(self, wait: Wait, error: Exception) -> None:
        """Go on elsewhere with the wait that a step has returned: the kernel cannot watch it."""

    def end(self, error: Exception | None) -> None:
        """Note that a step returned nothing to wait for, or raised `error`."""


class _Watch:
    """One owner's wait, with its descriptors and deadline."""

    __slots__ = ("wait", "descriptors", "deadline", "owner")

    def __init__(self, wait: Wait, owner: WaitOwner) -> None:
        self.owner = owner
        self.wait = wait
        self.descriptors: dict[int, int] = {}
        for watched, events in wait.watched:
            self.descriptors[watched.fileno()] = events
        self.deadline = _NEVER if wait.seconds is None else time.monotonic() + wait.seconds


class Poller:
    """The epoll thread.  watch() may be called by any thread."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._epoll: select.epoll | None = None  # opened by start()
        self._wake_up_read = self._wake_up_write = -1  # the wake-up pipe
        # Guards _watches, what the epoll watches, and writing to the wake-up pipe.
        self._lock = threading.Lock()
        self._watches: dict[int, _Watch] = {}
        self._stopping = False
        self._releasing_idle = False
        # Monotonic; of the poller's thread, but others may make the next look earlier.
        self._looked = self._next_look = 0.0
        self.thread = threading.Thread(target=self._run, name="poller", daemon=True)

    def __len__(self) -> int:
        """Return the number of connections that wait."""
        return len({id(watch) for watch in list(self._watches.values())})

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
        watch = _Watch(wait, owner)
        # Pool threads do what follows an event, so it is reported once; a step of this
        # thread may be told again.
        once = select.EPOLLONESHOT if watch.wait.step is None else 0
        epoll = self._epoll
        if epoll is None:
            raise ValueError("the poller has not been started")
        with self._lock:
            try:
                for descriptor, events in watch.descriptors.items():
                    # On Linux the events are those of poll(2).
                    epoll.register(descriptor, events | once)
                    self._watches[descriptor] = watch
            except BaseException:
                # Still under the lock: an event of the first descriptor may have come already.
                self._remove(watch, closed=False)
                raise
        # Only now: a look that has begun before has set the next one, or sees the watch.
        if watch.deadline < self._next_look:
            self._look_by(watch.deadline)

    def release_idle(self) -> None:
        """Wake idle waits as if their time were up, from now on."""
        self._releasing_idle = True
        self._release([watch for watch in list(self._watches.values()) if watch.wait.idle], False)

    def _run(self) -> None:
        epoll = self._epoll
        assert epoll is not None  # start() has opened it
        while not self._stopping:
            events = epoll.poll(min(TICK, max(0.0, self._next_look - time.monotonic())))
            now = time.monotonic()
            for descriptor, event in events:
                if descriptor == self._wake_up_read:
                    os.read(descriptor, WAKE_UPS)
                else:
                    self._handle_event(descriptor, event, now)
            if now >= self._next_look:
                self._wake_late(now)

    def _handle_event(self, descriptor: int, event: int, now: float) -> None:
        """Go on with what watches a descriptor; a frame of its own, so that nothing is kept."""
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

    def _wake_late(self, now: float) -> None:
        """Wake what has waited for too long."""
        self._looked, self._next_look = now, now + TICK
        late = []
        for watch in list(self._watches.values()):
            if watch.deadline <= now:
                late.append(watch)
            elif watch.deadline < self._next_look:
                self._look_by(watch.deadline)
        self._release(late, False)

    def _look_by(self, deadline: float) -> None:
        """Make the next look early enough for a deadline.  Thread: any."""
        look = max(deadline, self._looked + SHORTEST_TICK)
        with self._lock:
            if look >= self._next_look:
                return
            self._next_look = look
            # The poller's thread waits for the look that was the next until now.
            if threading.get_ident() != self.thread.ident:
                self._wake_up()

    def _wake_up(self) -> None:
        """Wake the poller's thread.  Under the lock."""
        if self._wake_up_write >= 0:
            try:
                os.write(self._wake_up_write, b"!")
            except BlockingIOError:
                pass  # it has not read the last one yet

    def _leave(self, watch: _Watch, wait: Wait | None) -> None:
        """End a watch whose step returned nothing, or a wait for a pool thread."""
        self._forget(watch, closed=wait is None)
        if wait is None:
            self._end(watch, None)
            return
        try:
            self.watch(wait, watch.owner)
        except (OSError, ValueError) as error:  # closed meanwhile, or the kernel has no memory
            watch.owner.cannot_watch(wait, error)

    def _end(self, watch: _Watch, error: Exception | None) -> None:
        try:
            watch.owner.end(error)
        except Exception:  # the fault of one connection must not end the others
            self._log.exception("ending a watched connection")

    def _watch_instead(self, watch: _Watch, wait: Wait, now: float) -> None:
        """Watch for another wait; only differences are told to the kernel.

        A relay passes here whenever a side ends.  A wait that cannot be watched is woken.
        """
        before = watch.descriptors
        watch.wait = wait
        watch.descriptors = {}
        for watched, events in wait.watched:
            watch.descriptors[watched.fileno()] = events
        watch.deadline = _NEVER if wait.seconds is None else now + wait.seconds
        if watch.deadline < self._next_look:
            self._look_by(watch.deadline)
        epoll = self._epoll
        assert epoll is not None
        try:
            with self._lock:
                for descriptor in before.keys() - watch.descriptors.keys():
                    # One that was closed may already belong to another connection.
                    if self._watches.get(descriptor) is watch:
                        del self._watches[descriptor]
                        self._unregister(descriptor)
                for descriptor, events in watch.descriptors.items():
                    if descriptor not in before:
                        epoll.register(descriptor, events)
                        self._watches[descriptor] = watch
                    elif events != before[descriptor]:
                        epoll.modify(descriptor, events)
        except (OSError, ValueError) as error:  # closed meanwhile, or the kernel has no memory
            self._forget(watch, closed=False)
            watch.owner.cannot_watch(wait, error)

    def _forget(self, watch: _Watch, closed: bool) -> bool:
        """Stop watching; return whether it was still watched.

        `closed`: the descriptors are closed and may already belong to another connection.
        The kernel has forgotten closed ones by itself.
        """
        with self._lock:
            return self._remove(watch, closed)

    def _remove(self, watch: _Watch, closed: bool) -> bool:
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

    def _release(self, watches: list[_Watch], ready: bool) -> None:
        """Wake watches; one may be listed once for each of its descriptors."""
        for watch in watches:
            if not self._forget(watch, closed=False):
                continue  # woken a moment ago
            try:
                watch.owner.wake(watch.wait, ready)
            except Exception:  # the fault of one connection must not stop the others
                self._log.exception("waking a watched connection")
