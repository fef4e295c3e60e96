"""What netproxyctl prints."""
from __future__ import annotations

from typing import Any

from netproxy.observe.console import status_text, tunnels_text, upstreams_text


def figures(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "state": "up", "carries": ["tcp", "udp"], "live": 2, "dialled": 10, "failed": 1, "latency": 0.0123,
            "error": "", "groups": [], **more}


def test_status() -> None:
    assert status_text({"lines": ["connections=1", "udp main"]}) == "connections=1\nudp main"


def test_a_way_out_has_a_line() -> None:
    unused = figures("second", state="unused", carries=[], live=0, dialled=0, failed=0, latency=0.0)
    assert upstreams_text([figures("office"), unused]) == (
        "name    state   carries  live  dialled  failed  latency  last error\n"
        "office  up      tcp,udp  2     10       1       12.3 ms\n"
        "second  unused  -        0     0        0       -")


def test_the_members_of_a_group_stand_below_it() -> None:
    pool = figures("pool", groups=[{"name": "pool", "balance": "failover", "members": [figures("a"), figures("b", state="down")]}])
    assert [line.split()[:2] for line in upstreams_text([pool]).split("\n")[1:]] == [["pool", "up"], ["a", "up"], ["b", "down"]]


def test_a_group_on_the_way_has_a_line_of_its_own() -> None:
    through = figures("through", groups=[{"name": "pool", "balance": "failover", "members": [figures("a")]}])
    assert upstreams_text([through]).split("\n")[2:] == [
        "  pool   failover", "    a    up        tcp,udp  2     10       1       12.3 ms"]


def test_an_error_of_another_is_printed_without_its_control_characters() -> None:
    assert upstreams_text([figures("a", error="bad\x1b[2J\nname")]).endswith("bad?[2J?name")


AGENT = {"name": "home", "client": "192.0.2.1:50000", "since": 0.0, "rtt": 0.0123, "exit": True, "streams": 2, "opened": 9, "idle": 4,
         "ports": ["127.0.0.1:8022/tcp"], "refused": {"80/tcp": "not allowed by the bridge"}, "sent": 10, "received": 20}


def test_an_agent_has_a_line() -> None:
    text = tunnels_text({"agents": [AGENT], "agent": None})
    head, line = text.split("\n")
    assert head.split() == ["agent", "from", "since", "rtt", "live", "opened", "sent", "received", "ports"]
    assert line.split()[:2] == ["home", "192.0.2.1:50000"] and "12.3 ms" in line
    assert line.endswith("2     9       10    20        127.0.0.1:8022/tcp, 80/tcp (not allowed by the bridge), exit")


def test_the_own_agent_has_a_line() -> None:
    own = {"name": "home", "connected": True, "since": 0.0, "rtt": 0.0, "idle": 4, "opened": 7, "ports": {"8022/tcp": "served"}}
    assert tunnels_text({"agents": [], "agent": own}).endswith("-, 7 opened, 4 wait; ports: 8022/tcp served")
    assert tunnels_text({"agents": [], "agent": {"name": "home", "connected": False, "tries": 3}}) == (
        "agent 'home': not connected, 3 failures in a row")


def test_no_tunnel_is_a_head_alone() -> None:
    assert tunnels_text({"agents": [], "agent": None}).split() == ["agent", "from", "since", "rtt", "live", "opened", "sent", "received", "ports"]
