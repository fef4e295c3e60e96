#!/usr/bin/env python3
"""What the UDP relay costs and carries: a table by sessions, targets, kind of load and level of batching.

  python3 tests/bench/udp.py            some minutes
  python3 tests/bench/udp.py --quick    some seconds, and less exact

Starts netproxyd on loopback, senders and a sink; they are processes of their own.
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
FEW, MANY = 8, 2000  # sessions whose costs are compared
RETRY = 2.1  # seconds: netproxyd tries no sooner again what has failed
HELD = 500  # associations whose memory is told
WAY_WIDTHS = (11, 12, 12, 12, 12)
WIDTHS = (8, 8, 7, 5, 11, 11, 7, 11)
EXPLANATION = f"""
{SIZE}-byte datagrams of clients that take turns.  lone: each has one at a time.  burst: {TRAIN} in a row.
train: {TRAIN} by one UDP_SEGMENT.  echo: one at a time at a quarter of the pace, and sent back; both ways count.
us/datagram: processor time of the daemon.  flood/s: what arrives of as many as can be sent by this machine.
"""


class Plan(NamedTuple):
    rows: tuple[
        tuple[str, int, int, tuple[str, ...]], ...
    ]  # level, sessions, targets a client, loads
    seconds: float  # of a paced measurement
    flood: float  # of a flood, 0: none
    floods: tuple[int, ...]  # sessions with which there is one
    rounds: int  # of the ways out


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
    def __init__(self, plan: Plan, rate: int) -> None:
        self._plan = plan
        self._rate = rate
        self.costs: dict[tuple[str, int, int, str], float] = {}
        self._sink = Sink(max(targets for _, _, targets, _ in plan.rows))
        self._clients = Clients()

    def run(self) -> None:
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
        if settle(self._sink) < sent:  # some did not get through: once more, when they may
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
        """Microseconds a datagram, datagrams delivered a second, the part of them lost."""
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
        """MiB that associations with a session each add, after the first."""
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

    def ways(self) -> None:
        """What a datagram costs by each way out, beside the direct one; rounds in turn, medians."""
        with Netproxyd() as hop:
            at = f"{hop.address[0]}:{hop.address[1]}"
            urls = {
                "direct": "direct",
                "socks5": f"socks5://{at}",
                "connect-udp": f"http://{at}",
                "uot": f"socks5://{at}?udp=uot",
            }
            daemons = {way: Netproxyd(way=url) for way, url in urls.items()}
            try:
                costs = {
                    (way, load): statistics.median(found)
                    for (way, load), found in self._way_costs(daemons).items()
                }
            finally:
                for daemon in daemons.values():
                    daemon.stop()
        print(
            f"\nProcessor time a datagram by way out, {FEW} clients, and as a multiple of the direct way's:\n"
        )
        print_row(WAY_WIDTHS, "way out", *LOADS)
        for way in urls:
            print_row(
                WAY_WIDTHS,
                way,
                *(
                    f"{costs[way, load]:.2f} {costs[way, load] / max(1e-9, costs['direct', load]):.2f}x"
                    for load in LOADS
                ),
            )

    def _way_costs(self, daemons: dict[str, Netproxyd]) -> dict[tuple[str, str], list[float]]:
        costs: dict[tuple[str, str], list[float]] = {}
        for _ in range(self._plan.rounds):
            for way, daemon in daemons.items():
                self._sink.call("echo", True)
                self._clients.call("open", daemon.address, FEW, self._sink.targets[:1])
                settle(self._sink)
                for load in LOADS:
                    costs.setdefault((way, load), []).append(self._measure(daemon, load)[0])
                self._clients.call("close")
        return costs

    def stop(self) -> None:
        self._clients.stop()
        self._sink.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures netproxyd's UDP relay on loopback.")
    parser.add_argument("--quick", action="store_true", help="fewer rows, shorter measurements")
    parser.add_argument(
        "--rate",
        type=int,
        default=40_000,
        help="datagrams a second of the paced loads (default: 40000)",
    )
    parser.add_argument("--ways", action="store_true", help="only what the ways out cost")
    options = parser.parse_args()
    plan = QUICK_PLAN if options.quick else THOROUGH_PLAN
    if raise_descriptor_limit(MANY * 2 + 200) < MANY * 2 + 200:
        raise SystemExit(f"this needs {MANY * 2 + 200} descriptors: raise the limit with ulimit -n")
    print(
        f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} processors, "
        f"{options.rate:,} datagrams/s"
    )
    print(EXPLANATION)
    bench = Bench(plan, options.rate)
    try:
        bench.ways()
        if options.ways:
            return
        bench.run()
        ratios = [
            f"{load} {bench.costs['vectors', MANY, 1, load] / max(1e-9, bench.costs['vectors', FEW, 1, load]):.2f}"
            for load in LOADS
        ]
        print(
            f"\nCost of a datagram at {MANY:,} sessions, as a multiple of that at {FEW}: {', '.join(ratios)}"
        )
        print(f"Memory added by {HELD} associations: {bench.memory():.1f} MiB")
    finally:
        bench.stop()


if __name__ == "__main__":
    main()
