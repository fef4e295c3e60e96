"""What happens to the daemon in the hostile hour, by a timetable that repeats.

Some troubles last: faults of system calls, the descriptor limit, a log that nobody reads, upstreams
that are down. Others happen again and again: reloads, jumps of the clock, agents that come and go.
"""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from typing import Callable, NamedTuple

from scene import Daemon, LogReader, Preloads

from tests.e2e.support import environment

# Seconds after which the timetable begins again.
CYCLE = 40.0
STEP = 0.1
PROBABILITY = 0.02
# As in tests/e2e/test_fiu.py.
CALLS = ("recv", "recvfrom", "recvmsg", "send", "sendto", "sendmsg", "connect", "socket", "poll")
FAULTY = tuple(f"posix/io/net/{name}" for name in (*CALLS, "accept"))
# Descriptors that the daemon may open at its limit.
SPARE_DESCRIPTORS = 3
# Seconds of the daemon's clock from the right time.
OFFSETS = (3600, -7200, 0, 59, -1, 20_000, -20_000)
RELOAD_SECONDS, CLOCK_SECONDS, CONTROL_SECONDS, AGENT_SECONDS, DISK_SECONDS = 5, 7, 1, 9, 20
SILENT_CONTROL = 20
# Seconds that good clients may still feel a trouble after its end; through the tunnel until the
# agent, which waits longer after each failure, has connected again.
GRACE, TUNNEL_GRACE = 5.0, 20.0
TUNNELS = ("tunnel", "tunnel_udp")


class Trouble(NamedTuple):
    """A trouble that lasts."""

    name: str
    starts: float
    """Seconds from the start of the cycle."""
    lasts: float
    begin: Callable[[], None]
    end: Callable[[], None]
    hits: tuple[str, ...] | None = ()
    """The kinds of good clients that may lose a conversation; None for all."""


class Window(NamedTuple):
    """The time of a trouble in which good clients may lose a conversation."""

    name: str
    begins: float
    """Monotonic seconds, as `ends`."""
    ends: float
    hits: tuple[str, ...] | None

    def covers(self, kind: str, began: float, ended: float) -> bool:
        """Return whether a conversation of this time may be lost."""
        grace = TUNNEL_GRACE if kind in TUNNELS else GRACE
        hit = self.hits is None or kind in self.hits
        return hit and ended >= self.begins and began <= self.ends + grace


class Troubles:
    """The timetable, and its thread."""

    def __init__(
        self,
        daemon: Daemon,
        log: LogReader,
        others: dict[str, Daemon],
        preloads: Preloads,
        control: str,
    ) -> None:
        """`others` are the daemons in the world by name, `control` the path of the socket."""
        self._daemon, self._log, self._others = daemon, log, others
        self._preloads, self._control = preloads, control
        self._config = daemon.path.read_text()
        self._choices = random.Random(7)
        self._silent: list[socket.socket] = []
        self.counts: dict[str, int] = {}
        self.windows: list[Window] = []
        self.faults: list[str] = []
        """Why the troubles ended before stop()."""
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        first, second = others["fragile1"], others["fragile2"]
        self._lasting = [
            Trouble("log reader stopped", 6, 6, log.stop, log.go),
            Trouble("descriptor limit", 10, 2, self._limit, self._unlimit, None),
            Trouble("upstream killed", 1, 6, first.kill, first.start, ("group",)),
            Trouble("upstream frozen", 16, 6, self._freeze(second), self._thaw(second), ("group",)),
            Trouble("descriptor limit", 22, 2, self._limit, self._unlimit, None),
            Trouble("log reader stopped", 30, 5, log.stop, log.go),
            Trouble("upstream killed", 33, 3, second.kill, second.start, ("group",)),
        ]
        if preloads.pipes is not None:
            # Between reloads: a process that is forked while libfiu is changed may hang in it.
            self._lasting.append(
                Trouble("2 % faults", 3, 10, self._begin_faults, self._end_faults, None)
            )
        self._repeated: list[tuple[float, Callable[[], None]]] = [
            (RELOAD_SECONDS, self._reload),
            (CONTROL_SECONDS, self._bother_control),
            (AGENT_SECONDS, self._replace_agent),
            (DISK_SECONDS, others["steady"].clear_disk),
        ]
        if preloads.clock is not None:
            self._repeated.append((CLOCK_SECONDS, self._jump))

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End all troubles."""
        self._ends.set()
        self._thread.join()
        for sock in self._silent:
            sock.close()

    def _run(self) -> None:
        try:
            self._keep_timetable()
        except Exception as error:
            self.faults.append(f"troubles ended early: {error!r}")

    def _keep_timetable(self) -> None:
        began = time.monotonic()
        running: dict[Trouble, float] = {}
        due = {act: began + seconds for seconds, act in self._repeated}
        while not self._ends.wait(STEP):
            now = time.monotonic()
            place = (now - began) % CYCLE
            for trouble in self._lasting:
                wanted = trouble.starts <= place < trouble.starts + trouble.lasts
                if wanted and trouble not in running:
                    running[trouble] = now
                    self._count(trouble.name)
                    trouble.begin()
                elif not wanted and trouble in running:
                    self._end(trouble, running.pop(trouble))
            for seconds, act in self._repeated:
                if now >= due[act]:
                    due[act] += seconds
                    self._count(act.__name__.strip("_").replace("_", " "))
                    act()
        for trouble, since in running.items():
            self._end(trouble, since)

    def _end(self, trouble: Trouble, since: float) -> None:
        trouble.end()
        if trouble.hits != ():
            self.windows.append(Window(trouble.name, since, time.monotonic(), trouble.hits))

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    # -- lasting

    def _limit(self) -> None:
        self._daemon.limit_descriptors(SPARE_DESCRIPTORS)

    def _unlimit(self) -> None:
        self._daemon.limit_descriptors(None)

    @staticmethod
    def _freeze(daemon: Daemon) -> Callable[[], None]:
        return lambda: daemon.signal(signal.SIGSTOP)

    @staticmethod
    def _thaw(daemon: Daemon) -> Callable[[], None]:
        return lambda: daemon.signal(signal.SIGCONT)

    def _begin_faults(self) -> None:
        options = f"probability={PROBABILITY}"
        self._tell_fiu(*(f"enable_random name={name},{options}" for name in FAULTY))

    def _end_faults(self) -> None:
        self._tell_fiu(*(f"disable name={name}" for name in FAULTY))

    def _tell_fiu(self, *commands: str) -> None:
        options = [part for command in commands for part in ("-c", command)]
        subprocess.run(
            ["fiu-ctrl", "-f", str(self._preloads.pipes), *options, str(self._daemon.pid)],
            env=environment(),
            check=True,
            capture_output=True,
            timeout=60,
        )

    # -- repeated

    def _reload(self) -> None:
        """Reload a file with one rule more or less, or with a mistake."""
        number = self.counts["reload"]
        more = (
            "",
            "- {domain: never.example, via: block}\n",
            "- {port: [9], via: block}\n",
            "- {nonsense: 1}\n",
        )[number % 4]
        self._daemon.path.write_text(self._config + more)
        self._daemon.signal(signal.SIGHUP)

    def _jump(self) -> None:
        """Let the daemon's clock jump."""
        clock = self._preloads.clock
        assert clock is not None
        with open(clock, "r+b") as file:
            file.write(struct.pack("q", self._choices.choice(OFFSETS)))

    def _bother_control(self) -> None:
        """Send junk to the control socket, and keep clients that say nothing."""
        with contextlib.suppress(OSError):
            sock = socket.socket(socket.AF_UNIX)
            self._silent.append(sock)
            sock.setblocking(False)
            sock.connect(self._control)
            sock.send(self._choices.choice((b"", b"[" * 3000 + b"\n", b"\xff\n", b'{"command"')))
        while len(self._silent) > SILENT_CONTROL:
            self._silent.pop(0).close()

    def _replace_agent(self) -> None:
        """Kill the agent that comes and goes, or start it again."""
        comer = self._others["comer"]
        if comer.process.poll() is None:
            comer.kill()
        else:
            comer.start()


def faults_of(others: dict[str, Daemon]) -> list[str]:
    """End the daemons in the world. Return the faults in their logs."""
    return [fault for daemon in others.values() for fault in daemon.finish()]
