"""Counters that exist from the start, and what people call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy.errors import Reason
from netproxy.observe.exposition import reasons
from netproxy.observe.exposition.text_format import COUNTER_METRICS
from netproxy.protocol import http1
from netproxy.observe.exposition.reasons import FROM_THE_START, IN_WORDS, in_words, with_zeros

ROOT = Path(__file__).resolve().parents[3] / "netproxy"
# What an HTTP client is told is the reason as well.
PHRASES = [phrase.lower() for phrase in http1.PHRASES.values()]
SOURCE = "\n".join(
    path.read_text() for path in ROOT.rglob("*.py") if path.name not in ("reasons.py", "advice.py")
)


def test_counters_begin_with_0_and_keep_what_was_counted() -> None:
    counters = with_zeros({("drops", "fragment"): 3, ("rare", "x"): 1})
    assert counters["drops", "fragment"] == 3 and counters["rare", "x"] == 1
    assert counters["dial_failures", Reason.TIMEOUT.value] == 0
    assert list(counters) == sorted(counters)


def test_only_what_has_happened_is_told_in_words() -> None:
    counters = [("drops", "fragment", 3), ("drops", "closed", 0), ("bytes", "up", 9)]
    counters += [("connections", "accepted", 4), ("something_new", "", 1)]
    assert in_words(counters) == [("datagrams dropped", "fragment", 3), ("something new", "", 1)]


@pytest.mark.parametrize("name", FROM_THE_START)
def test_each_reason_is_one_that_the_program_counts(name: str) -> None:
    """A reason that is renamed must be renamed here as well."""
    for reason in FROM_THE_START[name]:
        assert f'"{reason}"' in SOURCE or reason in PHRASES, reason


def test_each_counter_with_a_metric_has_words() -> None:
    assert set(COUNTER_METRICS) == set(IN_WORDS)
    assert set(FROM_THE_START) <= set(reasons.IN_WORDS)
