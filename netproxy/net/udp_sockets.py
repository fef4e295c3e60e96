"""Opens UDP sockets and the arenas that fit them, all of one level of batching.

This module sets the options of a socket; net.datagram_socket and net.mmsg receive and
send.  The level is chosen once, by the configuration or by what the machine has.
Thread: any.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Callable, Protocol

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import ActivationAddress
from netproxy.net import datagram, syscalls
from netproxy.net.address import from_sockaddr, is_ipv6, is_unspecified, listen_error, to_sockaddr
from netproxy.net.datagram import SOL_UDP, UDP_GRO, Arena, ArenaPool
from netproxy.net.datagram_socket import BatchSocket, DatagramSocket
from netproxy.net.socket_options import DEFAULT_OPTIONS, SocketOptions, set_receive_timeout

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.services import Counter, Log

# Linux constants that the socket module of Python 3.10 and 3.11 does not name
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DONT, PMTUDISC_PROBE = 10, 23, 0, 3
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33

BUFFER = 4 << 20
"""Bytes asked for SO_RCVBUF and SO_SNDBUF.

Without CAP_NET_ADMIN the kernel reduces them to its limits (net.core.rmem_max, wmem_max).
"""


class ActivatedSockets(Protocol):
    """The sockets that the service manager has bound (daemon.activation.ActivationSockets)."""

    def take(self, network: str, address: ActivationAddress) -> socket.socket:
        """Return a duplicate of the socket of a network and a name.  Raises ListenError."""


class UdpSocketFactory:
    """Opens sockets and arenas of one level of batching.

    Level "mmsg" uses recvmmsg through ctypes (net.mmsg), with trains in both directions.
    "trains" uses the socket module with UDP_GRO and UDP_SEGMENT, "single" one system call for
    each datagram.  "auto" is "mmsg" if the machine has what it needs, else "trains".
    """

    def __init__(
        self,
        counter: Counter,
        log: Log,
        level: str = "auto",
        activated: ActivatedSockets | None = None,
    ) -> None:
        """Choose the level.  `activated` are the sockets that listen() may take."""
        self._activated = activated
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

    def arena(self) -> Arena:
        """Return a new arena."""
        return self._arena()

    def arenas(self) -> ArenaPool:
        """Return a new pool of arenas."""
        return ArenaPool(self._arena)

    def listen(self, address: Address, tag: bytes = b"") -> DatagramSocket:
        """Return a socket bound for clients; `tag` as in BatchSocket.

        If bound to an unspecified address, the socket keeps the local address that each client
        used.  Raises ListenError.
        """
        if isinstance(address, ActivationAddress):
            return self._take_activated(address)
        family = socket.AF_INET6 if is_ipv6(address.host) else socket.AF_INET
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM)
        except OSError as error:
            raise listen_error("udp", address, error) from error
        try:
            keyed = is_unspecified(address.host)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if keyed else 1)
            _report_local_address(sock, keyed)
            sock.bind(to_sockaddr(address, family))
            # Our header makes full-sized replies too long for many paths: let them be fragmented.
            return self._tuned(sock, PMTUDISC_DONT, keyed, tag)
        except OSError as error:
            sock.close()
            raise listen_error("udp", address, error) from error

    def _take_activated(self, address: ActivationAddress) -> DatagramSocket:
        """Return what listen() returns, on a socket that the service manager has bound."""
        if self._activated is None:
            raise ListenError(f"udp {address}: there are no activation sockets here")
        sock = self._activated.take("udp", address)
        try:
            keyed = is_unspecified(from_sockaddr(sock.getsockname()).host)
            _report_local_address(sock, keyed)
            sock.setblocking(True)
            set_receive_timeout(sock)
            local = self._tuned(sock, PMTUDISC_DONT, keyed)
        except OSError as error:
            sock.close()
            raise listen_error("udp", address, error) from error
        local.activated = True
        return local

    def outgoing(self, options: SocketOptions = DEFAULT_OPTIONS) -> DatagramSocket:
        """Return a socket for one client's datagrams to all its targets, IPv6 and IPv4.

        One socket has one port, so that all targets see the same source address.
        Raises OSError or DialError.
        """
        sock = self._open_outgoing(options)
        datagram.enable(sock, socket.IPPROTO_IP, datagram.IP_RECVERR, 1)
        if sock.family == socket.AF_INET6:
            datagram.enable(sock, socket.IPPROTO_IPV6, datagram.IPV6_RECVERR, 1)
        try:
            # Never fragmented on the way to a target: path MTU discovery, as in QUIC, stays right.
            return self._tuned(sock, PMTUDISC_PROBE)
        except OSError:
            sock.close()
            raise

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
        datagram.enable(sock, socket.IPPROTO_IP, IP_MTU_DISCOVER, discovery)
        if sock.family == socket.AF_INET6:
            datagram.enable(sock, socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, discovery)
        trains = self.level != "single"
        if trains:
            datagram.enable(sock, SOL_UDP, UDP_GRO, 1)
        return self._socket(sock, self._counter, self._log, keyed, tag, trains)


def _report_local_address(sock: socket.socket, enabled: bool) -> None:
    """Let each receive tell the local address that the datagram came to (PKTINFO)."""
    if sock.family == socket.AF_INET6:
        datagram.enable(sock, socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, int(enabled))
    else:
        datagram.enable(sock, socket.IPPROTO_IP, datagram.IP_PKTINFO, int(enabled))


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
