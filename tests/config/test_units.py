"""Single values: durations, rates, sizes, frequencies."""

from __future__ import annotations

import pytest

from netproxy.config.units import (
    parse_duration,
    parse_frequency,
    parse_rate,
    parse_size,
    parse_whole_limit,
)


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


@pytest.mark.parametrize(
    "text, rate",
    [
        ("0", None),
        ("20Mbit/s", 2_500_000),
        ("512kbit/s", 64_000),
        ("5MB/s", 5_000_000),
        ("1MiB/s", 1 << 20),
        ("1.5Mbit/s", 187_500),
        ("8bit/s", 1),
    ],
)
def test_rate_is_read_in_bytes_per_second(text: str, rate: int | None) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text, message",
    [
        ("20", "is not a rate"),
        ("20Mbit", "is not a rate"),
        ("20Mb/s", "is not a rate"),
        ("-1Mbit/s", "is not a rate"),
        ("0Mbit/s", "write 0 for no limit"),
        ("1bit/s", "write 0 for no limit"),
        ("9999999999Tbit/s", "write a lower rate"),
    ],
)
def test_text_that_is_no_rate_is_refused_with_an_example(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rate(text)


@pytest.mark.parametrize(
    "text, size", [("0", None), ("64KiB", 65536), ("2GB", 2 * 10**9), ("1.5kB", 1500), ("7 B", 7)]
)
def test_size_is_read_in_bytes(text: str, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text, message",
    [
        ("100", "is not a size"),
        ("1 Mbit", "is not a size"),
        ("0B", "write 0 for no limit"),
        ("0.0GiB", "write 0 for no limit"),
        ("9999999TiB", "write a smaller size"),
    ],
)
def test_text_that_is_no_size_is_refused_with_an_example(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_size(text)


@pytest.mark.parametrize(
    "text, frequency", [("0", None), ("20/s", 20.0), ("30/m", 0.5), ("36/h", 0.01)]
)
def test_frequency_is_read_in_events_per_second(text: str, frequency: float | None) -> None:
    assert parse_frequency(text) == frequency


@pytest.mark.parametrize("text", ["20", "/s", "20/d", "-1/s", "0/s", "x/s", "20/s/s"])
def test_text_that_is_no_frequency_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected 20/s|above 0"):
        parse_frequency(text)


@pytest.mark.parametrize("text, limit", [("0", None), ("1", 1), ("2147483647", 2147483647)])
def test_whole_limit_of_0_is_none(text: str, limit: int | None) -> None:
    assert parse_whole_limit(text) == limit


@pytest.mark.parametrize("text", ["", "-1", "00", "1.5", "2147483648", "many", "\u0661"])
def test_other_texts_are_no_whole_limit(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_whole_limit(text)
    assert str(caught.value) == f"'{text}' is not a whole number (0 is no limit)"
