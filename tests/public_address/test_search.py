"""Rounds of questions: what is sent when, what counts as an answer, and who is left out."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.public_address.search import (
    ANSWER_SECONDS,
    CONFIRM_SECONDS,
    REFRESH_SECONDS,
    SKIP_LIMIT,
    Search,
)
from netproxy.public_address.servers import LOOKUP_SECONDS, Servers
from tests.support.doubles import Counts

A, B = Address("192.0.2.1", 3478), Address("192.0.2.2", 3478)
A6 = Address("2001:db8::1", 3478)
NAME = Address("stun.example", 3478)
MAPPED, OTHER = Address("203.0.113.5", 1080), Address("203.0.113.9", 1080)


class Names:
    """A Resolver of stun.example."""

    def __init__(self) -> None:
        self.addresses: list[Address] = [A]
        self.asked = 0

    def resolve(self, target: Address, client: str = "", seconds: float = 0.0) -> list[Address]:
        self.asked += 1
        if not self.addresses:
            raise DialError(Reason.NAME, target.host)
        return self.addresses


class Rig:
    """A search, and what it has asked and told."""

    def __init__(self, *servers: Address, ipv6: bool = False) -> None:
        self.now = 1000.0
        self.sent: list[tuple[Address, bytes]] = []
        self.can_send = True
        self.rounds: list[bool] = []
        self.counts, self.names = Counts(), Names()
        self.tasks: list[Callable[[], None]] = []
        names: Any = self.names
        self.servers = Servers(servers, names, self._submit)
        self.search = Search(ipv6, self.servers, self, self.counts, self._settled)

    def _submit(self, task: Callable[[], None]) -> bool:
        self.tasks.append(task)
        return True

    def _settled(self, search: Search, changed: bool) -> None:
        self.rounds.append(changed)

    def ask(self, server: Address, transaction: bytes) -> bool:
        if self.can_send:
            self.sent.append((server, transaction))
        return self.can_send

    def pass_time(self, seconds: float) -> list[Address]:
        """Let so many seconds pass; return whom the search asks then."""
        self.now += seconds
        self.sent.clear()
        self.servers.look_up(self.now)
        self.search.tick(self.now)
        return [server for server, _ in self.sent]

    def answer(self, *answers: Address | None) -> None:
        """Answer the questions that were sent last, in their order."""
        for (_, transaction), mapped in zip(list(self.sent), answers, strict=False):
            assert self.search.answered(transaction, mapped, self.now)


def test_all_servers_are_asked_at_once_and_after_a_while_again() -> None:
    rig = Rig(A, B)
    assert rig.pass_time(0) == [A, B]
    rig.answer(MAPPED, MAPPED)
    assert (rig.search.value, rig.search.sources) == (MAPPED, (A, B))
    assert rig.pass_time(REFRESH_SECONDS - 1) == []
    assert rig.pass_time(1) == [A, B]
    assert len({transaction for _, transaction in rig.sent}) == 2
    rig.answer(MAPPED, MAPPED)
    assert rig.rounds == [True, False, False]


def test_first_answer_counts_before_the_round_ends() -> None:
    rig = Rig(A, B)
    rig.pass_time(0)
    rig.answer(MAPPED)
    assert rig.search.value == MAPPED


def test_question_is_sent_again_with_the_same_transaction() -> None:
    rig = Rig(A)
    rig.pass_time(0)
    first = list(rig.sent)
    sent_after = [seconds for seconds in range(1, 10) if rig.pass_time(1) and rig.sent == first]
    assert sent_after == [1, 3]
    assert rig.counts.counts == {("stun", "no answer"): 1}


def test_answer_to_the_last_try_counts() -> None:
    rig = Rig(A)
    rig.pass_time(0)
    rig.pass_time(3)
    rig.now += ANSWER_SECONDS - 4
    rig.answer(MAPPED)
    assert rig.search.value == MAPPED
    assert rig.counts.counts == {}


def test_change_is_confirmed_soon() -> None:
    rig = Rig(A)
    rig.pass_time(0)
    rig.answer(MAPPED)
    rig.pass_time(REFRESH_SECONDS)
    rig.answer(OTHER)
    assert rig.search.value == MAPPED
    assert rig.pass_time(CONFIRM_SECONDS) == [A]
    rig.answer(OTHER)
    assert rig.search.value == OTHER
    assert rig.rounds == [True, False, True]


def test_round_that_is_wanted_soon_begins_with_the_next_tick() -> None:
    rig = Rig(A)
    rig.pass_time(0)
    rig.answer(MAPPED)
    rig.search.ask_soon()
    assert rig.pass_time(1) == [A]
    # While a round runs, another one follows it.
    rig.search.ask_soon()
    rig.answer(MAPPED)
    assert rig.pass_time(1) == [A]
    rig.answer(MAPPED)
    assert rig.pass_time(1) == []


def test_unknown_and_repeated_answers_are_not_taken() -> None:
    rig = Rig(A)
    rig.pass_time(0)
    assert not rig.search.answered(bytes(12), OTHER, rig.now)
    rig.answer(MAPPED)
    assert not rig.search.answered(rig.sent[0][1], OTHER, rig.now)
    assert rig.search.value == MAPPED


@pytest.mark.parametrize(
    "mapped",
    [None, Address("0.0.0.0", 1), Address("203.0.113.5", 0), Address("2001:db8::5", 1080)],
    ids=["error", "unspecified", "no port", "other family"],
)
def test_impossible_answer_is_none(mapped: Address | None) -> None:
    rig = Rig(A)
    rig.pass_time(0)
    rig.answer(mapped)
    assert rig.search.value is None
    assert rig.counts.counts == {("stun", "refused"): 1}


def test_server_that_fails_is_left_out_for_longer_and_longer() -> None:
    rig = Rig(A, B)
    skipped, gaps = 0, []
    for _ in range(80):
        asked = rig.pass_time(REFRESH_SECONDS)
        rig.answer(MAPPED)
        if B in asked:
            gaps.append(skipped)
            skipped = 0
            rig.pass_time(ANSWER_SECONDS)
        else:
            skipped += 1
    assert gaps[:4] == [0, 1, 3, 7]
    assert max(gaps) * REFRESH_SECONDS <= SKIP_LIMIT


def test_server_that_answers_again_is_asked_each_time() -> None:
    rig = Rig(A, B)
    rig.pass_time(0)
    rig.answer(MAPPED)
    rig.pass_time(ANSWER_SECONDS)
    assert rig.pass_time(REFRESH_SECONDS) == [A]
    rig.answer(MAPPED)
    assert rig.pass_time(REFRESH_SECONDS) == [A, B]
    rig.answer(MAPPED, MAPPED)
    assert rig.pass_time(REFRESH_SECONDS) == [A, B]


def test_all_servers_are_asked_while_none_answers() -> None:
    rig = Rig(A, B)
    for _ in range(5):
        assert rig.pass_time(REFRESH_SECONDS) == [A, B]
        rig.pass_time(ANSWER_SECONDS)
    assert rig.rounds == [False] * 5
    assert rig.search.sources == ()


def test_question_that_cannot_be_sent_ends_the_round() -> None:
    rig = Rig(A)
    rig.can_send = False
    rig.pass_time(0)
    assert rig.rounds == [False]
    assert rig.counts.counts == {("stun", "not sent"): 1}
    rig.can_send = True
    assert rig.pass_time(REFRESH_SECONDS) == [A]


@pytest.mark.parametrize("ipv6, server", [(False, A), (True, A6)])
def test_family_asks_servers_of_its_own(ipv6: bool, server: Address) -> None:
    rig = Rig(A, A6, ipv6=ipv6)
    assert rig.pass_time(0) == [server]


def test_family_without_server_asks_nobody() -> None:
    rig = Rig(A, ipv6=True)
    assert rig.pass_time(0) == []
    assert rig.rounds == []


class TestNames:
    def test_name_is_looked_up_by_a_pool(self) -> None:
        rig = Rig(NAME)
        assert rig.pass_time(0) == []
        assert rig.names.asked == 0
        rig.tasks.pop()()
        assert rig.pass_time(1) == [A]
        rig.answer(MAPPED)
        assert rig.search.sources == (NAME,)
        for _ in range(100):
            rig.pass_time(REFRESH_SECONDS)
            rig.answer(MAPPED)
        assert not rig.tasks

    def test_name_that_is_not_found_is_looked_up_again(self) -> None:
        rig = Rig(NAME)
        rig.names.addresses = []
        rig.pass_time(0)
        rig.tasks.pop()()
        rig.pass_time(LOOKUP_SECONDS - 1)
        assert not rig.tasks
        rig.pass_time(1)
        rig.names.addresses = [A]
        rig.tasks.pop()()
        assert rig.pass_time(1) == [A]

    def test_name_of_a_silent_server_is_looked_up_again(self) -> None:
        rig = Rig(NAME)
        rig.pass_time(0)
        rig.tasks.pop()()
        rig.pass_time(1)
        rig.pass_time(ANSWER_SECONDS)
        rig.names.addresses = [B]
        rig.pass_time(LOOKUP_SECONDS)
        rig.tasks.pop()()
        rig.pass_time(ANSWER_SECONDS)
        assert rig.pass_time(REFRESH_SECONDS) == [B]
