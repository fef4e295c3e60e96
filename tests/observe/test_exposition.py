"""The text that Prometheus reads."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from netproxy.interfaces.flows import Traffic
from netproxy.observe import exposition
from netproxy.observe.exposition import COUNTER, GAUGE, Family, Sample, render, single
from netproxy.observe.flows import Key, Total
from netproxy.observe.metrics import Histogram

ROOT = Path(__file__).resolve().parents[2] / "netproxy"
MAIN = Key("tcp", "main", "direct")


def histogram() -> Histogram:
    made = Histogram((0.01, 1.0))
    for value in (0.001, 0.5, 7.0):
        made.add(value)
    return made


def everything() -> bytes:
    way = {"name": "pool", "state": "up", "live": 1, "dialled": 3, "failed": 1, "latency": 0.25}
    member = {**way, "name": "office", "state": "down"}
    ways = [
        {**way, "groups": [{"name": "pool", "balance": "failover", "members": [member]}]},
        {**way, "name": "default", "state": "-", "groups": []},
    ]
    return render(
        [
            single("build_info", GAUGE, "The version.", 1, version="1"),
            *exposition.totals(
                {
                    MAIN: Total(3, 1, Traffic(10, 20)),
                    Key("udp", "main", "pool"): Total(1, 1, Traffic(1, 2, 3, 4)),
                }
            ),
            *exposition.counted(
                [
                    ("drops", "fragment", 3),
                    ("drops", 'a "b"\\\n', 1),
                    ("connections", "accepted", 9),
                ]
            ),
            exposition.dials({"direct": histogram()}),
            *exposition.upstreams(ways),
            *exposition.process(1e9),
        ]
    )


def test_a_metric_has_a_help_a_type_and_samples() -> None:
    assert single("x", COUNTER, "How many.", 3, reason="r")._replace(name="x_total") == Family(
        "x_total", COUNTER, "How many.", [Sample({"reason": "r"}, 3)]
    )
    assert render(
        [
            single("x_total", COUNTER, "How many.", 12345678901, reason="r"),
            Family("none", GAUGE, "Nothing.", []),
        ]
    ) == (
        b'# HELP netproxy_x_total How many.\n# TYPE netproxy_x_total counter\nnetproxy_x_total{reason="r"} 12345678901\n'
    )


def test_a_label_is_escaped() -> None:
    assert b'{reason="a \\"b\\"\\\\\\n"} 1\n' in everything()


def test_flows_by_listener_way_out_and_direction() -> None:
    text = everything().decode()
    for line in (
        'netproxy_tcp_flows_total{listener="main",upstream="direct"} 3',
        'netproxy_tcp_flows{listener="main",upstream="direct"} 1',
        'netproxy_tcp_bytes_total{listener="main",upstream="direct",direction="down"} 20',
        'netproxy_udp_datagrams_total{listener="main",upstream="pool",direction="up"} 3',
    ):
        assert f"\n{line}\n" in text


def test_a_histogram_counts_upward() -> None:
    text = everything().decode()
    assert re.findall(r"netproxy_dial_seconds\S+ \S+", text) == [
        'netproxy_dial_seconds_bucket{upstream="direct",le="0.01"} 1',
        'netproxy_dial_seconds_bucket{upstream="direct",le="1"} 2',
        'netproxy_dial_seconds_bucket{upstream="direct",le="+Inf"} 3',
        'netproxy_dial_seconds_sum{upstream="direct"} 7.501',
        'netproxy_dial_seconds_count{upstream="direct"} 3',
    ]


def test_ways_out_and_their_members() -> None:
    text = everything().decode()
    assert re.findall(r"netproxy_upstream_up\S+ \S+", text) == [
        'netproxy_upstream_up{upstream="pool"} 1',
        'netproxy_upstream_up{upstream="pool/office"} 0',
    ]


def test_no_other_labels_than_were_promised() -> None:
    """Hazard 117."""
    labels = set(re.findall(r'[{,](\w+)="', everything().decode()))
    assert labels == {"listener", "upstream", "reason", "direction", "le", "version"}


def test_every_counter_of_the_program_has_a_name_here() -> None:
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
    assert counted - {name for name, _ in exposition.ELSEWHERE} - set(exposition.COUNTED) == set()


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool")
def test_promtool_finds_nothing_wrong() -> None:
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=everything(), capture_output=True, timeout=60
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, b"")
