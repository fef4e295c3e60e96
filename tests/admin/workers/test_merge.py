"""Snapshots of several processes, merged."""

from __future__ import annotations

import json
from typing import Any

import pytest

from netproxy.admin.stats.account_rows import SubjectUse
from netproxy.admin.stats.snapshot import EVENTS_LIMIT, PAGE_FLOWS, Details, PoolUse, Snapshot
from netproxy.admin.workers.merge import add_departed, counters_of, merge
from netproxy.admin.workers.report import decode, encode
from netproxy.admin.workers.rows import merge_flows, merge_tunnels, merge_verdicts
from netproxy.interfaces.flows import Traffic
from netproxy.observe.flows import OTHER, TOTALS_LIMIT, FlowTotal, TotalKey
from netproxy.observe.metrics import Histogram
from netproxy.observe.process import ProcessUse

MAIN, UDP = TotalKey("tcp", "main", "direct"), TotalKey("udp", "main", "direct")


def histogram(*values: float) -> Histogram:
    filled = Histogram((0.1, 1.0))
    for value in values:
        filled.add(value)
    return filled


def listener(name: str, live: int, accepted: int) -> Any:
    numbers = {"live": live, "accepted": accepted, "announced": [], "mappings": []}
    return {"name": name, "network": "tcp", "address": "127.0.0.1:1", **numbers}


def member(name: str = "office", **fields: Any) -> Any:
    numbers = {"live": 0, "dialled": 0, "failed": 0, "latency": None}
    return {"name": name, "state": "up", "carries": ["tcp"], **numbers, "error": "", **fields}


def upstream(groups: Any = (), **fields: Any) -> Any:
    return {**member(**fields), "groups": list(groups)}


def flow(number: int, age: float, sent: int = 0) -> Any:
    return {"id": number, "age": age, "sent": sent, "received": 0}


FULL = Snapshot(
    connections=3,
    listeners=[listener("main", 2, 9)],
    upstreams=[upstream([{"name": "pool", "balance": "failover", "members": [member("a")]}])],
    counters={("drops", "fragment"): 4},
    totals={MAIN: FlowTotal(5, 2, Traffic(10, 20)), UDP: FlowTotal(1, 1, Traffic(1, 2, 3, 4))},
    dial_times={"direct": histogram(0.05, 0.5, 7.0)},
    pools={"dial": PoolUse(3, 2)},
    process=ProcessUse(1.5, 100, 60, 8, 1024, 20),
    lines=["connections=3"],
    details=Details(
        flows=[(1, 10, 20)],
        busiest=[flow(1, 2.0, 10)],
        users=[SubjectUse("alice", 1, 0, 10, 20, {"connections": 5})],
        clients=[SubjectUse("192.0.2.1", 1, 0, 10, 20, {})],
        refusals=[{"at": 1.0, "reason": "acl"}],
        failures=[{"at": 2.0, "why": "refused"}],
        notices=[{"at": 3.0, "text": "hot"}],
    ),
)


def plain(snapshot: Snapshot) -> Any:
    """Return a snapshot as JSON values, which compare."""
    return json.loads(json.dumps(encode(snapshot)))


def test_report_brings_everything_across() -> None:
    report = plain(FULL)
    assert plain(decode(report)) == report
    assert decode(report).totals == FULL.totals
    assert decode(report).details.users == FULL.details.users
    assert decode(report).process == FULL.process


def test_one_process_merged_is_itself() -> None:
    assert plain(merge([FULL])) == plain(FULL)


def test_numbers_of_processes_are_added() -> None:
    both = merge([FULL, FULL._replace(counters={("drops", "acl"): 1, ("drops", "fragment"): 2})])
    assert (both.connections, both.sessions) == (6, 2)
    assert both.listeners == [listener("main", 4, 18)]
    assert list(both.counters.items()) == [(("drops", "acl"), 1), (("drops", "fragment"), 6)]
    assert both.totals == {
        MAIN: FlowTotal(10, 4, Traffic(20, 40)),
        UDP: FlowTotal(2, 2, Traffic(2, 4, 6, 8)),
    }
    dials = both.dial_times["direct"]
    assert (dials.counts, dials.sum) == ([2, 2, 2], 15.1)
    assert both.pools == {"dial": PoolUse(6, 4)}
    assert both.process == ProcessUse(3.0, 200, 120, 16, 2048, 40)
    # The parts are as before.
    assert FULL.dial_times["direct"].counts == [1, 1, 1]


def test_names_that_only_one_process_has_are_kept() -> None:
    other = Snapshot(listeners=[listener("two", 1, 1)], dial_times={"office": histogram(1.0)})
    both = merge([FULL, other])
    assert [row["name"] for row in both.listeners] == ["main", "two"]
    assert list(both.dial_times) == ["direct", "office"]


class TestUpstreams:
    @pytest.mark.parametrize(
        "states, state",
        [
            (("up", "down"), "up"),
            (("down", "failing"), "failing"),
            (("unused", "down"), "down"),
            (("unused", "up"), "up"),
            (("unused", "unused"), "unused"),
            (("-", "-"), "-"),
        ],
    )
    def test_upstream_that_works_for_one_worker_works(
        self, states: tuple[str, ...], state: str
    ) -> None:
        parts = [Snapshot(upstreams=[upstream(state=name)]) for name in states]
        assert merge(parts).upstreams[0]["state"] == state
        assert merge(parts[::-1]).upstreams[0]["state"] == state

    @pytest.mark.parametrize(
        "rows, latency",
        [
            ([(3, 0.1), (1, 0.5)], 0.2),
            ([(3, 0.1), (1000, None)], 0.1),
            # A health check knows the latency without a dial.
            ([(0, 0.25), (0, None)], 0.25),
        ],
    )
    def test_latency_is_weighted_by_dials(
        self, rows: list[tuple[int, float | None]], latency: float
    ) -> None:
        parts = [
            Snapshot(upstreams=[upstream(dialled=dialled, latency=seconds)])
            for dialled, seconds in rows
        ]
        assert merge(parts).upstreams[0]["latency"] == pytest.approx(latency)

    def test_latency_that_no_worker_knows_is_none(self) -> None:
        assert merge([Snapshot(upstreams=[upstream()])] * 2).upstreams[0]["latency"] is None

    def test_error_is_that_of_the_worker_for_which_it_does_not_work(self) -> None:
        rows = [
            upstream(error="old", failed=9),
            upstream(error="new", failed=1, state="failing"),
            upstream(),
        ]
        parts = [Snapshot(upstreams=[row]) for row in rows]
        assert merge(parts).upstreams[0]["error"] == "new"
        assert merge(parts[2:]).upstreams[0]["error"] == ""

    def test_members_of_groups_are_merged_by_name(self) -> None:
        def part(first: int, second: int) -> Snapshot:
            members = [member("a", live=first, dialled=first), member("b", dialled=second)]
            group = {"name": "pool", "balance": "failover", "members": members}
            return Snapshot(upstreams=[upstream([group], live=first, dialled=first)])

        (row,) = merge([part(1, 10), part(2, 20)], counters_of(part(100, 1000))).upstreams
        assert (row["live"], row["dialled"]) == (3, 103)
        (group,) = row["groups"]
        assert [(row["name"], row["live"], row["dialled"]) for row in group["members"]] == [
            ("a", 3, 103),
            ("b", 0, 1030),
        ]


class TestDeparted:
    def test_counters_of_a_process_that_has_ended_stay_and_its_gauges_do_not(self) -> None:
        ended = merge([FULL], counters_of(FULL))
        assert (ended.connections, ended.sessions, ended.pools) == (3, 1, FULL.pools)
        assert ended.listeners == [listener("main", 2, 18)]
        assert ended.counters == {("drops", "fragment"): 8}
        assert ended.totals[MAIN] == FlowTotal(10, 2, Traffic(20, 40))
        assert ended.dial_times["direct"].counts == [2, 2, 2]
        assert ended.process == FULL.process._replace(cpu=3.0)
        assert ended.details.flows == [(1, 10, 20)] and ended.lines == ["connections=3"]

    def test_names_that_are_not_configured_any_more_are_not_shown(self) -> None:
        old = Snapshot(
            listeners=[listener("old", 1, 1)], upstreams=[upstream(name="old", dialled=1)]
        )
        now = merge([FULL], counters_of(old))
        assert [row["name"] for row in (*now.listeners, *now.upstreams)] == ["main", "office"]

    def test_several_that_have_ended_are_added(self) -> None:
        departed = Snapshot()
        for _ in range(3):
            departed = add_departed(departed, FULL)
        assert departed.listeners == [listener("main", 0, 27)]
        assert departed.counters == {("drops", "fragment"): 12}
        assert merge([], departed).connections == 0

    def test_names_of_many_configurations_are_bounded(self) -> None:
        departed = Snapshot()
        for number in range(TOTALS_LIMIT + 10):
            name = f"name{number}"
            ended = Snapshot(
                totals={TotalKey("tcp", name, "direct"): FlowTotal(1, 0, Traffic(1, 2))},
                dial_times={name: histogram(0.5)},
                listeners=[listener(name, 0, 1)],
            )
            departed = add_departed(departed, ended)
        assert len(departed.totals) == TOTALS_LIMIT + 1
        assert departed.totals[TotalKey("tcp", OTHER, OTHER)] == FlowTotal(10, 0, Traffic(10, 20))
        assert len(departed.dial_times) == TOTALS_LIMIT + 1
        assert departed.dial_times[OTHER].counts == [0, 10, 0]
        assert len(departed.listeners) == TOTALS_LIMIT


class TestDetails:
    def test_row_of_a_user_is_the_greatest_of_all_workers(self) -> None:
        parts = [
            Details(
                users=[SubjectUse("alice", 3, 1, 10, 7, {}), SubjectUse("bob", 1, 0, 1, 1, {})]
            ),
            Details(users=[SubjectUse("alice", 2, 4, 12, 5, {"sessions": 9})]),
        ]
        merged = merge([Snapshot(details=part) for part in parts]).details
        assert merged.users == [
            SubjectUse("alice", 3, 4, 12, 7, {"sessions": 9}),
            SubjectUse("bob", 1, 0, 1, 1, {}),
        ]

    def test_events_are_in_the_order_of_time_and_the_newest_stay(self) -> None:
        parts = [
            Details(notices=[{"at": float(at), "text": ""} for at in range(first, 40, 2)])
            for first in (0, 1)
        ]
        merged = merge([Snapshot(details=part) for part in parts]).details
        assert [row["at"] for row in merged.notices] == [float(at) for at in range(20, 40)]
        assert len(merged.notices) == EVENTS_LIMIT

    def test_busiest_flows_are_those_of_all_workers(self) -> None:
        parts = [
            Details(busiest=[flow(number, 1.0, number) for number in range(first, 200, 2)])
            for first in (0, 1)
        ]
        busiest = merge([Snapshot(details=part) for part in parts]).details.busiest
        assert [row["id"] for row in busiest] == list(range(199, 199 - PAGE_FLOWS, -1))


class TestRows:
    def test_flows_are_listed_with_the_oldest_first(self) -> None:
        merged = merge_flows([[flow(1, 9.0), flow(3, 1.0)], [flow(2, 5.0)], []])
        assert [row["id"] for row in merged] == [1, 2, 3]

    def test_agents_of_all_workers_are_listed_and_a_connected_own_agent(self) -> None:
        home: Any = {"name": "home"}
        parts: Any = [
            {"agents": [home], "agent": None, "direct": [1]},
            {"agents": [], "agent": {"name": "x", "connected": False}, "direct": []},
            {"agents": [home], "agent": {"name": "x", "connected": True}, "direct": [2]},
        ]
        both = {"agents": [home, home], "agent": parts[2]["agent"], "direct": [1, 2]}
        assert merge_tunnels(parts) == both
        assert merge_tunnels(parts[:2])["agent"] == parts[1]["agent"]
        assert merge_tunnels(parts[:1]) == {"agents": [home], "agent": None, "direct": [1]}

    def test_same_verdict_of_several_workers_is_listed_once(self) -> None:
        def verdict(target: str, way: str, seconds: int) -> Any:
            return {"target": target, "upstream": way, "seconds": seconds}

        parts = [
            [verdict("a:1", "direct", 5), verdict("b:1", "direct", 5)],
            [verdict("a:1", "direct", 9), verdict("b:1", "upstream", 7)],
        ]
        assert merge_verdicts(parts) == [
            verdict("a:1", "direct", 9),
            verdict("b:1", "direct", 5),
            verdict("b:1", "upstream", 7),
        ]


def test_what_was_found_for_a_listener_is_shown_once() -> None:
    """All workers announce the same; the first one asks the router."""
    mapping = {"network": "udp", "port": 1, "external": "", "how": "pcp", "left": 0.0, "fault": ""}
    announced = {"announced": ["203.0.113.5:1"]}
    first = {**listener("main", 1, 1), **announced, "mappings": [mapping]}
    second = {**listener("main", 1, 1), **announced}
    for rows in ((first, second), (second, first)):
        (merged,) = merge([Snapshot(listeners=[row]) for row in rows]).listeners
        assert (merged["announced"], merged["mappings"]) == (["203.0.113.5:1"], [mapping])
