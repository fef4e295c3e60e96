"""The text that Prometheus reads."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from netproxy.interfaces.flows import Traffic
from netproxy.observe.exposition import text_format
from netproxy.observe.exposition.text_format import COUNTER, GAUGE, Family, Sample, render, single
from netproxy.observe.flows import FlowTotal, TotalKey
from netproxy.observe.metrics import Histogram
from netproxy.observe.process import process_use

ROOT = Path(__file__).resolve().parents[3] / "netproxy"
MAIN = TotalKey("tcp", "main", "direct")


def histogram() -> Histogram:
    filled = Histogram((0.01, 1.0))
    for value in (0.001, 0.5, 7.0):
        filled.add(value)
    return filled


def everything() -> bytes:
    """All kinds of metrics."""
    pool = {"name": "pool", "state": "up", "live": 1, "dialled": 3, "failed": 1, "latency": 0.25}
    member = {**pool, "name": "office", "state": "down"}
    fresh = {**pool, "name": "fresh", "state": "unused", "latency": None, "groups": []}
    upstreams = [
        {**pool, "groups": [{"name": "pool", "balance": "failover", "members": [member]}]},
        {**pool, "name": "default", "state": "-", "groups": []},
        fresh,
    ]
    totals = {
        MAIN: FlowTotal(3, 1, Traffic(10, 20)),
        TotalKey("udp", "main", "pool"): FlowTotal(1, 1, Traffic(1, 2, 3, 4)),
    }
    counters = [("drops", "fragment", 3), ("drops", 'a "b"\\\n', 1), ("connections", "accepted", 9)]
    return render(
        [
            single("build_info", GAUGE, "The version.", 1, version="1"),
            *text_format.flow_families(totals),
            *text_format.counter_families(counters),
            text_format.dial_family({"direct": histogram()}),
            *text_format.upstream_families(upstreams),
            *text_format.process_families(1e9, process_use()),
        ]
    )


def test_metric_has_help_type_and_samples() -> None:
    assert single("x", COUNTER, "How many.", 3, reason="r")._replace(name="x_total") == Family(
        "x_total", COUNTER, "How many.", [Sample({"reason": "r"}, 3)]
    )
    assert render(
        [
            single("x_total", COUNTER, "How many.", 12345678901, reason="r"),
            Family("none", GAUGE, "Nothing.", []),
        ]
    ) == (
        b"# HELP netproxy_x_total How many.\n"
        b"# TYPE netproxy_x_total counter\n"
        b'netproxy_x_total{reason="r"} 12345678901\n'
    )


def test_label_values_are_escaped() -> None:
    assert b'{reason="a \\"b\\"\\\\\\n"} 1\n' in everything()


def test_flows_have_labels_for_listener_upstream_and_direction() -> None:
    text = everything().decode()
    for line in (
        'netproxy_tcp_flows_total{listener="main",upstream="direct"} 3',
        'netproxy_tcp_flows{listener="main",upstream="direct"} 1',
        'netproxy_tcp_bytes_total{listener="main",upstream="direct",direction="down"} 20',
        'netproxy_udp_datagrams_total{listener="main",upstream="pool",direction="up"} 3',
    ):
        assert f"\n{line}\n" in text


def test_histogram_buckets_are_cumulative() -> None:
    text = everything().decode()
    assert re.findall(r"netproxy_dial_seconds\S+ \S+", text) == [
        'netproxy_dial_seconds_bucket{upstream="direct",le="0.01"} 1',
        'netproxy_dial_seconds_bucket{upstream="direct",le="1"} 2',
        'netproxy_dial_seconds_bucket{upstream="direct",le="+Inf"} 3',
        'netproxy_dial_seconds_sum{upstream="direct"} 7.501',
        'netproxy_dial_seconds_count{upstream="direct"} 3',
    ]


def test_group_members_have_the_label_group_slash_member() -> None:
    text = everything().decode()
    assert re.findall(r"netproxy_upstream_up\S+ \S+", text) == [
        'netproxy_upstream_up{upstream="pool"} 1',
        'netproxy_upstream_up{upstream="pool/office"} 0',
    ]


def test_labels_are_only_the_documented_ones() -> None:
    """Hazard 117."""
    labels = set(re.findall(r'[{,](\w+)="', everything().decode()))
    assert labels == {"listener", "upstream", "reason", "direction", "le", "version"}


def test_every_counter_in_the_source_has_a_metric() -> None:
    counted = {
        name
        for path in ROOT.rglob("*.py")
        for name in re.findall(r'[^.]count\("(\w+)", ', path.read_text())
    } | {
        name
        for path in ROOT.rglob("*.py")
        for name in re.findall(r'counter\.count\("(\w+)", ', path.read_text())
    }
    assert "drops" in counted
    elsewhere = {name for name, _ in text_format.COUNTED_ELSEWHERE}
    assert counted - elsewhere - set(text_format.COUNTER_METRICS) == set()


def users() -> bytes:
    amounts: Any = {"up": 3, "down": 4}
    row: Any = {"name": 'a"b', "connections": 1, "sessions": 2, "total": amounts}
    return text_format.render(text_format.user_families([row]))


def test_users_have_bytes_connections_and_sessions() -> None:
    assert [line for line in users().decode().splitlines() if not line.startswith("#")] == [
        r'netproxy_user_bytes_total{user="a\"b",direction="up"} 3',
        r'netproxy_user_bytes_total{user="a\"b",direction="down"} 4',
        r'netproxy_user_connections{user="a\"b"} 1',
        r'netproxy_user_sessions{user="a\"b"} 2',
    ]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_accepts_the_metrics() -> None:
    result = subprocess.run(
        ["promtool", "check", "metrics"],
        input=everything() + users(),
        capture_output=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, b"")
