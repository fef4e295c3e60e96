"""Opens UDP sockets and arenas of one level of batching: what every datagram of the process passes through.

The options that a socket needs stand here; what it does is net.datagram's and
net.mmsg'.  The level is chosen once, by what the machine has or the configuration says.
"""

from __future__ import annotations

import socket
from typing import Callable

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import ActivationAddress, Address
from netproxy.interfaces.services import Counter, Log
from netproxy.net import datagram
from netproxy.net.address import from_sockaddr, is_ipv6, is_unspecified, to_sockaddr
from netproxy.net.socket_options import DEFAULT_OPTIONS, SocketOptions
from netproxy.net.datagram import SOL_UDP, UDP_GRO, Arena, ArenaPool, DatagramSocket
from netproxy.net.activation import ActivationSockets, look_now_and_then

# Linux constants that the socket module of Python 3.10 and 3.11 does not name
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DONT, PMTUDISC_PROBE = 10, 23, 0, 3

SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33

BUFFER = (
    4 << 20
)  # bytes asked for SO_RCVBUF and SO_SNDBUF; without CAP_NET_ADMIN the kernel cuts it to its maximum


class UdpSocketFactory:
    """Opens sockets and arenas of one level of batching; the level is chosen once.

    "auto": the best that is there.  "mmsg": recvmmsg by ctypes (net.mmsg), trains both ways.
    "trains": the socket module, with UDP_GRO and UDP_SEGMENT.  "single": a system call a datagram.
    """

    def __init__(
        self,
        counter: Counter,
        log: Log,
        level: str = "auto",
        activated: ActivationSockets | None = None,
    ) -> None:
        """`activated`: by the service manager, for listen()."""
        self._activated = activated
        self._counter = counter
        self._log = log
        self.level = level
        self._arena: Callable[[], Arena] = Arena
        self._socket: Callable[..., DatagramSocket] = DatagramSocket
        if level in ("auto", "mmsg"):
            try:
                from netproxy.net import mmsg  # late: ctypes is optional

                self._arena, self._socket, self.level = mmsg.MmsgArena, mmsg.MmsgSocket, "mmsg"
                mmsg.share_one_heap()
            except (
                ImportError,
                OSError,
                AttributeError,
            ):  # no ctypes, or a C library without recvmmsg
                self.level = "trains"

    def arena(self) -> Arena:
        return self._arena()

    def arenas(self) -> ArenaPool:
        return ArenaPool(self._arena)

    def listen(self, address: Address, tag: bytes = b"") -> DatagramSocket:
        """A socket bound for clients; ListenError.  Bound to a wildcard it keeps what local address each client used."""
        if isinstance(address, ActivationAddress):
            return self._listen_by(address)
        family = socket.AF_INET6 if is_ipv6(address.host) else socket.AF_INET
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM)
        except OSError as error:
            raise ListenError(f"udp {address}: {error.strerror}") from error
        try:
            keyed = is_unspecified(address.host)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if keyed else 1)
                datagram.enable(sock, socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, int(keyed))
            else:
                datagram.enable(sock, socket.IPPROTO_IP, datagram.IP_PKTINFO, int(keyed))
            sock.bind(to_sockaddr(address, family))
        except OSError as error:
            sock.close()
            raise ListenError(f"udp {address}: {error.strerror}") from error
        # our header makes full-sized replies too long for many paths: let them be fragmented
        return self._tuned(sock, PMTUDISC_DONT, keyed, tag)

    def _listen_by(self, address: ActivationAddress) -> DatagramSocket:
        """The same by a socket that is bound already."""
        if self._activated is None:
            raise ListenError(f"udp {address}: no sockets are passed here")
        sock = self._activated.take("udp", address)
        keyed = is_unspecified(from_sockaddr(sock.getsockname()).host)
        if sock.family == socket.AF_INET6:
            datagram.enable(sock, socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, int(keyed))
        else:
            datagram.enable(sock, socket.IPPROTO_IP, datagram.IP_PKTINFO, int(keyed))
        sock.setblocking(True)
        look_now_and_then(sock)
        made = self._tuned(sock, PMTUDISC_DONT, keyed)
        made.activated = True
        return made

    def outgoing(self, outgoing: SocketOptions = DEFAULT_OPTIONS) -> DatagramSocket:
        """A socket for one client's datagrams to all its targets, IPv6 and IPv4; OSError.

        One socket has one port, so that every target sees the client come from the same place.
        """
        sock = self._open_outgoing(outgoing)
        datagram.enable(sock, socket.IPPROTO_IP, datagram.IP_RECVERR, 1)
        if sock.family == socket.AF_INET6:
            datagram.enable(sock, socket.IPPROTO_IPV6, datagram.IPV6_RECVERR, 1)
        # never fragmented on the way to a target: QUIC's path MTU discovery stays honest
        return self._tuned(sock, PMTUDISC_PROBE)

    @staticmethod
    def _open_outgoing(outgoing: SocketOptions) -> socket.socket:
        if outgoing.address:
            return _open_towards_all(
                socket.AF_INET6 if is_ipv6(outgoing.address) else socket.AF_INET, outgoing
            )
        try:
            return _open_towards_all(socket.AF_INET6, outgoing)
        except OSError:  # a machine without IPv6
            return _open_towards_all(socket.AF_INET, outgoing)

    def _tuned(
        self, sock: socket.socket, discover: int, keyed: bool = False, tag: bytes = b""
    ) -> DatagramSocket:
        for option, beyond in (
            (socket.SO_RCVBUF, SO_RCVBUFFORCE),
            (socket.SO_SNDBUF, SO_SNDBUFFORCE),
        ):
            if not datagram.enable(sock, socket.SOL_SOCKET, beyond, BUFFER):  # needs CAP_NET_ADMIN
                datagram.enable(sock, socket.SOL_SOCKET, option, BUFFER)
        datagram.enable(sock, socket.IPPROTO_IP, IP_MTU_DISCOVER, discover)
        if sock.family == socket.AF_INET6:
            datagram.enable(sock, socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, discover)
        trains = self.level != "single"
        if trains:
            datagram.enable(sock, SOL_UDP, UDP_GRO, 1)
        return self._socket(sock, self._counter, self._log, keyed, tag, trains)


def _open_towards_all(family: int, outgoing: SocketOptions) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if outgoing is not DEFAULT_OPTIONS:
            outgoing.apply(sock)
        if not outgoing.address:
            sock.bind(("", 0))
    except BaseException:
        sock.close()
        raise
    return sock
