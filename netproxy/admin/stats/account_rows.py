"""Rows about users, clients and bans, for netproxyctl, metrics and the status page.

Only reads, on the thread of the caller: the control socket's or the metrics listener's.
"""

from __future__ import annotations

from netproxy.access.accounts.standing import BANNED_CLIENT, FOR_EVER, QUOTA_USED_UP
from netproxy.access.accounts.subject import CLIENT, USER
from netproxy.typed import TYPE_CHECKING, Iterable, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.access.accounts.standing import Ban
    from netproxy.access.accounts.subject import Limits
    from netproxy.access.accounts.usage import Usage
    from netproxy.admin.view import AccountsView
    from netproxy.interfaces.answers import BanRow, ClientRow, Directions, LimitsRow, UserRow


class SubjectUse(NamedTuple):
    """What a user or a client with running flows uses."""

    name: str
    connections: int
    sessions: int
    up: int
    """Bytes, client to target."""
    down: int
    limits: LimitsRow
    """The limits in force; those of clients are not shown."""


def subject_uses(view: AccountsView, kind: str) -> list[SubjectUse]:
    """Return the users or the clients with running flows."""
    limits = view.accounts.limits
    return [
        SubjectUse(*stats, limits_row(limits(stats.name)) if kind == USER else {})
        for stats in view.accounts.stats(kind)
    ]


def user_rows(
    view: AccountsView, active: Iterable[SubjectUse], limit: int | None = None
) -> list[UserRow]:
    """Return the users that are configured, have flows or are banned; those with flows first.

    `active`: those with flows.  `limit`: the most rows.
    """
    busiest = sorted(active, key=_carried, reverse=True)
    uses = {use.name: use for use in busiest}
    banned, _ = view.standing.bans()
    names = dict.fromkeys(uses)
    names.update(dict.fromkeys(ban.name for ban in banned))
    names.update(dict.fromkeys(view.config.users))
    return [_user_row(view, uses.get(name) or _unused(view, name)) for name in list(names)[:limit]]


def _unused(view: AccountsView, name: str) -> SubjectUse:
    return SubjectUse(name, 0, 0, 0, 0, limits_row(view.accounts.limits(name)))


def _user_row(view: AccountsView, use: SubjectUse) -> UserRow:
    name = use.name
    today, month, total = view.usage.of(name)
    terms = view.standing.restricted.get(name)
    quotas = terms.quotas if terms is not None else (None, None, None)
    left = [
        max(0, quota - used.up - used.down)
        for quota, used in zip(quotas, (today, month, total), strict=True)
        if quota is not None
    ]
    return {
        "name": name,
        "connections": use.connections,
        "sessions": use.sessions,
        "today": _directions(today),
        "month": _directions(month),
        "total": _directions(total),
        "left": min(left, default=None),
        "limits": use.limits,
        "refused": view.standing.refusal(name, ""),
    }


def client_rows(
    view: AccountsView, active: Sequence[SubjectUse], limit: int | None = None
) -> list[ClientRow]:
    """Return the clients with flows, the busiest first, then the others that are banned.

    `active`: those with flows.  `limit`: the most rows.
    """
    _, bans = view.standing.bans()
    banned, with_flows = {ban.name for ban in bans}, {client.name for client in active}
    clients = sorted(active, key=_carried, reverse=True)
    clients += [SubjectUse(name, 0, 0, 0, 0, {}) for name in sorted(banned - with_flows)]
    return [_client_row(client, client.name in banned) for client in clients[:limit]]


def _client_row(use: SubjectUse, is_banned: bool) -> ClientRow:
    return {
        "name": use.name,
        "connections": use.connections,
        "sessions": use.sessions,
        "up": use.up,
        "down": use.down,
        "refused": BANNED_CLIENT if is_banned else "",
    }


def ban_rows(view: AccountsView) -> list[BanRow]:
    """Return the bans in force."""
    users, clients = view.standing.bans()
    return [*_bans(USER, users), *_bans(CLIENT, clients)]


def users_over_quota(view: AccountsView) -> int:
    """Return how many users have used up a quota."""
    standing = view.standing
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


def _carried(use: SubjectUse) -> int:
    return use.up + use.down
