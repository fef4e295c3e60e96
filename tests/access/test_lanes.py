"""The lanes of checks of hashed passwords: who waits behind whom, and what is not checked."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Iterator

import pytest

from netproxy.access.backoff import BackOff, Penalty
from netproxy.access.checks import lanes as lanes_module
from netproxy.access.checks.lanes import PasswordLanes
from netproxy.access.checks.passwords import PasswordChecks
from netproxy.access.checks.queue import TOO_MANY
from netproxy.access.login import Login
from netproxy.access.users import Users, hash_password
from netproxy.errors import LoginPenalised, LoginUnavailable
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Events
from netproxy.listener.fair_queue import FairQueue
from netproxy.listener.pool import ThreadPool
from netproxy.net.stream import Stream
from tests.support.handlers import RecordingLog
from tests.support.logins import Recorder, Running, Tasks
from tests.support.sockets import SECONDS

CLIENT, OTHER, LOCAL = "192.0.2.1", "192.0.2.2", "127.0.0.1"
HASHED = hash_password("secret", 1024)
PENALTY = Penalty(5, 600.0, 600.0)


LOWER_PRIORITY = lanes_module._lower_priority


@pytest.fixture(autouse=True)
def tests_keep_their_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks run on the thread of the tests, whose priority could not be raised again."""
    monkeypatch.setattr(lanes_module, "_lower_priority", str)


class Checked:
    """A Login whose checks wait until they are run, and notes the names that are checked."""

    def __init__(self, stream: Stream, *users: str) -> None:
        self.stream, self.asked, self.suspects = stream, list[str](), list[str]()
        self.clean, self.suspect = Tasks(), Tasks()
        self.back_off, self.recorder = BackOff(0.0), Recorder()
        self.back_off.rules = PENALTY
        self.users = Users({user: HASHED for user in users})
        self.lanes = PasswordLanes(self.clean, self.suspect, self.back_off)
        self._real, self.users.check = self.users.check, self._check  # type: ignore[method-assign]
        checks = PasswordChecks(self.users, self.lanes)
        self.login = Login(
            self.users, "required", self.recorder, self.back_off, "main", None, checks
        )

    def _check(self, name: bytes, password: bytes, is_suspect: bool = False) -> str | None:
        self.asked.append(name.decode())
        if is_suspect:
            self.suspects.append(name.decode())
        return self._real(name, password, is_suspect)

    def begin(self, user: str, password: str = "secret", host: str = CLIENT) -> Running:
        """Begin a login."""
        name, secret, client = user.encode(), password.encode(), Address(host, 4000)
        return Running(self.login.authenticate(name, secret, client, self.stream))

    def fail(self, user: str, host: str) -> None:
        """Fail a login from a host, as its handler does."""
        login = self.begin(user, "wrong", host)
        self.clean.run()
        self.suspect.run()
        assert login.go_on() is None
        self.back_off.next_delay(host, time.monotonic())


@pytest.fixture
def stream() -> Iterator[Stream]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    made = Stream(ours)
    with theirs:
        yield made
    made.close()


def test_login_waits_for_its_check_without_a_thread(stream: Stream) -> None:
    """Hazard 110."""
    checked = Checked(stream, "alice")
    for user in ("alice", "nobody"):
        for password in ("secret", "wrong"):
            login = checked.begin(user, password, OTHER)
            assert isinstance(login.need, Events) and login.need.light
            checked.clean.run()
            stamp = checked.login.stamp("alice")
            is_right = (user, password) == ("alice", "secret")
            assert login.go_on() == (("alice", stamp) if is_right else None)
            checked.lanes._names.clear()


def test_first_login_does_not_wait_behind_clients_that_have_failed(stream: Stream) -> None:
    """Hazard 110."""
    checked = Checked(stream, "alice", "bob")
    checked.fail("mallory", CLIENT)
    guess, good = checked.begin("bob", "guess"), checked.begin("alice", host=OTHER)
    assert [len(lane.waiting) for lane in (checked.clean, checked.suspect)] == [1, 1]
    checked.clean.run()
    assert good.go_on() and not guess.ended
    checked.suspect.run()
    assert guess.go_on() is None


def test_first_login_does_not_wait_behind_guesses_of_another_user(stream: Stream) -> None:
    """Hazard 110: each guess comes from an address of its own."""
    checked = Checked(stream, "alice", "bob")
    checked.fail("bob", "192.0.2.9")
    guesses = [checked.begin("bob", "guess", f"198.51.100.{number}") for number in range(9)]
    good, same = checked.begin("alice", host=OTHER), checked.begin("bob", host=OTHER)
    checked.clean.run()
    assert good.go_on() and checked.asked == ["bob", "alice"]
    assert not any(login.ended for login in (*guesses, same))
    checked.suspect.run()
    assert same.go_on() and not any(guess.go_on() for guess in guesses)


def test_lane_does_not_tell_which_users_there_are(stream: Stream) -> None:
    """Hazard 109."""
    checked = Checked(stream, "alice", "bob")
    for user in ("alice", "nobody"):
        checked.fail(user, CLIENT)
    for user in ("alice", "nobody"):
        checked.begin(user, "guess", OTHER)
    assert (len(checked.clean.waiting), len(checked.suspect.waiting)) == (0, 2)
    for user in ("bob", "somebody"):
        checked.begin(user, "guess", OTHER)
    assert (len(checked.clean.waiting), len(checked.suspect.waiting)) == (2, 2)


def test_login_that_waits_changes_the_lane_when_its_client_fails(stream: Stream) -> None:
    checked = Checked(stream, "alice")
    logins = [checked.begin("alice", f"guess {number}") for number in range(3)]
    checked.clean.waiting.pop(0).run()
    assert logins[0].go_on() is None
    checked.back_off.next_delay(CLIENT, time.monotonic())
    checked.clean.run()
    assert checked.asked == ["alice"] and len(checked.suspect.waiting) == 2
    checked.suspect.run()
    assert [login.go_on() for login in logins[1:]] == [None, None]
    assert checked.lanes._held == {}


def test_second_guess_at_a_time_is_refused_unchecked_and_counts(stream: Stream) -> None:
    """Hazard 110."""
    checked = Checked(stream, "alice", "bob")
    checked.fail("alice", CLIENT)
    first, same, other = (checked.begin("alice"), checked.begin("alice"), checked.begin("bob"))
    for number in range(PENALTY.after - 1):
        assert not checked.back_off.penalty(CLIENT, time.monotonic())
        with pytest.raises(LoginPenalised) as refusal:
            checked.begin("alice", f"guess {number}")
        assert refusal.value.seconds >= 1.0
    assert checked.back_off.penalty(CLIENT, time.monotonic())
    told = [(CLIENT, "alice")] + [(CLIENT, "alice", "penalty")] * 4
    assert checked.recorder.told == told
    # A penalty refuses what waits, when its turn comes.
    checked.suspect.run()
    for login in (first, same, other):
        with pytest.raises(LoginPenalised):
            login.go_on()
    assert checked.asked == ["alice"] and checked.lanes._held == {}


@pytest.mark.parametrize("host, after", [(LOCAL, 5), ("::ffff:127.0.0.1", 5), (CLIENT, 0)])
def test_client_without_penalties_makes_no_guesses(stream: Stream, host: str, after: int) -> None:
    checked = Checked(stream, "alice")
    checked.back_off.rules = Penalty(after, 600.0, 600.0)
    checked.fail("alice", host)
    wrong, right = checked.begin("alice", "wrong", host), checked.begin("alice", host=host)
    checked.suspect.run()
    assert wrong.go_on() is None and right.go_on()


def test_names_that_failed_are_forgotten_and_bounded(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 110."""
    monkeypatch.setattr(lanes_module, "NAMES_LIMIT", 3)
    checked = Checked(stream, "alice")
    for number in range(9):
        checked.lanes.note_failure(f"user {number}")
    assert len(checked.lanes._names) == 3
    checked.begin("user 5", host=OTHER)
    checked.begin("user 6", host=OTHER)
    assert (len(checked.clean.waiting), len(checked.suspect.waiting)) == (1, 1)
    monkeypatch.setattr(lanes_module, "FORGET_SECONDS", 0.0)
    checked.begin("user 7", host=OTHER)
    assert (len(checked.clean.waiting), len(checked.suspect.waiting)) == (2, 1)


def test_login_that_is_dropped_from_its_lane_is_unavailable(stream: Stream) -> None:
    checked = Checked(stream, "alice")
    login = checked.begin("alice")
    checked.clean.waiting.pop().drop()
    with pytest.raises(LoginUnavailable, match=TOO_MANY):
        login.go_on()
    assert checked.recorder.told == [(CLIENT, "alice", TOO_MANY)] and checked.lanes._held == {}


def test_guesses_of_a_client_delay_another_by_one_check(stream: Stream) -> None:
    """Hazard 110: the queue of a lane takes clients in turn."""
    log = RecordingLog()
    pool = ThreadPool("pool-under-test", 1, 0, log)
    queue = FairQueue(pool, 100)
    checked = Checked(stream, *(f"user{number}" for number in range(9)))
    checked.lanes = PasswordLanes(queue.submit, queue.submit, checked.back_off)
    began, go_on = threading.Event(), threading.Event()
    real = checked.users.check

    def check(name: bytes, password: bytes, is_suspect: bool = False) -> str | None:
        began.set()
        assert go_on.wait(SECONDS)
        return real(name, password, is_suspect)

    checked.users.check = check  # type: ignore[method-assign]
    login = Login(
        checked.users,
        "required",
        None,
        None,
        "main",
        None,
        PasswordChecks(checked.users, checked.lanes),
    )
    logins: list[Any] = []
    hosts = (CLIENT, CLIENT, CLIENT, OTHER, "192.0.2.3", OTHER)
    for number, host in enumerate(hosts):
        name = f"user{number}".encode()
        logins.append(Running(login.authenticate(name, b"secret", Address(host, 1), stream)))
        assert began.wait(SECONDS)
    go_on.set()
    for running in logins:
        running.wait(SECONDS)
    assert checked.asked == ["user0", "user3", "user4", "user1", "user5", "user2"]
    queue.stop(SECONDS)
    assert not log.lines


def test_suspects_alone_are_checked_with_the_memory_of_suspects(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "GIVE_WAY_SECONDS", 0.0)
    checked = Checked(stream, "alice", "bob")
    checked.fail("alice", OTHER)
    suspect, first = checked.begin("alice"), checked.begin("bob")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(checked.suspect.run).result(SECONDS)
        pool.submit(checked.clean.run).result(SECONDS)
    assert suspect.go_on() is not None and first.go_on() is not None
    assert checked.asked == ["alice", "alice", "bob"] and checked.suspects == ["alice"]


def test_thread_of_a_lane_has_a_low_priority(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "_lower_priority", LOWER_PRIORITY)
    checked = Checked(stream, "alice")
    checked.fail("alice", OTHER)
    login = checked.begin("alice")

    def run() -> int:
        checked.suspect.run()
        return os.getpriority(os.PRIO_PROCESS, 0)

    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(os.getpriority, os.PRIO_PROCESS, 0).result()
        assert pool.submit(run).result() >= max(before, lanes_module.SUSPECT_NICE)
    assert login.go_on() and os.getpriority(os.PRIO_PROCESS, 0) == before


@pytest.mark.parametrize("is_dropped", [False, True])
def test_check_of_a_suspect_gives_way_to_first_logins(
    stream: Stream, monkeypatch: pytest.MonkeyPatch, is_dropped: bool
) -> None:
    """Hazard 110: two checks at once slow each other down."""
    monkeypatch.setattr(lanes_module, "GIVE_WAY_SECONDS", SECONDS)
    checked = Checked(stream, "alice", "bob", "carol")
    checked.fail("alice", OTHER)
    suspect, first, last = map(checked.begin, ("alice", "bob", "carol"))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(checked.suspect.run)
        checked.clean.waiting.pop(0).run()
        if is_dropped:
            checked.clean.waiting.pop().drop()
        else:
            checked.clean.run()
        running.result(SECONDS)
    assert suspect.go_on() and first.go_on()
    assert checked.asked == ["alice", "bob", *["carol"] * (not is_dropped), "alice"]


def test_check_of_a_suspect_gives_way_for_a_moment_only(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "GIVE_WAY_SECONDS", 0.0)
    checked = Checked(stream, "alice", "bob")
    checked.fail("alice", OTHER)
    suspect, first = checked.begin("alice"), checked.begin("bob")
    checked.suspect.run()
    assert suspect.go_on() and not first.ended


def test_suspect_that_has_left_gives_way_to_nobody(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 110: the turns of those that have left cost a lane nothing."""
    checked = Checked(stream, "alice", "bob")
    monkeypatch.setattr(checked.lanes, "give_way", lambda: pytest.fail("waits for nobody"))
    checked.fail("alice", OTHER)
    suspect, first = checked.begin("alice"), checked.begin("bob")
    suspect.steps.close()
    checked.suspect.run()
    assert checked.asked == ["alice"] and not first.ended and checked.lanes._first_logins == 1


def test_check_that_changes_the_lane_is_no_first_login_any_more(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "GIVE_WAY_SECONDS", SECONDS)
    checked = Checked(stream, "alice")
    login = checked.begin("alice")
    checked.back_off.next_delay(CLIENT, time.monotonic())
    checked.clean.run()
    checked.suspect.run()
    assert login.go_on() and checked.lanes._first_logins == 0
