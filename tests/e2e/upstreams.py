"""Other people's proxies as upstreams: each is started on a port of loopback with a configuration of the test's, and ended.

Also the exchanges that show what a way carries.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable

import pytest

from tests.e2e.peers import PATIENCE, Where, exactly, listen
from tests.e2e.support import LOOPBACK, START_SECONDS, environment, program
from tests.support.certificates import certificates
from tests.support.ports import free_port

PIECE = 1 << 16
EXCHANGE_SECONDS = 15.0  # it takes a tenth of one
DANTED = """\
logoutput: {directory}/danted.log
internal: 127.0.0.1 port = {port}
external: lo
clientmethod: none
socksmethod: none
user.privileged: {user}
user.unprivileged: {user}
client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 command: bindreply udpreply connect udpassociate }}
"""
TINYPROXY = """\
Port {port}
Listen 127.0.0.1
Timeout 60
LogLevel Warning
Allow 127.0.0.1
"""
SQUID = """\
http_port 127.0.0.1:{port}
acl CONNECT method CONNECT
http_access allow all
cache deny all
access_log none
cache_log /dev/null
pid_filename none
pinger_enable off
coredump_dir none
cache_effective_user {user}
"""
SSHD = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/key
AuthorizedKeysFile {directory}/key.pub
PidFile none
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PrintMotd no
"""
SSH_OPTIONS = (
    "IdentitiesOnly=yes",
    "BatchMode=yes",
    "ExitOnForwardFailure=yes",
    "StrictHostKeyChecking=no",
    "UserKnownHostsFile=/dev/null",
    "LogLevel=ERROR",
)
HAPROXY = """
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend before
    bind 127.0.0.1:{port} ssl crt {directory}/both.pem
    default_backend behind
backend behind
    server netproxyd {there}
"""


class Programs:
    """What a way needs besides netproxyd: started in a directory, and killed at the end, the last one first."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def start(self, port: int, *command: str) -> None:
        """Returns when it listens on `port`; the test is skipped where it ends instead."""
        log = self.directory / f"{Path(command[0]).name}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._ends.callback(_end, process)
        deadline = time.monotonic() + START_SECONDS
        while not listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(
                    f"{command[0]} does not start: {log.read_text('utf-8', 'replace')[-300:]}"
                )
            time.sleep(0.005)

    def at_end(self, do: Callable[[], object]) -> None:
        self._ends.callback(do)

    def write(self, name: str, text: str) -> str:
        path = self.directory / name
        path.write_text(text)
        return str(path)


def listens(port: int) -> bool:
    """Looked up and not tried: a connection would be counted."""
    return f" 0100007F:{port:04X} 00000000:0000 0A " in Path("/proc/net/tcp").read_text()


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)  # it and its children: a session of their own
    except ProcessLookupError:
        pass
    process.wait()


def _me() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


# -- the programs: each gives the URL by which NetProxy goes through it


def danted(programs: Programs, scheme: str) -> str:
    path, port = program("danted"), free_port()
    config = programs.write(
        "danted.conf", DANTED.format(directory=programs.directory, port=port, user=_me())
    )
    programs.start(port, path, "-N", "1", "-f", config)
    return f"{scheme}://{LOOPBACK}:{port}"


def microsocks(programs: Programs) -> str:
    port = free_port()
    programs.start(port, program("microsocks"), "-i", LOOPBACK, "-p", str(port))
    return f"socks5h://{LOOPBACK}:{port}"


def tinyproxy(programs: Programs) -> str:
    path, port = program("tinyproxy"), free_port()
    programs.start(
        port, path, "-d", "-c", programs.write("tinyproxy.conf", TINYPROXY.format(port=port))
    )
    return f"http://{LOOPBACK}:{port}"


def squid(programs: Programs) -> str:
    path, port = program("squid"), free_port()
    # as root it does not run
    config = programs.write(
        "squid.conf", SQUID.format(port=port, user="nobody" if os.getuid() == 0 else _me())
    )
    programs.at_end(lambda: [left.unlink() for left in Path("/dev/shm").glob(f"netproxy{port}-*")])
    programs.start(port, path, "-N", "-n", f"netproxy{port}", "-d", "1", "-f", config)
    return f"http://{LOOPBACK}:{port}"


def v2ray(programs: Programs, protocol: str, scheme: str) -> str:
    path, port = program("v2ray"), free_port()
    settings = {"udp": True, "ip": LOOPBACK} if protocol == "socks" else {}
    config = {
        "log": {"loglevel": "warning"},
        "outbounds": [{"protocol": "freedom"}],
        "inbounds": [
            {"listen": LOOPBACK, "port": port, "protocol": protocol, "settings": settings}
        ],
    }
    programs.start(port, path, "-config", programs.write("v2ray.json", json.dumps(config)))
    return f"{scheme}://{LOOPBACK}:{port}"


def ssh(programs: Programs) -> str:
    """`ssh -D` to a server with a key that both sides are known by."""
    sshd, client, keygen = program("sshd"), program("ssh"), program("ssh-keygen")
    directory, server_port, port = programs.directory, free_port(), free_port()
    if os.getuid() == 0:
        os.makedirs(
            "/run/sshd", 0o755, exist_ok=True
        )  # sshd wants it, and its package leaves it to systemd
    subprocess.run(
        (keygen, "-q", "-t", "ed25519", "-N", "", "-f", "key"),
        cwd=directory,
        check=True,
        timeout=START_SECONDS,
    )
    config = programs.write("sshd.conf", SSHD.format(directory=directory, port=server_port))
    programs.start(server_port, sshd, "-D", "-e", "-f", config)
    options = [word for option in SSH_OPTIONS for word in ("-o", option)]
    programs.start(
        port,
        client,
        "-F",
        "/dev/null",
        *options,
        "-i",
        str(directory / "key"),
        "-N",
        "-D",
        f"{LOOPBACK}:{port}",
        "-p",
        str(server_port),
        f"{_me()}@{LOOPBACK}",
    )
    return f"socks5://{LOOPBACK}:{port}"


def haproxy(programs: Programs, scheme: str, there: int) -> str:
    """TLS before the listener of ours on the port `there`."""
    path, port, made = program("haproxy"), free_port(), certificates()
    programs.write(
        "both.pem", "".join(Path(made.path(f"server.{end}")).read_text() for end in ("pem", "key"))
    )
    config = programs.write(
        "haproxy.cfg",
        HAPROXY.format(directory=programs.directory, port=port, there=f"{LOOPBACK}:{there}"),
    )
    programs.start(port, path, "-db", "-f", config)
    return secured(scheme, port)


def pproxy(programs: Programs, scheme: str) -> str:
    pytest.importorskip("pproxy", reason="pproxy is not installed")
    port = free_port()
    programs.start(port, sys.executable, "-m", "pproxy", "-l", f"{scheme}://{LOOPBACK}:{port}")
    return f"{scheme}://{LOOPBACK}:{port}"


def secured(scheme: str, port: int) -> str:
    """The URL of a hop with TLS whose certificate is one of ours."""
    return f"{scheme}://{LOOPBACK}:{port}?tls.ca={certificates().path('ca.pem')}"


# -- exchanges


class Exchange:
    """A target, and what its clients do there: SIZE bytes each way at once, then an answer to the client's end."""

    SIZE = 8 << 20

    def __init__(self) -> None:
        self._up, self._down = os.urandom(self.SIZE), os.urandom(self.SIZE)
        self._server = listen(LOOPBACK)
        self.address: Where = self._server.getsockname()[:2]
        self._arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # a digest for each client
        self.answer = hashlib.sha256(
            self._up
        ).digest()  # what a client gets that ends its way first
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # accept() returns
        self._thread.join(PATIENCE)
        self._server.close()

    def run(self, client: socket.socket) -> bytes:
        """All bytes come as they went, or AssertionError; what comes after the client's end, b"" where both ways end with it."""
        with client:
            assert _both_ways(client, self._up, self.SIZE) == self._down
            assert self._arrived.get(timeout=EXCHANGE_SECONDS) == self.answer
            client.shutdown(socket.SHUT_WR)
            return _to_the_end(client)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):  # the other side tells
            digest = hashlib.sha256(_both_ways(client, self._down, self.SIZE)).digest()
            self._arrived.put(digest)
            if not _to_the_end(client):
                client.sendall(digest)


def _both_ways(sock: socket.socket, data: bytes, size: int) -> bytes:
    """Sends `data` and receives `size` bytes at once."""
    received, sent, view = bytearray(), 0, memoryview(data)
    deadline = time.monotonic() + EXCHANGE_SECONDS
    sock.setblocking(False)
    poll = select.poll()
    while sent < len(data) or len(received) < size:
        assert time.monotonic() < deadline, (
            f"sent {sent} of {len(data)} bytes, received {len(received)} of {size}"
        )
        poll.register(
            sock,
            (select.POLLIN if len(received) < size else 0)
            | (select.POLLOUT if sent < len(data) else 0),
        )
        for _, events in poll.poll(1000):
            if events & select.POLLOUT:
                sent += sock.send(view[sent : sent + PIECE])
            if events & ~select.POLLOUT:
                piece = sock.recv(min(PIECE, size - len(received)))
                assert piece, f"closed after {len(received)} of {size} bytes"
                received += piece
    sock.settimeout(EXCHANGE_SECONDS)
    return bytes(received)


def _to_the_end(sock: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(PIECE):
            received += piece
    return received


def http_connect(server: Where, target: Where) -> socket.socket:
    """The connection through an HTTP proxy."""
    sock = socket.create_connection(server, PATIENCE)
    sock.sendall(
        b"CONNECT %b:%d HTTP/1.1\r\nHost: %b:%d\r\n\r\n" % (2 * (target[0].encode(), target[1]))
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += exactly(sock, 1)
    assert head.split()[1] == b"200", head
    return sock
