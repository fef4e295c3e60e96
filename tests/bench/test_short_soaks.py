"""Runs the soaks and the hostile hour in their short forms, so that they keep working.

The tests check that the tables have all rows, that there are figures, and that data arrived. They
do not check the figures.
"""

from __future__ import annotations

import re
import shutil

import pytest

from tests.bench.short import output, rows

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def test_soak_benchmark_answers_datagrams_and_closes_everything() -> None:
    """Hazard 101, for some seconds."""
    text = output("soak.py", "--minutes", "0.1")
    table = rows(text, r"(\d+) +([\d.]+) +(\d+) +(\d+) +([\d,]+) +([\d.]+)% +(\d+)$")
    assert len(table) >= 6
    assert any(float(row[5]) > 0 for row in table)
    assert "descriptors left over" not in text
    assert re.search(r"^(flat|NOT FLAT: .*)$", text, re.MULTILINE)


def test_tcp_soak_benchmark_holds_all_connections_and_closes_them() -> None:
    """Hazard 101, for some seconds."""
    text = output("soak_tcp.py", "--connections", "500", "--minutes", "0.1")
    table = rows(text, r"(\d+) +([\d.]+) +(\d+) +(\d+) +(\d+) +([\d,]+) +([\d.]+)% +([\d.]+)$")
    assert len(table) >= 6
    # Connections that are being replaced may be counted twice or not at all.
    assert all(475 <= int(row[4]) <= 525 and float(row[6]) > 0 for row in table)
    assert "with all clients gone: 0 connections" in text
    assert "descriptors left over" not in text
    assert re.search(r"^(flat|NOT FLAT: .*)$", text, re.MULTILINE)


def test_mixed_soak_serves_every_kind_of_client_and_closes_everything() -> None:
    """Hazard 101, for some seconds."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    text = output("soak_mixed.py", "--minutes", "0.2", "--clients", "1")
    table = rows(text, r"(\d+) +([\d.]+) +(\d+) +(\d+) +([\d.]+) +(\d+)$")
    assert len(table) >= 6
    assert text.endswith("\nflat\n"), text


def test_hostile_minute_takes_nothing_from_good_clients() -> None:
    """Hazards 96, 100, 101 and 102: every byte is right, nothing is lost, nothing is left."""
    text = output("hostile.py", "--minutes", "0.5", "--clients", "2")
    if text.startswith("not possible here: "):
        pytest.skip(text)
    assert text.endswith("\nunharmed\n"), text
    for line, names in (
        ("attacks", ("flood", "forged datagram", "slow client", "SYN", "unread", "wrong login")),
        ("troubles", ("descriptor limit", "log reader stopped", "reload", "upstream killed")),
    ):
        ((told,),) = rows(text, f"({line}: .*)$")
        counts = dict(re.findall(r"(\w[\w ]*?) (\d+)(?:, |$)", told.partition(": ")[2]))
        assert all(int(counts[name]) > 0 for name in names), told


def test_usage_is_counted_although_the_daemon_is_killed() -> None:
    text = output("usage_kills.py", "--times", "1", "--longest", "2")
    assert rows(text, r"1 +[\d.]+ +[\d,]+ +[\d,]+ +-?[\d,]+ +-?[\d.]+") and "passed" in text
