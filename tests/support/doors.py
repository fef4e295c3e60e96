"""Asks a daemon for a target by every protocol: a "door" is a function for one of them.

A door returns "open", "denied" or the protocol's error code. For datagrams, "denied" is a 403, a
reset, or a datagram that is dropped and counted. `arrived` returns true when a datagram has reached
its target; without it, a session counts as "open".
"""

from __future__ import annotations

import socket
import struct
from typing import Any, Callable

from netproxy.errors import Reason
from netproxy.net.stream import Stream, complete
from netproxy.protocol import socks5, uot
from tests.support.handlers import LOCALHOST, eventually
from tests.support.relays import Running, associate
from tests.support.sockets import SECONDS, read_exactly, read_to_end

Arrived = Callable[[], Any] | None
Door = Callable[..., str]
REFUSALS = (Reason.DENIED.value, Reason.LOOP.value)


def _dial(running: Running, address: str = LOCALHOST) -> socket.socket:
    return socket.create_connection((address, running.port), SECONDS)


def _packed(host: str, port: int) -> bytes:
    """Return ATYP, address and port of SOCKS5, with a name unless the host is an address."""
    for kind, family in ((1, socket.AF_INET), (4, socket.AF_INET6)):
        try:
            return bytes((kind,)) + socket.inet_pton(family, host) + struct.pack(">H", port)
        except OSError:
            pass
    return bytes((3, len(host))) + host.encode() + struct.pack(">H", port)


def by_socks5(running: Running, host: str, port: int, arrived: Arrived = None) -> str:
    """Ask by SOCKS5 CONNECT."""
    with _dial(running) as sock:
        sock.sendall(b"\5\1\0\5\1\0" + _packed(host, port))
        code = read_exactly(sock, 12)[3]
        return {0: "open", 2: "denied"}.get(code, str(code))


def by_socks4a(running: Running, host: str, port: int, arrived: Arrived = None) -> str:
    """Ask by SOCKS4a CONNECT."""
    with _dial(running) as sock:
        sock.sendall(b"\4\1" + struct.pack(">H", port) + b"\0\0\0\1\0" + host.encode() + b"\0")
        return {0x5A: "open", 0x5B: "denied"}[read_exactly(sock, 8)[1]]


def _status(sock: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\r\n"):
        line += read_exactly(sock, 1)
    code = line.split()[1].decode()
    return {"200": "open", "101": "open", "403": "denied"}.get(code, code)


def _bracketed(host: str) -> bytes:
    return (f"[{host}]" if ":" in host else host).encode()


def by_connect(running: Running, host: str, port: int, arrived: Arrived = None) -> str:
    """Ask by HTTP CONNECT."""
    with _dial(running) as sock:
        sock.sendall(b"CONNECT %b:%d HTTP/1.1\r\nHost: a\r\n\r\n" % (_bracketed(host), port))
        return _status(sock)


def by_forward(running: Running, host: str, port: int, arrived: Arrived = None) -> str:
    """Ask by an HTTP request. A target that closes without an answer (502) was reached."""
    with _dial(running) as sock:
        sock.sendall(b"GET http://%b:%d/ HTTP/1.0\r\nHost: a\r\n\r\n" % (_bracketed(host), port))
        return {"502": "open"}.get(code := _status(sock), code)


def by_socks5_udp(running: Running, host: str, port: int, arrived: Arrived = None) -> str:
    """Ask by a datagram of an association, sent to the listener's port whatever BND says."""
    with (
        associate(running.port) as control,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        assert complete(socks5.read_reply(Stream(control)))[0] == socks5.SUCCEEDED
        datagram = b"\0\0\0" + _packed(host, port) + b"x"
        return _sent(running, lambda: client.sendto(datagram, (LOCALHOST, running.port)), arrived)


def by_connect_udp(running: Running, host: str, port: int, arrived: Arrived = None) -> str:
    """Ask by an upgrade to connect-udp (RFC 9298)."""
    with _dial(running) as sock:
        sock.sendall(
            b"GET /.well-known/masque/udp/%b/%d/ HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\n"
            b"Upgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n"
            % (host.replace(":", "%3A").encode(), port)
        )
        return _status(sock)


def by_uot(running: Running, host: str, port: int, arrived: Arrived = None) -> str:
    """Ask by UDP over TCP, with a stream for one target."""
    with _uot(running) as sock:
        refused = _refused(running, "dial_failures")
        sock.sendall(b"\1" + _packed(host, port) + b"\0\1x")
        there = arrived or (lambda: running.state()["sessions"])
        try:
            eventually(lambda: _refused(running, "dial_failures") > refused or there())
            sock.shutdown(socket.SHUT_WR)
            read_to_end(sock)
        except OSError:
            pass
        return "denied" if _refused(running, "dial_failures") > refused else "open"


def by_uot_to_all(running: Running, host: str, port: int, arrived: Arrived = None) -> str:
    """Ask by UDP over TCP, with a stream whose frames name their targets."""
    with _uot(running) as sock:
        sock.sendall(b"\0\1" + bytes(6))
        place = _packed(host, port)
        return _sent(
            running,
            lambda: sock.sendall({1: b"\0", 4: b"\1", 3: b"\2"}[place[0]] + place[1:] + b"\0\1x"),
            arrived,
        )


def _uot(running: Running) -> socket.socket:
    sock = _dial(running)
    name = uot.MAGIC.encode()
    sock.sendall(b"\5\1\0\5\1\0\3" + bytes((len(name),)) + name + b"\0\0")
    assert read_exactly(sock, 12)[3] == 0
    return sock


def _refused(running: Running, counter: str) -> int:
    return sum(running.count(counter, reason) for reason in REFUSALS)


def _sent(running: Running, send: Callable[[], Any], arrived: Arrived) -> str:
    """Send a datagram. Return "open", or the reason for which it was dropped."""
    before, sessions = running.drops(), running.state()["sessions"]
    there = arrived or (lambda: running.state()["sessions"] > sessions)
    send()
    eventually(lambda: running.drops() != before or there())
    lost = [reason for reason, total in running.drops().items() if total != before.get(reason, 0)]
    return "open" if not lost else "denied" if lost[0] in REFUSALS else lost[0]


STREAMS: dict[str, Door] = {
    "SOCKS5": by_socks5,
    "SOCKS4a": by_socks4a,
    "HTTP CONNECT": by_connect,
    "HTTP forward": by_forward,
}
DATAGRAMS: dict[str, Door] = {
    "SOCKS5 UDP": by_socks5_udp,
    "connect-udp": by_connect_udp,
    "UoT": by_uot,
    "UoT to all": by_uot_to_all,
}
DOORS = {**STREAMS, **DATAGRAMS}
