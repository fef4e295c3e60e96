"""Connection, which drives a handshake, step by step: with a poller and a pool that only record."""

from __future__ import annotations

import gc
import select
import socket
import time
import weakref
from functools import partial
from typing import Any, Callable, Iterator

import pytest

from netproxy.errors import DeadlineError, ProtocolError, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import (
    Blocking,
    Events,
    Handshake,
    Progress,
    Ready,
    Wait,
    Watched,
)
from netproxy.listener import handshake_driver as driver_module
from netproxy.listener.handshake_driver import Connection, Serving
from netproxy.net.stream import Stream
from tests.support.doubles import Counts, Lines
from tests.support.sockets import SECONDS, nothing_comes, tcp_pair

CLIENT = Address("192.0.2.1", 5)


class RecordingPoller:
    """A poller that only remembers its waits, the last of them for the test to go on with."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.failure: OSError | None = None

    def watch(self, wait: Wait, owner: Connection) -> None:
        if self.failure is not None and wait.watched:
            raise self.failure
        self.waits.append(wait)
        if not wait.watched:
            owner.wake(wait, True)

    @property
    def wait(self) -> Wait:
        return self.waits[-1]


class RecordingPool:
    """A pool whose tasks run when the test says so; it takes none while `full`."""

    def __init__(self) -> None:
        self.tasks: list[Callable[[], None]] = []
        self.stopped = False

    def submit(self, task: Callable[[], None], urgent: bool = False, client: str = "") -> bool:
        assert urgent
        if not self.stopped:
            self.tasks.append(task)
        return not self.stopped

    def run(self) -> None:
        self.tasks.pop(0)()


class RecordingConnection(Connection):
    """A connection that remembers its end."""

    __slots__ = ("ends",)

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream, CLIENT)
        self.ends = 0

    def ended(self) -> None:
        self.ends += 1
        super().ended()


class Driver:
    """One connection and what drives it."""

    def __init__(self, ours: socket.socket, peer: socket.socket) -> None:
        ours.setblocking(False)
        self.stream, self.peer = Stream(ours, limited=10.0), peer
        self.poller, self.pool = RecordingPoller(), RecordingPool()
        self.counts, self.log = Counts(), Lines()
        any_poller: Any = self.poller
        any_pool: Any = self.pool
        self.serving = Serving(any_pool, any_poller, self.counts, self.log)
        self.connection = RecordingConnection(self.stream)

    def begin(self, handshake: Handshake) -> None:
        self.serving.begin(self.connection, handshake)

    def send(self, data: bytes) -> None:
        """Send bytes of the client, and wait until they have come."""
        self.peer.sendall(data)
        poll = select.poll()
        poll.register(self.stream.socket, select.POLLIN)
        assert poll.poll(SECONDS * 1000)

    def step(self) -> None:
        """Do what the poller does after an event on the connection's socket."""
        wait = self.poller.wait
        assert wait.step is not None
        try:
            following = wait.step(self.stream.socket.fileno(), select.POLLIN)
        except Exception as error:
            self.connection.end(error)
            return
        if following is None:
            self.connection.end(None)
        elif following is not wait:
            self.poller.watch(following, self.connection)

    def wake(self, ready: bool = True) -> None:
        """Do what the poller does with a wait without step, and run the pool's task."""
        self.connection.wake(self.poller.wait, ready)
        self.pool.run()

    def outcome(self) -> dict[tuple[str, str], int]:
        return {key: total for key, total in self.counts.counts.items() if key[1] != "accepted"}


@pytest.fixture
def driver() -> Iterator[Driver]:
    with tcp_pair() as (ours, peer):
        yield Driver(ours, peer)


class Always:
    """A need that is satisfied at once."""

    def __init__(self, light: bool) -> None:
        self.light = light

    def begin(self) -> str:
        return "there"

    def watched(self) -> tuple[Watched, float | None]:
        raise AssertionError

    def proceed(self, ready: Ready) -> Any:
        raise AssertionError

    def block(self) -> Any:
        raise AssertionError


class TestWaits:
    def test_wait_for_bytes_has_a_step_and_ends_at_the_deadline(self, driver: Driver) -> None:
        def handshake() -> Handshake:
            yield from driver.stream.read_exactly(1)
            return None

        driver.begin(handshake())
        wait = driver.poller.wait
        assert wait.watched == ((driver.stream.socket, select.POLLIN),)
        assert wait.step is not None and wait.fixed and not wait.idle
        assert wait.seconds is not None and 9.0 < wait.seconds <= 10.0
        assert not driver.pool.tasks

    def test_wait_stays_the_same_while_bytes_drip_in(self, driver: Driver) -> None:
        """The poller has nothing to tell the kernel then."""

        def handshake() -> Handshake:
            yield from driver.stream.read_exactly(5)
            yield from driver.stream.read_exactly(5)
            return None

        driver.begin(handshake())
        for _ in range(9):
            driver.send(b"x")
            driver.step()
        assert len(driver.poller.waits) == 1 and not driver.connection.ends
        driver.send(b"x")
        driver.step()
        assert driver.connection.ends == 1

    def test_new_deadline_makes_a_new_wait(self, driver: Driver) -> None:
        def handshake() -> Handshake:
            yield from driver.stream.read_exactly(1)
            driver.stream.limit(100.0)
            yield from driver.stream.read_exactly(1)
            return None

        driver.begin(handshake())
        driver.send(b"x")
        driver.step()
        assert len(driver.poller.waits) == 2
        assert driver.poller.wait.seconds is not None and driver.poller.wait.seconds > 90.0

    def test_each_wait_of_a_pace_has_all_its_seconds(self, driver: Driver) -> None:
        def handshake() -> Handshake:
            driver.stream.pace(7.0)
            yield from driver.stream.read_exactly(2)
            return None

        driver.begin(handshake())
        driver.send(b"x")
        driver.step()
        assert [wait.seconds for wait in driver.poller.waits] == [7.0, 7.0]

    def test_wait_for_bytes_is_not_that_for_other_events(self, driver: Driver) -> None:
        other, _ = socket.socketpair()

        def handshake() -> Handshake:
            driver.stream.limit(None)
            yield Events(((other, select.POLLOUT),), 5.0, light=True)
            yield from driver.stream.read_exactly(1)
            return None

        with other, _:
            driver.begin(handshake())
            wait = driver.poller.wait
            assert wait.watched == ((other, select.POLLOUT),) and wait.step is not None
            following = wait.step(other.fileno(), select.POLLOUT)
        assert following is not None and following is not wait
        assert following.watched == ((driver.stream.socket, select.POLLIN),)

    @pytest.mark.parametrize("idle", [False, True])
    def test_wait_for_events_tells_whether_it_is_idle(self, driver: Driver, idle: bool) -> None:
        def handshake() -> Handshake:
            yield Events(((driver.stream.socket, select.POLLIN),), 5.0, True, idle)
            return None

        driver.begin(handshake())
        assert driver.poller.wait.idle is idle and driver.poller.wait.seconds == 5.0

    def test_event_about_the_last_owner_of_a_descriptor_changes_nothing(
        self, driver: Driver
    ) -> None:
        received = []

        def handshake() -> Handshake:
            received.append((yield from driver.stream.read_exactly(1)))
            return None

        driver.begin(handshake())
        driver.step()
        assert len(driver.poller.waits) == 1 and not driver.connection.ends
        driver.stream.light = False
        driver.wake()
        assert not driver.connection.ends and not received
        driver.send(b"x")
        driver.wake()
        assert received == [b"x"] and driver.connection.ends == 1

    def test_event_about_the_last_owner_is_none_of_those_that_a_handshake_asks_for(
        self, driver: Driver
    ) -> None:
        """Hazard 187.  The end of another connection must not be taken for that of this client."""
        results: list[Ready] = []

        def handshake() -> Handshake:
            results.append((yield Events(((driver.stream.socket, select.POLLIN),), 5.0, True)))
            return None

        driver.begin(handshake())
        descriptor = driver.stream.socket.fileno()
        assert driver.poller.wait.step is not None
        assert driver.poller.wait.step(descriptor, select.POLLHUP) is driver.poller.wait
        assert not results and not driver.connection.ends
        driver.send(b"x")
        assert driver.poller.wait.step(descriptor, select.POLLIN) is None
        assert results == [{descriptor: select.POLLIN}]

    def test_time_that_is_up_is_thrown_into_the_handshake(self, driver: Driver) -> None:
        caught: list[Exception] = []

        def handshake() -> Handshake:
            try:
                yield from driver.stream.read_exactly(1)
            except DeadlineError as error:
                caught.append(error)
            return None

        driver.begin(handshake())
        driver.wake(ready=False)
        assert len(caught) == 1 and driver.connection.ends == 1


class TestThreads:
    def test_blocking_call_is_made_by_the_pool_alone(self, driver: Driver) -> None:
        made: list[str] = []

        def handshake() -> Handshake:
            made.append((yield Blocking(lambda: "first")))
            made.append((yield Blocking(lambda: "second")))
            return None

        driver.begin(handshake())
        assert not made and len(driver.pool.tasks) == 1
        driver.pool.run()
        assert made == ["first", "second"] and driver.connection.ends == 1

    def test_failed_blocking_call_is_thrown_into_the_handshake(self, driver: Driver) -> None:
        def fail() -> None:
            raise ProtocolError("bad")

        def handshake() -> Handshake:
            try:
                yield Blocking(fail)
            except ProtocolError:
                driver.stream.reply(b"refused")
            return None

        driver.begin(handshake())
        driver.pool.run()
        assert driver.peer.recv(64) == b"refused" and driver.outcome() == {}

    @pytest.mark.parametrize("light", [False, True])
    def test_result_at_once_needs_a_thread_unless_the_need_is_light(
        self, driver: Driver, light: bool
    ) -> None:
        def handshake() -> Handshake:
            result = yield Always(light)
            driver.stream.reply(result.encode())
            return None

        driver.begin(handshake())
        assert len(driver.pool.tasks) == (0 if light else 1)
        if not light:
            assert nothing_comes(driver.peer, 0)
            driver.pool.run()
        assert driver.peer.recv(64) == b"there"

    def test_need_that_is_not_light_is_watched_without_a_step(
        self, driver: Driver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(driver_module, "STAY_SECONDS", 0.0)
        received = []

        def handshake() -> Handshake:
            received.append((yield from driver.stream.read_exactly(2)))
            return None

        driver.stream.light = False
        driver.begin(handshake())
        assert driver.poller.wait.step is None
        driver.send(b"a")
        driver.wake()
        assert driver.poller.wait.step is None and len(driver.poller.waits) == 2
        driver.send(b"b")
        driver.wake()
        assert received == [b"ab"] and driver.connection.ends == 1

    def test_pool_thread_stays_a_moment_for_a_need_that_is_not_light(
        self, driver: Driver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Giving the connection to the poller and taking it back costs two changes of threads."""
        monkeypatch.setattr(driver_module, "STAY_SECONDS", 5.0)
        received = []

        def send() -> None:
            driver.peer.sendall(b"ab")

        def handshake() -> Handshake:
            driver.stream.light = False
            yield Blocking(send)
            received.append((yield from driver.stream.read_exactly(2)))
            return None

        driver.begin(handshake())
        driver.pool.run()
        assert received == [b"ab"] and not any(wait.watched for wait in driver.poller.waits)

    def test_light_bytes_are_the_pollers_again_after_a_blocking_call(self, driver: Driver) -> None:
        def handshake() -> Handshake:
            yield Blocking(lambda: None)
            yield from driver.stream.read_exactly(1)
            return None

        driver.begin(handshake())
        driver.pool.run()
        assert driver.poller.wait.step is not None and not driver.pool.tasks
        driver.send(b"x")
        driver.step()
        assert driver.connection.ends == 1

    def test_unwatchable_need_is_waited_for_by_a_pool_thread(self, driver: Driver) -> None:
        received = []

        def handshake() -> Handshake:
            received.append((yield from driver.stream.read_exactly(1)))
            return None

        driver.poller.failure = OSError("no memory")
        driver.begin(handshake())
        driver.peer.sendall(b"x")
        driver.pool.run()
        assert received == [b"x"] and driver.connection.ends == 1

    def test_unwatchable_wait_behind_a_handshake_is_told_that_its_time_is_up(
        self, driver: Driver
    ) -> None:
        told: list[bool] = []

        def resume(ready: bool) -> None:
            told.append(ready)

        def handshake() -> Handshake:
            yield from ()
            return Wait(((driver.stream.socket, select.POLLIN),), None, resume)

        driver.poller.failure = OSError("no memory")
        driver.begin(handshake())
        driver.pool.run()
        assert told == [False] and driver.connection.ends == 1


class TestEnd:
    def test_handshake_without_a_need_ends(self, driver: Driver) -> None:
        def handshake() -> Handshake:
            yield from ()
            return None

        driver.begin(handshake())
        assert driver.connection.ends == 1 and not driver.stream.open
        assert driver.outcome() == {}

    def test_returned_wait_goes_on_as_it_says(self, driver: Driver) -> None:
        resumed: list[bool] = []
        wait = Wait(((driver.stream.socket, select.POLLIN),), 5.0, resumed.append)

        def handshake() -> Handshake:
            yield from driver.stream.read_exactly(1)
            return wait

        driver.begin(handshake())
        driver.send(b"x")
        driver.step()
        assert driver.poller.wait is wait and not driver.connection.ends
        driver.wake()
        assert resumed == [True] and driver.connection.ends == 1

    @pytest.mark.parametrize("where", ["at the beginning", "after a byte", "on a thread"])
    def test_fault_closes_the_handshake_and_ends_once(self, driver: Driver, where: str) -> None:
        closed: list[bool] = []

        def handshake() -> Handshake:
            try:
                if where == "after a byte":
                    yield from driver.stream.read_exactly(1)
                elif where == "on a thread":
                    yield Blocking(lambda: None)
                raise ValueError("broken")
            finally:
                closed.append(True)

        driver.begin(handshake())
        if where == "after a byte":
            driver.send(b"x")
            driver.step()
        elif where == "on a thread":
            driver.pool.run()
        assert closed == [True] and driver.connection.ends == 1
        assert driver.outcome() == {("connections", "internal error"): 1}
        assert driver.log.of("exception") == [f"serving {CLIENT}: broken"]

    def test_fault_of_a_need_closes_the_handshake(self, driver: Driver) -> None:
        closed: list[bool] = []

        def fail() -> None:
            raise ValueError("broken")

        def handshake() -> Handshake:
            try:
                yield Blocking(fail)
            finally:
                closed.append(True)

        driver.begin(handshake())
        driver.pool.run()
        assert closed == [True] and driver.connection.ends == 1
        assert driver.outcome() == {("connections", "internal error"): 1}

    @pytest.mark.parametrize("error", [None, ProtocolError("bad")], ids=["returned", "failed"])
    def test_ended_connection_is_freed_without_the_garbage_collector(
        self, driver: Driver, error: Exception | None
    ) -> None:
        class Held:
            pass

        held = Held()
        freed = weakref.ref(held)

        def handshake(held: Held) -> Handshake:
            yield from driver.stream.read_exactly(1)
            if error is not None:
                raise error
            return None

        gc.disable()
        try:
            driver.begin(handshake(held))
            del held
            driver.send(b"x")
            driver.step()
            assert driver.connection.ends == 1
            driver.poller.waits.clear()
            if error is not None:
                error.__traceback__ = None
            assert freed() is None
        finally:
            gc.enable()


class TestNoThread:
    """The pool has stopped, or no thread can be had."""

    def test_needs_of_the_handshake_fail_and_it_ends_once(self, driver: Driver) -> None:
        caught: list[Exception] = []

        def handshake() -> Handshake:
            try:
                yield from driver.stream.read_exactly(1)
                yield Blocking(lambda: caught.append(AssertionError()))
            except StreamError as error:
                caught.append(error)
                yield from driver.stream.close_staged()
            return None

        driver.begin(handshake())
        driver.pool.stopped = True
        driver.send(b"x")
        driver.step()
        assert [type(error) for error in caught] == [StreamError]
        assert driver.connection.ends == 1 and not driver.stream.open
        assert driver.outcome() == {("connections_refused", "no thread"): 1}

    def test_error_for_want_of_a_thread_is_not_counted_again(self, driver: Driver) -> None:
        def handshake() -> Handshake:
            yield Blocking(lambda: None)
            return None

        driver.pool.stopped = True
        driver.begin(handshake())
        assert driver.connection.ends == 1
        assert driver.outcome() == {("connections_refused", "no thread"): 1}

    def test_handshake_that_does_not_end_is_closed(self, driver: Driver) -> None:
        closed: list[bool] = []

        def handshake() -> Handshake:
            try:
                while True:
                    try:
                        yield Blocking(lambda: None)
                    except StreamError:
                        continue
            finally:
                closed.append(True)

        driver.pool.stopped = True
        driver.begin(handshake())
        assert closed == [True] and driver.connection.ends == 1

    def test_returned_wait_is_told_that_its_time_is_up(self, driver: Driver) -> None:
        told: list[bool] = []

        def resume(ready: bool) -> Wait | None:
            told.append(ready)
            return Wait((), None, resume)

        def handshake() -> Handshake:
            yield from ()
            return Wait((), None, resume)

        driver.pool.stopped = True
        driver.begin(handshake())
        assert told == [False] and driver.connection.ends == 1 and not driver.stream.open


def test_light_need_may_stay_pending(driver: Driver) -> None:
    class Reluctant(Always):
        asked = 0

        def begin(self) -> Any:
            return Progress.PENDING

        def watched(self) -> tuple[Watched, float | None]:
            return ((driver.stream.socket, select.POLLIN),), 5.0

        def proceed(self, ready: Ready) -> Any:
            self.asked += 1
            return "at last" if self.asked == 3 else Progress.PENDING

    need = Reluctant(light=True)
    results = []

    def handshake() -> Handshake:
        results.append((yield need))
        return None

    driver.begin(handshake())
    for _ in range(3):
        driver.step()
    assert results == ["at last"] and len(driver.poller.waits) == 1


def test_deadline_is_kept_over_several_waits(driver: Driver) -> None:
    """Each wait has what is left, however the connection changes threads."""

    def handshake() -> Handshake:
        yield from driver.stream.read_exactly(1)
        yield Blocking(partial(time.sleep, 0.02))
        yield from driver.stream.read_exactly(1)
        return None

    driver.begin(handshake())
    first = driver.poller.wait.seconds
    driver.send(b"x")
    driver.step()
    driver.pool.run()
    last = driver.poller.wait.seconds
    assert first is not None and last is not None and last <= first - 0.02
