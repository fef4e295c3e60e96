"""The search for the largest packet, against links of given sizes; time is an argument."""

from __future__ import annotations

import pytest

from netproxy.protocol.tunnels.path import BASE_PACKET
from netproxy.tunnel.path.mtu import AGAIN_SECONDS, LADDER, TRIES, VERIFY_SECONDS, MtuSearch


def pass_packets(search: MtuSearch, link: int, now: float, until: float, large: bool = True) -> int:
    """Tick until a time over a link that takes packets up to `link` bytes; return the tries."""
    tries = 0
    while now < until:
        now = max(now, search.due)
        if packet := search.tick(now, large):
            tries += 1
            if packet <= link:
                search.answered(packet, now)
    return tries


@pytest.mark.parametrize("link", [BASE_PACKET, 1300, 1372, 1451, 1472, 9000])
def test_largest_size_that_passes_is_found(link: int) -> None:
    search = MtuSearch()
    pass_packets(search, link, 0.0, 30.0)
    assert search.size == max((step for step in LADDER if step <= link), default=BASE_PACKET)


def test_nothing_beyond_the_limit_is_tried() -> None:
    search = MtuSearch(1452)
    pass_packets(search, 9000, 0.0, 30.0)
    assert search.size == 1452 and not search.is_searching


def test_idle_path_is_left_alone_once_its_size_is_known() -> None:
    search = MtuSearch()
    assert pass_packets(search, 9000, 0.0, 10.0, large=False) == len(LADDER)
    assert pass_packets(search, 9000, 10.0, 60.0, large=False) == 0


def test_narrower_route_is_noticed() -> None:
    search = MtuSearch()
    pass_packets(search, 9000, 0.0, 10.0)
    pass_packets(search, 1300, 10.0, 10.0 + VERIFY_SECONDS + 3.0 * TRIES)
    assert search.size == 1232 and not search.is_blocked


def test_larger_sizes_are_tried_again_later() -> None:
    search = MtuSearch()
    pass_packets(search, 1300, 0.0, 30.0)
    assert search.size == 1232
    pass_packets(search, 9000, 30.0, 30.0 + AGAIN_SECONDS + 10.0)
    assert search.size == LADDER[-1]


def test_path_that_takes_no_base_packet_is_blocked() -> None:
    search = MtuSearch()
    pass_packets(search, 1000, 0.0, 30.0)
    assert search.is_blocked
    search.restart(30.0)
    assert not search.is_blocked and search.size == BASE_PACKET


def test_late_answer_of_another_size_does_no_harm() -> None:
    search = MtuSearch()
    assert search.tick(0.0, True) == LADDER[0]
    search.answered(LADDER[2], 0.1)
    assert search.size == LADDER[2]
    search.answered(LADDER[0], 0.2)
    assert search.size == LADDER[2] and search.tick(search.due, True) == LADDER[3]
