"""Runs the benchmarks of relays, logins and names in their short forms, so that they keep working.

The tests check that the tables have all rows, that there are figures, and that data arrived. They
do not check the figures.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from tests.bench.short import output, rows
from tests.e2e.support import program

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def test_udp_benchmark_measures_every_level_and_load() -> None:
    text = output("udp.py", "--quick", "--rate", "10000")
    table = rows(
        text,
        r"(mmsg|trains|single) +([\d,]+) +(\d+) +(lone|burst|train|echo) +"
        r"([\d.]+) +([\d,]+) +(-?[\d.]+)%",
    )
    assert {row[0] for row in table} == {"mmsg", "trains", "single"}
    assert {row[1] for row in table} == {"1", "8", "100", "2,000"}
    assert {row[2] for row in table} == {"1", "50"}
    assert {row[3] for row in table} == {"lone", "burst", "train", "echo"}
    assert any(int(row[5].replace(",", "")) > 0 for row in table)
    assert re.search(
        r"multiple of that at 8: lone [\d.]+, burst [\d.]+, train [\d.]+, echo [\d.]+", text
    )
    assert re.search(r"Memory added by 500 associations: -?[\d.]+ MiB", text)


def test_game_benchmark_measures_direct_and_relayed_round_trips() -> None:
    text = output("game.py", "--seconds", "0.5", "--clients", "50")
    columns = r"(\d+) +(\d+) +(-?\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)"
    table = {row[0]: row for row in rows(text, rf"(direct|relay) +{columns}")}
    assert set(table) == {"direct", "relay"}
    assert all(int(row[2]) > 0 for row in table.values())
    assert re.search(r"^ *added +-?[\d.]+", text, re.MULTILINE)


def test_tcp_benchmark_measures_throughput_connections_and_memory() -> None:
    text = output("tcp.py", "--quick")
    assert re.search(r"start to listening +\d+ ms", text)
    directions = rows(text, r"(client to target|target to client), one connection +[\d.]+ Gbit/s")
    assert len(directions) == 2
    assert re.search(r"one after the other +\d+ per second, \d+ us", text)
    assert re.search(r"50 idle connections +[+-][\d.]+ MiB, \d+ threads", text)
    assert re.search(r"after they have gone +[+-][\d.]+ MiB, \d+ threads", text)


def test_rules_benchmark_finds_listed_names_and_no_others() -> None:
    text = output("rules.py", "--domains", "2000", "--networks", "500")
    assert [
        row[:2] for row in rows(text, r"([\d,]+) (domains|networks) +[\d.]+ s +(-?[\d.]+) MiB$")
    ] == [("2,000", "domains"), ("500", "networks")]
    table = rows(text, r"((?:name|IPv)[\w, ]*?) +[\d.]+ us +(\d+) of (\d+)$")
    assert {row[0] for row in table if row[1] == row[2] != "0"} == {
        "name, listed",
        "name, below a listed one",
        "IPv4, listed",
        "IPv6, listed",
    }
    assert {row[0] for row in table if row[1] == "0" != row[2]} == {
        "name, not listed",
        "name of 40 labels",
        "IPv4, not listed",
        "IPv6, not listed",
        "name, asked of networks",
    }


def test_logins_benchmark_refuses_every_wrong_login_and_no_good_one() -> None:
    """Hazard 110, for some seconds."""
    text = output("logins.py", "--seconds", "2", "--spread", "1", "--addresses", "400")
    table = rows(text, r"(none|1 addresses)((?: +[\d.]+){6}) +(\d+) +[\d.]+ +[\d.]+ +[\d.]+$")
    assert [row[0] for row in table] == ["none", "1 addresses"]
    assert all(row[2] == "0" for row in table)
    counted = re.findall(r"failures_total\{reason=\"(\w+)\"\} ([\d,]+)", text)
    assert {reason for reason, _ in counted} == {"penalty", "refused"}
    # The last part has one wrong login of each address, and no penalty.
    assert counted[-1] == ("refused", "400")
    assert "Traceback" not in text


def test_dns_benchmark_gets_right_answers_of_both_servers() -> None:
    for name in ("unbound", "dnsmasq", "dnsperf"):
        program(name)
    text = output("dns.py", "--rounds", "1", "--seconds", "0.5")
    table = rows(
        text,
        r"(netproxyd|dnsmasq) +(kept|fresh) +([\d,]+) +[\d,]+ +[\d,]+ +\d+ +(\d+) +(\d+) +(.*)$",
    )
    assert [row[:2] for row in table] == [
        (server, load) for server in ("netproxyd", "dnsmasq") for load in ("kept", "fresh")
    ]
    assert all(int(row[2].replace(",", "")) > 0 and row[4:] == ("0", "-") for row in table)
    assert sum(int(row[3]) for row in table) > 0
    assert re.search(r"Ratio to dnsmasq: kept [\d.]+, fresh [\d.]+", text)


def plots() -> ModuleType:
    """Return the module plots.py."""
    return importlib.import_module("tests.bench.plots")


def test_programs_are_measured_side_by_side_and_plotted(tmp_path: Path) -> None:
    path = tmp_path / "performance.json"
    arguments = ("--rounds", "1", "--seconds", "0.2", "--only", "netproxyd,microsocks")
    text = output("peers.py", *arguments, "--json", str(path))
    figures = {row[0] for row in rows(text, r"netproxyd +(\w+) +[\d,.]+ +1\.00 .*$")}
    assert figures == {panel.field for panel in plots().PANELS}
    content = json.loads(path.read_text())
    page = plots().page(content)
    for name in content["medians"]:
        assert f"| {name} | " in page
    drawing = ElementTree.fromstring(plots().plot(content["medians"]))
    assert len(drawing.findall("{*}rect")) == 1 + len(figures) * len(content["medians"])


def test_transparent_proxy_is_checked_and_measured(tmp_path: Path) -> None:
    """All that a client does works, and the datagrams of a train stay together."""
    for name in ("ip", "nft", "setpriv"):
        program(name)
    path = tmp_path / "transparent.json"
    size = ("--rounds", "1", "--seconds", "0.1", "--flows", "20")
    only = ("--only", "netproxyd tproxy", "--upstreams", "direct")
    text = output("transparent_peers.py", *size, *only, "--json", str(path))
    if text.startswith("not possible here: "):
        pytest.skip(text)
    content = json.loads(path.read_text())
    (checks,) = content["works"]["direct"].values()
    # Never fragmented on the way to a target (hazard 45).
    assert [name for name, passed in checks.items() if not passed] == ["datagram of 8,000 bytes"]
    (figures,) = content["medians"]["direct"].values()
    # The clock of processor time has ticks of 10 ms: so short a time may have none.
    costs = {name for name in figures if name.endswith(("_us", "_per_gb"))}
    assert all(figures[name] > 0 for name in figures.keys() - costs)
    assert figures["datagrams_per_receive"] > 1
