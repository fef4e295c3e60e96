"""Rows about users, clients and bans, for netproxyctl, metrics and the status page.

Only reads, on the thread of the caller: the control socket's or the metrics listener's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable

from netproxy.access.accounts.standing import BANNED_CLIENT, FOR_EVER, QUOTA_USED_UP
from netproxy.access.accounts.subject import CLIENT, USER, SubjectStats

if TYPE_CHECKING:
    from netproxy.access.accounts.standing import Ban
    from netproxy.access.accounts.subject import Limits
    from netproxy.access.accounts.usage import Usage
    from netproxy.admin.view import DaemonView
    from netproxy.interfaces.answers import BanRow, ClientRow, Directions, LimitsRow, UserRow


def user_rows(daemon: DaemonView, limit: int | None = None) -> list[UserRow]:
    """Return the users that are configured, have flows or are banned; those with flows first.

    `limit`: the most rows.
    """
    stats = {row.name: row for row in daemon.accounts.stats(USER)}
    banned, _ = daemon.standing.bans()
    busiest = sorted(stats.values(), key=_carried, reverse=True)
    names = dict.fromkeys(row.name for row in busiest)
    names.update(dict.fromkeys(ban.name for ban in banned))
    names.update(dict.fromkeys(daemon.user_names))
    unused = SubjectStats("", 0, 0, 0, 0)
    return [_user_row(daemon, name, stats.get(name, unused)) for name in list(names)[:limit]]


def _user_row(daemon: DaemonView, name: str, stats: SubjectStats) -> UserRow:
    today, month, total = daemon.usage.of(name)
    terms = daemon.standing.restricted.get(name)
    quotas = terms.quotas if terms is not None else (None, None, None)
    left = [
        max(0, quota - used.up - used.down)
        for quota, used in zip(quotas, (today, month, total), strict=True)
        if quota is not None
    ]
    return {
        "name": name,
        "connections": stats.connections,
        "sessions": stats.sessions,
        "today": _directions(today),
        "month": _directions(month),
        "total": _directions(total),
        "left": min(left, default=None),
        "limits": limits_row(daemon.accounts.limits(name)),
        "refused": daemon.standing.refusal(name, ""),
    }


def client_rows(daemon: DaemonView, limit: int | None = None) -> list[ClientRow]:
    """Return the clients with flows, the busiest first, then the others that are banned.

    `limit`: the most rows.
    """
    _, bans = daemon.standing.bans()
    banned = {ban.name for ban in bans}
    clients = sorted(daemon.accounts.stats(CLIENT), key=_carried, reverse=True)
    with_flows = {client.name for client in clients}
    clients += [SubjectStats(name, 0, 0, 0, 0) for name in sorted(banned - with_flows)]
    return [_client_row(client, client.name in banned) for client in clients[:limit]]


def _client_row(stats: SubjectStats, is_banned: bool) -> ClientRow:
    return {
        "name": stats.name,
        "connections": stats.connections,
        "sessions": stats.sessions,
        "up": stats.up,
        "down": stats.down,
        "refused": BANNED_CLIENT if is_banned else "",
    }


def ban_rows(daemon: DaemonView) -> list[BanRow]:
    """Return the bans in force."""
    users, clients = daemon.standing.bans()
    return [*_bans(USER, users), *_bans(CLIENT, clients)]


def users_over_quota(daemon: DaemonView) -> int:
    """Return how many users have used up a quota."""
    standing = daemon.standing
    names = [name for name, terms in standing.restricted.items() if terms.has_quota]
    return sum(standing.refusal(name, "") == QUOTA_USED_UP for name in names)


def limits_row(limits: Limits) -> LimitsRow:
    """Return the limits that there are."""
    row: LimitsRow = {}
    for key, value in limits._asdict().items():
        if value is not None:
            row[key] = value  # type: ignore[literal-required]  # the same keys
    return row


def _bans(kind: str, bans: Iterable[Ban]) -> list[BanRow]:
    return [
        {"kind": kind, "name": name, "until": None if until == FOR_EVER else until}
        for name, until in bans
    ]


def _directions(usage: Usage) -> Directions:
    return {"up": usage.up, "down": usage.down}


def _carried(stats: SubjectStats) -> int:
    return stats.up + stats.down
