"""Parked connections that go on by steps: each on the parker's own thread, until one ends or wants a thread."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from typing import Callable, Iterator

import pytest

from netproxy.interfaces.connections import READABLE, Wait
from netproxy.listener import poller as parker_module
from netproxy.listener.poller import Poller
from tests.support.doubles import Lines
from tests.support.sockets import wait_until

Pair = tuple[socket.socket, socket.socket]
Answer = Callable[[int, int], Wait | None]


class Steps:
    """A step that does what `answer` says, a wake and an end; all of them remember their calls."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.steps: list[tuple[int, int]] = []
        self.wakes: list[tuple[Wait, bool]] = []
        self.ends = 0
        self.errors: list[Exception | None] = []
        self.threads: set[threading.Thread] = set()

    def step(self, descriptor: int, events: int) -> Wait | None:
        self.threads.add(threading.current_thread())
        self.steps.append((descriptor, events))
        assert self.answer is not None
        return self.answer(descriptor, events)

    def wake(self, pause: Wait, ready: bool) -> None:
        self.wakes.append((pause, ready))

    def end(self, error: Exception | None) -> None:
        self.threads.add(threading.current_thread())
        self.ends += 1
        self.errors.append(error)

    def pause(
        self,
        *sockets: socket.socket,
        seconds: float = 60.0,
        stepping: bool = True,
        events: int = READABLE,
    ) -> Wait:
        return Wait(
            [(sock, events) for sock in sockets],
            seconds,
            lambda ready: None,
            False,
            self.step if stepping else None,
        )

    def watch(self, poller: Poller, pause: Wait) -> None:
        poller.watch(pause, self.wake, self.end)


def echoing(steps: Steps, *sockets: socket.socket, seconds: float = 60.0) -> Wait:
    """A pause that gives each byte back and goes on waiting as before."""
    pause = steps.pause(*sockets, seconds=seconds)
    found = {sock.fileno(): sock for sock in sockets}

    def answer(descriptor: int, events: int) -> Wait:
        found[descriptor].send(found[descriptor].recv(1))
        return pause

    steps.answer = answer
    return pause


def ask(sock: socket.socket, byte: bytes = b"x") -> None:
    sock.settimeout(5)
    sock.send(byte)
    assert sock.recv(1) == byte


def ending(*sockets: socket.socket) -> Answer:
    def answer(descriptor: int, events: int) -> None:
        for sock in sockets:
            sock.close()

    return answer


class TestAPauseThatStaysAsItIs:
    def test_is_stepped_again_and_again_on_the_parkers_thread(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        (first, one), (second, two) = pair(), pair()
        steps = Steps()
        steps.watch(poller, echoing(steps, first, second))
        for _ in range(10):
            ask(one)
            ask(two)
        assert (
            steps.steps == [(first.fileno(), select.POLLIN), (second.fileno(), select.POLLIN)] * 10
        )
        assert steps.threads == {poller.thread}
        assert not steps.wakes and not steps.ends and len(poller) == 1

    def test_is_not_given_up_while_it_is_stepped(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        ours, theirs = pair()
        steps = Steps()
        steps.watch(poller, echoing(steps, ours, seconds=0.3))
        for _ in range(25):
            ask(theirs)
            time.sleep(0.03)
        assert not steps.wakes and len(poller) == 1

    def test_is_woken_when_its_time_is_over(self, poller: Poller, pair: Callable[[], Pair]) -> None:
        ours, theirs = pair()
        steps = Steps()
        pause = echoing(steps, ours, seconds=0.1)
        steps.watch(poller, pause)
        ask(theirs)
        wait_until(lambda: steps.wakes)
        ((woken, ready),) = steps.wakes
        assert woken is pause and ready is False
        theirs.send(b"late")
        look_again(poller, pair)
        assert len(steps.steps) == 1 and not steps.ends and not len(poller)


def look_again(poller: Poller, pair: Callable[[], Pair]) -> None:
    """Has the parker look once more: what came before has been dealt with then."""
    ours, theirs = pair()
    steps = Steps()
    steps.answer = ending(ours)
    steps.watch(poller, steps.pause(ours))
    theirs.send(b"x")
    wait_until(lambda: steps.ends == 1)


class TestAnotherPause:
    def test_is_watched_in_place_of_the_first(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        (first, one), (second, two) = pair(), pair()
        steps = Steps()
        later = steps.pause(second)

        def answer(descriptor: int, events: int) -> Wait:
            (first if descriptor == first.fileno() else second).recv(1)
            return later

        steps.answer = answer
        steps.watch(poller, steps.pause(first))
        one.send(b"x")
        wait_until(lambda: len(steps.steps) == 1)
        one.send(b"y")
        two.send(b"z")
        wait_until(lambda: len(steps.steps) == 2)
        look_again(poller, pair)
        assert (
            steps.steps == [(first.fileno(), select.POLLIN), (second.fileno(), select.POLLIN)]
            and len(poller) == 1
        )

    def test_brings_its_own_events(self, poller: Poller, pair: Callable[[], Pair]) -> None:
        ours, theirs = pair()
        steps = Steps()
        first, writing, last = (
            steps.pause(ours),
            steps.pause(ours, events=select.POLLOUT),
            steps.pause(ours),
        )
        steps.answer = lambda descriptor, events: (
            writing if events & select.POLLIN and len(steps.steps) == 1 else last
        )
        theirs.send(b"x")
        steps.watch(poller, first)
        wait_until(lambda: len(steps.steps) >= 3)
        assert [events for _, events in steps.steps[:3]] == [
            select.POLLIN,
            select.POLLOUT,
            select.POLLIN,
        ]
        ours.recv(1)

    def test_without_a_step_is_handed_over(self, poller: Poller, pair: Callable[[], Pair]) -> None:
        ours, theirs = pair()
        steps = Steps()
        other = steps.pause(ours, stepping=False)
        steps.answer = lambda descriptor, events: other
        theirs.send(b"x")
        steps.watch(poller, steps.pause(ours))
        wait_until(lambda: steps.wakes)
        ((pause, ready),) = steps.wakes
        assert pause is other and ready is True
        look_again(poller, pair)
        assert len(steps.steps) == len(steps.wakes) == 1 and not steps.ends and not len(poller)

    def test_of_nothing_wants_a_thread_at_once(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        ours, theirs = pair()
        steps = Steps()
        nothing = steps.pause(stepping=False)
        steps.answer = lambda descriptor, events: nothing
        theirs.send(b"x")
        steps.watch(poller, steps.pause(ours))
        wait_until(lambda: steps.wakes)
        assert steps.wakes == [(nothing, True)] and not steps.ends
        steps.watch(poller, nothing)
        assert steps.wakes == [(nothing, True)] * 2
        look_again(poller, pair)
        assert len(steps.steps) == 1 and not len(poller)


class TestAnEnd:
    def test_is_told_once_and_forgets_the_descriptors(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        (first, one), (second, two) = pair(), pair()
        steps = Steps()
        ready = threading.Event()

        def answer(descriptor: int, events: int) -> None:
            assert ready.wait(5)
            ending(first, second)(descriptor, events)

        steps.answer = answer
        steps.watch(poller, steps.pause(first, second))
        one.send(b"x")
        two.send(b"x")
        ready.set()
        wait_until(lambda: steps.ends)
        look_again(poller, pair)
        assert (steps.ends, len(steps.steps), steps.wakes, len(poller)) == (1, 1, [], 0)
        assert steps.threads == {poller.thread}

    def test_may_come_before_all_descriptors_are_watched(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        """Both have something when they are parked, and the first step ends it: park() does not raise, end is told once."""
        for _ in range(400):
            (first, one), (second, two) = pair(), pair()
            steps = Steps()
            steps.answer = ending(first, second)
            one.send(b"x")
            two.send(b"x")
            steps.watch(poller, steps.pause(first, second))
            wait_until(lambda: steps.ends)
            assert (steps.ends, len(steps.steps), len(poller)) == (1, 1, 0)

    def test_leaves_another_with_the_same_descriptor_alone(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        """Between the end of one and the parker's look at it, its number is somebody else's who is parked already."""
        (ours, theirs), (other, its_peer) = pair(), pair()
        number = ours.fileno()
        steps, others = Steps(), Steps()
        new: list[socket.socket] = []

        def answer(descriptor: int, events: int) -> None:
            ours.close()
            new.append(other.dup())
            assert new[0].fileno() == number
            others.watch(poller, echoing(others, new[0]))

        steps.answer = answer
        steps.watch(poller, steps.pause(ours))
        theirs.send(b"x")
        wait_until(lambda: steps.ends)
        with new[0]:
            assert len(poller) == 1
            ask(its_peer)
            ask(its_peer)
            assert others.steps == [(number, select.POLLIN)] * 2
            others.answer = ending(new[0])
            its_peer.send(b"x")
            wait_until(lambda: others.ends)
            assert not len(poller) and steps.ends == 1

    def test_by_an_exception_is_told_with_it_and_ends_that_one_only(
        self, poller: Poller, pair: Callable[[], Pair], log: Lines
    ) -> None:
        (ours, theirs), (second, two) = pair(), pair()
        steps, others, broken = Steps(), Steps(), ValueError("broken")

        def answer(descriptor: int, events: int) -> None:
            ours.close()
            raise broken

        steps.answer = answer
        steps.watch(poller, steps.pause(ours))
        others.watch(poller, echoing(others, second))
        theirs.send(b"x")
        wait_until(lambda: steps.ends)
        ask(two)
        ask(two)
        assert steps.errors == [broken] and not log.of("exception")
        assert (steps.ends, len(steps.steps), steps.wakes, others.ends, len(poller)) == (
            1,
            1,
            [],
            0,
            1,
        )

    def test_that_fails_itself_is_logged_and_keeps_no_other(
        self, poller: Poller, pair: Callable[[], Pair], log: Lines
    ) -> None:
        (ours, theirs), (second, two) = pair(), pair()
        others = Steps()

        def end(error: Exception | None) -> None:
            raise ValueError("broken")

        steps = Steps()
        steps.answer = ending(ours)
        poller.watch(steps.pause(ours), steps.wake, end)
        others.watch(poller, echoing(others, second))
        theirs.send(b"x")
        wait_until(lambda: log.of("exception"))
        ask(two)
        assert log.of("exception") == ["ending a parked connection: broken"] and len(poller) == 1


class TestTime:
    """A deadline is kept to a tenth of a second where it is known before, though who waits is looked at each second alone."""

    @pytest.fixture
    def poller(self, log: Lines, monkeypatch: pytest.MonkeyPatch) -> Iterator[Poller]:
        monkeypatch.setattr(parker_module, "TICK", 60.0)
        poller = Poller(log)
        poller.start()
        yield poller
        poller.stop()

    def test_of_a_pause_that_follows_another(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        ours, theirs = pair()
        steps = Steps()
        short = steps.pause(ours, seconds=0.2)

        def answer(descriptor: int, events: int) -> Wait:
            ours.recv(1)
            return short

        steps.answer = answer
        steps.watch(poller, steps.pause(ours))
        theirs.send(b"x")
        wait_until(lambda: steps.steps)
        began = time.monotonic()
        wait_until(lambda: steps.wakes)
        assert steps.wakes == [(short, False)] and 0.1 < time.monotonic() - began < 2.0

    def test_of_those_that_were_found_to_have_little_left(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        ends = [pair()[0] for _ in range(3)]
        steps = Steps()
        for seconds, end in zip((0.3, 0.6, 0.9), ends):
            steps.watch(poller, steps.pause(end, seconds=seconds))
        began, other = time.monotonic(), pair()
        watched = Steps()
        watched.watch(poller, echoing(watched, other[0]))
        ask(other[1])  # has the parker take note
        took = []
        for number in range(1, 4):
            wait_until(lambda: len(steps.wakes) == number)
            took.append(time.monotonic() - began)
        assert all(due - 0.05 <= late < due + 1.0 for due, late in zip((0.3, 0.6, 0.9), took))


class TestADescriptorThatSomebodyElseHasByNow:
    def test_is_not_given_up_for_the_first_owners_time(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        """A relay whose time is up is found by both its descriptors; once woken it may be closed, and the second be another's."""
        (first, one), (second, two), (third, three) = pair(), pair(), pair()
        number, later = second.fileno(), Steps()

        class Closing(Steps):
            def wake(self, pause: Wait, ready: bool) -> None:
                super().wake(pause, ready)
                if len(self.wakes) == 1:
                    os.dup2(
                        third.fileno(), number
                    )  # closes the second, and is a new connection's at once
                    later.watch(poller, echoing(later, second))

        steps = Closing()
        steps.watch(poller, echoing(steps, first, second, seconds=0.05))
        wait_until(lambda: steps.wakes)
        ask(three)
        look_again(poller, pair)
        assert (
            [ready for _, ready in steps.wakes] == [False] and not later.wakes and len(poller) == 1
        )

    def test_parking_after_the_stop_touches_nobodys(
        self, log: Lines, pair: Callable[[], Pair]
    ) -> None:
        ours, theirs = pair()
        poller, steps = Poller(log), Steps()
        poller.start()
        poller.stop()
        with select.epoll() as other:
            with pytest.raises((OSError, ValueError)):
                steps.watch(poller, steps.pause(ours))
            theirs.send(b"x")
            assert other.poll(0.02) == [] and not len(poller)
