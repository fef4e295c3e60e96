"""Runs netproxyd as a process, checks it at the end of a test, and waits for conditions."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Sequence, TypeVar

import pytest

from tests.e2e.peers import Login, Make, listen, socks5

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
ANY_PORT = f"sps://{LOOPBACK}:0"
# Limits of waits, long enough for a machine that is ten times slower.
START_SECONDS = 30.0
SECONDS = 20.0
# How many more descriptors than before a daemon may have when its clients have gone.
SPARE_DESCRIPTORS = 2

Value = TypeVar("Value")
_SERVES = re.compile(r" serves (.*), upstream ")
_LISTENS = re.compile(r"(tcp|udp) \[?([^ ]+?)\]?:(\d+)(?:, |$)")
_COUNTER = re.compile(r" ([a-z_]+)\{(.*)\}=(\d+)$")
_STATE = re.compile(r"([a-z]+)=(\d+)")


def program(name: str) -> str:
    """Return the path of a program. Skip the test if it is not installed."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def environment(**more: str) -> dict[str, str]:
    """Return this process's variables except those that change what netproxyd or clients do."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("JOURNAL_STREAM", "NOTIFY_SOCKET", "PYTHONPATH")
        and not key.lower().endswith("_proxy")
    }
    return {**kept, **more}


def wait_for(look: Callable[[], Value], seconds: float, what: str) -> Value:
    """Call `look` until it returns a true value, and return that.

    Raises AssertionError with `what` if there is none within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not (value := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)
    return value


class Netproxyd:
    """A daemon process. `host` and `port` are the address of its first TCP listener."""

    def __init__(
        self,
        log: Path,
        *arguments: str,
        host: str = LOOPBACK,
        port: int = 0,
        login: Login | None = None,
        python: Sequence[str] = (sys.executable,),
        make: Make = socket.socket,
        cwd: Path = ROOT,
        log_read: bool = True,
        **popen: Any,
    ) -> None:
        """Start the daemon with these arguments and wait until it serves.

        `login` is needed by clients of the first listener. `make` creates sockets that can reach
        the daemon, as socket.socket does; it may do so in another network namespace. Without
        `log_read` the caller passes stdout and stderr itself, in `popen`.
        """
        self.log_path = log
        self.host, self.port, self.login, self.make = host, port, login, make
        self._command = [*python, "-m", "netproxy", *arguments]
        with open(log, "wb") as output:
            if log_read:
                popen |= {"stdout": output, "stderr": output}
            self.process = subprocess.Popen(
                self._command, cwd=cwd, stdin=subprocess.DEVNULL, **{"env": environment(), **popen}
            )
        # Open descriptors while there is no client; 0 if they are not checked.
        self.baseline = 0
        self.ended = False
        try:
            if log_read:
                serves = wait_for(self._serves, START_SECONDS, "the line with the listeners")
                self.listens = [
                    (network, host, int(port)) for network, host, port in _LISTENS.findall(serves)
                ]
                self.port = self.tcp_ports[0]
            else:
                wait_for(lambda: self.answers(seconds=START_SECONDS), START_SECONDS, "an answer")
            self.baseline = self.descriptors()
        except BaseException:
            self.kill()
            raise

    # -- its log

    @property
    def log(self) -> str:
        """Everything that the daemon has logged."""
        return self.log_path.read_text("utf-8", "replace")

    def lines(self, pattern: str) -> list[str]:
        """Return the log lines that match the regular expression."""
        return [line for line in self.log.splitlines() if re.search(pattern, line)]

    def all_lines(self, pattern: str) -> list[str]:
        """The lines of all that has happened: the log is written a moment later, in order."""
        self.status()
        return self.lines(pattern)

    def _serves(self) -> str:
        if self.process.poll() is not None:
            raise AssertionError(f"ended with {self.process.returncode}:\n{self.log}")
        match = _SERVES.search(self.log)
        return match[1] if match else ""

    @property
    def tcp_ports(self) -> list[int]:
        """The ports of the TCP listeners, in the order of the configuration."""
        return [port for network, _, port in self.listens if network == "tcp"]

    def said(self, pattern: str, times: int = 1, seconds: float = SECONDS) -> list[str]:
        """Wait until `times` log lines match the pattern, and return all that do."""
        return wait_for(
            lambda: lines if len(lines := self.lines(pattern)) >= times else None,
            seconds,
            f"{times} x {pattern!r} in the log:\n{self.log[-2000:]}",
        )

    def status(self) -> dict[str, int]:
        """Return what the daemon logs on SIGUSR1: "connections", "drops{unknown sender}" and so on.

        A counter that was never incremented is missing.
        """
        before = len(self.lines(" connections="))
        # When the second dump begins, the first one is complete.
        for dump in (1, 2):
            self.signal(signal.SIGUSR1)
            self.said(" connections=", before + dump)
        lines = self.log.splitlines()
        starts = [at for at, line in enumerate(lines) if " connections=" in line]
        status: dict[str, int] = {}
        for line in lines[starts[before] : starts[before + 1]]:
            if counter := _COUNTER.search(line):
                status[f"{counter[1]}{{{counter[2]}}}"] = int(counter[3])
            else:
                for name, value in _STATE.findall(line):
                    status[name] = status.get(name, 0) + int(value)
        return status

    def drops(self) -> dict[str, int]:
        """Return the counters of dropped datagrams."""
        return {name: count for name, count in self.status().items() if name.startswith("drops{")}

    # -- its clients and signals

    @property
    def server(self) -> tuple[str, int]:
        """The address of the first TCP listener."""
        return self.host, self.port

    def url(self, scheme: str, login: str = "") -> str:
        """Return the URL of the first TCP listener for clients; `login` is "user:password"."""
        return f"{scheme}://{login + '@' if login else ''}{self.host}:{self.port}"

    def answers(self, seconds: float = SECONDS) -> bool:
        """Return True if a SOCKS5 CONNECT succeeds, with at most `seconds` for each answer."""
        if self.process.poll() is not None:
            raise AssertionError(f"ended with {self.process.returncode}")
        with listen(self.host, self.make) as target:
            try:
                control, _ = socks5(
                    self.server, 1, target.getsockname()[:2], self.login, self.make, seconds
                )
            except OSError:
                return False
            control.close()
        return True

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    def reload(self) -> None:
        """Send SIGHUP and wait until the daemon has reloaded its file or refused to."""
        before = len(self.lines("reloaded"))
        self.signal(signal.SIGHUP)
        self.said("reloaded", before + 1)

    def wait(self, seconds: float) -> int:
        """Wait for the end of the process and return its exit status."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended within {seconds:g} s:\n{self.log[-2000:]}") from None
        self.ended = True
        return status

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self.ended = True
        self.process.kill()
        self.process.wait()

    # -- its resources

    def descriptors(self) -> int:
        """Return the number of open descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        """Return the number of threads."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def check_idle(self) -> None:
        """Wait until all threads sleep in ten looks. A thread in a busy loop never sleeps."""
        wait_for(lambda: all(self._sleeps() for _ in range(10)), SECONDS, "all threads sleep")

    def _sleeps(self) -> bool:
        time.sleep(0.005)
        states = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            # A thread may end between the two reads.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
        return set(states) == {"S"}

    def resident_bytes(self) -> int:
        """Return the resident memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    # -- its end

    def finish(self) -> None:
        """Check what must hold after every test, and end the daemon.

        It runs, answers a client, has no descriptor more than before, exits with 0 on SIGTERM, and
        has logged no fault.
        """
        try:
            if not self.ended:
                assert self.process.poll() is None, (
                    f"ended by itself with {self.process.returncode}:\n{self.log[-2000:]}"
                )
                assert self.answers(), f"no answer to CONNECT:\n{self.log[-2000:]}"
                if self.baseline:
                    wait_for(
                        lambda: self.descriptors() <= self.baseline + SPARE_DESCRIPTORS,
                        SECONDS,
                        f"descriptors back to {self.baseline}",
                    )
                self.signal(signal.SIGTERM)
                assert self.wait(SECONDS) == 0
            self.check_log()
        finally:
            if self.process.poll() is None:
                self.kill()

    def check_log(self) -> None:
        """Fail if the log has a traceback, an internal error or the end of a needed thread."""
        faults = self.lines(r"Traceback|internal error|has died")
        assert not faults, "\n".join(faults)


def run_netproxyd(
    *arguments: str, flags: Sequence[str] = (), seconds: float = START_SECONDS, **popen: Any
) -> tuple[int, str]:
    """Run netproxyd to its end. Return its exit status and all that it wrote.

    `flags` are options of the interpreter.
    """
    process = subprocess.run(
        [sys.executable, *flags, "-m", "netproxy", *arguments],
        **{
            "cwd": ROOT,
            "env": environment(),
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "timeout": seconds,
            **popen,
        },
    )
    return process.returncode, (process.stdout or b"").decode()
