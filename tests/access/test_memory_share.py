"""The memory that checks of passwords share: who waits, and in which order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from netproxy.access.checks.memory_share import MemoryShare
from tests.support.sockets import wait_until

LIMIT = 10


def order_of(*sizes: int) -> list[int]:
    """Return the order in which checks get memory for which they wait, by their numbers."""
    share, order = MemoryShare(LIMIT), list[int]()

    def take(number: int, size: int) -> None:
        with share.of(size):
            order.append(number)

    # The memory is given back before the pool waits for its threads.
    with ThreadPoolExecutor(len(sizes)) as pool, share.of(LIMIT):
        for number, size in enumerate(sizes):
            pool.submit(take, number, size)
            wait_until(lambda number=number: len(share._waiting) == number + 1)
    assert not share._waiting and share._free == LIMIT
    return order


def test_checks_that_wait_have_their_turns_in_order() -> None:
    assert order_of(LIMIT, LIMIT, LIMIT) == [0, 1, 2]


def test_small_check_does_not_overtake_a_large_one() -> None:
    assert order_of(LIMIT, 1) == [0, 1]


def test_check_that_needs_more_than_the_limit_gets_all() -> None:
    assert order_of(2 * LIMIT, LIMIT) == [0, 1]
