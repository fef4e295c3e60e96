"""What happens to logins in one worker counts in the others."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any, Iterator

import pytest

from netproxy.access.backoff import BackOff, Penalty
from netproxy.access.external.answers import Answer, Answers
from netproxy.access.accounts.subject import NO_LIMITS, Limits
from netproxy.access.login import Credentials
from netproxy.daemon.workers.hand_over import HandOvers
from netproxy.daemon.workers.inbox import Inbox
from netproxy.daemon.workers.messages import Message, message_pair, send
from netproxy.daemon.workers.notices import (
    ANSWER,
    CLEARED,
    FAILED_LOGIN,
    GUESSED,
    FailedLogins,
    RightLogins,
)
from tests.support.doubles import Counts, Lines

HOST = "192.0.2.7"
ALICE = Credentials("alice", b"secret", HOST, "main")


class Accounts:
    """The limits that checks of logins have set."""

    def __init__(self) -> None:
        self.granted: dict[str, Limits] = {}

    def grant(self, user: str, limits: Limits) -> None:
        self.granted[user] = limits

    def limits(self, user: str, granted: bool = False) -> Limits:
        assert granted
        return self.granted.get(user, NO_LIMITS)


class Worker:
    """A worker, as far as logins concern it."""

    def __init__(self, index: int, boxes: list[Any], key: bytes = b"k" * 32) -> None:
        hand_overs = HandOvers([writing for _, writing in boxes])
        hand_overs.use_index(index)
        self.counts, self.lines, self.accounts = Counts(), Lines(), Accounts()
        self.back_off = BackOff(0.25)
        self.back_off.rules = Penalty(2, 100.0, 100.0)
        failed = FailedLogins(hand_overs, self.back_off, self.counts)
        self.answers = Answers(key, "a program")
        dependencies = SimpleNamespace(
            users=SimpleNamespace(), external=SimpleNamespace(answers=self.answers)
        )
        daemon: Any = SimpleNamespace(dependencies=dependencies)
        right = RightLogins(hand_overs, daemon, self.accounts)  # type: ignore[arg-type]
        right.follow()
        takers = {
            FAILED_LOGIN: failed.take_failure,
            GUESSED: failed.take_guess,
            CLEARED: failed.take_success,
            ANSWER: right.take_answer,
        }
        # Its thread must not take what the test wants to be caught up with.
        self.inbox = failed.inbox = Inbox(boxes[index][0], takers, self.counts, self.lines)
        self.inbox.thread = SimpleNamespace(is_alive=lambda: True)  # type: ignore[assignment]
        self.back_off.others = failed


@pytest.fixture
def boxes() -> Iterator[list[Any]]:
    boxes = [message_pair() for _ in range(2)]
    yield boxes
    for pair in boxes:
        for sock in pair:
            sock.close()


@pytest.fixture
def pair(boxes: list[Any]) -> list[Worker]:
    return [Worker(index, boxes) for index in (0, 1)]


def test_failed_logins_of_two_workers_lead_to_one_penalty(pair: list[Worker]) -> None:
    first, second = pair
    now = time.monotonic()
    first.back_off.next_delay(HOST, now)
    assert not second.back_off.has_failed(HOST, now)
    second.back_off.catch_up()
    assert second.back_off.has_failed(HOST, now)
    second.back_off.next_delay(HOST, now)
    first.back_off.catch_up()
    assert all(worker.back_off.penalty(HOST, time.monotonic()) > 0 for worker in pair)


def test_guess_of_a_password_ends_the_exception_in_all_workers(pair: list[Worker]) -> None:
    """Hazard 110."""
    first, second = pair
    now = time.monotonic()
    for _ in range(2):
        first.back_off.next_delay(HOST, now)
    second.back_off.catch_up()
    assert second.back_off.passes(HOST, "bob", True)
    assert not first.back_off.passes(HOST, "bob", False)
    second.back_off.catch_up()
    assert not second.back_off.passes(HOST, "bob", True)
    assert second.back_off.passes(HOST, "alice", True)


def test_right_login_takes_failures_back_in_all_workers(pair: list[Worker]) -> None:
    first, second = pair
    first.back_off.next_delay(HOST, time.monotonic())
    second.back_off.catch_up()
    second.back_off.succeeded(HOST, time.monotonic())
    for worker in pair:
        worker.back_off.catch_up()
        worker.back_off.learn(HOST, time.monotonic())
        assert not worker.back_off.penalty(HOST, time.monotonic())


def test_right_login_without_failures_is_not_told(pair: list[Worker], boxes: list[Any]) -> None:
    pair[0].back_off.succeeded(HOST, 1.0)
    with pytest.raises(BlockingIOError):
        boxes[1][0].recv(1, 0x40)


def test_answers_of_an_external_check_are_known_with_their_limits(pair: list[Worker]) -> None:
    first, second = pair
    key = first.answers.key(ALICE)
    first.accounts.grant("alice", Limits(connections=3))
    announce = first.answers.announce
    assert announce is not None
    announce(Answer(key, True, 10.0, "office"))
    second.back_off.catch_up()
    assert second.answers.find(second.answers.key(ALICE), 9.0) is True
    assert second.answers.upstream("alice") == "office"
    assert second.accounts.granted == {"alice": Limits(connections=3)}
    announce(Answer(key, False, 20.0))
    second.back_off.catch_up()
    assert second.answers.find(key, 19.0) is False


def test_answer_for_another_configuration_grants_nothing(boxes: list[Any]) -> None:
    first, second = Worker(0, boxes), Worker(1, boxes, b"other")
    announce = first.answers.announce
    assert announce is not None
    announce(Answer(first.answers.key(ALICE), True, 10.0))
    second.back_off.catch_up()
    assert not len(second.answers) and not second.accounts.granted


def test_secrets_are_in_no_message(pair: list[Worker], boxes: list[Any]) -> None:
    announce = pair[0].answers.announce
    assert announce is not None
    announce(Answer(pair[0].answers.key(ALICE), True, 10.0))
    sent = boxes[1][0].recv(65536)
    assert b"alice" in sent and b"secret" not in sent


def test_worker_that_does_not_read_costs_a_count(pair: list[Worker], boxes: list[Any]) -> None:
    boxes[1][0].close()
    pair[0].back_off.next_delay(HOST, 1.0)
    assert pair[0].counts.of("authentication", "failed login not told to a worker") == 1


def test_faulty_message_is_counted_and_the_next_one_is_taken(
    pair: list[Worker], boxes: list[Any]
) -> None:
    send(boxes[1][1], Message({"kind": FAILED_LOGIN}))
    pair[0].back_off.next_delay(HOST, time.monotonic())
    pair[1].back_off.catch_up()
    assert pair[1].back_off.has_failed(HOST, time.monotonic())
    assert pair[1].counts.of("connections", "internal error") == 1


def test_worker_that_has_not_begun_or_has_ended_catches_up_with_nothing(
    pair: list[Worker], boxes: list[Any]
) -> None:
    pair[0].back_off.next_delay(HOST, 1.0)
    thread, pair[1].inbox.thread = pair[1].inbox.thread, SimpleNamespace(is_alive=lambda: False)  # type: ignore[assignment]
    pair[1].back_off.catch_up()
    assert not pair[1].back_off.has_failed(HOST, 1.0)
    pair[1].inbox.thread = thread
    with contextlib.suppress(OSError):
        boxes[1][1].shutdown(2)
    for _ in range(3):
        pair[1].back_off.catch_up()
