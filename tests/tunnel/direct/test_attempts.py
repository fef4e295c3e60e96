"""When a bridge has a client and an agent try a direct path.  Time is an argument."""

from __future__ import annotations

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.tunnel.direct.attempts import Attempts, AttemptState

CLIENT, AGENT = Address("198.51.100.1", 4000), Address("198.51.100.2", 5000)
BOTH, MOVED = (CLIENT, AGENT), (CLIENT, AGENT._replace(port=5001))


def began(attempts: Attempts, seconds: float, start: float = 0.0) -> list[float]:
    """Tick each second; return when attempts have begun."""
    return [now for now in range(int(start), int(start + seconds)) if attempts.tick(now, BOTH)]


def test_attempt_begins_once_both_addresses_are_known() -> None:
    attempts = Attempts()
    assert not attempts.tick(0.0, None) and not attempts.tick(1.0, None)
    assert attempts.state is AttemptState.WAITING
    assert attempts.tick(2.0, BOTH)
    assert attempts.state is AttemptState.TRYING


def test_failed_attempts_are_repeated_less_and_less_often() -> None:
    """Hazard 182."""
    times = began(Attempts(), 4000)
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert gaps[:6] == [15, 25, 45, 85, 165, 325]
    assert set(gaps[6:]) == {605}


def test_answer_ends_the_attempts() -> None:
    attempts = Attempts()
    assert attempts.tick(0.0, BOTH)
    attempts.reported(True, 1.0)
    assert attempts.state is AttemptState.UP
    assert began(attempts, 3598, 2) == []


def test_keys_are_renewed_once_an_hour() -> None:
    attempts = Attempts()
    attempts.tick(0.0, BOTH)
    attempts.reported(True, 1.0)
    attempts.reported(True, 1800.0)  # moved, or the time of a round trip
    assert began(attempts, 3605) == [3601]
    # The agent says that it is down while it tries the new keys.
    attempts.reported(False, 3602.0)
    assert attempts.state is AttemptState.TRYING
    attempts.reported(True, 3603.0)
    assert attempts.state is AttemptState.UP


def test_path_that_was_steady_is_tried_again_at_once() -> None:
    attempts = Attempts()
    attempts.tick(0.0, BOTH)
    attempts.reported(True, 1.0)
    attempts.reported(False, 100.0)
    assert attempts.state is AttemptState.RESTING
    assert attempts.tick(101.0, BOTH)


def test_path_that_falters_is_not_tried_again_and_again() -> None:
    attempts = Attempts()
    times = []
    for now in range(1000):
        if attempts.tick(now, BOTH):
            times.append(now)
            attempts.reported(True, now + 0.1)
            attempts.reported(False, now + 0.2)
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert gaps == sorted(gaps) and gaps[0] >= 10 and len(times) < 10


def test_other_addresses_are_tried_at_once() -> None:
    attempts = Attempts()
    attempts.tick(0.0, BOTH)
    assert not attempts.tick(5.0, BOTH)
    assert attempts.state is AttemptState.RESTING
    assert attempts.tick(6.0, MOVED)
    assert attempts.failures == 0


def test_addresses_that_move_do_not_disturb_what_works() -> None:
    attempts = Attempts()
    attempts.tick(0.0, BOTH)
    attempts.reported(True, 1.0)
    assert not attempts.tick(2.0, MOVED)


def test_late_answer_counts() -> None:
    attempts = Attempts()
    attempts.tick(0.0, BOTH)
    attempts.tick(6.0, BOTH)
    attempts.reported(True, 7.0)
    assert attempts.state is AttemptState.UP


@pytest.mark.parametrize("state", [AttemptState.WAITING, AttemptState.RESTING])
def test_news_of_a_path_that_is_not_up_changes_nothing(state: AttemptState) -> None:
    attempts = Attempts()
    if state is AttemptState.RESTING:
        attempts.tick(0.0, BOTH)
        attempts.tick(6.0, BOTH)
    failures = attempts.failures
    attempts.reported(False, 7.0)
    assert attempts.state is state and attempts.failures == failures
