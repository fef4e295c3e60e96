"""Answers of dns listeners that are ready for the next query with the same bytes."""

from __future__ import annotations

from netproxy.protocol.dns_message import cache_key
from netproxy.resolver.answer_cache import READY_LIMIT, READY_SIZE, AnswerCache
from tests.support.dns import QR, RA, RD, a, answer, query, question, record

TTL = 60
ASKED = question("name.test")
QUERY = query(ASKED)


def kept(ttl: int = TTL, address: bytes = b"\xc0\0\2\1") -> bytes:
    """Return the answer of a server to QUERY."""
    return answer(ASKED, (a(ttl, address),))


def key(asked: bytes = QUERY) -> bytes:
    found = cache_key(asked)
    assert found is not None
    return found


def filled(message: bytes = kept()) -> AnswerCache:
    """Return a cache with an answer to QUERY, kept at the time 0 and found once."""
    cache = AnswerCache(16)
    cache.keep(key(), message, 0.0)
    assert cache.ready(QUERY, 0.0) is None
    assert cache.find(key(), QUERY, 0.0) is not None
    return cache


def test_answer_that_was_found_is_ready_for_the_same_query_with_any_id() -> None:
    cache = filled()
    for id in (0, 0x1234, 0xFFFF):
        expected = id.to_bytes(2, "big") + kept()[2:]
        assert cache.ready(query(ASKED, id=id), 0.9) == expected


def test_ready_answer_ends_when_its_ttl_changes() -> None:
    cache = filled()
    assert cache.ready(QUERY, 1.0) is None
    found = cache.find(key(), QUERY, 1.0)
    assert found == kept(TTL - 1) and cache.ready(QUERY, 1.9) == found


def test_ready_answer_ends_with_its_ttl() -> None:
    cache = filled()
    assert cache.find(key(), QUERY, TTL - 0.5) is not None
    assert cache.ready(QUERY, TTL - 0.1) is not None and cache.ready(QUERY, TTL) is None


def test_query_with_other_bytes_has_no_ready_answer() -> None:
    cache = filled()
    others = [
        query(question("NAME.test")),
        query(ASKED, flags=0),
        query(question("name.test", 28)),
        QUERY + b"\0",
        QUERY[:-1],
        QUERY[:2],
        b"",
    ]
    assert [cache.ready(other, 0.0) for other in others] == [None] * len(others)


def test_other_spelling_is_ready_in_its_own_spelling() -> None:
    cache, spelled = filled(), question("NaMe.TEST")
    found = cache.find(key(), query(spelled), 0.0)
    assert found == answer(spelled, (a(TTL),)) == cache.ready(query(spelled), 0.5)


def test_ready_answer_ends_when_another_is_kept() -> None:
    cache, other = filled(), kept(address=b"\xc0\0\2\2")
    cache.keep(key(), other, 0.5)
    assert cache.ready(QUERY, 0.5) is None
    assert cache.find(key(), QUERY, 0.5) == other == cache.ready(QUERY, 0.5)


def test_ready_answer_ends_when_an_answer_comes_that_must_not_be_kept() -> None:
    cache = filled()
    cache.keep(key(), kept(0), 0.5)
    assert cache.ready(QUERY, 0.5) is None and cache.find(key(), QUERY, 0.5) is None


def test_ready_answer_ends_when_its_place_is_needed() -> None:
    cache = AnswerCache(1)
    cache.keep(key(), kept(), 0.0)
    assert cache.find(key(), QUERY, 0.0) is not None
    other = query(question("other.test"))
    cache.keep(key(other), answer(question("other.test"), (a(TTL),)), 0.0)
    assert cache.ready(QUERY, 0.0) is None


def test_long_answer_is_found_but_not_ready() -> None:
    long = answer(ASKED, (record(b"\xc0\x0c", 1, TTL, bytes(READY_SIZE)),), flags=QR | RD | RA)
    cache = filled(long)
    assert cache.ready(QUERY, 0.0) is None and cache.find(key(), QUERY, 0.0) == long


def test_ready_answers_are_bounded_and_those_of_a_second_go_with_it() -> None:
    """A name can be spelled in many ways."""
    cache = AnswerCache(16)
    letters = "abcdefghijklmn"

    def spelled(number: int) -> bytes:
        """Return a query for `letters`, each upper case if its bit is set."""
        labels = (
            letter.upper() if number >> at & 1 else letter for at, letter in enumerate(letters)
        )
        return query(question("".join(labels)))

    asked = spelled(0)
    cache.keep(key(asked), answer(question(letters), (a(TTL),)), 0.0)
    for number in range(READY_LIMIT + 10):
        assert cache.find(key(asked), spelled(number), 0.0) is not None
    assert cache.ready(spelled(READY_LIMIT - 1), 0.0) is not None
    assert cache.ready(spelled(READY_LIMIT), 0.0) is None
    assert cache.find(key(asked), spelled(READY_LIMIT), 1.5) is not None
    assert cache.ready(spelled(READY_LIMIT), 1.5) is not None
