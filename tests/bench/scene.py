"""The scene of the hostile hour: network namespaces, the daemon under test and those behind it.

The daemon is in the middle. Good clients, hostile ones and the world behind the daemon have a
namespace each. In the world are the servers, two hops of a chain, two upstreams that fail, and
agents. The first hop is an agent too, and its log is on a file system of 64 KiB.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

from rig import ROOT, SECONDS

from conversation import LOGIN, Site

from netproxy.admin.control.ask import ask
from netproxy.admin.control.client import CommandError
from tests.e2e.namespaces import Namespace
from tests.e2e.support import environment
from tests.support.certificates import certificates

DAEMON = "10.90.{}.1"
GOOD, BAD, OUTER = "10.90.1.2", "10.90.2.{}", "10.90.3.2"
BAD_HOSTS = range(2, 32)
PORTS = {
    **{"main": 1080, "tls": 1443, "tcp": 1007, "udp": 1008, "dns": 1053, "bridge": 7000},
    **{"tunnel": 8007, "tunnel_udp": 8008, "comer": 8100},
    **{"steady": 2080, "second": 2081, "fragile1": 2082, "fragile2": 2083},
}
DESCRIPTORS = 8192
"""The limit of the daemon."""
NAMES = 500
"""In the caches: few, so that they are full soon."""
DISK = "64k"
PIPE = 4096
TOKEN = "a token for a hostile hour"
FINE = ("closed", "done", "association ended", "idle", "answered")
"""How flows end to which nothing has happened."""
FAULT_LINE = re.compile(r"Traceback|internal error|has died")
_CLIENT = re.compile(r" client=\[?([0-9.]+)\]?:(\d+) .*?(?: ended=(\".*?\"|\S+))?$")

TIMEOUTS = "timeouts: {handshake: 5s, connect: 5s, half_close: 15s, drain: 5s}\n"


def configuration(site: Site, folder: Path, host: str, hops: str, more: str) -> str:
    """Return the file of the daemon under test, which listens on `host`.

    `hops` is the address of the daemons behind it. `more` are lines of the file. The rules are the
    last ones, so that a reload can add others.
    """
    world, tls = site.world, certificates().listener()
    listen = "clients: [10.90.0.0/16, 127.0.0.0/8], limits: {connections: 4096}"
    udp = "udp: {idle_timeout: 5s, max_sessions_per_client: 2000}"
    ports = site.ports
    user, password = (part.decode() for part in LOGIN)
    return f"""
listeners:
- {{name: main, listen: '{host}:{ports["main"]}', auth: optional, {udp}, {listen}}}
- {{name: tls, listen: '{host}:{ports["tls"]}', auth: none, network: tcp, tls: {tls}, {listen}}}
- {{name: tcp, protocol: tcp, listen: '{host}:{ports["tcp"]}', target: '{_text(world.tcp)}',
   {listen}}}
- {{name: udp, protocol: udp, listen: '{host}:{ports["udp"]}', target: '{_text(world.udp)}',
   {udp}, clients: [10.90.0.0/16, 127.0.0.0/8]}}
- {{name: dns, protocol: dns, listen: '{host}:{ports["dns"]}', {listen}}}
users: {{{user}: {{password: '{password}'}}}}
dns: {{servers: ['{_text(world.dns)}'], cache: {NAMES}}}
destinations: {{deny: [multicast]}}
tunnel:
  bridge:
    listen: '{host}:{ports["bridge"]}'
    tls: {tls}
    agents:
      steady:
        token: '{TOKEN}'
        ports: ['{host}:{ports["tunnel"]}', '{host}:{ports["tunnel_udp"]}/udp']
      comer: {{token: '{TOKEN}', ports: ['{host}:{ports["comer"]}']}}
upstreams:
  steady: 'socks5://{hops}:{ports["steady"]}'
  second: 'http://{hops}:{ports["second"]}'
  fragile1: 'socks5://{hops}:{ports["fragile1"]}?timeout=2s'
  fragile2: 'http://{hops}:{ports["fragile2"]}?timeout=2s'
  group: {{members: [fragile1, fragile2, second]}}
control: 'unix:{control_path(folder)}'
{TIMEOUTS}
{more}
rules:
- {{port: [{world.tcp_chain[1]}], via: [steady, second]}}
- {{port: [{world.udp_chain[1]}], via: steady}}
- {{port: [{world.tcp_group[1]}], via: group}}
"""


class Sample(NamedTuple):
    """What a daemon holds at a time."""

    at: float
    """Seconds from the start."""
    resident: float
    """MiB."""
    descriptors: int
    threads: int


def agent(site: Site, name: str, bridge: str, listen: str) -> str:
    """Return the file of an agent."""
    ports, world = site.ports, site.world
    services = {
        "steady": f"'{ports['tunnel']}': '{_text(world.tcp)}', "
        f"'{ports['tunnel_udp']}/udp': '{_text(world.udp)}'",
        "comer": f"'{ports['comer']}': '{_text(world.tcp)}'",
    }[name]
    return f"""
{listen}
destinations: {{deny: [multicast]}}
tunnel:
  agent:
    bridge: 'tls://{bridge}:{ports["bridge"]}'
    name: {name}
    token: '{TOKEN}'
    tls: {{ca: '{certificates().path("ca.pem")}', server_name: localhost}}
    services: {{{services}}}
{TIMEOUTS}
"""


def hop(host: str, port: int) -> str:
    """Return the listeners of a daemon that is a hop."""
    udp = "udp: {idle_timeout: 5s, max_sessions_per_client: 2000}"
    clients = "clients: [10.90.0.0/16, 127.0.0.0/8]"
    limits = "limits: {connections: 4096, connections_per_client: 4096}"
    return f"listeners: [{{listen: '{host}:{port}', {clients}, {limits}, {udp}}}]\n"


def control_path(folder: Path) -> str:
    """Return the path of the control socket of the daemon under test."""
    return str(folder / "control")


def _text(where: tuple[str, int]) -> str:
    return f"{where[0]}:{where[1]}"


class LogReader:
    """Reads the daemon's log from a pipe, and notes what it says of good clients."""

    def __init__(self, path: Path, clients: Sequence[str]) -> None:
        """The log is kept in `path`. `clients` are the addresses of good clients."""
        read, self.write = os.pipe()
        try:
            # F_SETPIPE_SZ
            import fcntl

            fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, PIPE)
        except OSError:
            pass
        self._file = open(read, encoding="utf-8", errors="replace")
        self._copy = open(path, "w", encoding="utf-8")
        self._clients = frozenset(clients)
        self._reads = threading.Event()
        self._reads.set()
        self.faults: list[str] = []
        self.said: dict[int, list[tuple[float, str]]] = {}
        """By the port of a good client: when the daemon told of it, and how it ended."""
        self.counts = {"reloaded": 0, "not reloaded": 0, "records dropped": 0}
        self._serves = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read nothing until go()."""
        self._reads.clear()

    def go(self) -> None:
        """Read on."""
        self._reads.set()

    def wait_until_serving(self) -> None:
        """Wait until the daemon serves."""
        if not self._serves.wait(SECONDS):
            raise SystemExit("netproxyd does not start")

    def join(self) -> None:
        """Read to the end, when the daemon has ended."""
        self.go()
        self._thread.join(SECONDS)
        self._copy.close()

    def explains(self, ports: Sequence[int], since: float) -> bool:
        """Return whether the daemon has told since then why a client's flow ended."""
        return any(
            at >= since and ended.strip('"') not in FINE
            for port in ports
            for at, ended in self.said.get(port, ())
        )

    def _read(self) -> None:
        for line in self._file:
            self._reads.wait()
            self._copy.write(line)
            if " serves " in line:
                self._serves.set()
            if FAULT_LINE.search(line):
                self.faults.append(line)
            if " reloaded" in line:
                self.counts["not reloaded" if "not reloaded" in line else "reloaded"] += 1
            if match := re.search(r"were dropped here.* records=(\d+)", line):
                self.counts["records dropped"] += int(match[1])
            if (match := _CLIENT.search(line)) and match[1] in self._clients:
                ended = match[3] or line
                self.said.setdefault(int(match[2]), []).append((time.monotonic(), ended))


class Daemon:
    """A netproxyd as a process, perhaps in a network namespace."""

    def __init__(
        self,
        folder: Path,
        name: str,
        config: str,
        host: Namespace | None = None,
        more: Mapping[str, str] = {},
        log: LogReader | None = None,
        full: bool = False,
    ) -> None:
        """`more` are environment variables. With `full` the log is on a file system of its own."""
        self.name, self._host, self._more, self._log = name, host, dict(more), log
        self._folder, self._full = folder, full
        self.path = folder / f"{name}.yaml"
        self.log_path = folder / f"{name}.log"
        self.path.write_text(config)
        self.faults: list[str] = []
        self.start()

    def start(self) -> None:
        """Start the process."""
        command = [sys.executable, "-m", "netproxy", "-c", str(self.path)]
        if self._full:
            disk = self._folder / f"{self.name}-disk"
            disk.mkdir(exist_ok=True)
            mount = 'mount -t tmpfs -o size=$1 none "$2" && exec 2>>"$2/log" && shift 2 && '
            shell = ["unshare", "-m", "sh", "-c", mount + 'exec "$@"', "sh"]
            command = [*shell, DISK, str(disk), *command]
        with open(self.log_path, "ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(**self._more),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log.write if self._log is not None else output,
                preexec_fn=self._prepare,
            )
        if self._log is not None:
            os.close(self._log.write)

    def _prepare(self) -> None:
        if self._host is not None:
            self._host.enter()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        limit = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self.process.pid

    def signal(self, number: int) -> None:
        """Send a signal, if the process lives."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait()

    def clear_disk(self) -> None:
        """Note the faults in the log on the small file system, and empty it."""
        log = Path(f"/proc/{self.pid}/root{self._folder}/{self.name}-disk/log")
        with open(log, "r+", encoding="utf-8", errors="replace") as file:
            self.faults += filter(FAULT_LINE.search, file)
            file.truncate(0)

    def limit_descriptors(self, spare: int | None) -> None:
        """Let the process open so many more descriptors; None ends this."""
        hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)[1]
        soft = hard if spare is None else self.descriptors() + spare
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (soft, hard))

    def resident_mib(self) -> float:
        """Return the resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / (1 << 20)

    def sample(self, at: float) -> Sample:
        """Return what the daemon holds now, `at` seconds from the start."""
        if self.process.poll() is not None:
            raise SystemExit(f"netproxyd has ended with {self.process.returncode}")
        return Sample(at, self.resident_mib(), self.descriptors(), self.threads())

    def descriptors(self) -> int:
        """Return the number of open descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        """Return the number of threads."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def finish(self) -> list[str]:
        """End the process. Return the faults in its log, and a wrong exit status."""
        ended = self.process.poll()
        if ended is None:
            if self._full:
                self.clear_disk()
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                ended = self.process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        faults = [] if ended in (0, -signal.SIGKILL) else [f"{self.name} ended with {ended}"]
        if self._log is not None:
            self._log.join()
            self.faults += self._log.faults
        with open(self.log_path, encoding="utf-8", errors="replace") as file:
            self.faults += filter(FAULT_LINE.search, file)
        faults, self.faults = faults + self.faults, []
        return faults


def end_agent_sessions(site: Site, control: str) -> None:
    """End the sessions of an agent's UDP port, which would stay for minutes.

    `control` is the path of the bridge's control socket.
    """
    with contextlib.suppress(CommandError):
        ask(control, "kill", listener=f"steady-{site.ports['tunnel_udp']}")


class Preloads(NamedTuple):
    """Libraries that stand between the daemon and the C library."""

    variables: Mapping[str, str]
    pipes: Path | None
    """Where fiu-ctrl finds the daemon, None without libfiu."""
    clock: Path | None
    """The file with the seconds by which the daemon's clock is wrong, None without a compiler."""


def preloads(folder: Path) -> Preloads:
    """Return the libraries that this machine has."""
    variables: dict[str, str] = {}
    pipes = clock = None
    libraries: list[str] = []
    if shutil.which("fiu-run"):
        pipes = folder / "fiu"
        told = subprocess.run(
            ["fiu-run", "-n", "-x", "-f", str(pipes), "true"], capture_output=True, text=True
        ).stdout
        libraries += re.search(r'LD_PRELOAD="(.*?)"', told)[1].split()  # type: ignore[index]
        variables |= {"FIU_ENABLE": "", "FIU_CTRL_FIFO": str(pipes)}
    library, source = folder / "clock.so", Path(__file__).with_name("clock.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    if shutil.which("cc") and not subprocess.run(command, capture_output=True).returncode:
        clock = folder / "clock"
        clock.write_bytes(bytes(8))
        libraries.append(str(library))
        variables["NETPROXY_CLOCK"] = str(clock)
    if libraries:
        variables["LD_PRELOAD"] = " ".join(libraries)
    return Preloads(variables, pipes, clock)
