"""Merges rows of several workers: listeners, upstreams, flows, tunnels and verdicts.  Pure."""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, Iterable, Mapping, Sequence, TypeVar

if TYPE_CHECKING:
    from netproxy.interfaces.answers import (
        FlowRow,
        GroupRow,
        ListenerRow,
        MemberRow,
        TunnelsAnswer,
        UpstreamRow,
        VerdictRow,
    )

STATES = ("up", "failing", "down", "unused", "-")
"""States of upstreams: one that works for one of the workers works."""

Row = TypeVar("Row", bound=Mapping[str, object])


def _by_name(parts: Iterable[Sequence[Row]]) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for part in parts:
        for row in part:
            rows.setdefault(str(row["name"]), []).append(row)
    return rows


# -- listeners


def merge_listeners(
    parts: Sequence[Sequence[ListenerRow]], departed: Sequence[ListenerRow]
) -> list[ListenerRow]:
    """Return the listeners of all workers by name, with the sums of their connections.

    `departed` are those of workers that have ended: their counters are added to the others.
    """
    ended = _by_name([departed])
    return [
        {
            **rows[0],
            "live": sum(row["live"] for row in rows),
            "accepted": sum(row["accepted"] for row in [*rows, *ended.get(name, ())]),
            # All workers announce the same; the first one maps ports.
            "announced": max((row["announced"] for row in rows), key=len),
            "mappings": max((row["mappings"] for row in rows), key=len),
        }
        for name, rows in _by_name(parts).items()
    ]


# -- upstreams


def merge_upstreams(
    parts: Sequence[Sequence[UpstreamRow]], departed: Sequence[UpstreamRow]
) -> list[UpstreamRow]:
    """Return the upstreams of all workers by name, and the members of their groups.

    `departed` are those of workers that have ended: their counters are added to the others.
    """
    ended = _by_name([departed])
    return [
        {
            **_merge_members(rows, ended.get(name, ())),
            "groups": _merge_groups(
                [row["groups"] for row in rows], [row["groups"] for row in ended.get(name, ())]
            ),
        }
        for name, rows in _by_name(parts).items()
    ]


def _merge_groups(
    parts: Sequence[Sequence[GroupRow]], departed: Sequence[Sequence[GroupRow]]
) -> list[GroupRow]:
    ended = _by_name(departed)
    groups: list[GroupRow] = []
    for name, rows in _by_name(parts).items():
        ended_members = _by_name(row["members"] for row in ended.get(name, ()))
        members = [
            _merge_members(of_name, ended_members.get(member, ()))
            for member, of_name in _by_name(row["members"] for row in rows).items()
        ]
        groups.append({"name": name, "balance": rows[0]["balance"], "members": members})
    return groups


def _merge_members(rows: Sequence[MemberRow], departed: Sequence[MemberRow]) -> MemberRow:
    return {
        "name": rows[0]["name"],
        "state": min((row["state"] for row in rows), key=STATES.index),
        "carries": rows[0]["carries"],
        "live": sum(row["live"] for row in rows),
        "dialled": sum(row["dialled"] for row in [*rows, *departed]),
        "failed": sum(row["failed"] for row in [*rows, *departed]),
        "latency": _latency(rows),
        "error": _last_error(rows),
    }


def _latency(rows: Sequence[MemberRow]) -> float | None:
    """Return the average latency of the workers that know it, weighted by their dials."""
    weights = [(max(1, row["dialled"]), row["latency"]) for row in rows if row["latency"]]
    total = sum(weight for weight, _ in weights)
    return sum(weight * latency for weight, latency in weights) / total if total else None


def _last_error(rows: Sequence[MemberRow]) -> str:
    """Return the last error; if several workers have one, that of the worst state."""
    errors = [row for row in rows if row["error"]]
    return max(errors, key=_badness)["error"] if errors else ""


def _badness(row: MemberRow) -> tuple[bool, int]:
    return row["state"] in ("failing", "down"), row["failed"]


# -- answers to commands


def merge_flows(parts: Iterable[Sequence[FlowRow]]) -> list[FlowRow]:
    """Return the flows of all workers, the oldest first."""
    return sorted((row for part in parts for row in part), key=_age, reverse=True)


def _age(row: FlowRow) -> float:
    return row["age"]


def merge_tunnels(parts: Sequence[TunnelsAnswer]) -> TunnelsAnswer:
    """Return all agents, and the daemon's own agent: of several, a connected one."""
    own = [part["agent"] for part in parts if part["agent"] is not None]
    connected = [row for row in own if row.get("connected")]
    return {
        "agents": [row for part in parts for row in part["agents"]],
        "agent": next(iter(connected or own), None),
        "direct": [row for part in parts for row in part["direct"]],
    }


def merge_verdicts(parts: Iterable[Sequence[VerdictRow]]) -> list[VerdictRow]:
    """Return the verdicts of all workers, each once, for the longest time."""
    verdicts: dict[tuple[str, str], VerdictRow] = {}
    for row in (row for part in parts for row in part):
        key = row["target"], row["upstream"]
        before = verdicts.get(key)
        if before is None or before["seconds"] < row["seconds"]:
            verdicts[key] = row
    return list(verdicts.values())
