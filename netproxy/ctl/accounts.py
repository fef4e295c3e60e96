"""What netproxyctl prints about users, clients, limits and bans.  Pure.

Rates are differences between two answers of the daemon, which keeps nothing for them.
"""

from __future__ import annotations

from netproxy.ctl.console import amount_text, duration_text, format_table
from netproxy.interfaces.answers import ClientRow, UserRow
from netproxy.observe.escaping import escape
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.answers import (
        BanAnswer,
        BanRow,
        ClientsAnswer,
        Directions,
        LimitsRow,
        UserLimitsAnswer,
        UsersAnswer,
    )

_USER_COLUMNS = (
    *("user", "connections", "sessions", "to user", "from user", "today", "month", "total"),
    *("quota left", "limits", "refused"),
)
_CLIENT_COLUMNS = (
    *("client", "connections", "sessions", "to client", "from client", "bytes", "refused"),
)
_BAN_COLUMNS = ("kind", "name", "how long")
_BIT_SCALES = (("Gbit/s", 10**9), ("Mbit/s", 10**6), ("kbit/s", 10**3), ("bit/s", 1))
_SIZE_SCALES = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))
_PERIODS = (("s", 1), ("m", 60), ("h", 3600))
_NEVER = float("inf")


class RatedUser(UserRow):
    """A user with its rates, in bytes per second."""

    rate_up: float
    rate_down: float


class RatedClient(ClientRow):
    """A client with its rates, in bytes per second."""

    rate_up: float
    rate_down: float


# -- rates


def rate_users(before: UsersAnswer, now: UsersAnswer) -> list[RatedUser]:
    """Return the users of an answer with their rates; 0 for users that are new."""
    seconds = _seconds_between(before["at"], now["at"])
    totals = {row["name"]: row["total"] for row in before["users"]}
    rated: list[RatedUser] = []
    for row in now["users"]:
        total = row["total"]
        up, down = _rates(totals.get(row["name"], total), total, seconds)
        rated.append({**row, "rate_up": up, "rate_down": down})
    return rated


def rate_clients(before: ClientsAnswer, now: ClientsAnswer) -> list[RatedClient]:
    """Return the clients of an answer with their rates; 0 for clients that are new."""
    seconds = _seconds_between(before["at"], now["at"])
    moved: dict[str, Directions] = {
        row["name"]: {"up": row["up"], "down": row["down"]} for row in before["clients"]
    }
    rated: list[RatedClient] = []
    for row in now["clients"]:
        total: Directions = {"up": row["up"], "down": row["down"]}
        up, down = _rates(moved.get(row["name"], total), total, seconds)
        rated.append({**row, "rate_up": up, "rate_down": down})
    return rated


def _rates(before: Directions, now: Directions, seconds: float) -> tuple[float, float]:
    up, down = now["up"] - before["up"], now["down"] - before["down"]
    return round(max(0, up) / seconds, 1), round(max(0, down) / seconds, 1)


def _seconds_between(before: float, now: float) -> float:
    return max(1e-3, now - before)


# -- sorting


def sort_users(rows: Sequence[RatedUser], column: str) -> list[RatedUser]:
    """Sort users by one of USER_SORTS: amounts descend, what is left of quotas ascends."""
    keys: Mapping[str, Callable[[RatedUser], float]] = {
        "name": _nothing,
        "flows": _flows,
        "rate": _rate,
        "today": _today,
        "month": _month,
        "total": _total,
        "left": _left,
    }
    return sorted(sorted(rows, key=_name), key=keys[column])


def sort_clients(rows: Sequence[RatedClient], column: str) -> list[RatedClient]:
    """Sort clients by one of command_line.CLIENT_SORTS; amounts begin with the greatest."""
    keys: Mapping[str, Callable[[RatedClient], float]] = {
        "name": _nothing,
        "flows": _flows,
        "rate": _rate,
        "bytes": _client_bytes,
    }
    return sorted(sorted(rows, key=_name), key=keys[column])


def _nothing(row: RatedUser | RatedClient) -> float:
    """Keep the order by name."""
    return 0.0


def _name(row: RatedUser | RatedClient) -> str:
    return row["name"]


def _flows(row: RatedUser | RatedClient) -> float:
    return -row["connections"] - row["sessions"]


def _rate(row: RatedUser | RatedClient) -> float:
    return -row["rate_up"] - row["rate_down"]


def _today(row: RatedUser) -> float:
    return -_both(row["today"])


def _month(row: RatedUser) -> float:
    return -_both(row["month"])


def _total(row: RatedUser) -> float:
    return -_both(row["total"])


def _left(row: RatedUser) -> float:
    return _NEVER if row["left"] is None else row["left"]


def _client_bytes(row: RatedClient) -> float:
    return -row["up"] - row["down"]


def _both(amounts: Directions) -> int:
    return amounts["up"] + amounts["down"]


# -- texts


def users_text(rows: Sequence[RatedUser]) -> str:
    """Return a line for each user."""
    lines: list[Sequence[str]] = [_USER_COLUMNS]
    for row in rows:
        amounts = (amount_text(_both(amount)) for amount in (row["today"], row["month"]))
        left = row["left"]
        lines.append(
            (
                *_use_cells(row),
                *amounts,
                amount_text(_both(row["total"])),
                "-" if left is None else amount_text(left),
                limits_text(row["limits"]) or "-",
                row["refused"],
            )
        )
    return format_table(lines)


def clients_text(rows: Sequence[RatedClient]) -> str:
    """Return a line for each client."""
    lines: list[Sequence[str]] = [_CLIENT_COLUMNS]
    for row in rows:
        moved = amount_text(row["up"] + row["down"])
        lines.append((*_use_cells(row), moved, row["refused"]))
    return format_table(lines)


def _use_cells(row: RatedUser | RatedClient) -> Sequence[str]:
    return (
        row["name"],
        str(row["connections"]),
        str(row["sessions"]),
        amount_text(row["rate_down"] * 8, "bit/s"),
        amount_text(row["rate_up"] * 8, "bit/s"),
    )


def user_limits_text(answer: UserLimitsAnswer) -> str:
    """Return the limits of a user that are in force."""
    limits = limits_text(answer["limits"]) or "no limits"
    since = " (set by limit, until the next start)" if answer["overridden"] else ""
    return escape(f"{answer['user']}: {limits}{since}")


def limits_text(limits: LimitsRow) -> str:
    """Return limits as `limit` takes them, such as "connections=50 rate=5Mbit/s"."""
    texts = []
    if "connections" in limits:
        texts.append(f"connections={limits['connections']}")
    if "sessions" in limits:
        texts.append(f"sessions={limits['sessions']}")
    if "connection_rate" in limits:
        texts.append(f"connection_rate={_frequency_text(limits['connection_rate'])}")
    up, down = limits.get("rate_up"), limits.get("rate_down")
    rates = {"rate": up} if up == down else {"rate_up": up, "rate_down": down}
    for key, rate in rates.items():
        if rate is not None:
            texts.append(f"{key}={_scaled(rate * 8, _BIT_SCALES)}")
    if "burst" in limits:
        texts.append(f"burst={_scaled(limits['burst'], _SIZE_SCALES)}")
    return " ".join(texts)


def ban_text(answer: BanAnswer, now: float) -> str:
    """Return what a ban has done; `now` in seconds since the epoch."""
    ended = f"{answer['ended']} flows ended"
    return escape(f"{answer['kind']} {answer['name']} banned {_until_text(answer, now)}, {ended}")


def bans_text(answer: Sequence[BanRow], now: float) -> str:
    """Return a line for each ban."""
    lines: list[Sequence[str]] = [_BAN_COLUMNS]
    for row in answer:
        lines.append((row["kind"], row["name"], _until_text(row, now)))
    return format_table(lines)


def _until_text(row: BanRow, now: float) -> str:
    until = row["until"]
    return "until the next start" if until is None else f"for {duration_text(round(until - now))}"


def _scaled(value: int, scales: Sequence[tuple[str, int]]) -> str:
    """Return a value in the greatest unit that leaves no rest."""
    unit, scale = next((unit, scale) for unit, scale in scales if value % scale == 0)
    return f"{value // scale}{unit}"


def _frequency_text(per_second: float) -> str:
    """Return 20.0 as "20/s" and 0.5 as "30/m"."""
    counts = {unit: per_second * seconds for unit, seconds in _PERIODS}
    whole = (unit for unit, count in counts.items() if abs(round(count) - count) < 1e-6)
    unit = next(whole, "h")
    return f"{round(counts[unit])}/{unit}"
