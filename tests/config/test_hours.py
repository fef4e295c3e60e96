"""Times of the week as users write them."""

from __future__ import annotations

import pytest

from netproxy.config.hours import DAY, parse_hours
from netproxy.interfaces.flows import WEEK_MINUTES
from tests.config.reading import errors, read

pytest.importorskip("yaml")
EXPECTED = '(expected "mon-fri 08:00-18:00", "sat,sun" or "22:00-06:00")'


def minutes(text: str) -> set[int]:
    """Return the minutes of the week in a text."""
    found = [minute for span in parse_hours(text) for minute in span]
    assert len(found) == len(set(found))
    return set(found)


def of(days: str, start: int, stop: int) -> set[int]:
    """Return the minutes from start to stop of days as digits, 0 for Monday, within a week."""
    return {
        (int(day) * DAY + minute) % WEEK_MINUTES for day in days for minute in range(start, stop)
    }


@pytest.mark.parametrize(
    "text, expected",
    [
        ("mon-fri 08:00-18:00", of("01234", 480, 1080)),
        ("mon 8:00-18:00", of("0", 480, 1080)),
        ("0:00-9:05", of("0123456", 0, 545)),
        ("08:00-18:30", of("0123456", 480, 1110)),
        ("sat,sun", of("56", 0, DAY)),
        ("fri-mon", of("4560", 0, DAY)),
        ("wed-wed", of("2", 0, DAY)),
        ("Mon-Tue, THU 09:00-10:00", of("013", 540, 600)),
        ("fri 22:00-06:00", of("4", 1320, 1800)),
        ("sun 22:00-06:00", of("6", 1320, 1800)),
        ("22:00-06:00", of("0123456", 1320, 1800)),
        ("mon 22:00-24:00", of("0", 1320, DAY)),
        ("mon 22:00-00:00", of("0", 1320, DAY)),
        ("00:00-24:00", of("0123456", 0, DAY)),
        ("  tue   23:59-00:01 ", of("1", 1439, 1441)),
    ],
)
def test_text_stands_for_its_minutes(text: str, expected: set[int]) -> None:
    assert minutes(text) == expected
    assert all(0 <= span.start < span.stop <= WEEK_MINUTES for span in parse_hours(text))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", f"is empty {EXPECTED}"),
        ("munday", f"'munday': 'munday' is not a day {EXPECTED}"),
        ("mon-", f"'mon-': '' is not a day {EXPECTED}"),
        ("mon,,tue", f"'mon,,tue': '' is not a day {EXPECTED}"),
        ("mon-fri 8-18", f"'mon-fri 8-18': 'fri 8-18' is not a day {EXPECTED}"),
        ("8:0-18:00", f"'8:0-18:00': '8:0-18:00' is not a time of the day {EXPECTED}"),
        ("008:00-18:00", f"'008:00-18:00': '008:00-18:00' is not a time of the day {EXPECTED}"),
        ("mon 08:00", f"'mon 08:00': '08:00' is not a time of the day {EXPECTED}"),
        ("08:60-09:00", "'08:60-09:00': '08:60-09:00' is not a time of the day (00:00 to 24:00)"),
        ("24:00-06:00", "'24:00-06:00': '24:00-06:00' is not a time of the day (00:00 to 24:00)"),
        ("06:00-24:01", "'06:00-24:01': '06:00-24:01' is not a time of the day (00:00 to 24:00)"),
        ("mon 08:00-08:00", "'mon 08:00-08:00' is empty (write 00:00-24:00 for a whole day)"),
    ],
)
def test_text_that_is_no_time_is_an_error_with_its_place(text: str, message: str) -> None:
    assert errors(f"rules:\n  - {{hours: ['{text}'], via: direct}}") == [
        f"c.yaml:2:14: rules[0].hours[0]: {message}"
    ]


def test_hours_may_be_a_text_with_commas_or_a_list() -> None:
    alone, several = read(
        "rules: [{hours: 'mon,wed 08:00-12:00', via: block}, {hours: [tue, sat], via: block}]"
    ).rules
    assert alone.conditions.hours == (parse_hours("mon,wed 08:00-12:00"),)
    assert several.conditions.hours == (parse_hours("tue"), parse_hours("sat"))
    assert alone.text == "rules[0] (hours: mon,wed 08:00-12:00)"


def test_text_with_commas_that_is_wrong_is_told_what_is_wrong() -> None:
    assert errors("rules: [{hours: 'mon,wen', via: direct}]") == [
        f"c.yaml:1:17: rules[0].hours[0]: 'mon,wen': 'wen' is not a day {EXPECTED}"
    ]


def test_empty_list_of_hours_is_an_error() -> None:
    assert errors("rules: [{hours: [], via: direct}]") == [
        "c.yaml:1:17: rules[0].hours: is an empty list"
    ]
