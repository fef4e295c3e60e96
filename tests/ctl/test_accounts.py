"""What netproxyctl prints about users, clients, limits and bans."""

from __future__ import annotations

from typing import Any

import pytest

from netproxy.config.units import parse_frequency
from netproxy.admin.accounts import parse_limits
from netproxy.ctl.command_line import CLIENT_SORTS, USER_SORTS
from netproxy.ctl.accounts import (
    bans_text,
    clients_text,
    limits_text,
    rate_clients,
    rate_users,
    sort_clients,
    sort_users,
    users_text,
)


def user(name: str, up: int = 0, down: int = 0, **more: Any) -> dict[str, Any]:
    amounts = {"up": up, "down": down}
    return {
        "name": name,
        "connections": 1,
        "sessions": 0,
        "today": amounts,
        "month": amounts,
        "total": amounts,
        "left": None,
        "limits": {},
        "refused": "",
        **more,
    }


def client(name: str, up: int = 0, down: int = 0) -> dict[str, Any]:
    return {"name": name, "connections": 2, "sessions": 3, "up": up, "down": down, "refused": ""}


def users(at: float, *rows: dict[str, Any]) -> Any:
    return {"at": at, "users": list(rows)}


def clients(at: float, *rows: dict[str, Any]) -> Any:
    return {"at": at, "clients": list(rows)}


def test_rates_are_differences_and_new_names_have_none() -> None:
    rated = rate_users(
        users(10.0, user("a", 100, 0)), users(12.0, user("a", 300, 50), user("b", 9))
    )
    assert [(row["rate_up"], row["rate_down"]) for row in rated] == [(100.0, 25.0), (0.0, 0.0)]
    before, now = clients(1.0, client("x", 500)), clients(2.0, client("x", 20, 7))
    # The client's counts have begun again.
    assert [(row["rate_up"], row["rate_down"]) for row in rate_clients(before, now)] == [(0.0, 7.0)]


def test_rows_are_sorted_by_every_column() -> None:
    rows = rate_users(
        users(0.0, user("a"), user("b")),
        users(1.0, user("b", 10, left=5), user("a", 5, connections=9)),
    )
    orders = {column: [row["name"] for row in sort_users(rows, column)] for column in USER_SORTS}
    first = {column: names[0] for column, names in orders.items()}
    assert first == {
        **{"name": "a", "flows": "a", "rate": "b", "today": "b", "month": "b", "total": "b"},
        "left": "b",
    }
    machines = rate_clients(clients(0.0), clients(1.0, client("b"), client("a", 1)))
    for column in CLIENT_SORTS:
        assert [row["name"] for row in sort_clients(machines, column)] == ["a", "b"]


def test_users_have_a_line_with_escaped_names() -> None:
    now = users(
        1.0, user("a\x1b", 1000, 250_000, left=10**9, limits={"rate_up": 625_000}, refused="no")
    )
    head, line = users_text(rate_users(users(0.0, user("a\x1b")), now)).splitlines()
    assert head.startswith("user ")
    assert line.startswith(r"a\x1b  1 ")
    for cell in ("2.0 Mbit/s", "8.0 kbit/s", "251 kB", "1.0 GB", "rate_up=5Mbit/s", "no"):
        assert cell in line


def test_clients_have_a_line() -> None:
    text = clients_text(rate_clients(clients(0.0), clients(1.0, client("2001:db8::/64", 5, 5))))
    assert text.splitlines()[1].split() == [
        *("2001:db8::/64", "2", "3", "0", "bit/s", "0", "bit/s", "10", "B")
    ]


@pytest.mark.parametrize(
    "settings",
    [
        "connections=50 sessions=64 connection_rate=20/s rate=5Mbit/s burst=1MiB",
        "rate_up=1Gbit/s rate_down=12345680bit/s burst=1000000B",
        "connection_rate=30/m rate_down=512kbit/s",
        "connection_rate=1/h",
        "",
    ],
)
def test_limits_are_printed_as_they_are_given(settings: str) -> None:
    limits = {key: value for key, value in parse_limits(settings.split()).items() if value}
    assert limits_text(limits) == settings  # type: ignore[arg-type]


def test_rate_of_connections_is_printed_whole() -> None:
    for text in ("7/m", "100/h", "1/s", "59/m"):
        assert limits_text({"connection_rate": parse_frequency(text) or 0}).endswith(f"={text}")


def test_bans_have_a_line_each() -> None:
    bans: Any = [
        {"kind": "user", "name": "eve\u202e", "until": None},
        {"kind": "client", "name": "192.0.2.1", "until": 3700.0},
    ]
    assert bans_text(bans, 100.0).splitlines() == [
        "kind    name       how long",
        r"user    eve\u202e  until the next start",
        "client  192.0.2.1  for 1h",
    ]
