"""Waits with a step: it goes on, on the poller's thread, until it ends or needs a pool thread."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from typing import Any, Callable, Iterator

import pytest

from netproxy.interfaces.connections import READABLE, Wait
from netproxy.listener import poller as poller_module
from netproxy.listener.poller import Poller
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS, wait_until

Pair = tuple[socket.socket, socket.socket]
Answer = Callable[[int, int], Wait | None]


class Stepper:
    """A WaitOwner and the step of its waits, which does what `answer` says.

    It remembers all calls, and the threads that stepped or ended it.
    """

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.steps: list[tuple[int, int]] = []
        self.wakes: list[tuple[Wait, bool]] = []
        self.unwatched: list[Wait] = []
        self.errors: list[Exception | None] = []
        self.threads: set[threading.Thread] = set()

    def step(self, descriptor: int, events: int) -> Wait | None:
        self.threads.add(threading.current_thread())
        self.steps.append((descriptor, events))
        assert self.answer is not None
        return self.answer(descriptor, events)

    def wake(self, wait: Wait, ready: bool) -> None:
        self.wakes.append((wait, ready))

    def cannot_watch(self, wait: Wait, error: Exception) -> None:
        self.unwatched.append(wait)

    def end(self, error: Exception | None) -> None:
        self.threads.add(threading.current_thread())
        self.errors.append(error)

    @property
    def ends(self) -> int:
        return len(self.errors)

    def wait_for(
        self,
        *sockets: socket.socket,
        seconds: float = 60.0,
        stepping: bool = True,
        fixed: bool = False,
        events: int = READABLE,
    ) -> Wait:
        """Return a wait for events on one of the sockets."""
        watched = [(sock, events) for sock in sockets]
        step = self.step if stepping else None
        return Wait(watched, seconds, lambda ready: None, False, step, fixed)


def echoing(stepper: Stepper, *sockets: socket.socket, **options: Any) -> Wait:
    """Return a wait whose step returns each byte, and the same wait."""
    wait = stepper.wait_for(*sockets, **options)
    by_descriptor = {sock.fileno(): sock for sock in sockets}

    def answer(descriptor: int, events: int) -> Wait:
        sock = by_descriptor[descriptor]
        sock.send(sock.recv(1))
        return wait

    stepper.answer = answer
    return wait


def ask(sock: socket.socket, byte: bytes = b"x") -> None:
    sock.settimeout(SECONDS)
    sock.send(byte)
    assert sock.recv(1) == byte


def closing(*sockets: socket.socket) -> Answer:
    """Return an answer that closes the sockets and ends."""

    def answer(descriptor: int, events: int) -> None:
        for sock in sockets:
            sock.close()

    return answer


def finish_round(poller: Poller, pair: Callable[[], Pair]) -> None:
    """Wait until the poller has dealt with all events before this call."""
    ours, theirs = pair()
    stepper = Stepper()
    stepper.answer = closing(ours)
    poller.watch(stepper.wait_for(ours), stepper)
    theirs.send(b"x")
    wait_until(lambda: stepper.ends == 1)


class TestSameWait:
    def test_step_is_called_for_every_event_on_the_pollers_thread(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        (first, first_peer), (second, second_peer) = pair(), pair()
        stepper = Stepper()
        poller.watch(echoing(stepper, first, second), stepper)
        for _ in range(10):
            ask(first_peer)
            ask(second_peer)
        expected = [(first.fileno(), select.POLLIN), (second.fileno(), select.POLLIN)] * 10
        assert stepper.steps == expected
        assert stepper.threads == {poller.thread}
        assert not stepper.wakes and not stepper.ends and len(poller) == 1

    def test_each_event_renews_the_time_of_a_wait(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        ours, theirs = pair()
        stepper = Stepper()
        poller.watch(echoing(stepper, ours, seconds=0.5), stepper)
        for _ in range(40):
            ask(theirs)
            time.sleep(0.03)
        assert not stepper.wakes and len(poller) == 1

    def test_no_event_renews_the_time_of_a_fixed_wait(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        ours, theirs = pair()
        stepper = Stepper()
        wait = echoing(stepper, ours, seconds=0.3, fixed=True)
        poller.watch(wait, stepper)
        theirs.settimeout(SECONDS)
        for _ in range(200):
            if stepper.wakes:
                break
            theirs.send(b"x")
            time.sleep(0.03)
        assert stepper.wakes == [(wait, False)] and len(stepper.steps) > 1

    def test_wait_whose_time_is_up_is_woken(self, poller: Poller, pair: Callable[[], Pair]) -> None:
        ours, theirs = pair()
        stepper = Stepper()
        wait = echoing(stepper, ours, seconds=0.1)
        poller.watch(wait, stepper)
        ask(theirs)
        wait_until(lambda: stepper.wakes)
        ((woken, ready),) = stepper.wakes
        assert woken is wait and ready is False
        theirs.send(b"late")
        finish_round(poller, pair)
        assert len(stepper.steps) == 1 and not stepper.ends and not len(poller)


class TestFollowingWait:
    def test_following_wait_replaces_the_first(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        (first, first_peer), (second, second_peer) = pair(), pair()
        stepper = Stepper()
        following = stepper.wait_for(second)

        def answer(descriptor: int, events: int) -> Wait:
            (first if descriptor == first.fileno() else second).recv(1)
            return following

        stepper.answer = answer
        poller.watch(stepper.wait_for(first), stepper)
        first_peer.send(b"x")
        wait_until(lambda: len(stepper.steps) == 1)
        first_peer.send(b"y")
        second_peer.send(b"z")
        wait_until(lambda: len(stepper.steps) == 2)
        finish_round(poller, pair)
        assert stepper.steps == [(first.fileno(), select.POLLIN), (second.fileno(), select.POLLIN)]
        assert len(poller) == 1

    def test_following_wait_has_its_own_events(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        ours, theirs = pair()
        stepper = Stepper()
        writing = stepper.wait_for(ours, events=select.POLLOUT)
        reading = stepper.wait_for(ours)

        def answer(descriptor: int, events: int) -> Wait:
            return writing if events & select.POLLIN and len(stepper.steps) == 1 else reading

        stepper.answer = answer
        theirs.send(b"x")
        poller.watch(stepper.wait_for(ours), stepper)
        wait_until(lambda: len(stepper.steps) >= 3)
        events = [events for _, events in stepper.steps[:3]]
        assert events == [select.POLLIN, select.POLLOUT, select.POLLIN]
        ours.recv(1)

    def test_following_wait_without_a_step_wakes_its_owner(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        ours, theirs = pair()
        stepper = Stepper()
        following = stepper.wait_for(ours, stepping=False)
        stepper.answer = lambda descriptor, events: following
        theirs.send(b"x")
        poller.watch(stepper.wait_for(ours), stepper)
        wait_until(lambda: stepper.wakes)
        ((wait, ready),) = stepper.wakes
        assert wait is following and ready is True
        finish_round(poller, pair)
        assert len(stepper.steps) == len(stepper.wakes) == 1
        assert not stepper.ends and not len(poller)

    def test_following_wait_for_nothing_wakes_its_owner_at_once(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        ours, theirs = pair()
        stepper = Stepper()
        nothing = stepper.wait_for(stepping=False)
        stepper.answer = lambda descriptor, events: nothing
        theirs.send(b"x")
        poller.watch(stepper.wait_for(ours), stepper)
        wait_until(lambda: stepper.wakes)
        assert stepper.wakes == [(nothing, True)] and not stepper.ends
        poller.watch(nothing, stepper)
        assert stepper.wakes == [(nothing, True)] * 2
        finish_round(poller, pair)
        assert len(stepper.steps) == 1 and not len(poller)

    def test_following_wait_that_cannot_be_watched_goes_to_its_owner(
        self, poller: Poller, pair: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel has no memory for another descriptor."""
        (ours, theirs), (other, _) = pair(), pair()
        stepper = Stepper()
        following = stepper.wait_for(other)
        inner: Any = poller._epoll

        class FullEpoll:
            poll, unregister, close = inner.poll, inner.unregister, inner.close

            @staticmethod
            def register(descriptor: int, events: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def answer(descriptor: int, events: int) -> Wait:
            ours.recv(1)
            return following

        stepper.answer = answer
        poller.watch(stepper.wait_for(ours), stepper)
        with monkeypatch.context() as patch:
            patch.setattr(poller, "_epoll", FullEpoll())
            theirs.send(b"x")
            wait_until(lambda: stepper.unwatched)
        assert stepper.unwatched == [following]
        assert not stepper.wakes and not stepper.ends and not len(poller)

    def test_deadline_of_a_following_wait_is_kept(
        self, log: Lines, pair: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However seldom the poller looks at the deadlines otherwise."""
        monkeypatch.setattr(poller_module, "TICK", 10 * SECONDS)
        poller = Poller(log)
        poller.start()
        ours, theirs = pair()
        stepper = Stepper()
        following = stepper.wait_for(ours, seconds=0.2)

        def answer(descriptor: int, events: int) -> Wait:
            ours.recv(1)
            return following

        stepper.answer = answer
        poller.watch(stepper.wait_for(ours), stepper)
        theirs.send(b"x")
        wait_until(lambda: stepper.wakes)
        assert stepper.wakes == [(following, False)]
        poller.stop()


class TestEnd:
    def test_end_is_told_once_and_forgets_the_descriptors(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        (first, first_peer), (second, second_peer) = pair(), pair()
        stepper = Stepper()
        both_sent = threading.Event()

        def answer(descriptor: int, events: int) -> None:
            assert both_sent.wait(SECONDS)
            closing(first, second)(descriptor, events)

        stepper.answer = answer
        poller.watch(stepper.wait_for(first, second), stepper)
        first_peer.send(b"x")
        second_peer.send(b"x")
        both_sent.set()
        wait_until(lambda: stepper.ends)
        finish_round(poller, pair)
        assert (stepper.ends, len(stepper.steps), stepper.wakes, len(poller)) == (1, 1, [], 0)
        assert stepper.threads == {poller.thread}

    def test_step_may_end_a_wait_while_it_is_being_added(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        """Both sockets have bytes before watch() is called, and the first step closes them."""
        for _ in range(400):
            (first, first_peer), (second, second_peer) = pair(), pair()
            stepper = Stepper()
            stepper.answer = closing(first, second)
            first_peer.send(b"x")
            second_peer.send(b"x")
            poller.watch(stepper.wait_for(first, second), stepper)
            wait_until(lambda stepper=stepper: stepper.ends)
            assert (stepper.ends, len(stepper.steps), len(poller)) == (1, 1, 0)

    def test_end_leaves_the_new_owner_of_a_descriptor_alone(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        """The step closes its socket, and its number is watched for another owner already."""
        (ours, theirs), (other, other_peer) = pair(), pair()
        number = ours.fileno()
        stepper, later = Stepper(), Stepper()
        reused: list[socket.socket] = []

        def answer(descriptor: int, events: int) -> None:
            ours.close()
            reused.append(other.dup())
            assert reused[0].fileno() == number
            poller.watch(echoing(later, reused[0]), later)

        stepper.answer = answer
        poller.watch(stepper.wait_for(ours), stepper)
        theirs.send(b"x")
        wait_until(lambda: stepper.ends)
        with reused[0]:
            assert len(poller) == 1
            ask(other_peer)
            ask(other_peer)
            assert later.steps == [(number, select.POLLIN)] * 2
            later.answer = closing(reused[0])
            other_peer.send(b"x")
            wait_until(lambda: later.ends)
            assert not len(poller) and stepper.ends == 1

    def test_following_wait_leaves_the_new_owner_of_a_descriptor_alone(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        """The step closes one of two sockets, such as a failed dial, and goes on with the other."""
        (client, client_peer), (dial, dial_peer), (other, other_peer) = pair(), pair(), pair()
        number = dial.fileno()
        stepper, later = Stepper(), Stepper()
        reused: list[socket.socket] = []

        def answer(descriptor: int, events: int) -> Wait:
            if reused:
                client.send(client.recv(1))
            else:
                dial.close()
                reused.append(other.dup())
                assert reused[0].fileno() == number
                poller.watch(echoing(later, reused[0]), later)
            return stepper.wait_for(client)

        stepper.answer = answer
        poller.watch(stepper.wait_for(client, dial), stepper)
        dial_peer.send(b"x")
        wait_until(lambda: reused)
        with reused[0]:
            ask(client_peer)
            ask(other_peer)
            assert later.steps == [(number, select.POLLIN)] and len(poller) == 2
            later.answer = closing(reused[0])
            other_peer.send(b"x")
            wait_until(lambda: later.ends)

    def test_exception_of_a_step_ends_only_its_owner(
        self, poller: Poller, pair: Callable[[], Pair], log: Lines
    ) -> None:
        (ours, theirs), (second, second_peer) = pair(), pair()
        stepper, other, broken = Stepper(), Stepper(), ValueError("broken")

        def answer(descriptor: int, events: int) -> None:
            ours.close()
            raise broken

        stepper.answer = answer
        poller.watch(stepper.wait_for(ours), stepper)
        poller.watch(echoing(other, second), other)
        theirs.send(b"x")
        wait_until(lambda: stepper.ends)
        ask(second_peer)
        ask(second_peer)
        assert stepper.errors == [broken] and not log.of("exception")
        assert len(stepper.steps) == 1 and not stepper.wakes
        assert not other.ends and len(poller) == 1

    def test_exception_of_end_is_logged_and_stops_no_other_wait(
        self, poller: Poller, pair: Callable[[], Pair], log: Lines
    ) -> None:
        class Failing(Stepper):
            def end(self, error: Exception | None) -> None:
                raise ValueError("broken")

        (ours, theirs), (second, second_peer) = pair(), pair()
        other, stepper = Stepper(), Failing()
        stepper.answer = closing(ours)
        poller.watch(stepper.wait_for(ours), stepper)
        poller.watch(echoing(other, second), other)
        theirs.send(b"x")
        wait_until(lambda: log.of("exception"))
        ask(second_peer)
        assert log.of("exception") == ["ending a watched connection: broken"] and len(poller) == 1


class TestDeadlines:
    """A deadline that is known before is kept, though the poller looks at all of them seldom."""

    @pytest.fixture
    def poller(self, log: Lines, monkeypatch: pytest.MonkeyPatch) -> Iterator[Poller]:
        monkeypatch.setattr(poller_module, "TICK", 10 * SECONDS)
        poller = Poller(log)
        poller.start()
        yield poller
        poller.stop()

    def test_near_deadlines_are_kept_in_their_order(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        stepper, other = Stepper(), Stepper()
        waits = [stepper.wait_for(pair()[0], seconds=seconds) for seconds in (0.3, 0.6, 0.9)]
        for wait in waits:
            poller.watch(wait, stepper)
        ours, theirs = pair()
        poller.watch(echoing(other, ours), other)
        ask(theirs)  # wakes the poller, which looks at the deadlines
        wait_until(lambda: len(stepper.wakes) == 3)
        assert stepper.wakes == [(wait, False) for wait in waits]


class TestReusedDescriptor:
    def test_second_descriptor_of_a_late_wait_may_belong_to_another(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        """A relay whose time is up is listed once for each of its descriptors.

        Once woken it may close them, and another connection may have the second one.
        """
        (first, _), (second, _), (third, third_peer) = pair(), pair(), pair()
        number, later = second.fileno(), Stepper()

        class Closing(Stepper):
            def wake(self, wait: Wait, ready: bool) -> None:
                super().wake(wait, ready)
                if len(self.wakes) == 1:
                    # Closes the second; its number is a new connection's at once.
                    os.dup2(third.fileno(), number)
                    poller.watch(echoing(later, second), later)

        stepper = Closing()
        poller.watch(echoing(stepper, first, second, seconds=0.05), stepper)
        wait_until(lambda: stepper.wakes)
        ask(third_peer)
        finish_round(poller, pair)
        assert [ready for _, ready in stepper.wakes] == [False]
        assert not later.wakes and len(poller) == 1

    @pytest.mark.parametrize("events", [READABLE, select.POLLIN])
    def test_step_may_open_another_under_the_number_of_one_that_it_closed(
        self, poller: Poller, pair: Callable[[], Pair], events: int
    ) -> None:
        """A login's event is closed, and the upstream's socket may have its number at once."""
        (ours, theirs), (new, new_peer) = pair(), pair()
        stepper, later = Stepper(), Stepper()
        reopened: list[socket.socket] = []

        def replace(descriptor: int, _: int) -> Wait:
            number = ours.detach()
            os.dup2(new.fileno(), number)  # closes the one that is watched
            new.close()
            reopened.append(socket.socket(fileno=number))
            return echoing(later, *reopened, events=events)

        stepper.answer = replace
        poller.watch(stepper.wait_for(ours, events=READABLE), stepper)
        theirs.send(b"x")
        ask(new_peer)
        ask(new_peer)
        assert len(poller) == 1 and not stepper.unwatched and not later.unwatched
        later.answer = closing(*reopened)
        new_peer.send(b"x")
        wait_until(lambda: not len(poller))

    def test_watch_after_the_stop_touches_no_other_epoll(
        self, log: Lines, pair: Callable[[], Pair]
    ) -> None:
        """The number of the closed epoll may belong to another file."""
        ours, theirs = pair()
        poller, stepper = Poller(log), Stepper()
        poller.start()
        poller.stop()
        with select.epoll() as other:
            with pytest.raises((OSError, ValueError)):
                poller.watch(stepper.wait_for(ours), stepper)
            theirs.send(b"x")
            assert other.poll(0.02) == [] and not len(poller)


class TestTimedStep:
    """A wait with `timed`: its step goes on when the time is up as well."""

    def test_step_goes_on_when_the_time_is_up(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        ours, _ = pair()
        stepper = Stepper()
        waits = [stepper.wait_for(ours, seconds=0.02)._replace(timed=True) for _ in range(5)]
        rest = iter(waits[1:])
        stepper.answer = lambda descriptor, events: next(rest, None)
        poller.watch(waits[0], stepper)
        wait_until(lambda: stepper.ends == 1)
        assert stepper.steps == [(-1, 0)] * 5
        assert stepper.threads == {poller.thread}
        assert not stepper.wakes and not len(poller)

    def test_event_comes_before_the_time_is_up(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        ours, theirs = pair()
        stepper = Stepper()
        wait = stepper.wait_for(ours, seconds=60.0)._replace(timed=True)
        stepper.answer = closing(ours)
        poller.watch(wait, stepper)
        theirs.send(b"x")
        wait_until(lambda: stepper.ends == 1)
        assert [events for _, events in stepper.steps] == [select.POLLIN]

    def test_deadline_of_a_wait_that_has_ended_is_skipped(
        self, poller: Poller, pair: Callable[[], Pair]
    ) -> None:
        (ours, theirs), (other, _) = pair(), pair()
        stepper, late = Stepper(), Stepper()
        stepper.answer = closing(ours)
        poller.watch(stepper.wait_for(ours, seconds=0.3)._replace(timed=True), stepper)
        theirs.send(b"x")
        wait_until(lambda: stepper.ends == 1)
        late.answer = lambda descriptor, events: None
        poller.watch(late.wait_for(other, seconds=0.4)._replace(timed=True), late)
        wait_until(lambda: late.ends == 1)
        assert len(stepper.steps) == 1 and stepper.ends == 1

    def test_deadline_that_two_looks_have_noted_is_met_once(
        self, poller: Poller, pair: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A step that returns a long wait must not be told that its time is up."""
        monkeypatch.setattr(poller_module, "TICK", 0.05)
        ours, _ = pair()
        stepper = Stepper()
        first = stepper.wait_for(ours, seconds=0.3)._replace(timed=True)
        long = stepper.wait_for(ours, seconds=600.0)
        stepper.answer = lambda descriptor, events: long
        poller._next_look = time.monotonic() + 1.0
        poller.watch(first, stepper)
        poller._near.add(next(iter(poller._watches.values())))
        wait_until(lambda: bool(stepper.steps))
        finish_round(poller, pair)
        assert stepper.steps == [(-1, 0)] and not stepper.wakes and not stepper.ends
