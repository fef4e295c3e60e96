"""Opens UDP sockets and the arenas that fit them, all of one level of batching.

This module sets the options of a socket; net.datagram_socket and net.mmsg receive and
send.  The level is chosen once, by the configuration or by what the machine has.
Thread: any.
"""

from __future__ import annotations

import socket

from netproxy.interfaces.flows import FlowCounter
from netproxy.net import datagram, syscalls
from netproxy.net.address import from_sockaddr, is_ipv6, is_unspecified, listen_error, to_sockaddr
from netproxy.net.datagram import SOL_UDP, UDP_GRO, Arena, ArenaPool
from netproxy.net.datagram_socket import BatchSocket, DatagramSocket
from netproxy.net.socket_options import (
    DEFAULT_OPTIONS,
    SocketOptions,
    set_receive_timeout,
    set_transparent,
)
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.services import Counter, Log

# Linux constants that the socket module of Python 3.10 and 3.11 does not name
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DONT, PMTUDISC_PROBE = 10, 23, 0, 3
_MTU_OPTIONS = {
    socket.AF_INET: (socket.IPPROTO_IP, 14, 20 + 8),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 24, 40 + 8),
}
"""IP_MTU and IPV6_MTU: level, option, and the bytes of the headers of IP and UDP."""
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33

BUFFER = 4 << 20
"""Bytes asked for SO_RCVBUF and SO_SNDBUF.

Without CAP_NET_ADMIN the kernel reduces them to its limits (net.core.rmem_max, wmem_max).
"""


class UdpSocketFactory:
    """Opens sockets and arenas of one level of batching.

    Level "mmsg" uses recvmmsg through ctypes (net.mmsg), with trains in both directions.
    "trains" uses the socket module with UDP_GRO and UDP_SEGMENT, "single" one system call for
    each datagram.  "auto" is "mmsg" if the machine has what it needs, else "trains".
    """

    def __init__(self, counter: Counter, log: Log, level: str = "auto") -> None:
        """Choose the level."""
        self._counter = counter
        self._log = log
        self.level = level
        """The level in use: "mmsg", "trains" or "single"."""
        self._arena: Callable[[], Arena] = Arena
        self._socket: Callable[..., DatagramSocket] = BatchSocket
        if level in ("auto", "mmsg"):
            try:
                from netproxy.net import mmsg, mmsg_arena  # late: ctypes is optional

                self._arena, self._socket = mmsg_arena.MmsgArena, mmsg.MmsgSocket
                self.level = "mmsg"
                syscalls.use_one_heap()
            except (ImportError, OSError, AttributeError):
                # No ctypes, or a C library without recvmmsg.
                self.level = "trains"
        self.arenas = ArenaPool(self._arena)
        """Lends arenas to threads while they are awake: those of all tables and configurations."""

    def arena(self) -> Arena:
        """Return a new arena."""
        return self._arena()

    def listen(self, address: Address, tag: bytes = b"") -> DatagramSocket:
        """Return a socket bound for clients; `tag` as in BatchSocket.

        If bound to an unspecified address, the socket keeps the local address that each client
        used.  Raises ListenError.
        """
        family = socket.AF_INET6 if is_ipv6(address.host) else socket.AF_INET
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM)
        except OSError as error:
            raise listen_error("udp", address, error) from error
        try:
            keyed = is_unspecified(address.host)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if keyed else 1)
            datagram.report_local_address(sock, keyed)
            sock.bind(to_sockaddr(address, family))
            # Our header makes full-sized replies too long for many paths: let them be fragmented.
            return self._tuned(sock, PMTUDISC_DONT, keyed, tag)
        except OSError as error:
            sock.close()
            raise listen_error("udp", address, error) from error

    def take_over(self, sock: socket.socket) -> DatagramSocket:
        """Return what listen() returns, on a socket that was bound for this process.

        Raises ListenError; then the socket is closed.
        """
        address = from_sockaddr(sock.getsockname())
        try:
            keyed = is_unspecified(address.host)
            datagram.report_local_address(sock, keyed)
            sock.setblocking(True)
            set_receive_timeout(sock)
            local = self._tuned(sock, PMTUDISC_DONT, keyed)
        except OSError as error:
            sock.close()
            raise listen_error("udp", address, error) from error
        local.is_given = True
        return local

    def foreign(self, address: Address) -> DatagramSocket:
        """Return a socket that sends from an address which need not be this machine's.

        Other sockets may have the same address.  Raises OSError.
        """
        family = socket.AF_INET6 if is_ipv6(address.host) else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            set_transparent(sock, True)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(to_sockaddr(address, family))
            # Nobody reads it: what comes all the same must hold no memory.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            datagram.enable(sock, socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            discovery = IPV6_MTU_DISCOVER if family == socket.AF_INET6 else IP_MTU_DISCOVER
            level = socket.IPPROTO_IPV6 if family == socket.AF_INET6 else socket.IPPROTO_IP
            datagram.enable(sock, level, discovery, PMTUDISC_DONT)
            trains = self.level != "single"
            return self._socket(sock, self._counter, self._log, False, b"", trains)
        except BaseException:
            sock.close()
            raise

    def outgoing(
        self, options: SocketOptions = DEFAULT_OPTIONS, flow: Flow | None = None
    ) -> DatagramSocket:
        """Return a socket for one client's datagrams to all its targets, IPv6 and IPv4.

        One socket has one port, so that all targets see the same source address.  `flow`: that of
        the first datagram, for records of what the socket drops.  Raises OSError or DialError.
        """
        sock = self._open_outgoing(options)
        datagram.enable(sock, socket.IPPROTO_IP, datagram.IP_RECVERR, 1)
        if sock.family == socket.AF_INET6:
            datagram.enable(sock, socket.IPPROTO_IPV6, datagram.IPV6_RECVERR, 1)
        try:
            # Never fragmented on the way to a target: path MTU discovery, as in QUIC, stays right.
            local = self._tuned(sock, PMTUDISC_PROBE)
        except OSError:
            sock.close()
            raise
        if flow is not None:
            local.counter = FlowCounter(self._counter, flow)
        return local

    @staticmethod
    def _open_outgoing(options: SocketOptions) -> socket.socket:
        if options.address:
            family = socket.AF_INET6 if is_ipv6(options.address) else socket.AF_INET
            return _open_unconnected(family, options)
        try:
            return _open_unconnected(socket.AF_INET6, options)
        except OSError:
            # A machine without IPv6.
            return _open_unconnected(socket.AF_INET, options)

    def _tuned(
        self, sock: socket.socket, discovery: int, keyed: bool = False, tag: bytes = b""
    ) -> DatagramSocket:
        """Set buffers, path MTU discovery (IP_MTU_DISCOVER) and GRO; wrap the socket.

        Raises OSError; then the socket is still open.
        """
        for option, forced in (
            (socket.SO_RCVBUF, SO_RCVBUFFORCE),
            (socket.SO_SNDBUF, SO_SNDBUFFORCE),
        ):
            # The forced option needs CAP_NET_ADMIN.
            if not datagram.enable(sock, socket.SOL_SOCKET, forced, BUFFER):
                datagram.enable(sock, socket.SOL_SOCKET, option, BUFFER)
        _discover_mtu(sock, discovery)
        trains = self.level != "single"
        if trains:
            datagram.enable(sock, SOL_UDP, UDP_GRO, 1)
        return self._socket(sock, self._counter, self._log, keyed, tag, trains)


def send_alone(local: DatagramSocket, data: bytes, target: Address) -> bool:
    """Send a datagram that lies in no arena; return whether it was sent.  Never blocks."""
    sock = local.socket
    try:
        sock.sendto(data, socket.MSG_DONTWAIT, to_sockaddr(target, sock.family))
    except (OSError, ValueError):
        # No route, no room, the socket is closed, or it has not the family of the target.
        return False
    return True


def _discover_mtu(sock: socket.socket, discovery: int) -> None:
    datagram.enable(sock, socket.IPPROTO_IP, IP_MTU_DISCOVER, discovery)
    if sock.family == socket.AF_INET6:
        datagram.enable(sock, socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, discovery)


def allow_fragments(local: DatagramSocket, allowed: bool) -> None:
    """Let routers fragment what a socket sends, or have them drop what is too large for a link."""
    _discover_mtu(local.socket, PMTUDISC_DONT if allowed else PMTUDISC_PROBE)


def largest_payload(target: Address) -> int:
    """Return the bytes of UDP payload that the first link to a target takes, 0 if not known.

    Less if the kernel knows of a narrower link behind it.  Sends nothing; never blocks.
    """
    family = socket.AF_INET6 if is_ipv6(target.host) else socket.AF_INET
    level, option, headers = _MTU_OPTIONS[family]
    try:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(to_sockaddr(target, family))
            return max(0, sock.getsockopt(level, option) - headers)
    except (OSError, ValueError):
        # No route, or a name.
        return 0


def set_target_options(sock: socket.socket, enabled: bool) -> None:
    """Let rules of the kernel lead datagrams to a socket, and each tell its target, or no longer.

    Raises OSError.
    """
    set_transparent(sock, enabled)
    for level, option in datagram.ORIGINAL_TARGETS:
        if level == socket.IPPROTO_IP or sock.family == socket.AF_INET6:
            sock.setsockopt(level, option, int(enabled))


def report_targets(local: DatagramSocket, enabled: bool) -> None:
    """Let the keys of peers have the address that each datagram was sent to, or no longer.

    For a socket that rules of the kernel lead datagrams to.  Raises OSError.
    """
    sock, keyed = local.socket, is_unspecified(local.address.host)
    set_target_options(sock, enabled)
    datagram.report_local_address(sock, keyed and not enabled)
    local.plain_keys = not (keyed or enabled)


def _open_unconnected(family: int, options: SocketOptions) -> socket.socket:
    """Return a bound socket that reaches all targets of the family, IPv4 as well from IPv6."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if options is not DEFAULT_OPTIONS:
            options.apply(sock)
        if not options.address:
            sock.bind(("", 0))
    except BaseException:
        sock.close()
        raise
    return sock
