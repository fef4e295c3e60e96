"""What netproxyctl prints."""

from __future__ import annotations

from typing import Any

import pytest

from netproxy.ctl.console import (
    amount_text,
    duration_text,
    flows_text,
    lines_text,
    sort_flows,
    status_text,
    tunnels_text,
    upstreams_text,
    verdicts_text,
)


def upstream(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "state": "up",
        "carries": ["tcp", "udp"],
        "live": 2,
        "dialled": 10,
        "failed": 1,
        "latency": 0.0123,
        "error": "",
        "groups": [],
        **more,
    }


STATUS = {
    "version": "1",
    "state": "serving",
    "uptime": 90061.5,
    "pid": 7,
    "reloaded": {"at": 0.0, "fine": True},
    "connections": 2,
    "sessions": 1,
    "threads": 9,
    "memory": 16_000_000,
    "log": "info",
    "bytes": {"up": 1_200_000, "down": 3_400_000_000},
    "events": [["datagrams dropped", "fragment", 1], ["UDP sessions ended", "idle", 12]],
    "lines": ["connections=2", "drops{fragment}=1"],
    "listeners": [
        {
            "name": "main",
            "network": "tcp+udp",
            "address": "127.0.0.1:1080",
            "live": 2,
            "accepted": 40,
        }
    ],
}
FLOW = {
    "id": 12,
    "network": "tcp",
    "listener": "main",
    "client": "192.0.2.1:5000",
    "user": "alice",
    "target": "example.com:443",
    "name": "",
    "route": "",
    "upstream": "office",
    "age": 75.2,
    "idle": 0.4,
    "sent": 1500,
    "received": 2_000_000,
    "datagrams_sent": 3,
    "datagrams_received": 4,
}


EVENTS = [
    "since the start     why       how often",
    "datagrams dropped   fragment  1",
    "UDP sessions ended  idle      12",
]


def test_status_is_a_head_listeners_and_what_has_happened() -> None:
    assert status_text(STATUS).split("\n") == [
        "netproxyd 1 is serving, up 1d1h, process 7",
        "2 connections, 1 UDP sessions, 9 threads, 16.0 MB of memory, log level info",
        "1.2 MB to targets, 3.4 GB to clients",
        "",
        "listener  network  address         live  accepted",
        "main      tcp+udp  127.0.0.1:1080  2     40",
        "",
        *EVENTS,
    ]
    assert status_text({**STATUS, "events": []}).endswith("  2     40")
    assert "; the last reload failed, see the log\n" in status_text(
        {**STATUS, "reloaded": {"at": 0.0, "fine": False}}
    )


def test_status_tells_what_was_found_for_a_listener() -> None:
    how = "pcp, router 192.168.1.1"
    mapped = {"network": "udp", "port": 1080, "external": "203.0.113.5:1080", "how": how}
    row = {
        **STATUS["listeners"][0],
        "announced": ["203.0.113.5:1080", "[2001:db8::5]:1080"],
        "mappings": [
            {**mapped, "left": 3541.0, "fault": ""},
            {**mapped, "left": 100.0, "fault": "192.168.1.1:5351: no answer"},
            {**mapped, "external": "", "left": 0.0, "fault": "refused: not authorized"},
            {**mapped, "external": "", "left": 0.0, "fault": ""},
        ],
    }
    port, at = "listener 'main': udp port 1080", "203.0.113.5:1080"
    assert status_text({**STATUS, "listeners": [row]}).split("\n")[7:] == [
        "listener 'main' announces 203.0.113.5:1080",
        "listener 'main' announces [2001:db8::5]:1080",
        f"{port} is mapped to {at} ({how}), 59m1s left",
        f"{port} is mapped to {at} ({how}), 1m40s left; 192.168.1.1:5351: no answer",
        f"{port} is not mapped ({how}); refused: not authorized",
        f"{port} is not mapped ({how})",
        "",
        *EVENTS,
    ]


def test_status_has_a_line_for_each_worker() -> None:
    def worker(index: int, state: str, pid: int) -> dict[str, Any]:
        counts = {"connections": 5, "sessions": 2, "restarts": index}
        return {"index": index, "state": state, "pid": pid, "cpu": 0.126, "memory": 9e6, **counts}

    workers = [worker(0, "serving", 71), worker(1, "starting", 0)]
    assert status_text({**STATUS, "workers": workers}).split("\n")[3:8] == [
        "",
        "worker  state     process  cpu  memory  connections  sessions  restarts",
        "0       serving   71       13%  9.0 MB  5            2         0",
        "1       starting  -        13%  9.0 MB  5            2         1",
        "",
    ]


def test_flow_has_a_line() -> None:
    assert flows_text([FLOW], False) == (
        "id  listener  client          user   target           upstream  age    idle"
        "  to target  to client\n"
        "12  main      192.0.2.1:5000  alice  example.com:443  office    1m15s  0s"
        "    1.5 kB     2.0 MB"
    )
    assert flows_text([FLOW], True).endswith("2.0 MB     3/4")
    assert flows_text([], False).startswith("id  listener")


def test_names_of_strangers_are_printed_as_their_codes() -> None:
    """Hazards 112 and 143."""
    text = flows_text([{**FLOW, "user": "a\x1b[2Jb", "target": "x\r\n\u202ey\u200b:1"}], False)
    assert r"a\x1b[2Jb" in text and r"x\r\n\u202ey\u200b:1" in text and text.count("\n") == 1


def test_flows_are_sorted_amounts_from_the_greatest() -> None:
    flows = [
        {**FLOW, "id": at, "sent": sent, "target": target}
        for at, sent, target in ((1, 5, "b"), (2, 9, "c"), (3, 7, "a"))
    ]

    def ids(by: str) -> list[int]:
        return [row["id"] for row in sort_flows(flows, by)]

    assert (ids("id"), ids("bytes"), ids("sent"), ids("target")) == (
        [1, 2, 3],
        [2, 3, 1],
        [2, 3, 1],
        [3, 1, 2],
    )


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (999_600, "1.0 MB"),
        (10**19, "10000 PB"),
    ],
)
def test_amount_has_a_prefix(value: float, text: str) -> None:
    assert amount_text(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(0.9, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m59s"), (3661, "1h1m"), (86400 * 3, "3d")],
)
def test_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_verdict_has_a_line() -> None:
    row = {"target": "a\x1b.test:443", "upstream": "direct", "seconds": 3599}
    assert verdicts_text([row]) == (
        "target          upstream  for\na\\x1b.test:443  direct    59m59s"
    )


def test_upstream_has_a_line() -> None:
    unused = upstream(
        "second", state="unused", carries=[], live=0, dialled=0, failed=0, latency=0.0
    )
    assert upstreams_text([upstream("office"), unused]) == (
        "name    state   carries  live  dialled  failed  latency  last error\n"
        "office  up      tcp,udp  2     10       1       12.3 ms\n"
        "second  unused  -        0     0        0       -"
    )


def test_upstream_without_statistics_shows_no_counts() -> None:
    direct = upstream("default", state="-", live=0, dialled=0, failed=0, latency=None)
    assert upstreams_text([direct]) == (
        "name     state  carries  live  dialled  failed  latency  last error\n"
        "default  -      tcp,udp  -     -        -       -"
    )


def test_members_follow_their_group() -> None:
    pool = upstream(
        "pool",
        groups=[
            {
                "name": "pool",
                "balance": "failover",
                "members": [upstream("a"), upstream("b", state="down")],
            }
        ],
    )
    assert [line.split()[:2] for line in upstreams_text([pool]).split("\n")[1:]] == [
        ["pool", "up"],
        ["a", "up"],
        ["b", "down"],
    ]


def test_group_within_a_chain_has_a_line() -> None:
    through = upstream(
        "through", groups=[{"name": "pool", "balance": "failover", "members": [upstream("a")]}]
    )
    assert upstreams_text([through]).split("\n")[2:] == [
        "  pool   failover",
        "    a    up        tcp,udp  2     10       1       12.3 ms",
    ]


def test_error_of_an_upstream_is_printed_with_codes() -> None:
    text = upstreams_text([upstream("a", error="bad\x1b[2J\nname")])
    assert text.endswith(r"bad\x1b[2J\nname")


AGENT = {
    "name": "home",
    "client": "192.0.2.1:50000",
    "since": 0.0,
    "rtt": 0.0123,
    "exit": True,
    "streams": 2,
    "opened": 9,
    "idle": 4,
    "ports": ["127.0.0.1:8022/tcp"],
    "refused": {"80/tcp": "not allowed by the bridge"},
    "sent": 10,
    "received": 20,
}


OWN_AGENT = {
    "name": "home",
    "connected": True,
    "since": 0.0,
    "rtt": 0.0,
    "idle": 4,
    "opened": 7,
    "ports": {"8022/tcp": "served"},
}


def test_connected_agent_has_a_line() -> None:
    text = tunnels_text({"agents": [AGENT], "agent": None})
    head, line = text.split("\n")
    assert head.split() == [
        "agent",
        "from",
        "since",
        "rtt",
        "live",
        "opened",
        "sent",
        "received",
        "datagrams",
        "ports",
    ]
    assert line.split()[:2] == ["home", "192.0.2.1:50000"] and "12.3 ms" in line
    assert line.endswith(
        "2     9       10    20        tcp"
        "        127.0.0.1:8022/tcp, 80/tcp (not allowed by the bridge), exit"
    )


def test_own_agent_has_a_line() -> None:
    assert tunnels_text({"agents": [], "agent": OWN_AGENT}).endswith(
        "-, 7 opened, 4 idle; datagrams: tcp; ports: 8022/tcp served"
    )
    assert tunnels_text(
        {"agents": [], "agent": {"name": "home", "connected": False, "tries": 3}}
    ) == ("agent 'home': not connected, 3 failures in a row")


PATH = {"up": True, "rtt": 0.0421, "loss": 0.0213, "mtu": 1452, "sent": 5, "received": 1 << 20}


@pytest.mark.parametrize(
    "path, text",
    [
        (PATH, "udp 42.1 ms, 2.1% lost, mtu 1452, 5 B/1.0 MB"),
        ({**PATH, "up": False}, "tcp, udp down, 5 B/1.0 MB"),
    ],
)
def test_datagram_path_is_told_on_both_sides(path: dict[str, Any], text: str) -> None:
    assert text in tunnels_text({"agents": [{**AGENT, "path": path}], "agent": None})
    own = {**OWN_AGENT, "path": path}
    assert f"datagrams: {text};" in tunnels_text({"agents": [], "agent": own})


def test_direct_paths_have_a_line_each() -> None:
    client: Any = {"peer": "client 'ann'", "state": "direct", "rtt": 0.0421, "flows": 2}
    other: Any = {"peer": "192.0.2.9:4000", "state": "relayed", "rtt": 0.04, "flows": 1}
    own = {**OWN_AGENT, "direct": [other]}
    lines = tunnels_text({"agents": [], "agent": own, "direct": [client]}).splitlines()
    assert lines[1:] == [
        "client 'ann': direct 42.1 ms, 2 flows",
        "192.0.2.9:4000: relayed, 1 flows",
    ]


def test_tunnels_without_agents_are_a_head_only() -> None:
    assert tunnels_text({"agents": [], "agent": None}).split() == [
        "agent",
        "from",
        "since",
        "rtt",
        "live",
        "opened",
        "sent",
        "received",
        "datagrams",
        "ports",
    ]


@pytest.mark.parametrize("evil", ["\x1b[2J", "\n", "\u202e", "\u200b", "\u2066", "\ufeff"])
def test_no_answer_prints_a_deceiving_character(evil: str) -> None:
    """Hazard 143: whichever field of an answer holds the name."""
    listener = {"name": evil, "network": "tcp", "address": evil, "live": 1, "accepted": 1}
    member = upstream(evil, state=evil, error=evil)
    group = {"name": evil, "balance": "failover", "members": [member]}
    agent = {**AGENT, "name": evil, "client": evil, "ports": [evil], "refused": {evil: evil}}
    own = {**OWN_AGENT, "name": evil, "ports": {evil: evil}}
    texts = [
        status_text({**STATUS, "listeners": [listener], "lines": [f"a {evil}"]}),
        upstreams_text([{**member, "groups": [group]}]),
        tunnels_text({"agents": [agent], "agent": own}),
        tunnels_text({"agents": [], "agent": {**own, "connected": False, "tries": 1}}),
        flows_text(
            [{**FLOW, **dict.fromkeys(("listener", "client", "user", "upstream"), evil)}], True
        ),
        verdicts_text([{"target": evil, "upstream": evil, "seconds": 1}]),
        lines_text([f"rule {evil}"]),
    ]
    code = evil.encode("unicode_escape").decode()
    for text in texts:
        assert code in text
        assert all(line.isprintable() for line in text.split("\n"))
        assert evil == "\n" or evil not in text
