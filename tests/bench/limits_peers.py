"""The programs that limits.py measures: netproxyd, 3proxy and squid, each with a rate per user."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Protocol

from limits_load import CONNECT, GET, PASSWORD, SOCKS
from rig import LOOPBACK, ROOT, SECONDS, TICK, Endpoint, Netproxyd, free_port

# Connections that a program must take.
CONNECTIONS = 16384


class Running(Protocol):
    """A proxy that runs."""

    address: Endpoint

    def processor_seconds(self) -> float:
        """Return user and system time so far."""


class Peer(NamedTuple):
    """A program and what it can do."""

    name: str
    start: Callable[[int, int], object]
    """A context with the running proxy, for a number of users and their bit/s."""
    dialects: tuple[str, ...]
    udp: bool
    """Whether it relays UDP (SOCKS5 UDP ASSOCIATE)."""
    up: bool
    """Whether it limits what clients send."""


class Program:
    """A started program that listens on one port of loopback."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self.address: Endpoint = LOOPBACK, port
        deadline = time.monotonic() + SECONDS
        while not _answers(self.address):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SystemExit(f"{command[0]} did not start:\n{log.read_text()}")
            time.sleep(0.05)

    def processor_seconds(self) -> float:
        """Return user and system time so far, in ticks of 10 ms on most machines."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / TICK

    def stop(self) -> None:
        """End the program."""
        self._process.terminate()
        try:
            self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _answers(address: Endpoint) -> bool:
    try:
        socket.create_connection(address, 1).close()
    except OSError:
        return False
    return True


def netproxyd(users: int, rate: int, root: Path = ROOT) -> Netproxyd:
    """Start netproxyd of a checkout. Each user has `rate` bit/s in each direction; 0: no limit."""
    limits = f", limits: {{rate_up: {rate}bit/s, rate_down: {rate}bit/s}}" if rate else ""
    lines = "\n".join(
        f"  {user_name(number)}: {{password: {PASSWORD}{limits}}}" for number in range(users)
    )
    config = f"""
listeners:
  - listen: "{LOOPBACK}:0"
    protocol: sps
    limits: {{connections: {CONNECTIONS}}}
    udp: {{max_sessions: {CONNECTIONS}}}
users:
{lines}
log: {{access: false}}
"""
    return Netproxyd(config=config, root=root)


def user_name(number: int) -> str:
    """Return the name of a user."""
    return f"u{number}"


@contextmanager
def three_proxy(users: int, rate: int) -> Iterator[Program]:
    """Start 3proxy with bandlimin and bandlimout."""
    names = [user_name(number) for number in range(users)]
    # bandlimin is what comes from targets, bandlimout what goes to them.
    lines = [
        "log /dev/null",
        f"maxconn {CONNECTIONS}",
        "auth strong",
        *(f"users {name}:CL:{PASSWORD}" for name in names),
        *(f"{limit} {rate} {name}" for limit in ("bandlimin", "bandlimout") for name in names),
        "allow *",
        f"internal {LOOPBACK}",
        f"external {LOOPBACK}",
    ]
    with ExitStack() as stack:
        folder, port = _folder(stack), free_port()
        path = folder / "3proxy.cfg"
        path.write_text("\n".join([*lines, f"socks -p{port}", ""]))
        program = Program([os.environ["THREE_PROXY"], str(path)], port, folder / "log")
        stack.callback(program.stop)
        yield program


@contextmanager
def squid(users: int, rate: int) -> Iterator[Program]:
    """Start squid with a delay pool of class 4: buckets of a second, filled once a second."""
    with ExitStack() as stack:
        folder, port = _folder(stack), free_port()
        # squid gives up its rights before it opens its files.
        folder.chmod(0o777)
        path = folder / "squid.conf"
        path.write_text(f"""http_port {LOOPBACK}:{port}
auth_param basic program /usr/lib/squid/basic_fake_auth
auth_param basic children 2
acl known proxy_auth REQUIRED
http_access allow known
delay_pools 1
delay_class 1 4
delay_access 1 allow all
delay_parameters 1 none none none {rate // 8}/{rate // 8}
cache deny all
cache_mem 8 MB
access_log none
cache_log {folder}/cache.log
cache_store_log none
pid_filename {folder}/squid.pid
coredump_dir {folder}
pinger_enable off
max_filedescriptors {CONNECTIONS}
shutdown_lifetime 1 seconds
""")
        program = Program(["/usr/sbin/squid", "-N", "-f", str(path)], port, folder / "log")
        stack.callback(program.stop)
        yield program


def _folder(stack: ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netproxy-bench-")))


def peers() -> list[Peer]:
    """Return netproxyd and the programs that are installed; say which are not."""
    found = [Peer("netproxyd", netproxyd, (SOCKS, CONNECT, GET), udp=True, up=True)]
    if path := os.environ.get("THREE_PROXY") or shutil.which("3proxy"):
        os.environ["THREE_PROXY"] = path
        found.append(Peer("3proxy", three_proxy, (SOCKS,), udp=True, up=True))
    else:
        print("3proxy is not installed: its program may be given as THREE_PROXY")
    if os.path.exists("/usr/sbin/squid"):
        found.append(Peer("squid", squid, (CONNECT, GET), udp=False, up=False))
    else:
        print("squid is not installed")
    return found
