"""Single values: durations."""

from __future__ import annotations

import pytest

from netproxy.config.units import parse_duration


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("0", 0.0),
        ("0s", 0.0),
        ("30s", 30.0),
        ("5m", 300.0),
        ("2h", 7200.0),
        ("1d", 86400.0),
        ("500ms", 0.5),
        ("1h30m", 5400.0),
        ("1.5s", 1.5),
        ("1m30s", 90.0),
    ],
)
def test_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["30", "1", "010"])
def test_number_without_unit_is_refused_with_the_units(text: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"'{text}' has no unit: write {text}s for seconds or {text}ms for milliseconds",
    ):
        parse_duration(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s",
        "1x",
        "-1s",
        "1 s",
        " 1s",
        "1s ",
        "1h30",
        "1.s",
        ".5s",
        "1e3s",
        "+1s",
        "1S",
        "inf",
        "nan",
        "never",
        "\uff15s",
    ],
)
def test_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not a duration \(expected 500ms, 30s, 5m, 2h, 1d or 1h30m\)"
    ):
        parse_duration(text)
