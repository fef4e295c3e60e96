#!/usr/bin/env python3
"""Measures long lists of domains and networks: loading, memory, and the time of a decision.

  python3 tests/bench/rules.py [--domains 200000] [--networks 50000]

Writes two list files with the same contents each time, reads them as netproxyd does, and asks for
names and addresses that are in them or not.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from netproxy.interfaces.networks import NetworkSet  # noqa: E402
from netproxy.router.lists import read_domains, read_networks  # noqa: E402
from netproxy.router.matchers import DomainSet  # noqa: E402

# Names or addresses for each line of the table.
ASKED = 1000
# The fastest round counts.
ROUNDS = 5
# How patterns begin: most are single names.
MARKS = ("", "", "", ".", "*.")
WIDTHS = (28, 10, 15)


def name(number: int) -> str:
    """Return a domain of the list, about twenty letters long."""
    pick = random.Random(number)
    first, second, last = (
        pick.choice(words)
        for words in (
            ("ads", "track", "pixel", "cdn", "metrics"),
            ("news-site", "shop", "media", "games"),
            ("com", "net", "example", "co.uk"),
        )
    )
    return f"{first}{number:x}.{second}{pick.randrange(5000)}.{last}"


def network(number: int) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return a network of the list. Four of five are IPv4, none of them in 0.0.0.0/8.

    All IPv6 networks are in 2000::/3.
    """
    pick = random.Random(number)
    if number % 5:
        return ipaddress.IPv4Network(
            (pick.randrange(1 << 24, 1 << 32), pick.randint(16, 32)), strict=False
        )
    return ipaddress.IPv6Network(
        ((1 << 125) + pick.randrange(1 << 125), pick.randint(32, 64)), strict=False
    )


def write_lists(folder: Path, domains: int, networks: int) -> tuple[Path, Path]:
    """Write both list files. Return their paths."""
    names, addresses = folder / "domains.txt", folder / "networks.txt"
    with names.open("w") as file:
        for number in range(domains):
            file.write(f"{MARKS[number % len(MARKS)]}{name(number)}\n")
    with addresses.open("w") as file:
        for number in range(networks):
            file.write(f"{network(number)}\n")
    return names, addresses


def sample(count: int) -> list[int]:
    """Return numbers of entries, the same ones each time."""
    return random.Random(count).sample(range(count), min(count, ASKED))


def resident_mib() -> float:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / (1 << 20)


def load(label: str, build: Callable[[], Any]) -> Any:
    """Print time and memory of loading a list. Return the list."""
    memory, start = resident_mib(), time.perf_counter()
    loaded = build()
    seconds = time.perf_counter() - start
    print_row(label, f"{seconds:.2f} s", f"{resident_mib() - memory:.1f} MiB")
    return loaded


def ask(label: str, matcher: Any, hosts: Sequence[str]) -> None:
    """Print the time of a decision: the fastest round, because other programs only add time."""
    best, hits = float("inf"), 0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        hits = sum([host in matcher for host in hosts])
        best = min(best, time.perf_counter() - start)
    print_row(label, f"{best / len(hosts) * 1e6:.2f} us", f"{hits} of {len(hosts)}")


def print_row(*cells: str) -> None:
    """Print a row of the table."""
    first, *others = cells
    columns = zip(others, WIDTHS[1:], strict=True)
    print(first.ljust(WIDTHS[0]) + "".join(cell.rjust(width) for cell, width in columns))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure what long lists of domains and networks cost netproxyd."
    )
    parser.add_argument("--domains", type=int, default=200_000)
    parser.add_argument("--networks", type=int, default=50_000)
    options = parser.parse_args()
    print(f"CPython {sys.version.split()[0]}, {os.cpu_count()} processors\n")
    with tempfile.TemporaryDirectory(prefix="netproxy-bench-") as folder:
        names, addresses = write_lists(Path(folder), options.domains, options.networks)
        print_row("list", "load", "memory")
        domains = load(f"{options.domains:,} domains", lambda: DomainSet(read_domains(str(names))))
        networks = load(
            f"{options.networks:,} networks", lambda: NetworkSet(read_networks(str(addresses)))
        )
    some = sample(options.domains)
    held = [network(number) for number in sample(options.networks)]
    print()
    print_row("decision", "time", "in the list")
    ask(
        "name, listed",
        domains,
        [name(number) for number in some if MARKS[number % len(MARKS)] != "*."],
    )
    ask(
        "name, below a listed one",
        domains,
        [f"www.{name(number)}" for number in some if MARKS[number % len(MARKS)]],
    )
    ask("name, not listed", domains, [f"www.{name(number)}.org" for number in some])
    ask("name of 40 labels", domains, ["x." * 37 + f"{name(number)}.org" for number in some])
    for version, outside in (4, "0.1.{}.{}"), (6, "fd00::{}:{}"):
        ask(
            f"IPv{version}, listed",
            networks,
            [str(entry[-1]) for entry in held if entry.version == version],
        )
        ask(
            f"IPv{version}, not listed",
            networks,
            [outside.format(index >> 8, index & 255) for index in range(ASKED)],
        )
    ask("name, asked of networks", networks, [name(number) for number in some])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
