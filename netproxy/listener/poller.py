"""Where connections wait that have nothing to do: one thread and one epoll for all of them.

A handler that would only wait returns a Pause; its thread goes back to the pool,
and the connection costs its descriptors and half a kilobyte.  The first byte, the
end of the stream or the end of its time puts it back on a thread of the pool, but
where the pause has a step that never waits: this thread takes that itself.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import Any, Callable

from netproxy.interfaces.connections import Wait
from netproxy.interfaces.services import Log

TICK = 1.0  # seconds between two looks at who has waited too long, and who will have soon
LOOK_LEAST = (
    0.1  # and at the least, however many deadlines there are: each look goes through all that wait
)

Wake = Callable[[Wait, bool], None]  # (pause, ready): for a thread to go on with
End = Callable[["Exception | None"], None]


class _Parked:
    __slots__ = ("pause", "descriptors", "deadline", "wake", "end")

    def __init__(self, pause: Wait, wake: Wake, end: End) -> None:
        self.wake = wake
        self.end = end
        self.set(pause, time.monotonic())

    def set(self, pause: Wait, now: float) -> None:
        self.pause = pause
        self.descriptors = {sock.fileno(): events for sock, events in pause.watched}
        self.renew(now)

    def renew(self, now: float) -> None:
        self.deadline = float("inf") if self.pause.seconds is None else now + self.pause.seconds


class Poller:
    def __init__(self, log: Log) -> None:
        self._log = log
        self._epoll: Any = None  # a select.epoll, opened by start()
        self._bell = self._rope = -1
        self._lock = threading.Lock()  # guards _parked and what the epoll watches
        self._parked: dict[int, _Parked] = {}
        self._stopping = False
        self._sparing = False  # expendable ones are not kept any more
        self._looked = self._next_look = (
            0.0  # monotonic; of the parker's thread, though others may make it look earlier
        )
        self.thread = threading.Thread(target=self._watch, name="poller", daemon=True)

    def __len__(self) -> int:
        return len({id(parked) for parked in list(self._parked.values())})

    @property
    def watched(self) -> int:
        """Descriptors."""
        return len(self._parked)

    def start(self) -> None:
        self._epoll = select.epoll()
        self._bell, self._rope = os.pipe()
        self._epoll.register(self._bell, select.EPOLLIN)
        self.thread.start()

    def stop(self) -> None:
        if self._epoll is None:
            return
        self._stopping = True
        if self.thread.is_alive():  # it may never have begun
            os.write(self._rope, b"!")
            self.thread.join()
        with self._lock:  # a thread that has not ended in time may still come to park
            self._epoll.close()
        os.close(self._bell)
        os.close(self._rope)

    def watch(self, pause: Wait, wake: Wake, end: End) -> None:
        """OSError or ValueError where it cannot be watched.

        `wake(pause, ready)` is called once, on the parker's thread: ready is False when the time was up.

        A pause that has a step goes on by that alone as long as it gives another such pause; where it gives none, or fails,
        `end(error)` is called, on the parker's thread, and it is not parked any more.  Nothing of that may block.
        """
        if self._sparing and pause.idle:
            wake(pause, False)
        elif not pause.watched:
            wake(pause, True)
        else:
            self._add(_Parked(pause, wake, end))

    def _add(self, parked: _Parked) -> None:
        # others' threads do what comes then, so it is told once; what this thread does itself it may be told again
        once = select.EPOLLONESHOT if parked.pause.step is None else 0
        self._look_by(parked.deadline)
        try:
            with self._lock:
                for descriptor, events in parked.descriptors.items():
                    self._epoll.register(
                        descriptor, events | once
                    )  # Linux: the events are poll(2)'s
                    self._parked[descriptor] = parked
        except BaseException:
            self._forget(parked, closed=False)
            raise

    def release_idle(self) -> None:
        """Wakes those with nothing under way, as if their time were up, now and as soon as they come."""
        self._sparing = True
        self._release(
            [parked for parked in list(self._parked.values()) if parked.pause.idle], False
        )

    def _watch(self) -> None:
        while not self._stopping:
            events = self._epoll.poll(min(TICK, max(0.0, self._next_look - time.monotonic())))
            now = time.monotonic()
            for descriptor, event in events:
                self._tell(descriptor, event, now)
            if now >= self._next_look:
                self._look(now)

    def _tell(self, descriptor: int, event: int, now: float) -> None:
        """In a frame of its own: nothing of whoever was told last is held on to."""
        with self._lock:  # who is being added has all its descriptors watched after that
            parked = self._parked.get(descriptor)
        if parked is not None and parked.pause.step is not None:
            self._advance(parked, descriptor, event, now)
        elif parked is not None:
            self._release([parked], True)

    def _look(self, now: float) -> None:
        """Who has waited too long is woken."""
        self._looked, self._next_look = now, now + TICK
        late = []
        for parked in list(self._parked.values()):
            if parked.deadline <= now:
                late.append(parked)
            elif parked.deadline < self._next_look:
                self._look_by(parked.deadline)
        self._release(late, False)

    def _look_by(self, deadline: float) -> None:
        if deadline < self._next_look:
            self._next_look = max(deadline, self._looked + LOOK_LEAST)

    def _advance(self, parked: _Parked, descriptor: int, event: int, now: float) -> None:
        before = parked.pause
        try:
            pause = before.step(descriptor, event)
        except Exception as error:
            self._forget(parked, closed=False)
            self._end(parked, error)
            return
        if pause is before:
            parked.renew(now)
            return
        if pause is None:
            self._forget(parked, closed=True)
            self._end(parked, None)
            return
        try:
            if pause.step is None:  # from now on it is told once
                self._forget(parked, closed=False)
                self.watch(pause, parked.wake, parked.end)
            else:
                self._watch_instead(parked, pause, now)
        except (OSError, ValueError):  # closed meanwhile, or the kernel has no room
            parked.wake(pause, False)

    def _end(self, parked: _Parked, error: Exception | None) -> None:
        try:
            parked.end(error)
        except Exception:  # one connection's fault must not keep the others parked
            self._log.exception("ending a parked connection")

    def _watch_instead(self, parked: _Parked, pause: Wait, now: float) -> None:
        """Only what is different is told to the kernel: a relay passes here at each end of a side.  OSError, ValueError."""
        before = parked.descriptors
        parked.set(pause, now)
        self._look_by(parked.deadline)
        try:
            with self._lock:
                for descriptor in before.keys() - parked.descriptors.keys():
                    del self._parked[descriptor]
                    self._unwatch(descriptor)
                for descriptor, events in parked.descriptors.items():
                    if descriptor not in before:
                        self._epoll.register(descriptor, events)
                        self._parked[descriptor] = parked
                    elif events != before[descriptor]:
                        self._epoll.modify(descriptor, events)
        except BaseException:
            self._forget(parked, closed=False)
            raise

    def _forget(self, parked: _Parked, closed: bool) -> bool:
        """Whether it was still known.  `closed`: its descriptors are, and perhaps somebody else's by now; the kernel watches
        closed ones no more."""
        known = False
        with self._lock:
            for each in parked.descriptors:
                if self._parked.get(each) is parked:
                    del self._parked[each]
                    known = True
                    if not closed:
                        self._unwatch(each)
        return known

    def _unwatch(self, descriptor: int) -> None:
        try:
            self._epoll.unregister(descriptor)
        except (OSError, ValueError):
            pass  # closed after all

    def _release(self, several: list[_Parked], ready: bool) -> None:
        """One may be there for each of its descriptors: by the second time the number may be somebody else's."""
        for parked in several:
            if not self._forget(parked, closed=False):
                continue  # woken a moment ago
            try:
                parked.wake(parked.pause, ready)
            except Exception:  # one connection's fault must not keep the others parked
                self._log.exception("waking a parked connection")
