"""How long a simulated NAT keeps an idle mapping, and servers that cannot tell."""

from __future__ import annotations

import math

import pytest

from netproxy.admin.nat.exchange import GIVE_UP_SECONDS
from netproxy.admin.nat.lifetime import AGES, PORTS, SETTLED_SECONDS, measure_lifetime
from netproxy.admin.nat.report import Lifetime
from netproxy.interfaces.addresses import Address
from tests.support.stun import FIRST, LONE, Nat, Script, Server, SimulatedNat


def measured(lifetime: float, script: Script | None = None) -> tuple[Lifetime, float]:
    """Return what was found out, and the seconds that it took."""
    transport = SimulatedNat(Nat(lifetime=lifetime), [Server(script=script)])
    result = measure_lifetime(FIRST, transport, transport.clock)
    return result, transport.now - 100


@pytest.mark.parametrize(
    ("lifetime", "alive", "expired"), [(1, 0, 15), (20, 15, 25), (30, 25, 35), (300, 245, 305)]
)
def test_lifetime_is_between_two_ages(lifetime: float, alive: int, expired: int) -> None:
    result, seconds = measured(lifetime)
    assert result == Lifetime(alive, expired)
    assert seconds == SETTLED_SECONDS + expired + GIVE_UP_SECONDS


def test_mapping_that_is_kept_has_no_end() -> None:
    result, seconds = measured(math.inf)
    assert result == Lifetime(AGES[-1], None)
    assert seconds == SETTLED_SECONDS + AGES[-1]


@pytest.mark.parametrize("lost", [1, 3])
def test_lost_requests_are_no_expired_mapping(lost: int) -> None:
    assert measured(30, Script(lost=lost))[0] == Lifetime(25, 35)


@pytest.mark.parametrize("script", [Script(redirects=False), Script(error=420)])
def test_server_that_answers_to_the_source_alone_tells_nothing(script: Script) -> None:
    """An error tells no address; then nothing is known either."""
    result, _ = measured(30, script)
    assert result.unknown and (result.alive, result.expired) == (0, None)


def test_silent_server_tells_nothing() -> None:
    transport = SimulatedNat(Nat(), [Server()])
    result = measure_lifetime(LONE, transport, transport.clock)
    assert result == Lifetime(unknown="the server does not answer")


def test_what_comes_meanwhile_is_no_answer() -> None:
    class Noisy(SimulatedNat):
        def receive(self, seconds: float):  # type: ignore[no-untyped-def]
            if seconds > 1 and not self.arrived:
                self._deliver(Address("203.0.113.5", 40000), FIRST, b"noise")
            self.now += 0.01
            return super().receive(seconds - 0.01)

    transport = Noisy(Nat(lifetime=20), [Server()])
    assert measure_lifetime(FIRST, transport, transport.clock) == Lifetime(15, 25)


def test_every_age_has_a_port_and_is_no_multiple_of_thirty_seconds() -> None:
    assert PORTS == len(AGES) + 2
    assert sorted(set(AGES)) == list(AGES) and all(age % 30 for age in AGES)
