#!/usr/bin/env python3
"""Watches memory, descriptors and threads of netproxyd under a load of every kind.

  python3 tests/bench/soak_mixed.py                 90 minutes; more with --minutes
  python3 tests/bench/soak_mixed.py --minutes 0.3   a short run

The good clients of the hostile hour (good.py), without anything hostile: TCP, HTTP, TLS, BIND, UDP
in all forms, chains, groups, tunnels and DNS. Prints a row each minute. The exit status is 1 if a
client loses something or gets a wrong byte, if something is left at the end, if memory grows by
more than 0.5 % an hour after the first 20 minutes, or if descriptors or threads grow. Memory is
judged in runs of an hour or more, descriptors and threads in runs of forty minutes or more: the
sessions of an agent's UDP port last for five.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from rig import LOOPBACK, SECONDS, free_port, print_row, raise_descriptor_limit

from conversation import Site
from good import KINDS, GoodClients, Outcome

from scene import PORTS, Daemon, Sample, agent, configuration, control_path, end_agent_sessions
from scene import hop
from soak import SPARE, halves, slope
from world import Servers

from tests.support.certificates import certificates
from tests.support.results import note

# The time before anything is expected to be flat, at most this part of a run.
WARM_UP, WARM_UP_PART = 1200.0, 0.3
# Growth of resident memory, in per cent an hour.
GROWTH = 0.5
# Seconds of a run after which memory, and descriptors and threads, are judged.
LONG_FOR_MEMORY, LONG = 3600.0, 2400.0
# Work connections that agents keep, more or less.
AGENT_DESCRIPTORS = 10
# Sessions of UDP clients end a while after the last datagram, and idle threads after that.
CLEAN_SECONDS = 60.0
LOG = "log: {access: false}"
WIDTHS = (8, 9, 12, 8, 10, 8)


def start(stack: ExitStack, folder: Path) -> tuple[Site, GoodClients, list[Daemon]]:
    """Start all processes. The first daemon is the one to watch."""
    servers, clients = Servers(LOOPBACK), GoodClients()
    for process in (servers, clients):
        stack.callback(process.stop)
    ports = {name: free_port() for name in PORTS}
    site = Site(LOOPBACK, ports, servers.world, certificates().path("ca.pem"))
    more = f"{LOG}\n"
    steady = agent(site, "steady", LOOPBACK, hop(LOOPBACK, ports["steady"])) + more
    files = {
        "daemon": configuration(site, folder, LOOPBACK, LOOPBACK, LOG),
        "steady": steady,
        **{name: hop(LOOPBACK, ports[name]) + more for name in ("second", "fragile1", "fragile2")},
    }
    daemons = [Daemon(folder, name, config) for name, config in files.items()]
    for daemon in daemons:
        stack.callback(daemon.finish)
    deadline = time.monotonic() + SECONDS
    while failed := clients.call("try_all", site):
        if time.monotonic() > deadline:
            raise SystemExit("\n".join(map(str, failed)))
    return site, clients, daemons


def watch(
    daemon: Daemon, clients: GoodClients, seconds: float, outcomes: list[Outcome]
) -> list[Sample]:
    """Print a row each minute, or more often in a short run."""
    interval = max(1.0, min(60.0, seconds / 12))
    print_row(WIDTHS, "seconds", "RSS MiB", "descriptors", "threads", "served/s", "lost")
    samples: list[Sample] = []
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        time.sleep(min(interval, max(0.0, seconds - now)))
        new = clients.call("report")
        outcomes += new
        took, now = time.monotonic() - began - now, time.monotonic() - began
        samples.append(daemon.sample(now))
        print_row(
            WIDTHS,
            f"{now:.0f}",
            f"{samples[-1].resident:.2f}",
            samples[-1].descriptors,
            samples[-1].threads,
            f"{len(new) / took:.1f}",
            sum(bool(outcome.why) for outcome in outcomes),
        )
    return samples


def verdict(samples: list[Sample], seconds: float) -> tuple[list[str], float]:
    """Return what grows, and the growth of memory in per cent an hour."""
    warm_up = min(WARM_UP, seconds * WARM_UP_PART)
    rest = [sample for sample in samples if sample.at >= warm_up]
    memory = [(sample.at, sample.resident) for sample in rest]
    mean = sum(resident for _, resident in memory) / len(memory)
    growth = slope(memory) * 3600 / mean * 100
    print(f"\nRSS: {mean:.2f} MiB, {growth:+.2f} % an hour after the first {warm_up:.0f} s")
    faults = []
    if growth > GROWTH and seconds >= LONG_FOR_MEMORY:
        faults.append("resident memory grows")
    for name in ("descriptors", "threads"):
        first, second = halves([getattr(sample, name) for sample in rest])
        print(f"{name}: {first:.1f} in the first half of it, {second:.1f} in the second")
        if second - first > SPARE + first / 20 and seconds >= LONG:
            faults.append(f"{name} grow")
    return faults, growth


def left_over(daemon: Daemon, before: Sample) -> list[str]:
    """Wait until all of the clients has gone. Return what is left."""
    deadline = time.monotonic() + CLEAN_SECONDS
    while True:
        left = {
            "descriptors": daemon.descriptors() - before.descriptors,
            "threads": daemon.threads() - before.threads,
        }
        if max(left.values()) <= AGENT_DESCRIPTORS or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    print("with all clients gone: " + ", ".join(f"{left[name]:+d} {name}" for name in left))
    return [f"{name} left over" for name, value in left.items() if value > AGENT_DESCRIPTORS]


def run(seconds: float, count: int, folder: Path) -> list[str]:
    """Run the load. Return what is wrong."""
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        site, clients, daemons = start(stack, folder)
        before = daemons[0].sample(0)
        clients.call("start", site, count)
        samples = watch(daemons[0], clients, seconds, outcomes)
        outcomes += clients.call("end")
        end_agent_sessions(site, control_path(folder))
        faults, growth = verdict(samples, seconds)
        faults += left_over(daemons[0], before)
        faults += [fault for daemon in daemons for fault in daemon.finish()]
    served = Counter(outcome.kind for outcome in outcomes if not outcome.why)
    faults += [f"{outcome.kind}: {outcome.why}" for outcome in outcomes if outcome.why]
    faults += [f"{kind}: never served" for kind in KINDS if not served[kind]]
    print("served: " + ", ".join(f"{kind} {served[kind]}" for kind in KINDS))
    # In a short run the growth says nothing.
    long_run = {"RSS, % an hour": round(growth, 2)} if seconds >= LONG_FOR_MEMORY else {}
    note(
        "soak",
        not faults,
        minutes=round(seconds / 60, 1),
        clients=count * len(KINDS),
        **{"conversations": sum(served.values()), "lost": len(outcomes) - sum(served.values())},
        **{"RSS, MiB": [round(samples[0].resident, 2), round(samples[-1].resident, 2)]},
        **long_run,
        descriptors=[samples[0].descriptors, samples[-1].descriptors],
        threads=[samples[0].threads, samples[-1].threads],
    )
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Watch netproxyd's memory, descriptors and threads under a load of every kind."
    )
    parser.add_argument("--minutes", type=float, default=90.0, help="how long (default: 90)")
    parser.add_argument("--clients", type=int, default=3, help="of each kind (default: 3)")
    options = parser.parse_args()
    raise_descriptor_limit(4096)
    with tempfile.TemporaryDirectory(prefix="netproxy-soak-") as temporary:
        try:
            faults = run(options.minutes * 60, options.clients, Path(temporary))
        except pytest.skip.Exception as why:
            raise SystemExit(f"not possible here: {why}") from None
    print("flat" if not faults else "\n".join(["NOT FLAT:", *faults]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
