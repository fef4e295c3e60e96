#!/usr/bin/env python3
"""A hostile hour: everything that happens to a proxy, at once, while good clients check every byte.

  python3 tests/bench/hostile.py                              an hour, ten good clients of each kind
  python3 tests/bench/hostile.py --minutes 0.7 --clients 2    a short form

Hostile clients (attacks.py) and troubles (troubles.py) go on all the time. Good clients (good.py)
of every kind lose nothing: no conversation ends early or waits in vain, and no byte is wrong.

Three troubles break flows of good clients as well, because they hit the daemon's own system calls
or the only upstream of a flow: 2 % faults, the descriptor limit, and an upstream that is down.
While one of them lasts, and some seconds afterwards (GRACE in troubles.py), a good client may lose
a conversation. The program counts these, and how many the daemon's log explains: a record for the
client's port that tells why the flow ended. A loss at any other time is a failure. Wrong bytes
always are.

Needs root for the network namespaces. Without libfiu there are no faults, and without a C compiler
the clock does not jump. The exit status is 1 if a conversation was lost, bytes were wrong, memory,
descriptors or threads grow, something is left at the end, or a log has a traceback.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from rig import SECONDS, print_row, raise_descriptor_limit

from attacks import Attacks, Ground
from conversation import Site
from good import KINDS, GoodClients, Outcome

from scene import BAD, BAD_HOSTS, DAEMON, GOOD, OUTER, PORTS, Daemon, LogReader, Sample
from scene import agent, configuration, control_path, end_agent_sessions, hop, preloads
from soak import CLEAN_SECONDS, SPARE, halves, slope
from troubles import CYCLE, Troubles, Window, faults_of
from world import Servers

from tests.e2e.namespaces import Namespace, connect, hosts
from tests.support.certificates import certificates
from tests.support.results import note

# The part of the time before anything is expected to be flat.
WARM_UP = 0.3
# MiB that may be added in the rest of a run of LONG_RUN seconds or more.
GROWTH_MIB, LONG_RUN = 4.0, 600.0
# Work connections that an agent keeps, more or less.
AGENT_DESCRIPTORS = 10
LOG = "log: {level: info, queue: 65536}"
WIDTHS = (8, 9, 12, 8, 8, 8, 10)
_NO_FILTER = "for file in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $file; done"


class Account:
    """The outcomes of the good clients, and which of them are failures."""

    def __init__(self, log: LogReader, windows: list[Window]) -> None:
        self._log, self._windows = log, windows
        self.served: Counter[str] = Counter()
        self.lost: list[Outcome] = []

    def add(self, outcomes: list[Outcome]) -> None:
        """Note outcomes."""
        for outcome in outcomes:
            if outcome.why:
                self.lost.append(outcome)
            else:
                self.served[outcome.kind] += 1

    def judge(self) -> tuple[list[str], dict[str, int]]:
        """Return the failures, and counts. Call it when all windows are known."""
        failures, counts = [], {"broken, explained": 0, "broken, no record": 0}
        for outcome in self.lost:
            covered = any(
                window.covers(outcome.kind, outcome.began, outcome.ended)
                for window in self._windows
            )
            if outcome.wrong or not covered:
                failures.append(f"{outcome.kind} at {outcome.ended:.1f}: {outcome.why}")
            elif self._log.explains(outcome.ports, outcome.began):
                counts["broken, explained"] += 1
            else:
                counts["broken, no record"] += 1
                print(f"no record: {outcome.kind} at {outcome.ports}: {outcome.why}")
        failures += [f"{kind}: never served" for kind in KINDS if not self.served[kind]]
        return failures, counts


class Scene:
    """All processes of a run."""

    def __init__(self, stack: ExitStack, folder: Path, count: int) -> None:
        """`count`: good clients of each kind."""
        self._count = count
        names = stack.enter_context(hosts("middle", "good", "bad", "outer"))
        middle, good, bad, outer = names
        self._connect(middle, good, bad, outer)
        authority = certificates().path("ca.pem")
        servers = Servers(OUTER, outer.socket)
        self.clients, self.attacks = GoodClients(good.enter), Attacks(bad.enter)
        for process in (servers, self.clients, self.attacks):
            stack.callback(process.stop)
        self.site = Site(DAEMON.format(1), PORTS, servers.world, authority)
        self.ground = Ground(
            self.site._replace(host=DAEMON.format(2)),
            tuple(BAD.format(number) for number in BAD_HOSTS),
            GOOD,
            "10.90.",
        )
        self.preloads = preloads(folder)
        self.others = self._start_others(folder, outer)
        stack.callback(faults_of, self.others)
        self.log = LogReader(folder / "daemon-read.log", [GOOD])
        config = configuration(self.site, folder, "0.0.0.0", OUTER, LOG)
        more = self.preloads.variables
        self.daemon = Daemon(folder, "daemon", config, middle, more, self.log)
        stack.callback(self.daemon.finish)
        self.log.wait_until_serving()
        self._control = control_path(folder)
        self.troubles = Troubles(self.daemon, self.log, self.others, self.preloads, self._control)

    @staticmethod
    def _connect(middle: Namespace, good: Namespace, bad: Namespace, outer: Namespace) -> None:
        """Join the namespaces. The daemon's host takes forged packets as well."""
        connect(middle, [f"{DAEMON.format(1)}/24"], good, [f"{GOOD}/24"])
        addresses = [f"{BAD.format(number)}/24" for number in BAD_HOSTS]
        connect(middle, [f"{DAEMON.format(2)}/24"], bad, addresses)
        connect(middle, [f"{DAEMON.format(3)}/24"], outer, [f"{OUTER}/24"])
        command = ("ip", "netns", "exec", middle.name, "sh", "-c", _NO_FILTER)
        subprocess.run(command, check=True)

    def _start_others(self, folder: Path, outer: Namespace) -> dict[str, Daemon]:
        bridge = DAEMON.format(3)
        steady = agent(self.site, "steady", bridge, hop(OUTER, PORTS["steady"]))
        comer = agent(self.site, "comer", bridge, "listeners: []")
        others = {
            "steady": Daemon(folder, "steady", steady + "log: {level: debug}\n", outer, full=True),
            "comer": Daemon(folder, "comer", comer, outer),
        }
        for name in ("second", "fragile1", "fragile2"):
            others[name] = Daemon(folder, name, hop(OUTER, PORTS[name]), outer)
        return others

    def begin(self) -> tuple[int, int]:
        """Wait until each kind of good client is served. Return descriptors and threads."""
        deadline = time.monotonic() + SECONDS
        while failed := self.clients.call("try_all", self.site):
            if time.monotonic() > deadline:
                raise SystemExit("\n".join(map(str, failed)))
        before = self.daemon.descriptors(), self.daemon.threads()
        self.clients.call("start", self.site, self._count)
        self.attacks.call("start", self.ground)
        self.troubles.start()
        return before

    def left_over(self, before: tuple[int, int], threads: bool) -> list[str]:
        """Wait until all of the clients has gone. Return what is left."""
        end_agent_sessions(self.site, self._control)
        deadline = time.monotonic() + CLEAN_SECONDS + SECONDS
        while True:
            left = {"descriptors": self.daemon.descriptors() - before[0] - AGENT_DESCRIPTORS}
            if threads:
                left["threads"] = self.daemon.threads() - before[1]
            if max(left.values()) <= SPARE or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return [f"{value} {name} left over" for name, value in left.items() if value > SPARE]


def watch(scene: Scene, account: Account, seconds: float) -> list[Sample]:
    """Print a row each minute, or more often in a short run. Return a sample for each cycle."""
    interval = max(1.0, min(60.0, seconds / 12))
    print_row(WIDTHS, "seconds", "RSS MiB", "descriptors", "threads", "served", "broken", "reloads")
    samples: list[Sample] = []
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        time.sleep(min(interval, max(0.0, seconds - now)))
        account.add(scene.clients.call("report"))
        now = time.monotonic() - began
        samples.append(scene.daemon.sample(now))
        print_row(
            WIDTHS,
            f"{now:.0f}",
            f"{samples[-1].resident:.2f}",
            samples[-1].descriptors,
            samples[-1].threads,
            sum(account.served.values()),
            len(account.lost),
            scene.log.counts["reloaded"],
        )
    return samples


def grows(samples: list[Sample], seconds: float) -> list[str]:
    """Return what is not flat after the warm-up of a long run."""
    rest = [sample for sample in samples if sample.at >= seconds * WARM_UP]
    growth = slope([(sample.at, sample.resident) for sample in rest]) * (rest[-1].at - rest[0].at)
    print(f"RSS: {growth:+.2f} MiB in the {rest[-1].at - rest[0].at:.0f} s after the warm-up")
    if seconds < LONG_RUN:
        return []
    faults = ["resident memory grows"] if growth > GROWTH_MIB else []
    for name in ("descriptors", "threads"):
        first, second = halves([getattr(sample, name) for sample in rest])
        print(f"{name}: {first:.1f} in the first half of it, {second:.1f} in the second")
        # Windows of troubles and rows meet differently in the two halves.
        if second - first > SPARE + first / 5:
            faults.append(f"{name} grow")
    return faults


def run(seconds: float, count: int, folder: Path) -> list[str]:
    """Run everything. Return what is wrong."""
    with ExitStack() as stack:
        scene = Scene(stack, folder, count)
        for name, place in zip(
            ("libfiu (2 % faults)", "a C compiler (jumps of the clock)"),
            scene.preloads[1:],
            strict=True,
        ):
            if place is None:
                print(f"{name} is not installed: without its troubles")
        before = scene.begin()
        account = Account(scene.log, scene.troubles.windows)
        samples = watch(scene, account, seconds)
        scene.troubles.stop()
        attacks = scene.attacks.call("end")
        account.add(scene.clients.call("end"))
        faults = scene.left_over(before, threads=seconds >= CYCLE)
        faults += scene.daemon.finish() + faults_of(scene.others) + scene.troubles.faults
        failures, counts = account.judge()
        faults += grows(samples, seconds) + failures
        counts |= {"served": sum(account.served.values()), "lost": len(failures)}
    print("served: " + ", ".join(f"{kind} {account.served[kind]}" for kind in KINDS))
    print("good clients: " + _text(counts))
    print("log: " + _text(scene.log.counts))
    print("attacks: " + _text(attacks))
    print("troubles: " + _text(scene.troubles.counts))
    note(
        "hostile",
        not faults,
        minutes=round(seconds / 60, 1),
        clients=count * len(KINDS),
        **{"good clients": counts, "log": scene.log.counts},
        **{"attacks": attacks, "troubles": scene.troubles.counts},
        **{"RSS, MiB": [round(samples[0].resident, 1), round(samples[-1].resident, 1)]},
        **{"most descriptors": max(sample.descriptors for sample in samples)},
        **{"most threads": max(sample.threads for sample in samples)},
    )
    return faults


def _text(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Trouble netproxyd in every way at once.")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument(
        "--clients", type=int, default=10, help="good clients of each kind (default: 10)"
    )
    parser.add_argument("--keep", type=Path, help="a folder for files and logs, which are kept")
    options = parser.parse_args()
    raise_descriptor_limit(8192)
    with tempfile.TemporaryDirectory(prefix="netproxy-hostile-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            faults = run(options.minutes * 60, options.clients, folder)
        except pytest.skip.Exception as why:
            raise SystemExit(f"not possible here: {why}") from None
    print("unharmed" if not faults else "\n".join(["FAULTS:", *faults]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
