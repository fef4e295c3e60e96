#!/usr/bin/env python3
"""Measures the UDP relay by level of batching, number of sessions and targets, and kind of load.

  python3 tests/bench/udp.py            some minutes
  python3 tests/bench/udp.py --quick    some seconds, less exact

Starts netproxyd on loopback, clients and targets, each in its own process.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from typing import NamedTuple

from load import SIZE, TRAIN, Clients, Sink, settle
from rig import Netproxyd, print_row, raise_descriptor_limit

LOADS = ("lone", "burst", "train", "echo")
# Sessions whose costs are compared.
FEW, MANY = 8, 2000
# Seconds until netproxyd tries again to open a session that has failed.
RETRY = 2.1
# Associations whose memory is measured.
HELD = 500
UPSTREAM_WIDTHS = (11, 12, 12, 12, 12)
WIDTHS = (8, 8, 7, 5, 11, 11, 7, 11)
EXPLANATION = f"""
Clients take turns to send datagrams of {SIZE} bytes. lone: one at a time. burst: {TRAIN} in a row.
train: {TRAIN} with one UDP_SEGMENT. echo: one at a time, at a quarter of the rate, and sent back;
both directions count. us/datagram: processor time of the daemon. flood/s: datagrams that arrive
when this machine sends as many as it can.
"""


Row = tuple[str, int, int, tuple[str, ...]]
"""Level of batching, sessions, targets of each client, loads."""


class Plan(NamedTuple):
    """What is measured, and for how long."""

    rows: tuple[Row, ...]
    seconds: float
    """Of a measurement at a fixed rate."""
    flood: float
    """Seconds of a flood; 0 for none."""
    floods: tuple[int, ...]
    """Numbers of sessions with which there is a flood."""
    rounds: int
    """Of the comparison of upstreams."""


ALL = tuple(
    (level, sessions, targets, LOADS)
    for level, every in (
        (
            "mmsg",
            (
                (1, 1),
                (1, 50),
                (FEW, 1),
                (FEW, 10),
                (FEW, 50),
                (100, 1),
                (100, 50),
                (MANY, 1),
                (MANY, 10),
            ),
        ),
        ("trains", ((1, 1), (FEW, 1), (FEW, 50), (100, 1), (MANY, 1))),
        ("single", ((1, 1), (FEW, 1), (FEW, 50), (100, 1), (MANY, 1))),
    )
    for sessions, targets in every
)
QUICK = (
    ("mmsg", 1, 1, ("lone", "train")),
    ("mmsg", FEW, 1, LOADS),
    ("mmsg", FEW, 50, ("lone",)),
    ("mmsg", 100, 1, ("lone",)),
    ("mmsg", MANY, 1, LOADS),
    ("trains", FEW, 1, ("burst",)),
    ("single", FEW, 1, ("burst",)),
)
THOROUGH_PLAN = Plan(ALL, 1.5, 1.0, (1, FEW, 100, MANY), 5)
QUICK_PLAN = Plan(QUICK, 0.25, 0.2, (FEW,), 1)


class Bench:
    """Runs the measurements of a plan and prints them."""

    def __init__(self, plan: Plan, rate: int) -> None:
        self._plan = plan
        self._rate = rate
        self.costs: dict[tuple[str, int, int, str], float] = {}
        self._sink = Sink(max(targets for _, _, targets, _ in plan.rows))
        self._clients = Clients()

    def run(self) -> None:
        """Print a row for each level, number of sessions and targets, and load."""
        print_row(
            WIDTHS,
            "batching",
            "sessions",
            "targets",
            "load",
            "us/datagram",
            "delivered/s",
            "loss",
            "flood/s",
        )
        for level in dict.fromkeys(row[0] for row in self._plan.rows):
            with Netproxyd(level) as daemon:
                for row in self._plan.rows:
                    if row[0] == level:
                        self._measure_row(daemon, *row)

    def _measure_row(
        self, daemon: Netproxyd, level: str, sessions: int, targets: int, loads: tuple[str, ...]
    ) -> None:
        self._sink.call("echo", False)
        sent = self._clients.call("open", daemon.address, sessions, self._sink.targets[:targets])
        if settle(self._sink) < sent:
            # Some sessions were not opened: try again.
            time.sleep(RETRY)
            self._clients.call("open_targets")
            settle(self._sink)
        for load in loads:
            cost, delivered, loss = self._measure(daemon, load)
            self.costs[level, sessions, targets, load] = cost
            flood = ""
            if self._plan.flood and sessions in self._plan.floods and load != "echo":
                flood = f"{self._flood(load):,.0f}"
            print_row(
                WIDTHS,
                level,
                f"{sessions:,}",
                targets,
                load,
                f"{cost:.2f}",
                f"{delivered:,.0f}",
                f"{loss:.2%}",
                flood,
            )
        self._clients.call("close")

    def _measure(self, daemon: Netproxyd, load: str) -> tuple[float, float, float]:
        """Return microseconds per datagram, datagrams delivered per second, and the part lost."""
        echo = load == "echo"
        self._sink.call("echo", echo)
        before = daemon.processor_seconds()
        done = self._clients.call(
            "run", load, self._rate / 4 if echo else self._rate, self._plan.seconds
        )
        reached = settle(self._sink)
        spent = daemon.processor_seconds() - before
        delivered = done.received if echo else reached
        passed = reached + done.received
        return spent / max(1, passed) * 1e6, passed / done.seconds, 1 - delivered / done.sent

    def _flood(self, load: str) -> float:
        done = self._clients.call("run", load, 0, self._plan.flood)
        return settle(self._sink) / done.seconds

    def memory(self) -> float:
        """Return the MiB that HELD associations with one session each add, after the first one."""
        with Netproxyd() as daemon:
            self._sink.call("echo", True)
            others = Clients()
            others.call("open", daemon.address, 1, self._sink.targets[:1])
            time.sleep(0.2)
            before = daemon.resident_mib()
            self._clients.call("open", daemon.address, HELD, self._sink.targets[:1])
            settle(self._sink)
            time.sleep(0.2)
            added = daemon.resident_mib() - before
            for clients in (others, self._clients):
                clients.call("close")
            others.stop()
        return added

    def upstreams(self) -> None:
        """Print the cost of a datagram through each upstream: medians of alternating rounds."""
        with Netproxyd() as hop:
            at = f"{hop.address[0]}:{hop.address[1]}"
            urls = {
                "direct": "direct",
                "socks5": f"socks5://{at}",
                "connect-udp": f"http://{at}",
                "uot": f"socks5://{at}?udp=uot",
            }
            daemons = {name: Netproxyd(upstream=url) for name, url in urls.items()}
            try:
                costs = {
                    key: statistics.median(values)
                    for key, values in self._upstream_costs(daemons).items()
                }
            finally:
                for daemon in daemons.values():
                    daemon.stop()
        print(f"\nProcessor time of a datagram, {FEW} clients, and its ratio to direct:\n")
        print_row(UPSTREAM_WIDTHS, "upstream", *LOADS)
        for name in urls:
            cells = []
            for load in LOADS:
                cost, direct = costs[name, load], max(1e-9, costs["direct", load])
                cells.append(f"{cost:.2f} {cost / direct:.2f}x")
            print_row(UPSTREAM_WIDTHS, name, *cells)

    def _upstream_costs(self, daemons: dict[str, Netproxyd]) -> dict[tuple[str, str], list[float]]:
        costs: dict[tuple[str, str], list[float]] = {}
        for _ in range(self._plan.rounds):
            for name, daemon in daemons.items():
                self._sink.call("echo", True)
                self._clients.call("open", daemon.address, FEW, self._sink.targets[:1])
                settle(self._sink)
                for load in LOADS:
                    costs.setdefault((name, load), []).append(self._measure(daemon, load)[0])
                self._clients.call("close")
        return costs

    def stop(self) -> None:
        """End the processes of clients and targets."""
        self._clients.stop()
        self._sink.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures netproxyd's UDP relay on loopback.")
    parser.add_argument("--quick", action="store_true", help="fewer rows, shorter measurements")
    parser.add_argument(
        "--rate",
        type=int,
        default=40_000,
        help="datagrams per second at a fixed rate (default: 40000)",
    )
    parser.add_argument("--upstreams", action="store_true", help="only compare upstreams")
    options = parser.parse_args()
    plan = QUICK_PLAN if options.quick else THOROUGH_PLAN
    if raise_descriptor_limit(MANY * 2 + 200) < MANY * 2 + 200:
        raise SystemExit(f"this needs {MANY * 2 + 200} descriptors: raise the limit with ulimit -n")
    print(
        f"Python {platform.python_version()}, Linux {platform.release()}, "
        f"{os.cpu_count()} processors, {options.rate:,} datagrams/s"
    )
    print(EXPLANATION)
    bench = Bench(plan, options.rate)
    try:
        bench.upstreams()
        if options.upstreams:
            return
        bench.run()
        ratios = []
        for load in LOADS:
            few, many = bench.costs["mmsg", FEW, 1, load], bench.costs["mmsg", MANY, 1, load]
            ratios.append(f"{load} {many / max(1e-9, few):.2f}")
        print(
            f"\nCost of a datagram at {MANY:,} sessions, "
            f"as a multiple of that at {FEW}: {', '.join(ratios)}"
        )
        print(f"Memory added by {HELD} associations: {bench.memory():.1f} MiB")
    finally:
        bench.stop()


if __name__ == "__main__":
    main()
