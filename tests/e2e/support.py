"""Runs netproxyd as a process, checks it at the end of a test, and waits for conditions."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Sequence, TypeVar

import pytest

from tests.e2e.peers import Login, Make, listen, socks5
from tests.support.sockets import SECONDS

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
ANY_PORT = f"sps://{LOOPBACK}:0"
# How many more descriptors than before a daemon may have when its clients have gone.
SPARE_DESCRIPTORS = 2

# NETPROXY_TEST_WORKERS=2 runs the daemons of all tests with two workers.
WORKERS = ["-w", count] if (count := os.environ.get("NETPROXY_TEST_WORKERS")) else []
# How many processes of a daemon serve clients: each has caches, and turns of groups, of its own.
PROCESSES = int(count or 1)

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


def runtime_directory(arguments: Sequence[str]) -> dict[str, str]:
    """Return the variable that keeps a daemon without a file from the control socket of others.

    The directory is removed at the end of the tests.
    """
    if "-c" in arguments:
        return {}
    folder = tempfile.mkdtemp(prefix="netproxyd")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"RUNTIME_DIRECTORY": folder}


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


def runs(pid: int) -> bool:
    """Return whether a process runs; one that has ended may wait for its parent.

    While its first thread has ended already, others may still hold its sockets.
    """
    try:
        return any(_thread_runs(path) for path in Path(f"/proc/{pid}/task").iterdir())
    except FileNotFoundError:
        return False


def _thread_runs(path: Path) -> bool:
    try:
        return (path / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Readiness:
    """Waits until a daemon, with all its workers, has told a service manager that it serves."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Add what the daemon needs to know to its `environment`."""
        # The folder of a test may be too deep for the address of a socket.
        self._folder = tempfile.TemporaryDirectory()
        environment["NOTIFY_SOCKET"] = path = os.path.join(self._folder.name, "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path)
        self._socket.settimeout(SECONDS)

    def wait(self) -> None:
        """Wait; then the daemon tells nobody any more."""
        with self._folder, self._socket:
            while not self._socket.recv(4096).startswith(b"READY=1"):
                pass


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
        if "-w" not in arguments:
            self._command += WORKERS
        self._has_workers = "-w" in self._command
        # Log lines that check_log() passes: of faults that the test itself provokes.
        self.provoked = ""
        variables = {**(popen.get("env") or environment()), **runtime_directory(arguments)}
        readiness = None if log_read else Readiness(variables)
        popen = {"cwd": cwd, "stdin": subprocess.DEVNULL, **popen, "env": variables}
        with open(log, "wb") as output:
            if log_read:
                popen |= {"stdout": output, "stderr": output}
            self.process = subprocess.Popen(self._command, **popen)
        # Open descriptors while there is no client; 0 if they are not checked.
        self.baseline = 0
        self.ended = False
        try:
            if readiness is None:
                serves = wait_for(self._serves, SECONDS, "the line with the listeners")
                self.listens = [
                    (network, host, int(port)) for network, host, port in _LISTENS.findall(serves)
                ]
                self.port = self.tcp_ports[0]
            else:
                readiness.wait()
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

    def counted(self, name: str, number: int) -> int:
        """Return a counter of status() once it is at least so much.

        A client can see that it was refused, or its reply, before the daemon has counted it.
        """

        def count() -> int:
            reached = self.status().get(name, 0)
            return reached if reached >= number else 0

        return wait_for(count, SECONDS, f"{number} x {name}")

    def drops(self) -> dict[str, int]:
        """Return the counters of dropped datagrams, without those of unknown senders.

        On loopback these may be other tests': the kernel gives a port to one after the other.
        """
        status = self.status()
        status.pop("drops{unknown sender}", None)
        return {name: count for name, count in status.items() if name.startswith("drops{")}

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
        if status < 0:
            self._provoke_deaths()
        return status

    def kill(self) -> None:
        """Send SIGKILL and wait for the end, which workers see a moment later and tell of."""
        self.ended = True
        workers = self.workers() if self.process.poll() is None else []
        self._provoke_deaths()
        self.process.kill()
        self.process.wait()
        wait_for(lambda: not any(map(runs, workers)), SECONDS, "the end of all workers")

    def _provoke_deaths(self) -> None:
        """Note that workers have lost their parent."""
        self.provoked = "|".join(filter(None, (self.provoked, "the parent has died$")))

    # -- its resources

    def processes(self) -> list[int]:
        """Return the daemon's process and those of its workers."""
        return [self.process.pid, *self.workers()]

    def workers(self) -> list[int]:
        """Return the processes of the workers, in the order in which they were started."""
        if not self._has_workers:
            return []
        pid = self.process.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def descriptors(self) -> int:
        """Return the number of open descriptors."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.processes())

    def threads(self) -> int:
        """Return the number of threads."""
        return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in self.processes())

    def threads_at_rest(self) -> int:
        """Return the number of threads once all run that a daemon without clients has.

        The parent of workers starts a thread for each of them with its first question, up to a
        second after all serve.
        """
        self.status()
        return self.threads()

    def check_idle(self) -> None:
        """Wait until all threads sleep in ten looks. A thread in a busy loop never sleeps."""
        wait_for(lambda: all(self._sleeps() for _ in range(10)), SECONDS, "all threads sleep")

    def _sleeps(self) -> bool:
        time.sleep(0.005)
        states = []
        tasks = (Path(f"/proc/{pid}/task").iterdir() for pid in self.processes())
        for task in itertools.chain(*tasks):
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

        It runs, answers a client, has no descriptor more than before, exits with 0 on SIGTERM
        without a connection that it must cut, and has logged no fault.
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
                # The drain may have ended because its time was up, within the same wait.
                cut = self.lines("stopping: .* are cut")
                assert not cut, f"{cut[0]}:\n{self.log[-2000:]}"
            self.check_log()
        finally:
            if self.process.poll() is None:
                self.kill()

    def check_log(self) -> None:
        """Fail if the log has a traceback, an internal error or the end of a needed thread."""
        faults = self.lines(r"Traceback|internal error|has died")
        if self.provoked:
            faults = [line for line in faults if not re.search(self.provoked, line)]
        assert not faults, "\n".join(faults)


def run_netproxyd(
    *arguments: str, flags: Sequence[str] = (), seconds: float = SECONDS, **popen: Any
) -> tuple[int, str]:
    """Run netproxyd to its end. Return its exit status and all that it wrote.

    `flags` are options of the interpreter.
    """
    process = subprocess.run(
        [sys.executable, *flags, "-m", "netproxy", *arguments],
        **{
            "cwd": ROOT,
            "env": environment(**runtime_directory(arguments)),
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "timeout": seconds,
            **popen,
        },
    )
    return process.returncode, (process.stdout or b"").decode()
