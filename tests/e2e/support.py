"""netproxyd as a process, what is asked of it at its end, and waiting without sleeping too long."""

from __future__ import annotations

import os
import random
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
START_SECONDS = 10.0  # for the "serves" line: generous, the machine may be busy
CLEAN_SECONDS = 5.0  # for descriptors to be back where they were (HAZARDS section 3)
CHOSEN_PORTS = range(
    20_000, 32_000
)  # below what Linux hands out by itself (net.ipv4.ip_local_port_range)
SPARE_DESCRIPTORS = 2  # that may stay open all the same: HAZARDS allows them

Value = TypeVar("Value")
_SERVES = re.compile(r" serves (.*), upstream ")
_LISTENS = re.compile(r"(tcp|udp) \[?([^ ]+?)\]?:(\d+)(?:, |$)")
_COUNTER = re.compile(r" ([a-z_]+)\{(.*)\}=(\d+)$")
_STATE = re.compile(r"([a-z]+)=(\d+)")


def program(name: str) -> str:
    """The path of a program, or the test is skipped."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def environment(**more: str) -> dict[str, str]:
    """Ours without what would change how netproxyd or a client program behaves."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("JOURNAL_STREAM", "NOTIFY_SOCKET", "PYTHONPATH")
        and not key.lower().endswith("_proxy")
    }
    return {**kept, **more}


def wait_for(look: Callable[[], Value], seconds: float, what: str) -> Value:
    """The first true value that `look` gives within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)
    return value


def free_port() -> int:
    """A port that was free for TCP and UDP a moment ago.

    It is none that the kernel hands out by itself: a client that keeps trying such a port before anybody
    listens there is in the end given it as its own and connects to itself, and no server can have it then.
    """
    while True:
        port = random.choice(CHOSEN_PORTS)
        with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            try:
                tcp.bind((LOOPBACK, port))
                udp.bind((LOOPBACK, port))
            except OSError:
                continue
            return port


class Netproxyd:
    """One daemon.  `host` and `port` are where clients reach its first TCP listener."""

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
        """`make` makes sockets where the daemon lives; without `log_read` standard error is the caller's matter."""
        self.log_path = log
        self.host, self.port, self.login, self.make = host, port, login, make
        self._command = [*python, "-m", "netproxy", *arguments]
        with open(log, "wb") as output:
            if log_read:
                popen |= {"stdout": output, "stderr": output}
            self.process = subprocess.Popen(
                self._command, cwd=cwd, stdin=subprocess.DEVNULL, **{"env": environment(), **popen}
            )
        self.baseline = 0  # descriptors when nothing goes on; 0: not looked at
        self.ended = False
        try:
            if log_read:
                serves = wait_for(self._serves, START_SECONDS, "the line that says what listens")
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

    # -- what it says

    @property
    def log(self) -> str:
        return self.log_path.read_text("utf-8", "replace")

    def lines(self, pattern: str) -> list[str]:
        return [line for line in self.log.splitlines() if re.search(pattern, line)]

    def all_lines(self, pattern: str) -> list[str]:
        """The log's lines with `pattern`, of all that has happened: it is written a moment later, in its order."""
        self.status()
        return self.lines(pattern)

    def _serves(self) -> str:
        if self.process.poll() is not None:
            raise AssertionError(f"ended with {self.process.returncode}:\n{self.log}")
        found = _SERVES.search(self.log)
        return found[1] if found else ""

    @property
    def tcp_ports(self) -> list[int]:
        return [port for network, _, port in self.listens if network == "tcp"]

    def said(self, pattern: str, times: int = 1, seconds: float = 5.0) -> list[str]:
        """The log's lines with `pattern`, as soon as there are so many."""
        return wait_for(
            lambda: found if len(found := self.lines(pattern)) >= times else None,
            seconds,
            f"{times} x {pattern!r} in the log:\n{self.log[-2000:]}",
        )

    def status(self) -> dict[str, int]:
        """The dump of SIGUSR1: "connections", "sessions", "drops{unknown sender}" and so on; what is not there was never counted."""
        before = len(self.lines(" connections="))
        for turn in (1, 2):  # all of the first dump is there when the second begins
            self.signal(signal.SIGUSR1)
            self.said(" connections=", before + turn)
        lines = self.log.splitlines()
        starts = [at for at, line in enumerate(lines) if " connections=" in line]
        found: dict[str, int] = {}
        for line in lines[starts[before] : starts[before + 1]]:
            if counter := _COUNTER.search(line):
                found[f"{counter[1]}{{{counter[2]}}}"] = int(counter[3])
            else:
                for name, value in _STATE.findall(line):
                    found[name] = found.get(name, 0) + int(value)
        return found

    # -- what it does

    @property
    def server(self) -> tuple[str, int]:
        return self.host, self.port

    def url(self, scheme: str, login: str = "") -> str:
        return f"{scheme}://{login + '@' if login else ''}{self.host}:{self.port}"

    def answers(self, seconds: float = 1.0) -> bool:
        """Whether a SOCKS5 CONNECT succeeds within `seconds`."""
        if self.process.poll() is not None:
            raise AssertionError(f"ended with {self.process.returncode}")
        started = time.monotonic()
        with listen(self.host, self.make) as target:
            try:
                control, _ = socks5(
                    self.server, 1, target.getsockname()[:2], self.login, self.make, seconds
                )
            except OSError:
                return False
            control.close()
        return time.monotonic() - started <= seconds

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def reload(self) -> None:
        """HUP, and waits until it has been done or refused."""
        before = len(self.lines(r"reloaded"))
        self.signal(signal.SIGHUP)
        self.said(r"reloaded", before + 1)

    def wait(self, seconds: float) -> int:
        """Its exit status."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended within {seconds:g} s:\n{self.log[-2000:]}") from None
        self.ended = True
        return status

    def kill(self) -> None:
        self.ended = True
        self.process.kill()
        self.process.wait()

    # -- what it takes

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    # -- its end

    def finish(self) -> None:
        """What must hold after every test: it lives, answers, leaks nothing, ends well, and had no fault."""
        try:
            if not self.ended:
                assert self.process.poll() is None, (
                    f"ended by itself with {self.process.returncode}:\n{self.log[-2000:]}"
                )
                assert self.answers(), f"no answer to CONNECT within a second:\n{self.log[-2000:]}"
                if self.baseline:
                    wait_for(
                        lambda: self.descriptors() <= self.baseline + SPARE_DESCRIPTORS,
                        CLEAN_SECONDS,
                        f"descriptors back to {self.baseline}",
                    )
                self.signal(signal.SIGTERM)
                assert self.wait(CLEAN_SECONDS) == 0
            self.check_log()
        finally:
            if self.process.poll() is None:
                self.kill()

    def check_log(self) -> None:
        faults = self.lines(r"Traceback|internal error|has died")
        assert not faults, "\n".join(faults)


def run_netproxyd(
    *arguments: str, flags: Sequence[str] = (), seconds: float = START_SECONDS, **popen: Any
) -> tuple[int, str]:
    """For what is to end at once: exit status, and all it wrote.  `flags` are the interpreter's."""
    done = subprocess.run(
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
    return done.returncode, (done.stdout or b"").decode()
