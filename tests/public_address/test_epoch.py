"""The clock of a router: when it says that mappings are lost (RFC 6887 section 8.5)."""

from __future__ import annotations

import pytest

from netproxy.public_address.epoch import Epoch

PCP, NAT_PMP = 1 / 16, 1 / 8


@pytest.mark.parametrize(
    "passed, theirs, tolerance, is_lost",
    [
        (60, 60, PCP, False),
        (60, 59, PCP, False),
        (60, 61, PCP, False),
        (0, 0, PCP, False),
        (0, -1, PCP, False),
        (60, -1000, PCP, True),
        (60, -2, PCP, True),
        (1600, 1500, PCP, False),
        (1600, 1497, PCP, True),
        (1500, 1600, PCP, False),
        (1500, 1610, PCP, True),
        (60, 60_000, PCP, True),
        (1600, 1400, NAT_PMP, False),
        (1600, 1390, NAT_PMP, True),
    ],
)
def test_clock_that_does_not_go_on_tells_of_a_loss(
    passed: float, theirs: float, tolerance: float, is_lost: bool
) -> None:
    epoch = Epoch()
    assert not epoch.note(100_000, 50.0, tolerance)
    assert epoch.note(100_000 + theirs, 50.0 + passed, tolerance) is is_lost
    # The next answers are compared with the new clock.
    assert not epoch.note(100_000 + theirs + 10, 60.0 + passed, tolerance)


def test_forgotten_clock_is_compared_with_nothing() -> None:
    epoch = Epoch()
    epoch.note(1000, 0.0, PCP)
    epoch.forget()
    assert not epoch.note(5, 10.0, PCP)
