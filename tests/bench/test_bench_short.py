"""The programs of this folder work: each in its short form, with the table it is for.  Their figures are nobody's here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.support import program

pytestmark = pytest.mark.e2e

FOLDER = Path(__file__).parent
SECONDS = 90.0  # of patience, on a machine that has other things to do


def output(name: str, *arguments: str, statuses: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode in statuses, done.stdout
    assert "internal error" not in done.stdout and "Traceback" not in done.stdout
    return done.stdout


def rows(text: str, pattern: str) -> list[tuple[str, ...]]:
    return re.findall(rf"^ *{pattern}", text, re.MULTILINE)


def test_udp() -> None:
    text = output("udp.py", "--quick")
    found = rows(
        text,
        r"(mmsg|trains|single) +([\d,]+) +(\d+) +(lone|burst|train|echo) +([\d.]+) +([\d,]+) +(-?[\d.]+)%",
    )
    assert {row[0] for row in found} == {"mmsg", "trains", "single"}
    assert {row[1] for row in found} == {"1", "8", "100", "2,000"}
    assert {row[2] for row in found} == {"1", "50"}
    assert all(float(row[4]) > 0 and int(row[5].replace(",", "")) > 0 for row in found)
    assert re.search(
        r"multiple of that at 8: lone [\d.]+, burst [\d.]+, train [\d.]+, echo [\d.]+", text
    )
    assert re.search(r"Memory added by 500 associations: -?[\d.]+ MiB", text)


def test_soak() -> None:
    text = output("soak.py", "--minutes", "0.1")
    found = rows(text, r"(\d+) +([\d.]+) +(\d+) +(\d+) +([\d,]+) +([\d.]+)% +(\d+)$")
    assert len(found) >= 6
    assert all(float(row[5]) > 0 for row in found)
    assert text.rstrip().endswith("flat")


def test_soak_tcp() -> None:
    text = output("soak_tcp.py", "--connections", "500", "--minutes", "0.1")
    found = rows(text, r"(\d+) +([\d.]+) +(\d+) +(\d+) +(\d+) +([\d,]+) +([\d.]+)% +([\d.]+)$")
    assert len(found) >= 6
    assert all(abs(int(row[4]) - 500) <= 25 and float(row[6]) > 0 for row in found)
    assert "with all clients gone: 0 connections" in text
    assert text.rstrip().endswith("flat")


def test_game() -> None:
    text = output("game.py", "--seconds", "0.5", "--clients", "50")
    found = {
        row[0]: row
        for row in rows(
            text, r"(direct|relay) +(\d+) +(\d+) +(-?\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)"
        )
    }
    assert set(found) == {"direct", "relay"}
    assert all(int(row[2]) > 0 for row in found.values())
    assert re.search(r"^ *added +-?[\d.]+", text, re.MULTILINE)


def test_tcp() -> None:
    text = output("tcp.py", "--quick")
    assert re.search(r"start to listening +\d+ ms", text)
    assert (
        len(
            rows(
                text, r"(client to target|target to client), one connection +[\d.]+ Gbit/s, \d+ ms"
            )
        )
        == 2
    )
    assert re.search(r"one after the other +\d+ a second, \d+ us", text)
    assert re.search(r"50 idle connections +[+-][\d.]+ MiB, \d+ threads", text)
    assert re.search(r"after they have gone +[+-][\d.]+ MiB, \d+ threads", text)


def test_rules() -> None:
    text = output("rules.py", "--domains", "2000", "--networks", "500")
    assert [
        row[:2] for row in rows(text, r"([\d,]+) (domains|networks) +[\d.]+ s +(-?[\d.]+) MiB$")
    ] == [("2,000", "domains"), ("500", "networks")]
    found = rows(text, r"((?:name|IPv)[\w, ]*?) +[\d.]+ us +(\d+) of (\d+)$")
    assert {row[0] for row in found if row[1] == row[2] != "0"} == {
        "name, listed",
        "name, below a listed one",
        "IPv4, listed",
        "IPv6, listed",
    }
    assert {row[0] for row in found if row[1] == "0" != row[2]} == {
        "name, not listed",
        "name of 40 labels",
        "IPv4, not listed",
        "IPv6, not listed",
        "name, asked of networks",
    }


def test_tunnel() -> None:
    if shutil.which("/usr/sbin/sshd") is None or shutil.which("openssl") is None:
        pytest.skip("openssh-server or openssl is not installed")
    text = output(
        "tunnel.py", "--mib", "8", "--streams", "24", "--rounds", "1", "--unread-rounds", "1"
    )
    found = rows(
        text,
        r"(.+?) +tunnel, TLS: +([\d.]+) \( *[\d.]+ x\)  tunnel, plain: +([\d.]+) \( *[\d.]+ x\)  ssh -R: +([\d.]+) \(1.00 x\)",
    )
    assert [row[0] for row in found] == [
        "MiB/s to the user",
        "MiB/s to the service",
        "streams/s, one by one",
        "streams/s, 8 at once",
    ]
    assert all(float(figure) > 0 for row in found for figure in row[1:])
    found = rows(text, r"(to the \w+) +tunnel, TLS: ([\d.]+) x  tunnel, plain: ([\d.]+) x$")
    assert [row[0] for row in found] == ["to the user", "to the service"] and all(
        float(figure) > 0 for row in found for figure in row[1:]
    )


def test_dns() -> None:
    for name in ("unbound", "dnsmasq", "dnsperf"):
        program(name)
    text = output(
        "dns.py", "--rounds", "1", "--seconds", "0.5", statuses=(0, 1)
    )  # 1: the rate, which is nobody's here
    found = rows(
        text,
        r"(netproxyd|dnsmasq) +(kept|fresh) +([\d,]+) +[\d,]+ +[\d,]+ +\d+ +(\d+) +(\d+)  (.*)$",
    )
    assert [row[:2] for row in found] == [
        (server, load) for server in ("netproxyd", "dnsmasq") for load in ("kept", "fresh")
    ]
    assert all(int(row[2].replace(",", "")) > 0 and row[4:] == ("0", "-") for row in found)
    assert sum(int(row[3]) for row in found) > 0
    assert re.search(r"Ratio to dnsmasq: kept [\d.]+, fresh [\d.]+", text)
