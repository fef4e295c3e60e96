"""Hostile clients: slow ones at every stage of every protocol, floods, forged packets.

All are in one process, which has many addresses; each attack has a thread and a pace of its own.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
import threading
import time
from typing import Callable, Mapping, NamedTuple, Sequence

from conversation import LOGIN, Site
from load import Process
from rig import Endpoint
from world import STACK

from netproxy.interfaces.addresses import Address
from netproxy.protocol import tunnel, uot
from netproxy.protocol.http import capsule
from netproxy.protocol.http import connect_udp
from tests.e2e.peers import encode

# Slow clients at the same time, and those that do not read what they asked for.
SLOW, UNREAD = 150, 20
# Seconds between two looks at the slow clients, of which a part then sends a byte or leaves.
LOOK = 0.1
DRIP, LEAVE = 0.05, 0.01
# Attacks a second.
FLOOD, LOGINS, QUERIES, NAMES, JUNK, FORGED, SYNS, ASSOCIATIONS = 40, 3, 40, 4, 200, 150, 100, 5
# Ports of the forged packets.
FORGED_PORTS = range(20_000, 20_200)
SECONDS = 2.0


class Ground(NamedTuple):
    """Where hostile clients are."""

    site: Site
    """What they attack; `host` is the daemon's address for them."""
    sources: tuple[str, ...]
    """Their addresses."""
    victim: str
    """The address of good clients, from which they forge datagrams."""
    unused: str
    """The first two bytes and a dot of addresses from which they forge SYNs, "10.90."."""


def _client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def scripts(site: Site) -> list[tuple[str, bytes]]:
    """Return what clients of each protocol send, with the port that they send it to."""
    world = site.world
    greeting, login = b"\5\1\0", b"\1" + b"".join(bytes([len(part)]) + part for part in LOGIN)
    to_tcp, to_silent = encode(world.tcp), encode(world.silent)
    silent = b"%b:%d" % (world.silent[0].encode(), world.silent[1])
    datagrams = uot.encode_request(uot.UotRequest(True, Address(*world.udp)))
    query = b"\1\2\1\0\0\1" + bytes(6) + b"\1a\6silent\0\0\1\0\1"
    hello = tunnel.encode_hello(tunnel.Hello(tunnel.CONTROL, "steady", bytes(32)))
    return [
        ("main", greeting + b"\5\1\0" + to_tcp + b"data"),
        ("main", greeting + b"\5\1\0" + to_silent + b"data"),
        ("main", b"\5\1\2" + login + b"\5\1\0" + to_tcp),
        ("main", greeting + b"\5\2\0" + encode(("0.0.0.0", 0))),
        ("main", greeting + b"\5\3\0" + encode(("0.0.0.0", 0))),
        ("main", greeting + b"\5\1\0" + encode((uot.MAGIC, 0)) + datagrams + b"\0\5hello"),
        ("main", greeting + b"\5\1\0" + encode(("a.silent", 80))),
        ("main", b"\4\1" + struct.pack("!H", world.tcp[1]) + to_tcp[1:5] + b"a\0"),
        ("main", b"CONNECT " + silent + b" HTTP/1.1\r\nHost: a\r\n\r\ndata"),
        ("main", b"GET http://" + silent + b"/ HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n"),
        ("main", b"POST http://" + silent + b"/ HTTP/1.1\r\nContent-Length: 99\r\n\r\nhello"),
        (
            "main",
            b"POST http://"
            + silent
            + b"/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        ),
        ("main", connect_udp.encode_request(Address(*world.udp), "a") + capsule.datagram_header(9)),
        ("tls", _client_hello()),
        ("tcp", b"data"),
        ("dns", struct.pack("!H", len(query)) + query),
        ("bridge", _client_hello()),
        ("bridge", hello),
    ]


class Attacks(Process):
    """A process with all hostile clients."""

    def __init__(self, begin: Callable[[], None]) -> None:
        """`begin` is called in the new process, to enter its namespace."""
        self._begin = begin
        super().__init__()

    def begin(self) -> None:
        self._begin()

    # -- calls

    def start(self, ground: Ground) -> None:
        """Begin all attacks."""
        self._ends = threading.Event()
        self._ground = ground
        self._counts: dict[str, int] = {}
        attacks: Mapping[str, tuple[Callable[[random.Random], None], float]] = {
            "flood": (self._flood, FLOOD),
            "wrong login": (self._log_in, LOGINS),
            "query": (self._query, QUERIES),
            "silent name": (self._name, NAMES),
            "junk": (self._junk, JUNK),
            "association": (self._associate, ASSOCIATIONS),
        }
        self._scripts = scripts(ground.site)
        self._udp = [self._bound(socket.SOCK_DGRAM, source) for source in ground.sources]
        threads = [(self._pace, (name, *attack)) for name, attack in attacks.items()]
        threads += [(self._slow, ()), (self._unread, ())]
        with contextlib.suppress(PermissionError):
            self._raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
            threads.append((self._pace, ("forged datagram", self._forge, FORGED)))
            threads.append((self._pace, ("SYN", self._syn, SYNS)))
        threading.stack_size(STACK)
        self._threads = [
            threading.Thread(target=run, args=given, daemon=True) for run, given in threads
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> dict[str, int]:
        """End all attacks; return how many there were of each kind."""
        self._ends.set()
        for thread in self._threads:
            thread.join()
        return self._counts

    # -- in its process

    def _pace(self, name: str, attack: Callable[[random.Random], None], rate: float) -> None:
        choices = random.Random(name)
        began, count = time.monotonic(), 0
        while not self._ends.is_set():
            if count >= (time.monotonic() - began) * rate:
                self._ends.wait(1 / rate)
                continue
            count += 1
            with contextlib.suppress(OSError):
                attack(choices)
            self._counts[name] = count

    def _bound(self, kind: int, source: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET, kind)
        if kind == socket.SOCK_STREAM:
            # The port is chosen by connect().
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((source, 0))
        return sock

    def _dial(self, choices: random.Random, port: str = "main") -> socket.socket:
        sock = self._bound(socket.SOCK_STREAM, choices.choice(self._ground.sources))
        sock.settimeout(SECONDS)
        try:
            sock.connect(self._to(port))
        except OSError:
            sock.close()
            raise
        return sock

    def _to(self, port: str) -> Endpoint:
        return self._ground.site.host, self._ground.site.ports[port]

    # -- slow clients

    def _slow(self) -> None:
        """Open SLOW connections that stop at any place of a script, and send on by bytes."""
        choices = random.Random("slow")
        clients: list[tuple[socket.socket, bytearray]] = []
        while not self._ends.wait(LOOK):
            with contextlib.suppress(OSError):
                while len(clients) < SLOW:
                    clients.append(self._open_slow(choices))
                    self._counts["slow client"] = self._counts.get("slow client", 0) + 1
            clients = [client for client in clients if self._continues(client, choices)]
        for sock, _ in clients:
            sock.close()

    def _open_slow(self, choices: random.Random) -> tuple[socket.socket, bytearray]:
        port, script = choices.choice(self._scripts)
        sock = self._dial(choices, port)
        sent = choices.randint(0, len(script))
        sock.send(script[:sent])
        sock.setblocking(False)
        return sock, bytearray(script[sent:])

    @staticmethod
    def _continues(client: tuple[socket.socket, bytearray], choices: random.Random) -> bool:
        sock, left = client
        chance = choices.random()
        try:
            if chance < LEAVE:
                _close(sock, abruptly=choices.random() < 0.5)
                return False
            if chance < DRIP and left:
                sock.send(left[:1])
                del left[0]
        except OSError:
            sock.close()
            return False
        return True

    def _unread(self) -> None:
        """Ask for much, and read nothing of it."""
        choices = random.Random("unread")
        host, port = self._ground.site.world.http
        request = b"GET http://%b:%d/1048576 HTTP/1.1\r\nHost: a\r\n\r\n" % (host.encode(), port)
        clients: list[socket.socket] = []
        while not self._ends.wait(1):
            with contextlib.suppress(OSError):
                if len(clients) >= UNREAD:
                    _close(clients.pop(0), abruptly=choices.random() < 0.5)
                clients.append(self._dial(choices))
                clients[-1].send(request * 20)
                self._counts["unread"] = self._counts.get("unread", 0) + 1
        for sock in clients:
            sock.close()

    # -- floods

    def _flood(self, choices: random.Random) -> None:
        """Connect, send something valid or not, and leave."""
        port, script = choices.choice(self._scripts)
        with self._dial(choices, port) as sock:
            if choices.random() < 0.3:
                script = choices.randbytes(choices.randrange(200))
            elif choices.random() < 0.3:
                at = choices.randrange(len(script))
                script = script[:at] + choices.randbytes(3) + script[at + 1 :]
            sock.send(script)
            if choices.random() < 0.5:
                sock.settimeout(0.02)
                with contextlib.suppress(TimeoutError):
                    sock.recv(4096)
            _close(sock, abruptly=choices.random() < 0.5)

    def _log_in(self, choices: random.Random) -> None:
        with self._dial(choices) as sock:
            sock.send(b"\5\1\2\1\5alice\5" + choices.randbytes(5) + b"\5\1\0")
            sock.recv(4)

    def _query(self, choices: random.Random) -> None:
        """Ask the dns listener for a name whose server is silent."""
        name = b"%08x" % choices.randrange(1 << 32)
        query = choices.randbytes(2) + b"\1\0\0\1" + bytes(6) + b"\x08" + name
        choices.choice(self._udp).sendto(query + b"\6silent\0\0\1\0\1", self._to("dns"))

    def _name(self, choices: random.Random) -> None:
        """Ask for a connection to a name whose server is silent, and leave."""
        with self._dial(choices) as sock:
            name = f"{choices.randrange(1 << 32)}.silent"
            sock.send(b"\5\1\0\5\1\0" + encode((name, 80)))
            sock.recv(2)

    def _junk(self, choices: random.Random) -> None:
        """Send a datagram of noise, or with a header before it, to any UDP port."""
        data = choices.randbytes(choices.choice((0, 1, 20, 1400)))
        if choices.random() < 0.5:
            data = b"\0\0\0" + encode(self._ground.site.world.udp) + data
        port = choices.choice(("main", "udp", "dns", "tunnel_udp"))
        choices.choice(self._udp).sendto(data, self._to(port))

    def _associate(self, choices: random.Random) -> None:
        """Make an association, send to many targets, and leave abruptly."""
        with self._dial(choices) as control:
            control.send(b"\5\1\0\5\3\0" + encode(("0.0.0.0", 0)))
            control.recv(100)
            with self._bound(socket.SOCK_DGRAM, control.getsockname()[0]) as sock:
                host = self._ground.site.world.udp[0]
                for port in choices.sample(range(1024, 65536), 20):
                    sock.sendto(b"\0\0\0" + encode((host, port)) + b"x", self._to("main"))
            _close(control, abruptly=True)

    # -- forged packets

    def _forge(self, choices: random.Random) -> None:
        """Send a datagram that seems to come from a good client's host.

        Not to the agent's port: forgers would take the host's share of its sessions, where no
        login tells them from the host.
        """
        data = b"\0\0\0" + encode(self._ground.site.world.udp) + b"forged"
        port = choices.choice(("main", "udp", "dns"))
        host, to = self._to(port)
        source = choices.choice(FORGED_PORTS)
        header = struct.pack("!HHHH", source, to, 8 + len(data), 0)
        self._send_raw(socket.IPPROTO_UDP, self._ground.victim, host, header + data)

    def _syn(self, choices: random.Random) -> None:
        """Send a SYN from an address where nobody answers."""
        host, to = self._to(choices.choice(("main", "tls", "tcp", "bridge")))
        source = f"{self._ground.unused}{choices.randint(200, 250)}.{choices.randint(1, 250)}"
        sequence, port = choices.randrange(1 << 32), choices.randrange(1024, 65536)
        header = struct.pack("!HHIIBBHHH", port, to, sequence, 0, 5 << 4, 2, 65535, 0, 0)
        pseudo = socket.inet_aton(source) + socket.inet_aton(host) + struct.pack("!HH", 6, 20)
        check = struct.pack("!H", checksum(pseudo + header))
        self._send_raw(socket.IPPROTO_TCP, source, host, header[:16] + check + header[18:])

    def _send_raw(self, protocol: int, source: str, host: str, data: bytes) -> None:
        addresses = socket.inet_aton(source) + socket.inet_aton(host)
        # The kernel fills in the identification and the checksum.
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), 0, 0, 64, protocol, 0)
        self._raw.sendto(header + addresses + data, (host, 0))


IP_BIND_ADDRESS_NO_PORT = 24


def checksum(data: bytes) -> int:
    """Return the checksum of RFC 1071."""
    words: Sequence[int] = struct.unpack(f"!{len(data) // 2}H", data)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _close(sock: socket.socket, abruptly: bool) -> None:
    if abruptly:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
