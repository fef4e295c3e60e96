"""Compares many short streams through a reverse tunnel with `ssh -R`, and with an earlier build.

    python3 tests/bench/tunnel_streams.py [--before FOLDER] [--bursts 40] [--at-once 8] \\
                                          [--rounds 5] [--mib 128]

A burst opens streams at the same moment; each sends a byte, receives one and is closed. The next
burst begins when all have answered. In the row of streams per second as many clients run at once,
and none waits for another. Bulk is one stream, up and down. Rounds alternate between the routes;
the results are medians. Needs what tunnel.py needs.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Callable

from rig import LOOPBACK, ROOT, SECONDS
from tunnel import Route, Target, download, open_streams, ssh, tunnel, upload

# The programs that main() starts.
PROGRAMS = ("openssl", "ssh", "ssh-keygen", "/usr/sbin/sshd")


def bursts(port: int, count: int, at_once: int) -> float:
    """Open so many bursts of `at_once` streams. Return the milliseconds of one."""
    barrier = threading.Barrier(at_once)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(count):
                barrier.wait(SECONDS)
                with socket.create_connection((LOOPBACK, port), SECONDS) as sock:
                    sock.sendall(b"e")
                    assert sock.recv(1) == b"e", "a stream ended without its answer"
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work) for _ in range(at_once)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(f"port {port}: {failed[0]!r}")
    return (time.monotonic() - began) / count * 1000


def started(stack: ExitStack, directory: Path, before: Path | None) -> list[Route]:
    """Start all programs; return the routes through them, `ssh -R` last."""
    target = Target().port
    builds = [("", ROOT)] if before is None else [(" before", before.resolve()), ("", ROOT)]
    routes = []
    for tls in (True, False):
        for name, root in builds:
            route = tunnel(stack, directory, target, tls, root)
            routes.append(route._replace(name=route.name + name))
    return [*routes, ssh(stack, directory, target)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="a checkout of an earlier build")
    parser.add_argument("--bursts", type=int, default=40)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=128)
    options = parser.parse_args(arguments)
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}")
    burst = f"ms for {options.at_once} streams at once"
    measures: dict[str, Callable[[int], float]] = {
        burst: lambda port: bursts(port, options.bursts, options.at_once),
        f"streams/s, {options.at_once} at once": lambda port: open_streams(
            port, options.bursts * options.at_once, options.at_once
        ),
        "MiB/s to the user": lambda port: download(port, options.mib),
        "MiB/s to the service": lambda port: upload(port, options.mib),
    }
    figures: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netproxy-bench-")))
        routes = started(stack, directory, options.before)
        for _ in range(options.rounds):
            for name, measure in measures.items():
                for route in routes:
                    figures.setdefault((name, route.name), []).append(measure(route.port))
    for name in measures:
        medians = {route.name: statistics.median(figures[name, route.name]) for route in routes}
        print(name)
        for route, median in medians.items():
            # A ratio above 1 is faster than ssh.
            ratio = medians["ssh -R"] / median if name == burst else median / medians["ssh -R"]
            lowest, highest = min(figures[name, route]), max(figures[name, route])
            print(f"  {route:22} {median:8.1f}  ({lowest:.1f} to {highest:.1f})  {ratio:5.2f} x")


if __name__ == "__main__":
    main()
