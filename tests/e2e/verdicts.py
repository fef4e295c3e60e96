"""Asks an old proxy and netproxyd with the converted file the same flows, and compares verdicts.

Everything is in one network namespace whose loopback interface has all addresses of 10.9.0.0/16:
clients, targets, upstream proxies and both daemons.  Names come from a hosts file that only the
daemons see.
"""

from __future__ import annotations

import base64
import contextlib
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence, TypeVar

from netproxy.ctl.convert.command import convert
from netproxy.ctl.convert.source import read_source
from tests.e2e.namespaces import Namespace, hosts
from tests.e2e.peers import encode, exactly, read_address
from tests.e2e.support import ROOT, SECONDS, program, wait_for
from tests.e2e.support import environment

OLD_PORT, NEW_PORT = 1081, 1082
NETWORK = "10.9.0.0/16"
UPSTREAM = ("10.9.9.1", 3128)
"""A proxy for all protocols that answers every request itself, with another body than targets."""
PORTS = (22, 25, 80, 443, 563, 8080)
"""The ports of all targets, TCP; and UDP_PORTS."""
UDP_PORTS = (53, 5353)
REDIRECTED = {OLD_PORT: "10.9.21", NEW_PORT: "10.9.22"}
"""The networks whose connections redirect() leads to the ports of the proxies."""
NAMES = {
    "www.allowed.example": "10.9.1.1",
    "allowed.example": "10.9.1.1",
    "ads.example": "10.9.1.2",
    "www.ads.example": "10.9.1.2",
    "adserver7.example": "10.9.1.3",
    "intranet": "10.9.1.4",
    "far.onion.example": "10.9.1.5",
    "inside.example": "10.9.5.1",
}
# As in <linux/in.h>; the module socket has it from Python 3.14 on.
IP_PKTINFO = 8
DIRECT, THROUGH, REFUSED = "direct", "through the upstream", "refused"
_BODIES = {b"ok": DIRECT, b"up": THROUGH}
AT_ONCE = 8
# How long a datagram's answer may take before it counts as refused.
_UDP_SECONDS = 0.5
# Within the mount namespace that `ip netns exec` makes.
_MOUNT = """
for file in hosts passwd shadow; do
    [ ! -e "$0/$file" ] || mount --bind "$0/$file" "/etc/$file"
done
exec "$@"
"""

Result = TypeVar("Result")


class Ask(NamedTuple):
    """One flow that a client asks a proxy for."""

    how: str
    """ "http", "connect", "socks5", "socks4", "bind", "udp" or "redirected"."""
    target: str
    """host:port"""
    client: str = "10.9.2.1"
    login: str = ""
    """user:password"""

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.target.rpartition(":")
        return host, int(port)


def asks(
    hows: Sequence[str], targets: Sequence[str], clients: Sequence[str], logins: Sequence[str]
) -> list[Ask]:
    """Return all combinations."""
    return [
        Ask(how, target, client, login)
        for how in hows
        for target in targets
        for client in clients
        for login in logins
    ]


# -- the network


class Rig:
    """The namespace, its targets and its daemons."""

    def __init__(self, namespace: Namespace, directory: Path, stack: contextlib.ExitStack) -> None:
        self.namespace, self.directory, self._stack = namespace, directory, stack
        lines = ["127.0.0.1 localhost", *(f"{host} {name}" for name, host in NAMES.items())]
        (directory / "hosts").write_text("\n".join(lines) + "\n")

    def inside(self, call: Callable[[], Result]) -> Result:
        """Call a function in a thread that has entered the namespace; return its result."""
        results: list[Result] = []

        def run() -> None:
            self.namespace.enter()
            results.append(call())

        thread = threading.Thread(target=run, name="test-inside")
        thread.start()
        thread.join()
        return results[0]

    def start(self, port: int, *command: str, log: str) -> None:
        """Start a daemon in the namespace and wait until it listens on a port."""
        path = self.directory / log
        ip = program("ip")
        prefix = (ip, "netns", "exec", self.namespace.name, "sh", "-c", _MOUNT, str(self.directory))
        with open(path, "wb") as output:
            process = subprocess.Popen(
                [*prefix, *command],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._stack.callback(_end, process)

        def is_ready() -> bool:
            assert process.poll() is None, path.read_text("utf-8", "replace")
            return self.inside(lambda: _listens(port))

        wait_for(is_ready, SECONDS, f"{command[0]} listens on {port}")

    def convert(self, form: str, path: str, edit: Callable[[str], str] = str) -> str:
        """Convert a file, let netproxyd serve it on NEW_PORT, and return the configuration.

        `edit` makes the changes that are left to the user, such as passwords.
        """
        text = edit(convert(form, read_source(path))[0])
        config = self.directory / "converted.yaml"
        config.write_text(text.replace(f":{OLD_PORT}", f":{NEW_PORT}"))
        config.chmod(0o600)
        self.start(NEW_PORT, sys.executable, "-m", "netproxy", "-c", str(config), log="netproxyd")
        return text

    def redirect(self) -> None:
        """Lead connections to ports 80 and 443 from two networks to the two proxies."""
        rules = "".join(
            f"ip saddr {network}.0/24 tcp dport {{ 80, 443 }} redirect to :{port}\n"
            for port, network in REDIRECTED.items()
        )
        self.namespace.nft(
            f"table ip led {{ chain out {{\ntype nat hook output priority -100;\n{rules}}}\n}}"
        )

    def verdicts(self, flows: Sequence[Ask], port: int) -> list[str]:
        """Return the verdict of each flow at the proxy on a port."""

        def ask() -> list[str]:
            # Threads are in the namespace of the thread that starts them.
            with ThreadPoolExecutor(AT_ONCE, "test-client") as pool:
                return list(pool.map(partial(_verdict, port=port), flows))

        return self.inside(ask)

    def differences(self, flows: Sequence[Ask], old: Sequence[str]) -> list[tuple[Ask, str, str]]:
        """Return the flows of which netproxyd decides differently than the `old` verdicts."""
        rows = zip(flows, old, self.verdicts(flows, NEW_PORT), strict=True)
        return [row for row in rows if row[1] != row[2]]


@contextlib.contextmanager
def rig(directory: Path) -> Iterator[Rig]:
    """Make the network, with its targets and the upstream proxy."""
    with hosts("verdicts") as (namespace,), contextlib.ExitStack() as stack:
        namespace.ip("address", "add", NETWORK, "dev", "lo")
        namespace.ip("-6", "address", "add", "fd09::1/64", "dev", "lo", "nodad")
        made = Rig(namespace, directory, stack)
        stack.enter_context(made.inside(_Targets))
        yield made


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _listens(port: int) -> bool:
    # Not /proc/self: the namespace is that of this thread.
    tables = ("tcp", "tcp6")
    base = Path(f"/proc/self/task/{threading.get_native_id()}/net")
    return any(
        f":{port:04X} 0" in line and " 0A " in line
        for table in tables
        for line in (base / table).read_text().splitlines()
    )


class _Targets:
    """Answers on all ports, for targets and for the upstream proxy: one thread for everything."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop, other = socket.socketpair()
        self._selector.register(other, selectors.EVENT_READ, None)
        self._other = other
        for port in PORTS:
            self._listen(("", port), _answer)
        self._listen(UPSTREAM, _answer_as_proxy)
        for port in UDP_PORTS:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            # The answer leaves from the address that was asked.
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            sock.bind(("", port))
            self._selector.register(sock, selectors.EVENT_READ, _echo)
        self._thread = threading.Thread(target=self._run, name="test-targets")
        self._thread.start()

    def __enter__(self) -> _Targets:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.join()

    def _listen(self, address: tuple[str, int], answer: Callable[[socket.socket], None]) -> None:
        if address[0]:
            sock = socket.create_server(address)
        else:
            sock = socket.create_server(
                ("::", address[1]), family=socket.AF_INET6, dualstack_ipv6=True
            )

        def accept(server: socket.socket) -> None:
            client, _ = server.accept()
            client.settimeout(SECONDS)
            threading.Thread(target=serve, args=(client,), name="test-target").start()

        def serve(client: socket.socket) -> None:
            with client, contextlib.suppress(OSError, EOFError):
                answer(client)

        self._selector.register(sock, selectors.EVENT_READ, accept)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    for other in list(self._selector.get_map().values()):
                        other.fileobj.close()  # type: ignore[union-attr]
                    self._selector.close()
                    return
                key.data(key.fileobj)


def _echo(sock: socket.socket) -> None:
    data, control, _, peer = sock.recvmsg(2048, 128)
    sock.sendmsg([data], [(level, kind, value) for level, kind, value in control], 0, peer)


def _answer(client: socket.socket, body: bytes = b"ok") -> None:
    """Answer one HTTP request."""
    _head(client)
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n" + body)


def _answer_as_proxy(client: socket.socket) -> None:
    """Answer as a proxy that would have connected anywhere."""
    first = client.recv(1, socket.MSG_PEEK)
    if first == b"\5":
        exactly(client, exactly(client, 2)[1])
        client.sendall(b"\5\0")
        exactly(client, 3)
        read_address(client)
        client.sendall(b"\5\0\0\1" + bytes(6))
    elif first == b"\4":
        head = exactly(client, 8)
        parts = 2 if head[4:7] == b"\0\0\0" else 1
        while parts:
            parts -= exactly(client, 1) == b"\0"
        client.sendall(b"\0\x5a" + bytes(6))
    else:
        head = _head(client)
        if not head.startswith(b"CONNECT"):
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nup")
            return
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    _answer(client, b"up")


def _head(client: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += exactly(client, 1)
    return head


# -- clients


def _verdict(flow: Ask, port: int) -> str:
    try:
        return _BODIES.get(_CLIENTS[flow.how](flow, port), REFUSED)
    except (OSError, EOFError, ValueError):
        return REFUSED


def _connect(flow: Ask, port: int) -> socket.socket:
    proxy = "fd09::1" if ":" in flow.client else "10.9.0.1"
    return socket.create_connection((proxy, port), SECONDS, (flow.client, 0))


def _http(flow: Ask, port: int) -> bytes:
    with _connect(flow, port) as sock:
        sock.sendall(_request(f"GET http://{flow.target}/ HTTP/1.1", flow))
        return _body(sock)


def _http_connect(flow: Ask, port: int) -> bytes:
    with _connect(flow, port) as sock:
        sock.sendall(_request(f"CONNECT {flow.target} HTTP/1.1", flow))
        head = _head(sock)
        if not head.partition(b" ")[2].startswith(b"200"):
            return b""
        return _exchange(sock)


def _request(start: str, flow: Ask) -> bytes:
    lines = [start, f"Host: {flow.target}", "Connection: close"]
    if flow.login:
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(flow.login.encode()).decode()}")
    return "\r\n".join([*lines, "", ""]).encode()


def _exchange(sock: socket.socket) -> bytes:
    """Ask the target at the other end of a tunnel."""
    sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
    return _body(sock)


def _body(sock: socket.socket) -> bytes:
    head = _head(sock)
    return exactly(sock, 2) if head.partition(b" ")[2].startswith(b"200") else b""


def _socks5_hello(sock: socket.socket, flow: Ask) -> None:
    sock.sendall(b"\5\1\2" if flow.login else b"\5\1\0")
    method = exactly(sock, 2)[1]
    if method == 2:
        user, _, password = flow.login.partition(":")
        sock.sendall(b"\1" + _counted(user) + _counted(password))
        if exactly(sock, 2)[1]:
            raise ValueError("wrong login")
    elif method:
        raise ValueError("no method")


def _counted(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def _socks5_request(sock: socket.socket, command: int, address: tuple[str, int]) -> tuple[str, int]:
    sock.sendall(bytes([5, command, 0]) + _encoded(address))
    if exactly(sock, 3)[1]:
        raise ValueError("refused")
    return read_address(sock)


def _encoded(address: tuple[str, int]) -> bytes:
    try:
        return encode(address)
    except OSError:
        return b"\3" + _counted(address[0]) + struct.pack("!H", address[1])


def _socks5(flow: Ask, port: int) -> bytes:
    with _connect(flow, port) as sock:
        _socks5_hello(sock, flow)
        _socks5_request(sock, 1, flow.address)
        return _exchange(sock)


def _socks4(flow: Ask, port: int) -> bytes:
    host, target_port = flow.address
    with _connect(flow, port) as sock:
        try:
            packed, name = socket.inet_aton(host), b""
        except OSError:
            packed, name = b"\0\0\0\1", host.encode() + b"\0"
        user = flow.login.partition(":")[0].encode()
        sock.sendall(struct.pack("!BBH", 4, 1, target_port) + packed + user + b"\0" + name)
        if exactly(sock, 8)[1] != 0x5A:
            return b""
        return _exchange(sock)


def _bind(flow: Ask, port: int) -> bytes:
    """Have the proxy listen for a peer at the target's address, and connect from there."""
    with _connect(flow, port) as sock:
        _socks5_hello(sock, flow)
        bound = _socks5_request(sock, 2, flow.address)
        peer_address = NAMES.get(flow.address[0], flow.address[0])
        with socket.create_connection(bound, SECONDS, (peer_address, 0)) as peer:
            if exactly(sock, 3)[1]:
                return b""
            read_address(sock)
            peer.sendall(b"ok")
            return exactly(sock, 2)


def _udp(flow: Ask, port: int) -> bytes:
    with _connect(flow, port) as control, socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.settimeout(_UDP_SECONDS)
        sock.bind((flow.client, 0))
        _socks5_hello(control, flow)
        relay = _socks5_request(control, 3, ("0.0.0.0", 0))
        relay = ("10.9.0.1" if relay[0] == "0.0.0.0" else relay[0], relay[1])
        sock.sendto(b"\0\0\0" + _encoded(flow.address) + b"ok", relay)
        return sock.recv(2048)[-2:]


def _redirected(flow: Ask, port: int) -> bytes:
    """Connect to the target itself, from the network whose connections are led to a port."""
    source = f"{REDIRECTED[port]}.{flow.client.rpartition('.')[2]}"
    with socket.create_connection(flow.address, SECONDS, (source, 0)) as sock:
        return _exchange(sock)


_CLIENTS: dict[str, Callable[[Ask, int], bytes]] = {
    "http": _http,
    "connect": _http_connect,
    "socks5": _socks5,
    "socks4": _socks4,
    "bind": _bind,
    "udp": _udp,
    "redirected": _redirected,
}
