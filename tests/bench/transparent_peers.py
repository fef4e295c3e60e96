#!/usr/bin/env python3
"""Measures netproxyd as a transparent proxy beside sing-box, redsocks and the kernel alone.

  SING_BOX=PROGRAM python3 tests/bench/transparent_peers.py --json FILE

A client, a router with the proxy, and an internet are network namespaces.  Each program is led the
client's flows by the same rules of the kernel: TCP by REDIRECT or TPROXY, UDP by TPROXY.  All of
them connect directly ("direct"), and through one SOCKS5 proxy on the internet ("socks5"), without
which redsocks does nothing.  Programs are measured in turn within a round.

The first part is what works, without figures of time.  Needs root, nft, ip, setpriv, pytest,
cryptography and aioquic.  The exit status is 1 if netproxyd needs more memory than BAR_MIB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest

from load import Sink, settle
from rig import Endpoint, print_row, raise_descriptor_limit
from tcp import target
from transparent_checks import CHECKS, TRAINS, works
from transparent_load import TcpClients, UdpClients
from transparent_programs import Program, Rules, Running, Setting, Upstream, installed, running

from tests.e2e.router import SERVER, Net, network

SOCKETS = 8
"""UDP sockets that send at the same time."""
BAR_MIB, BAR_FLOWS = 24.0, 500
"""The resident memory that netproxyd may have with so many TCP and so many UDP flows."""
REST = 0.5
"""Seconds before memory is read."""
DESCRIPTORS = 8192
UPSTREAMS = ("direct", "socks5")
PARTS = ("works", "speed", "memory")
WIDTHS = (19, 26, 12, 8, 18)


class Figures(NamedTuple):
    """What one program did in one round; 0 is not measured."""

    down_gbits: float = 0.0
    """Of one TCP connection."""
    up_gbits: float = 0.0
    down_seconds_per_gb: float = 0.0
    """Processor time of the program."""
    up_seconds_per_gb: float = 0.0
    connections: float = 0.0
    """Per second, one after the other, with a byte to the target and back."""
    connection_us: float = 0.0
    """Processor time of each."""
    datagrams: float = 0.0
    """Delivered per second to the target, single ones of 1,200 bytes, sent as fast as possible."""
    datagram_us: float = 0.0
    train_datagrams: float = 0.0
    """The same, in trains of 8 (UDP_SEGMENT)."""
    train_datagram_us: float = 0.0
    datagrams_per_receive: float = 0.0
    """Of these trains, at the target: 8 if they stay together.  An upstream may join them."""
    idle_mib: float = 0.0
    """Resident memory."""
    tcp_mib: float = 0.0
    """With TCP flows that wait."""
    flows_mib: float = 0.0
    """With as many UDP flows as well."""


class Load(NamedTuple):
    """The processes at both ends."""

    tcp: TcpClients
    udp: UdpClients
    sink: Sink
    target: Endpoint

    def stop(self) -> None:
        """End them; those that were forked later have copies of the others' pipes."""
        for process in (self.udp, self.tcp, self.sink):
            process.stop()


def _start_load(net: Net, stack: ExitStack) -> Load:
    ours, theirs = get_context("fork").Pipe()
    arguments = (theirs, SERVER, net.internet.socket)
    server = get_context("fork").Process(target=target, args=arguments, daemon=True)
    server.start()
    stack.callback(server.join)
    stack.callback(server.terminate)
    address = ours.recv()
    sink = Sink(SOCKETS, echo=True, host=SERVER, make=net.internet.socket)
    load = Load(TcpClients(net.client), UdpClients(net.client), sink, address)
    stack.callback(load.stop)
    return load


class Meter:
    """Measures the processor time of a program; that of the kernel alone is not known."""

    def __init__(self, process: Running | None) -> None:
        self._process = process
        self.start()

    def start(self) -> None:
        """Measure from now on."""
        self._before = self._process.processor_seconds() if self._process else 0.0

    def per(self, count: float) -> float:
        """Return the seconds since start() for each of `count`."""
        if self._process is None or not count:
            return 0.0
        return (self._process.processor_seconds() - self._before) / count


def measure_speed(load: Load, process: Running | None, seconds: float) -> Figures:
    """Measure throughput and its cost."""
    meter, figures = Meter(process), Figures()
    for direction, name in ((b"d", "down"), (b"u", "up")):
        meter.start()
        traffic = load.tcp.call("bulk", load.target, direction, seconds)
        cost = meter.per(traffic / 1e9)
        speed = traffic * 8 / seconds / 1e9
        figures = figures._replace(
            **{f"{name}_gbits": speed, f"{name}_seconds_per_gb": cost}  # type: ignore[arg-type]
        )
    meter.start()
    done = load.tcp.call("rate", load.target, seconds)
    cost = meter.per(done) * 1e6
    figures = figures._replace(connections=done / seconds, connection_us=cost)
    answered = load.udp.call("open", load.sink.targets)
    if not answered:
        return figures
    load.sink.call("echo", False)
    settle(load.sink)
    rates = {}
    for kind in ("lone", "train"):
        load.sink.call("receives")
        meter.start()
        took = load.udp.call("run", kind, 0, seconds).seconds
        count = settle(load.sink)
        rates[kind] = count / took, meter.per(count) * 1e6
    together = count / max(1, load.sink.call("receives"))
    load.udp.call("close")
    load.sink.call("echo", True)
    return figures._replace(
        datagrams=rates["lone"][0],
        datagram_us=rates["lone"][1],
        train_datagrams=rates["train"][0],
        train_datagram_us=rates["train"][1],
        datagrams_per_receive=together,
    )


def measure_memory(load: Load, process: Running, flows: int) -> tuple[float, float, float]:
    """Return the resident memory: idle, with TCP flows, with UDP flows as well.

    These are the last three of Figures.
    """

    def resident() -> float:
        time.sleep(REST)
        return process.memory_mib("Rss")

    idle = resident()
    load.tcp.call("hold", load.target, flows)
    tcp = resident()
    answered = load.udp.call("hold", load.sink.targets[0], flows)
    if answered < flows:
        print(f"only {answered} of {flows} UDP flows had an answer")
    both = resident()
    load.tcp.call("release")
    load.udp.call("release")
    return idle, tcp, both


class Bench:
    """Measures programs, and keeps what was found."""

    def __init__(self, net: Net, stack: ExitStack, options: argparse.Namespace) -> None:
        self._net, self._options = net, options
        self._load = _start_load(net, stack)
        self._rules = Rules(net.router, net.internet)
        if "socks5" in options.upstreams:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="netproxy-bench-"))
            stack.callback(Upstream(net.internet, Path(folder)).stop)
        self.works: dict[str, dict[str, dict[str, bool]]] = {}
        self.seen: dict[str, dict[str, list[Figures]]] = {}

    def programs(self, upstream: str) -> list[Program]:
        """Return the programs that can be measured with an upstream."""
        only = self._options.only.split(",") if self._options.only else None
        return [
            program
            for program in installed()
            if (only is None or {program.name, program.name.partition(" ")[0]} & set(only))
            and (program.direct if upstream == "direct" else program.command is not None)
        ]

    def check(self, upstream: str, program: Program) -> None:
        """Find out what works through a program."""
        setting = Setting(upstream == "socks5", block=True)
        # The upstream makes trains of single datagrams: they would say nothing of the program.
        checks = CHECKS if setting.upstream else {**CHECKS, **TRAINS}
        with self._rules.applied(program.way), running(program, setting, self._net.router):
            self.works.setdefault(upstream, {})[program.name] = {
                name: works(check, self._net) for name, check in checks.items()
            }

    def measure(self, upstream: str, program: Program) -> None:
        """Measure a program once: fresh for its speed, and fresh for its memory."""
        setting, options = Setting(upstream == "socks5"), self._options
        figures = Figures()
        with self._rules.applied(program.way):
            if "speed" in options.parts:
                with running(program, setting, self._net.router) as process:
                    figures = measure_speed(self._load, process, options.seconds)
            if "memory" in options.parts and program.command is not None:
                with running(program, setting, self._net.router) as process:
                    assert process is not None
                    memory = measure_memory(self._load, process, options.flows)
                    figures = Figures(*figures[: -len(memory)], *memory)
        self.seen.setdefault(upstream, {}).setdefault(program.name, []).append(figures)

    def run(self) -> None:
        """Check, then measure in rounds: all programs, then all again."""
        for upstream in self._options.upstreams:
            if "works" in self._options.parts:
                for program in self.programs(upstream):
                    self.check(upstream, program)
                print_works(upstream, self.works[upstream])
        if set(self._options.parts) == {"works"}:
            return
        for number in range(self._options.rounds):
            for upstream in self._options.upstreams:
                programs = self.programs(upstream)
                first = number % len(programs)
                for program in programs[first:] + programs[:first]:
                    self.measure(upstream, program)

    def medians(self) -> dict[str, dict[str, Figures]]:
        """Return the medians by upstream and program, in the order of installed()."""
        return {
            upstream: {
                program.name: Figures(
                    *map(statistics.median, zip(*seen[program.name], strict=True))
                )
                for program in self.programs(upstream)
            }
            for upstream, seen in self.seen.items()
        }


def print_works(upstream: str, table: dict[str, dict[str, bool]]) -> None:
    """Print what works as a table in Markdown."""
    print(f"\n| {upstream} | " + " | ".join(table) + " |\n|" + "---|" * (len(table) + 1))
    for name in next(iter(table.values())):
        cells = ("yes" if passed[name] else "no" for passed in table.values())
        print(f"| {name} | " + " | ".join(cells) + " |")


def print_figures(
    upstream: str, medians: dict[str, Figures], seen: dict[str, list[Figures]]
) -> None:
    """Print medians and ranges, and what the medians are beside those of netproxyd."""
    first = next((name for name in medians if name.startswith("netproxyd")), next(iter(medians)))
    print()
    print_row(WIDTHS, upstream, "figure", "median", "ratio", "range")
    for field in Figures._fields:
        ours = getattr(medians[first], field)
        for name, median in medians.items():
            if value := getattr(median, field):
                values = [getattr(figures, field) for figures in seen[name]]
                spread = f"{_text(min(values))}-{_text(max(values))}"
                ratio = f"{value / ours:.2f}" if ours else "-"
                print_row(WIDTHS, name, field, _text(value), ratio, spread)


def _text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> int:
    """Print what works, the medians, and whether netproxyd is within its memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each figure (default: 1)")
    parser.add_argument("--flows", type=int, default=BAR_FLOWS, help="of TCP, and of UDP")
    parser.add_argument("--only", help="names such as netproxyd, or netproxyd tproxy")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS)
    parser.add_argument("--upstreams", type=lambda text: text.split(","), default=UPSTREAMS)
    parser.add_argument("--json", type=Path, help="a file for what works and the medians")
    options = parser.parse_args()
    for chosen, known in ((options.parts, PARTS), (options.upstreams, UPSTREAMS)):
        if unknown := set(chosen) - set(known):
            parser.error(f"unknown: {', '.join(unknown)} (known: {', '.join(known)})")
    raise_descriptor_limit(DESCRIPTORS)
    os.environ["PATH"] += os.pathsep + "/usr/sbin:/sbin"
    if shutil.which("setpriv") is None:
        raise SystemExit("not possible here: setpriv is not installed")
    try:
        with ExitStack() as stack:
            bench = Bench(stack.enter_context(network()), stack, options)
            bench.run()
    except pytest.skip.Exception as why:
        raise SystemExit(f"not possible here: {why}") from None
    medians = bench.medians()
    for upstream, table in medians.items():
        print_figures(upstream, table, bench.seen[upstream])
    if options.json:
        about = {
            "date": date.today().isoformat(),
            "machine": f"{platform.system()} {platform.release()}, CPython "
            f"{platform.python_version()}, {os.cpu_count()} processors",
            "rounds": options.rounds,
            "seconds": options.seconds,
            "flows": options.flows,
        }
        figures = {
            upstream: {name: median._asdict() for name, median in table.items()}
            for upstream, table in medians.items()
        }
        content = {**about, "works": bench.works, "medians": figures}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if "memory" in options.parts and options.flows == BAR_FLOWS:
        return judge(medians)
    return 0


def judge(medians: dict[str, dict[str, Figures]]) -> int:
    """Compare netproxyd's memory with the bar; return the exit status."""
    most = max(
        (
            (median.flows_mib, f"{name}, {upstream}")
            for upstream, table in medians.items()
            for name, median in table.items()
            if name.startswith("netproxyd")
        ),
        default=(0.0, "netproxyd was not measured"),
    )
    print(f"\nmost memory of netproxyd: {most[0]:.1f} MiB ({most[1]}); the bar is {BAR_MIB:g} MiB")
    return int(most[0] > BAR_MIB)


if __name__ == "__main__":
    sys.exit(main())
