"""Runs other programs as upstreams on loopback, and checks what a connection through them carries.

A function for each program writes its configuration, starts it and returns the URL for NetProxy.
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
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable

import pytest

from tests.e2e.peers import REPLY_SECONDS, Endpoint, exactly, listen
from tests.e2e.support import LOOPBACK, SECONDS, environment, program
from tests.support.certificates import certificates
from tests.support.ports import free_port

PIECE = 1 << 16
# The limit of an exchange, which takes a tenth of a second on a fast machine.
EXCHANGE_SECONDS = 60.0
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
{access}
cache deny all
access_log none
cache_log /dev/null
pid_filename none
pinger_enable off
coredump_dir none
cache_effective_user {user}
"""
# A nonce is stale after two uses.
SQUID_DIGEST = """\
auth_param digest program {helper} {passwords}
auth_param digest children 1
auth_param digest realm a test proxy
auth_param digest nonce_max_count 2
acl users proxy_auth REQUIRED
http_access allow users
http_access deny all
"""
DIGEST_HELPER = Path("/usr/lib/squid/digest_file_auth")
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
    server netproxyd {target}
"""


class Programs:
    """Programs that a test starts in `directory`. The context ends them, the last one first."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, port: int, *command: str, required: bool = False) -> None:
        """Start a program and wait until it listens on the port.

        If it does not, the test is skipped, or fails if the program is `required`.
        """
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
        self._stack.callback(_end, process)
        deadline = time.monotonic() + SECONDS
        while not listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                output_text = log.read_text("utf-8", "replace")
                assert not required, output_text
                pytest.skip(f"{command[0]} does not start: {output_text[-300:]}")
            time.sleep(0.005)

    def at_end(self, callback: Callable[[], object]) -> None:
        """Call the function after the programs that are started later have ended."""
        self._stack.callback(callback)

    def write(self, name: str, text: str) -> str:
        """Write a file to the directory and return its path."""
        path = self.directory / name
        path.write_text(text)
        return str(path)


def listens(port: int) -> bool:
    """Return True if a program listens on the port of 127.0.0.1.

    Looks in /proc, because a connection would be counted by the program.
    """
    return f" 0100007F:{port:04X} 00000000:0000 0A " in Path("/proc/net/tcp").read_text()


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        # The program and its children have a session of their own.
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


# -- the programs


def danted(programs: Programs, scheme: str) -> str:
    """Dante, which speaks SOCKS4 and SOCKS5, UDP included."""
    path, port = program("danted"), free_port()
    config = programs.write(
        "danted.conf", DANTED.format(directory=programs.directory, port=port, user=_user())
    )
    programs.start(port, path, "-N", "1", "-f", config)
    return f"{scheme}://{LOOPBACK}:{port}"


def microsocks(programs: Programs) -> str:
    """A SOCKS5 server without UDP."""
    port = free_port()
    programs.start(port, program("microsocks"), "-i", LOOPBACK, "-p", str(port))
    return f"socks5h://{LOOPBACK}:{port}"


def tinyproxy(programs: Programs) -> str:
    """An HTTP proxy."""
    path, port = program("tinyproxy"), free_port()
    programs.start(
        port, path, "-d", "-c", programs.write("tinyproxy.conf", TINYPROXY.format(port=port))
    )
    return f"http://{LOOPBACK}:{port}"


def squid(programs: Programs, access: str = "http_access allow all") -> str:
    """An HTTP proxy, which refuses to run as root.  `access`: lines that say who may use it."""
    path, port = program("squid"), free_port()
    user = "nobody" if os.getuid() == 0 else _user()
    config = programs.write("squid.conf", SQUID.format(port=port, user=user, access=access))
    shared_memory = f"netproxy{port}-*"
    programs.at_end(lambda: [path.unlink() for path in Path("/dev/shm").glob(shared_memory)])
    programs.start(port, path, "-N", "-n", f"netproxy{port}", "-d", "1", "-f", config)
    return f"http://{LOOPBACK}:{port}"


def squid_with_digest(programs: Programs, user: str, password: str) -> str:
    """squid that wants Digest authentication of a user.  The URL has no credentials."""
    if not DIGEST_HELPER.exists():
        pytest.skip(f"{DIGEST_HELPER} is not installed")
    # The helper runs as another user, who cannot read the directory of the test.
    descriptor, name = tempfile.mkstemp(prefix="netproxy-squid-")
    programs.at_end(lambda: os.unlink(name))
    with open(descriptor, "w") as file:
        file.write(f"{user}:{password}\n")
        os.fchmod(file.fileno(), 0o644)
    return squid(programs, SQUID_DIGEST.format(helper=DIGEST_HELPER, passwords=name))


def v2ray(programs: Programs, protocol: str, scheme: str) -> str:
    """v2ray with an inbound of the protocol "socks" or "http"."""
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
    """`ssh -D` to a server on this machine, with a key for host and user."""
    sshd, client, keygen = program("sshd"), program("ssh"), program("ssh-keygen")
    directory, server_port, port = programs.directory, free_port(), free_port()
    if os.getuid() == 0:
        # sshd needs this directory. Its package leaves it to systemd to create.
        os.makedirs("/run/sshd", 0o755, exist_ok=True)
    subprocess.run(
        (keygen, "-q", "-t", "ed25519", "-N", "", "-f", "key"),
        cwd=directory,
        check=True,
        timeout=SECONDS,
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
        f"{_user()}@{LOOPBACK}",
    )
    return f"socks5://{LOOPBACK}:{port}"


def haproxy(programs: Programs, scheme: str, target_port: int) -> str:
    """haproxy, which adds TLS to a listener of netproxyd."""
    path, port = program("haproxy"), free_port()
    files = [Path(certificates().path(name)) for name in ("server.pem", "server.key")]
    programs.write("both.pem", "".join(file.read_text() for file in files))
    target = f"{LOOPBACK}:{target_port}"
    text = HAPROXY.format(directory=programs.directory, port=port, target=target)
    config = programs.write("haproxy.cfg", text)
    programs.start(port, path, "-db", "-f", config)
    return secured(scheme, port)


def pproxy(programs: Programs, scheme: str) -> str:
    """pproxy, another proxy in Python."""
    pytest.importorskip("pproxy", reason="pproxy is not installed")
    port = free_port()
    programs.start(port, sys.executable, "-m", "pproxy", "-l", f"{scheme}://{LOOPBACK}:{port}")
    return f"{scheme}://{LOOPBACK}:{port}"


def secured(scheme: str, port: int) -> str:
    """Return the URL of a hop with TLS that has the server certificate of the tests."""
    return f"{scheme}://{LOOPBACK}:{port}?tls.ca={certificates().path('ca.pem')}"


# -- exchanges


class Exchange:
    """A target for TCP clients: SIZE bytes in both directions at once, then an answer to FIN.

    `answer` is what a client receives after it has sent FIN: the digest of the bytes it sent.
    """

    SIZE = 8 << 20

    def __init__(self) -> None:
        self._up, self._down = os.urandom(self.SIZE), os.urandom(self.SIZE)
        self._server = listen(LOOPBACK)
        self.address: Endpoint = self._server.getsockname()[:2]
        # A digest for each client.
        self._arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.answer = hashlib.sha256(self._up).digest()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        # Makes accept() return.
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(REPLY_SECONDS)
        self._server.close()

    def run(self, client: socket.socket) -> bytes:
        """Check that all bytes arrive in both directions, and send FIN. Return what follows.

        That is `answer`, or b"" if the connection ends in both directions with the client's FIN.
        """
        with client:
            assert _transfer(client, self._up, self.SIZE) == self._down
            assert self._arrived.get(timeout=EXCHANGE_SECONDS) == self.answer
            client.shutdown(socket.SHUT_WR)
            return _read_to_end(client)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # An error shows at the client as well, which fails the test.
        with client, contextlib.suppress(OSError):
            digest = hashlib.sha256(_transfer(client, self._down, self.SIZE)).digest()
            self._arrived.put(digest)
            if not _read_to_end(client):
                client.sendall(digest)


def _transfer(sock: socket.socket, data: bytes, size: int) -> bytes:
    """Send `data` and receive `size` bytes at the same time. Return what was received."""
    received, sent, view = bytearray(), 0, memoryview(data)
    deadline = time.monotonic() + EXCHANGE_SECONDS
    sock.setblocking(False)
    poll = select.poll()
    while sent < len(data) or len(received) < size:
        assert time.monotonic() < deadline, (
            f"sent {sent} of {len(data)} bytes, received {len(received)} of {size}"
        )
        wanted = select.POLLIN if len(received) < size else 0
        wanted |= select.POLLOUT if sent < len(data) else 0
        poll.register(sock, wanted)
        for _, events in poll.poll(1000):
            if events & select.POLLOUT:
                sent += sock.send(view[sent : sent + PIECE])
            if events & ~select.POLLOUT:
                piece = sock.recv(min(PIECE, size - len(received)))
                assert piece, f"closed after {len(received)} of {size} bytes"
                received += piece
    sock.settimeout(EXCHANGE_SECONDS)
    return bytes(received)


def _read_to_end(sock: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(PIECE):
            received += piece
    return received


def http_connect(server: Endpoint, target: Endpoint) -> socket.socket:
    """Return a connection to the target through an HTTP proxy."""
    sock = socket.create_connection(server, REPLY_SECONDS)
    sock.sendall(
        b"CONNECT %b:%d HTTP/1.1\r\nHost: %b:%d\r\n\r\n" % (2 * (target[0].encode(), target[1]))
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += exactly(sock, 1)
    assert head.split()[1] == b"200", head
    return sock
