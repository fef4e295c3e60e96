#!/usr/bin/env python3
"""Measures limits of users: how exact and fair they are, what they cost, and how peers do.

  python3 tests/bench/limits.py                          12 minutes
  python3 tests/bench/limits.py --parts users            one of users, price, bulk, peers
  python3 tests/bench/limits.py --parts bulk --before FOLDER
                                                         beside netproxyd of another checkout

Starts netproxyd and its peers on loopback; load and targets are processes of their own. Rounds
alternate; with several, the results are medians.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

from limits_load import SOCKS, TCP, UDP, Clients, Flow, Targets, connect_socks
from limits_peers import Running, netproxyd, peers, user_name
from load import SIZE
from rig import SECONDS, Netproxyd, print_row, raise_descriptor_limit
from tcp import PIECE

MIXED = "mixed"
NETWORKS = TCP, UDP, MIXED
UP, DOWN = "up", "down"
# What UDP flows send, as a multiple of their share of the rate.
OFFERED = 1.5
# Seconds that the sessions of all flows may take to exist.
OPEN_SECONDS = 60.0
AGAIN = 0.2
# A load generator that is so late says nothing of the daemon.
LATE = 0.02
PARTS = ("users", "price", "bulk", "peers")


class Case(NamedTuple):
    """A load: what the flows of each user are, and who sends."""

    network: str
    flows: int
    direction: str
    dialect: str = SOCKS


class Result(NamedTuple):
    """What a measurement has shown. Deviations from the rate are in per cent, of users."""

    least: float
    mean: float
    most: float
    jain: float
    """The least of Jain's indices of the users."""
    processor: float
    """Seconds of the proxy."""
    moved: int
    """Bytes of all users."""
    late: float
    """The share of the datagrams that were not sent for want of time."""


class Load(NamedTuple):
    """How large each measurement is."""

    users: int
    rate: int
    """Bit/s of each user."""
    seconds: float
    warm_up: float
    pairs: int
    """Pairs of processes that share the load."""
    train: int
    """Datagrams of one send."""


# -- a measurement


def flows_of(case: Case, users: int) -> list[Flow]:
    """Return the flows; the user of a flow is the remainder of its number by `users`."""
    flows = []
    for number in range(users * case.flows):
        turn, user = divmod(number, users)
        network = case.network
        if network == MIXED:
            # Of users with one flow each, half have a TCP flow.
            is_udp = turn % 2 if case.flows > 1 else user % 2
            network = UDP if is_udp else TCP
        flows.append(Flow(number, user_name(user), network))
    return flows


def measure(proxy: Running, case: Case, load: Load, paced: bool = False) -> Result:
    """Measure a case. `paced`: all flows send at their share of the rate, and no more."""
    flows = flows_of(case, load.users)
    share = load.rate / 8 / case.flows
    rates = {TCP: share if paced else 0.0, UDP: share if paced else OFFERED * share}
    with ExitStack() as stack:
        pairs = []
        for number in range(load.pairs):
            own = [flow for flow in flows if flow.number % load.users % load.pairs == number]
            targets = Targets(own, load.train)
            stack.callback(targets.stop)
            clients = Clients(own, load.train)
            stack.callback(clients.stop)
            clients.call("open", proxy.address, case.dialect, (targets.tcp, targets.udp))
            pairs.append((clients, targets))
        for clients, targets in pairs:
            _wait_for_sessions(clients, targets)
        stations = [(c, t) if case.direction == UP else (t, c) for c, t in pairs]
        for sender, _ in stations:
            sender.call("send", rates)
        time.sleep(load.warm_up)
        began, used = _counts(stations), proxy.processor_seconds()
        time.sleep(load.seconds)
        ended, processor = _counts(stations), proxy.processor_seconds() - used
        late = max(sender.call("late") for sender, _ in stations)
    rates_of = [0.0] * len(flows)
    for (first_at, first), (last_at, last) in zip(began, ended, strict=True):
        for number, (before, after) in enumerate(zip(first, last, strict=True)):
            rates_of[number] += (after - before) / (last_at - first_at)
    moved = sum(sum(last) - sum(first) for (_, first), (_, last) in zip(began, ended, strict=True))
    return _result(rates_of, load, processor, moved, late)


def _wait_for_sessions(clients: Clients, targets: Targets) -> None:
    deadline = time.monotonic() + OPEN_SECONDS
    while missing := targets.call("missing"):
        if time.monotonic() > deadline:
            raise SystemExit(f"{len(missing)} flows do not reach the target")
        clients.call("greet", missing)
        time.sleep(AGAIN)


def _counts(stations: Sequence[tuple[Any, Any]]) -> list[tuple[float, list[int]]]:
    return [receiver.call("counts") for _, receiver in stations]


def _result(
    rates: Sequence[float], load: Load, processor: float, moved: int, late: float
) -> Result:
    deviations, fairness = [], []
    for user in range(load.users):
        own = rates[user :: load.users]
        deviations.append((sum(own) * 8 / load.rate - 1) * 100)
        squares = sum(rate * rate for rate in own)
        fairness.append(sum(own) ** 2 / (len(own) * squares) if squares else 0.0)
    least, mean, most = min(deviations), statistics.fmean(deviations), max(deviations)
    return Result(least, mean, most, min(fairness), processor, moved, late)


def median(results: Sequence[Result]) -> Result:
    """Return the medians, figure by figure; of the extremes, the farthest ones."""
    middle = Result._make(map(statistics.median, zip(*results, strict=True)))
    least, most = min(result.least for result in results), max(result.most for result in results)
    return middle._replace(least=least, most=most, jain=min(result.jain for result in results))


# -- the parts

COLUMNS = (16, 7, 7, 6, 5, 22, 7, 9, 8)


def _print_head(load: Load, rounds: int, title: str) -> None:
    print(
        f"\n{title}: {load.users} users, {load.rate / 1e6:g} Mbit/s each, {load.seconds:g} s, "
        f"rounds: {rounds}"
    )
    print_row(
        COLUMNS,
        *("program", "dialect", "network", "flows", "", "min, mean, max in %"),
        *("Jain", "CPU s", "MB"),
    )


def _print_result(name: str, case: Case, result: Result) -> None:
    deviation = " ".join(f"{value:+7.2f}" for value in result[:3])
    jain = f"{result.jain:.4f}" if case.flows > 1 else "-"
    print_row(
        COLUMNS,
        *(name, case.dialect, case.network, case.flows, case.direction, deviation, jain),
        *(f"{result.processor:.2f}", f"{result.moved / 1e6:.1f}"),
    )
    if result.late > LATE:
        print(f"  of the datagrams of this load {result.late:.0%} were not sent for want of time")


def users(load: Load, networks: Sequence[str], flows: Sequence[int], rounds: int) -> None:
    """Print how exact and fair the rates are, and what netproxyd has used for them."""
    cases = [
        Case(network, count, direction)
        for network in networks
        for count in flows
        for direction in (UP, DOWN)
    ]
    _print_head(load, rounds, "Deviation of users from their rate")
    with netproxyd(load.users, load.rate) as daemon:
        results: dict[Case, list[Result]] = {case: [] for case in cases}
        for _ in range(rounds):
            for case in cases:
                results[case].append(measure(daemon, case, load))
                if rounds == 1:
                    _print_result("netproxyd", case, results[case][0])
    if rounds > 1:
        for case in cases:
            _print_result("netproxyd", case, median(results[case]))


def price(load: Load, flows: int, rounds: int) -> None:
    """Print the processor time with limits as a multiple of that without, load by load."""
    cases = [Case(network, flows, direction) for network in (TCP, UDP) for direction in (UP, DOWN)]
    # The second: the same load, and limits that it does not reach.
    limits = {"none": 0, "not reached": 2 * load.rate, "reached": load.rate}
    print(
        f"\nPrice of limits: {load.users} users with {flows} flows, {load.rate / 1e6:g} Mbit/s "
        f"each, {load.seconds:g} s, rounds: {rounds}"
    )
    widths = (7, 5, 11, 9, 9, 9)
    print_row(widths, "network", "", "limits", "CPU s", "MB", "ratio")
    with ExitStack() as stack:
        daemons = {
            name: stack.enter_context(netproxyd(load.users, rate)) for name, rate in limits.items()
        }
        for case in cases:
            results: dict[str, list[Result]] = {name: [] for name in limits}
            for turn in range(rounds):
                for name in _turned(list(limits), turn):
                    paced = name != "reached"
                    results[name].append(measure(daemons[name], case, load, paced))
            for name in limits:
                ratio = statistics.median(
                    _cost(result) / _cost(none)
                    for result, none in zip(results[name], results["none"], strict=True)
                )
                result = median(results[name])
                cells = f"{result.processor:.2f}", f"{result.moved / 1e6:.1f}", f"{ratio:.3f}"
                print_row(widths, case.network, case.direction, name, *cells)
                if result.late > LATE:
                    print(f"  {result.late:.0%} of this load was not sent for want of time")


def _cost(result: Result) -> float:
    # A tick of the clock in place of nothing, as a short run may have it.
    return max(result.processor, 0.01) / max(result.moved, 1)


def _turned(names: list[str], turn: int) -> Iterator[str]:
    """Yield the names, each time in the other order."""
    yield from names if turn % 2 == 0 else names[::-1]


def bulk(before: Path | None, seconds: float, rounds: int) -> None:
    """Print the speed of one connection of a user without limits, and that of another build."""
    builds = {"this": Path(__file__).resolve().parents[2]}
    if before is not None:
        builds["before"] = before.resolve()
    print(f"\nOne connection of a user without limits, {seconds:g} s, rounds: {rounds}")
    widths = (8, 5, 8, 9, 12)
    print_row(widths, "build", "", "Gbit/s", "ms per GB", "ratio")
    figures: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        daemons = {
            name: stack.enter_context(netproxyd(1, 0, root)) for name, root in builds.items()
        }
        for turn in range(rounds):
            for direction in (UP, DOWN):
                for name in _turned(list(builds), turn):
                    figure = _stream(daemons[name], direction, seconds)
                    figures.setdefault((name, direction), []).append(figure)
    for direction in (UP, DOWN):
        for name in builds:
            speed, cost = map(statistics.median, zip(*figures[name, direction], strict=True))
            others = zip(figures["this", direction], figures[name, direction], strict=True)
            ratio = statistics.median(this[0] / other[0] for this, other in others)
            print_row(
                widths, name, direction, f"{speed:.2f}", f"{cost:.0f}", f"this: {ratio:.3f} x"
            )


def _stream(daemon: Netproxyd, direction: str, seconds: float) -> tuple[float, float]:
    """Move as much as possible; return Gbit/s, and milliseconds of the daemon for each GB."""
    flow = Flow(0, user_name(0), TCP)
    with ExitStack() as stack:
        targets = Targets([flow], 1)
        stack.callback(targets.stop)
        sock = connect_socks(daemon.address, flow.user, targets.tcp, "/0 HTTP/1.0\r\n")
        stack.callback(sock.close)
        sock.settimeout(SECONDS)
        while targets.call("missing"):
            time.sleep(0.001)
        if direction == DOWN:
            targets.call("send", {TCP: 0.0})
        traffic, used, began = 0, daemon.processor_seconds(), time.monotonic()
        while (now := time.monotonic()) - began < seconds:
            traffic += sock.send(PIECE) if direction == UP else _received(sock)
        return (
            traffic * 8 / (now - began) / 1e9,
            (daemon.processor_seconds() - used) / traffic * 1e12,
        )


def _received(sock: socket.socket) -> int:
    if not (count := len(sock.recv(1 << 20))):
        raise SystemExit("netproxyd has closed a connection")
    return count


def beside_peers(load: Load, flows: int, rounds: int) -> None:
    """Print the figures of netproxyd beside those of other programs."""
    programs = peers()
    cases = [
        (peer, Case(TCP, flows, direction, dialect))
        for peer in programs
        for dialect in peer.dialects
        for direction in ((UP, DOWN) if peer.up and dialect == SOCKS else (DOWN,))
    ]
    cases += [
        (peer, Case(UDP, flows, direction))
        for peer in programs
        if peer.udp
        for direction in (UP, DOWN)
    ]
    results: dict[tuple[str, Case], list[Result]] = {}
    _print_head(load, rounds, "Beside other programs")
    for _ in range(rounds):
        for peer, case in cases:
            with peer.start(load.users, load.rate) as proxy:
                results.setdefault((peer.name, case), []).append(measure(proxy, case, load))
    for (name, case), measured in results.items():
        _print_result(name, case, median(measured))
    for peer in programs:
        if not peer.udp:
            print(f"{peer.name} relays no UDP")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of the part users")
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--rate", type=float, default=10.0, help="Mbit/s of each user")
    parser.add_argument("--flows", default="1,8", help="flows of each user, comma-separated")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds before it")
    parser.add_argument("--rounds", type=int, help="(1 for users, 3 for price, 5 for bulk)")
    parser.add_argument("--train", type=int, default=1, help="datagrams of one send")
    parser.add_argument("--pairs", type=int, default=1, help="pairs of processes for the load")
    parser.add_argument("--before", type=Path, help="a checkout of netproxyd without limits")
    options = parser.parse_args()
    parts, networks = options.parts.split(","), options.networks.split(",")
    if unknown := (set(parts) - set(PARTS)) | (set(networks) - set(NETWORKS)):
        parser.error(f"not known: {', '.join(unknown)}")
    raise_descriptor_limit(1 << 16)
    flows = [int(count) for count in options.flows.split(",")]
    rate = int(options.rate * 1e6)
    sizes = options.users, rate, options.seconds, options.warm_up, options.pairs, options.train
    load = Load(*sizes)
    if load.train * SIZE > 60_000:
        parser.error("a train has at most 50 datagrams")
    if "users" in parts:
        users(load, networks, flows, options.rounds or 1)
    if "price" in parts:
        price(load, max(flows), options.rounds or 3)
    if "bulk" in parts:
        bulk(options.before, min(load.seconds, 2.0), options.rounds or 5)
    if "peers" in parts:
        beside_peers(load, max(flows), options.rounds or 1)


if __name__ == "__main__":
    main()
