"""Runs the benchmarks of tunnels and of limits in their short forms, so that they keep working.

The tests check that the tables have all rows, that there are figures, and that data arrived. They
do not check the figures.
"""

from __future__ import annotations

import os
import shutil

import pytest

from netproxy.tunnel.path import sealing
from tests.bench.short import ROOT, output, rows
from tests.e2e.support import program

pytestmark = [pytest.mark.e2e, pytest.mark.long]


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
