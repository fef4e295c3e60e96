"""What netproxyctl prints."""
from __future__ import annotations

from typing import Any

from netproxy.observe.console import status_text, upstreams_text


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
