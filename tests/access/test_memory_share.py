"""The memory that checks of passwords share: who waits, and in which order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from netproxy.access.memory_share import MemoryShare
from tests.support.sockets import wait_until

LIMIT = 10


def order_of(*takers: tuple[str, int]) -> list[str]:
    """Return the order in which clients get memory for which they wait."""
    share, order = MemoryShare(LIMIT), list[str]()

    def take(client: str, size: int) -> None:
        with share.of(size, client):
            order.append(client)

    # The memory is given back before the pool waits for its threads.
    with ThreadPoolExecutor(len(takers)) as pool, share.of(LIMIT):
        for number, taker in enumerate(takers, 1):
            pool.submit(take, *taker)
            wait_until(lambda number=number: sum(map(len, share._waiting.values())) == number)
    assert not share._waiting and share._free == LIMIT
    return order


def test_checks_that_wait_have_their_turns_by_client() -> None:
    """Hazard 110: a burst of guesses of a client delays another client by one check."""
    takers = [(client, LIMIT) for client in ("a", "a", "a", "b", "c", "b")]
    assert order_of(*takers) == ["a", "b", "c", "a", "b", "a"]


def test_small_check_does_not_overtake_a_large_one() -> None:
    assert order_of(("large", LIMIT), ("small", 1)) == ["large", "small"]


def test_check_that_needs_more_than_the_limit_gets_all() -> None:
    assert order_of(("huge", 2 * LIMIT), ("huge", LIMIT)) == ["huge", "huge"]
