"""The window of counters: no packet counts twice, late ones count once."""

from __future__ import annotations

import random

from netproxy.tunnel.path.replay import WINDOW, ReplayWindow


def take(window: ReplayWindow, counter: int) -> bool:
    """Note a counter if it is new; return whether it was."""
    if not window.is_new(counter):
        return False
    window.note(counter)
    return True


def test_counter_is_new_once() -> None:
    window = ReplayWindow()
    assert [take(window, counter) for counter in (0, 0, 1, 5, 5, 1, 3, 3)] == [
        *(True, False, True, True, False, False, True, False)
    ]


def test_note_tells_the_newest() -> None:
    window = ReplayWindow()
    assert [window.note(counter) for counter in (4, 2, 9, 5)] == [True, False, True, False]
    assert window.newest == 9


def test_counter_behind_the_window_is_old() -> None:
    window = ReplayWindow()
    window.note(WINDOW + 10)
    assert not window.is_new(10) and window.is_new(11)
    window.note(1 << 60)
    assert not window.is_new(WINDOW + 11) and window.is_new((1 << 60) - WINDOW + 1)


def test_shuffled_counters_all_count_once() -> None:
    """Reordering within the window loses nothing."""
    window, counters = ReplayWindow(), []
    source = random.Random(5)
    for start in range(0, 20 * WINDOW, WINDOW // 2):
        block = list(range(start, start + WINDOW // 2))
        source.shuffle(block)
        counters += block
    assert all(take(window, counter) for counter in counters)
    assert not any(take(window, counter) for counter in counters)
