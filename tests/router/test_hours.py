"""Rules with times of the week, by a clock that the tests set."""

from __future__ import annotations

import time

import pytest

from netproxy.interfaces.routing import Route
from tests.support.routing import flow, routing

pytest.importorskip("yaml")
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
CONFIG = """
listeners: [{name: main, listen: '127.0.0.1:1080'}]
upstreams: {office: 'socks5h://192.0.2.1:1', night: 'socks5h://192.0.2.2:1'}
default: night
rules:
"""
FLOW = flow("tcp 192.168.1.5 -> public.example:443 on main")


class Clock:
    """A local time, and how often it was read."""

    def __init__(self, text: str = "mon 00:00") -> None:
        self.text = text
        self.reads = 0

    def __call__(self) -> time.struct_time:
        """Return the time of `text`, such as "fri 17:59"."""
        self.reads += 1
        day, _, minutes = self.text.partition(" ")
        hour, minute = map(int, minutes.split(":"))
        return time.struct_time((2026, 1, 1, hour, minute, 59, DAYS.index(day), 1, 0))


def upstream(rules: str, *texts: str) -> list[str]:
    """Return the upstream's name at each of the times."""
    clock = Clock()
    router = routing(CONFIG + rules, clock=clock).router
    names = []
    for clock.text in texts:
        names.append(router.route(FLOW).dialer.name)
    return names


OFFICE, NIGHT = "office", "night"


@pytest.mark.parametrize(
    "hours, times",
    [
        (
            "'mon-fri 08:00-18:00'",
            {
                "mon 08:00": OFFICE,
                "mon 07:59": NIGHT,
                "fri 17:59": OFFICE,
                "fri 18:00": NIGHT,
                "sat 12:00": NIGHT,
            },
        ),
        (
            "['fri 22:00-06:00', sun]",
            {
                "fri 21:59": NIGHT,
                "fri 22:00": OFFICE,
                "sat 05:59": OFFICE,
                "sat 06:00": NIGHT,
                "fri 03:00": NIGHT,
                "sun 00:00": OFFICE,
                "sun 23:59": OFFICE,
                "mon 00:00": NIGHT,
            },
        ),
        (
            "'sun 22:00-06:00'",
            {"sun 23:59": OFFICE, "mon 05:59": OFFICE, "mon 06:00": NIGHT, "tue 01:00": NIGHT},
        ),
    ],
)
def test_rule_matches_within_its_hours(hours: str, times: dict[str, str]) -> None:
    rules = f"  - {{hours: {hours}, via: office}}"
    assert dict(zip(times, upstream(rules, *times), strict=True)) == times


def test_not_hours_matches_outside_of_them() -> None:
    rules = "  - {not: {hours: '08:00-18:00'}, via: office}"
    assert upstream(rules, "mon 07:59", "mon 08:00", "mon 18:00") == [OFFICE, NIGHT, OFFICE]


def test_hours_and_another_condition_must_both_hold() -> None:
    rules = "  - {hours: mon, port: 444, via: office}\n  - {hours: mon, port: 443, via: block}"
    assert upstream(rules, "mon 10:00", "tue 10:00") == ["block", NIGHT]


def test_clock_is_read_for_rules_with_hours_alone() -> None:
    """A rule whose other conditions do not hold does not read it either."""
    clock = Clock()
    routing(f"{CONFIG}  - {{port: 80, via: office}}", clock=clock).router.route(FLOW)
    router = routing(f"{CONFIG}  - {{port: 80, hours: mon, via: office}}", clock=clock).router
    router.route(FLOW)
    assert clock.reads == 0
    router.route(flow("tcp 192.168.1.5 -> public.example:80 on main"))
    assert clock.reads == 1


def test_explain_and_routes_name_the_rule_with_hours() -> None:
    clock = Clock("tue 09:00")
    router = routing(f"{CONFIG}  - {{hours: 'tue 08:00-10:00', via: office}}", clock=clock).router
    text, outcome = router.explain(FLOW)
    assert text == "rules[0] (hours: tue 08:00-10:00)"
    assert isinstance(outcome, Route) and outcome.rule == "rules[0]"
    clock.text = "tue 10:00"
    assert router.explain(FLOW)[0] == "default" and router.route(FLOW).rule == "default"


def test_upstreams_of_all_hours_are_candidates() -> None:
    """An association outlives the hour in which it began."""
    router = routing(f"{CONFIG}  - {{hours: mon, via: office}}", clock=Clock("tue 09:00")).router
    assert [dialer.name for dialer in router.candidates(FLOW)] == [OFFICE, NIGHT]
