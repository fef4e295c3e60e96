#!/usr/bin/env python3
"""Kills netproxyd with SIGKILL while a user downloads, and checks what it has counted.

  python3 tests/bench/usage_kills.py                20 times, some four minutes
  python3 tests/bench/usage_kills.py --times 1      a short run

The user has a rate, so that an interval of saving is worth a known number of bytes. After each kill
the file of usage is opened as the next daemon would. The exit status is 1 if the file had to be
moved aside, if more bytes are missing than the user may move in an interval, or if the file has
bytes that were not moved.
"""

from __future__ import annotations

import argparse
import random
import socket
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

from rig import LOOPBACK, Netproxyd, print_row

from netproxy.access.accounts.usage import SAVE_SECONDS
from netproxy.access.accounts.usage_store import UsageStore
from tests.support.doubles import Lines

# Bytes per second of the user: enough that a second more or less is seen.
RATE = 4_000_000
# Seconds of a round, at least and at most: before the first save, and after the second.
SHORTEST, LONGEST = 2.0, 24.0
# Seconds between two looks of the janitor: a save may come so much late.
SWEEP_SECONDS = 1.0
# What the daemon may have read that the client has not received: buffers of sockets.
IN_FLIGHT = 16 << 20
CHUNK = 1 << 16
WIDTHS = (6, 8, 14, 14, 14, 10)


class Source:
    """A server that sends without end."""

    def __init__(self) -> None:
        self._listening = socket.create_server((LOOPBACK, 0))
        self.address = self._listening.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listening.accept()
            threading.Thread(target=self._send, args=(sock,), daemon=True).start()

    @staticmethod
    def _send(sock: socket.socket) -> None:
        try:
            while True:
                sock.sendall(bytes(CHUNK))
        except OSError:
            sock.close()


class Download(threading.Thread):
    """A user's download through SOCKS5; counts what arrives."""

    def __init__(self, server: tuple[str, int], target: tuple[str, int]) -> None:
        super().__init__(daemon=True)
        self.received = 0
        self._socket = sock = socket.create_connection(server)
        sock.sendall(b"\5\1\2\1\5alice\6secret")
        sock.sendall(b"\5\1\0\1" + socket.inet_aton(target[0]) + struct.pack("!H", target[1]))
        reply = b""
        while len(reply) < 14:
            reply += sock.recv(14 - len(reply))
        if reply[:4] != b"\5\2\1\0" or reply[5]:
            raise SystemExit(f"no connection: {reply!r}")

    def run(self) -> None:
        """Receive until the connection ends."""
        try:
            while data := self._socket.recv(CHUNK):
                self.received += len(data)
        except OSError:
            pass


def counted(state: Path) -> tuple[int, bool]:
    """Return the bytes that the file has for the user, and whether it had to be moved aside."""
    log = Lines()
    store = UsageStore(str(state), log)
    usage = store.load("2000-01-01", "2000-01").get("alice")
    store.close()
    moved = any("corrupt" in path.name for path in state.iterdir())
    return (usage[2].down if usage is not None else 0), moved


def main() -> int:
    """Run the rounds, print a row for each; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--longest", type=float, default=LONGEST, help="seconds of a round")
    options = parser.parse_args()
    source, failed, before = Source(), False, 0
    with tempfile.TemporaryDirectory(prefix="netproxy-usage-") as folder:
        state = Path(folder)
        config = (
            f"listeners: [{{listen: '{LOOPBACK}:0', auth: required}}]\nstate: {state}\n"
            f"users: {{alice: {{password: secret, limits: {{rate: {RATE}B/s}}}}}}\n"
            "log: {access: false}\n"
        )
        print_row(WIDTHS, "round", "seconds", "received", "counted", "missing", "intervals")
        for number in range(1, options.times + 1):
            daemon = Netproxyd(config=config)
            download = Download(daemon.address, source.address)
            download.start()
            seconds = random.uniform(SHORTEST, options.longest)
            time.sleep(seconds)
            daemon.kill()
            download.join()
            total, was_moved = counted(state)
            missing = download.received - (total - before)
            print_row(
                WIDTHS,
                number,
                f"{seconds:.1f}",
                f"{download.received:,}",
                f"{total - before:,}",
                f"{missing:,}",
                f"{missing / RATE / SAVE_SECONDS:.2f}",
            )
            most = RATE * (SAVE_SECONDS + SWEEP_SECONDS)
            failed = failed or was_moved or not -IN_FLIGHT <= missing <= most
            before = total
    print("failed" if failed else "passed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
