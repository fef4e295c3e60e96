"""Runs each benchmark in its short form, so that the programs keep working.

The tests check that the tables have all rows, that there are figures, and that data arrived. They
do not check the figures.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from netproxy.tunnel.path import sealing
from tests.e2e.support import program

pytestmark = [pytest.mark.e2e, pytest.mark.long]

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
# The limit of a run, which takes some seconds on a machine without other work.
SECONDS = 300.0
# The exit status of a benchmark whose figures are not good enough.
BELOW_TARGET = 1


def output(name: str, *arguments: str) -> str:
    """Run a benchmark and return its output."""
    process = subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert process.returncode in (0, BELOW_TARGET), process.stdout
    assert "internal error" not in process.stdout and "Traceback" not in process.stdout
    return process.stdout


def rows(text: str, pattern: str) -> list[tuple[str, ...]]:
    """Return the groups of the lines that begin with the pattern."""
    found = re.findall(rf"^ *{pattern}", text, re.MULTILINE)
    return [row if isinstance(row, tuple) else (row,) for row in found]


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


def test_soak_benchmark_answers_datagrams_and_closes_everything() -> None:
    """Hazard 101, for some seconds."""
    text = output("soak.py", "--minutes", "0.1")
    table = rows(text, r"(\d+) +([\d.]+) +(\d+) +(\d+) +([\d,]+) +([\d.]+)% +(\d+)$")
    assert len(table) >= 6
    assert any(float(row[5]) > 0 for row in table)
    assert "descriptors left over" not in text
    assert re.search(r"^(flat|NOT FLAT: .*)$", text, re.MULTILINE)


def test_tcp_soak_benchmark_holds_all_connections_and_closes_them() -> None:
    """Hazard 101, for some seconds."""
    text = output("soak_tcp.py", "--connections", "500", "--minutes", "0.1")
    table = rows(text, r"(\d+) +([\d.]+) +(\d+) +(\d+) +(\d+) +([\d,]+) +([\d.]+)% +([\d.]+)$")
    assert len(table) >= 6
    # Connections that are being replaced may be counted twice or not at all.
    assert all(475 <= int(row[4]) <= 525 and float(row[6]) > 0 for row in table)
    assert "with all clients gone: 0 connections" in text
    assert "descriptors left over" not in text
    assert re.search(r"^(flat|NOT FLAT: .*)$", text, re.MULTILINE)


def test_mixed_soak_serves_every_kind_of_client_and_closes_everything() -> None:
    """Hazard 101, for some seconds."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    text = output("soak_mixed.py", "--minutes", "0.2", "--clients", "1")
    table = rows(text, r"(\d+) +([\d.]+) +(\d+) +(\d+) +([\d.]+) +(\d+)$")
    assert len(table) >= 6
    assert text.endswith("\nflat\n"), text


def test_hostile_minute_takes_nothing_from_good_clients() -> None:
    """Hazards 96, 100, 101 and 102: every byte is right, nothing is lost, nothing is left."""
    text = output("hostile.py", "--minutes", "0.5", "--clients", "2")
    if text.startswith("not possible here: "):
        pytest.skip(text)
    assert text.endswith("\nunharmed\n"), text
    for line, names in (
        ("attacks", ("flood", "forged datagram", "slow client", "SYN", "unread", "wrong login")),
        ("troubles", ("descriptor limit", "log reader stopped", "reload", "upstream killed")),
    ):
        ((told,),) = rows(text, f"({line}: .*)$")
        counts = dict(re.findall(r"(\w[\w ]*?) (\d+)(?:, |$)", told.partition(": ")[2]))
        assert all(int(counts[name]) > 0 for name in names), told


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


def test_limits_benchmark_measures_every_load_and_program() -> None:
    """Every row has all flows, and bytes arrived."""
    size = ("--users", "4", "--rate", "2", "--seconds", "0.5", "--warm-up", "0.5")
    text = output("limits.py", *size, "--rounds", "1", "--flows", "1,4", "--before", str(ROOT))
    figures = r"(?:[+-][\d.]+ +){3}(?:-|[\d.]+) +[\d.]+ +([\d.]+)$"
    table = rows(text, rf"(\w+) +(SOCKS5|CONNECT|GET) +(tcp|udp|mixed) +(\d) +(up|down) +{figures}")
    ours = [row for row in table if row[0] == "netproxyd"]
    assert all(float(row[5]) > 0 for row in ours)
    assert {row[2:5] for row in ours} == {
        (network, count, direction)
        for network in ("tcp", "udp", "mixed")
        for count in "14"
        for direction in ("up", "down")
    }
    assert {"SOCKS5", "CONNECT", "GET"} == {row[1] for row in ours}
    table = rows(text, r"(tcp|udp) +(up|down) +(none|not reached|reached) +[\d.]+ +([\d.]+) ")
    assert len(table) == 12 and all(float(row[3]) > 0 for row in table)
    table = rows(text, r"(this|before) +(up|down) +([\d.]+) +\d+ +this: [\d.]+ x$")
    assert len(table) == 4 and all(float(row[2]) > 0 for row in table)


def test_tunnel_benchmark_measures_tunnels_and_ssh() -> None:
    if shutil.which("/usr/sbin/sshd") is None or shutil.which("openssl") is None:
        pytest.skip("openssh-server or openssl is not installed")
    text = output(
        "tunnel.py", "--mib", "8", "--streams", "24", "--rounds", "1", "--unread-rounds", "1"
    )
    figure = r": +([\d.]+) \( *[\d.]+ x\)"
    table = rows(text, f"(.+?) +tunnel, TLS{figure}  tunnel, plain{figure}  ssh -R{figure}")
    assert [row[0] for row in table] == [
        "MiB/s to the user",
        "MiB/s to the service",
        "streams/s, one by one",
        "streams/s, 8 at once",
    ]
    table = rows(text, r"(to the \w+) +tunnel, TLS: ([\d.]+) x  tunnel, plain: ([\d.]+) x$")
    assert [row[0] for row in table] == ["to the user", "to the service"]


def test_tunnel_streams_benchmark_measures_bursts_and_bulk_of_both_builds() -> None:
    if shutil.which("/usr/sbin/sshd") is None or shutil.which("openssl") is None:
        pytest.skip("openssh-server or openssl is not installed")
    size = ("--bursts", "3", "--at-once", "4", "--rounds", "1", "--mib", "4")
    text = output("tunnel_streams.py", *size, "--before", str(ROOT))
    figure = r" +([\d.]+)  \([\d.]+ to [\d.]+\) +[\d.]+ x$"
    table = rows(text, rf"(tunnel, TLS|tunnel, plain|ssh -R)( before|){figure}")
    names = ["tunnel, TLS before", "tunnel, TLS", "tunnel, plain before", "tunnel, plain", "ssh -R"]
    assert [row[0] + row[1] for row in table] == 4 * names
    assert all(float(row[2]) > 0 for row in table)


def test_tunnel_path_benchmark_measures_all_ways() -> None:
    if os.geteuid() or sealing.load_cipher() is None or not os.path.exists("/dev/net/tun"):
        pytest.skip("needs root, the package cryptography and TUN devices")
    for name in ("ip", "openssl"):
        program(name)
    text = output(
        "tunnel_path.py", "--seconds", "1", "--flows", "2", "--load-seconds", "0.3", "--rate", "500"
    )
    ways = rows(
        text, r"(direct|udp path|tls stream) +(\d+) +(\d+) +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+$"
    )
    assert [row[0] for row in ways] == ["direct", "udp path", "tls stream"]
    assert all(int(row[2]) for row in ways)
    loads = rows(text, r"(udp path|tls stream|flooded) +1200 +([\d,]+) ")
    assert [row[0] for row in loads] == ["udp path", "flooded", "tls stream", "flooded"]
    assert all(row[1] != "0" for row in loads)


def test_tunnel_troubles_benchmark_measures_what_a_flow_loses() -> None:
    if os.geteuid() or sealing.load_cipher() is None:
        pytest.skip("needs root and the package cryptography")
    for name in ("ip", "nft", "ss", "openssl"):
        program(name)
    text = output("tunnel_troubles.py", "--rounds", "1", "--only", "reset", "--after", "4")
    ((name, sent, _, ends),) = rows(text, r"(connections reset) +(\d+) +(\d+) +(\d+) +[\d.]+ .*$")
    assert name and int(sent) > 0 and ends == "1"


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


def test_usage_is_counted_although_the_daemon_is_killed() -> None:
    text = output("usage_kills.py", "--times", "1", "--longest", "2")
    assert rows(text, r"1 +[\d.]+ +[\d,]+ +[\d,]+ +-?[\d,]+ +-?[\d.]+") and "passed" in text


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
