"""Options of outgoing sockets, of every TCP connection of ours, and of activation sockets."""

from __future__ import annotations

import errno
import socket
import struct

from netproxy.errors import DialError, ListenError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.routing import RouteSelectors
from netproxy.net.address import (
    V4_MAPPED_TEXT,
    is_ipv6,
    is_native_ipv6,
    to_sockaddr,
    unpack_sockaddr,
)
from netproxy.typed import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import SocketAddress

# A peer that has vanished is known after two minutes.
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES = 60, 15, 4
# Seconds after which data without an acknowledgement ends a connection: keepalive does not see it.
# The kernel itself tries for a quarter of an hour (tcp_retries2), and is left to do so if all
# probes together take longer than the limit.
USER_TIMEOUT, USER_TIMEOUT_LIMIT = 120, 900
# Linux; Python 3.10 and 3.11 do not name these.
IP_BIND_ADDRESS_NO_PORT = 24
IP_FREEBIND, IPV6_FREEBIND = 15, 78

IP_TRANSPARENT, IPV6_TRANSPARENT, SO_ORIGINAL_DST = 19, 75, 80

LOOK_SECONDS = 0.5
"""How often a thread that waits on an activation socket looks whether it is to stop.

Nothing else wakes it, as the socket is never shut down.
"""

_TIMEVAL = struct.Struct("@ll")


class SocketOptions(NamedTuple):
    """How connections leave this machine; the system chooses what is empty."""

    address: str = ""
    """The local address."""
    device: str = ""
    """The interface (SO_BINDTODEVICE)."""
    mark: int = 0
    """SO_MARK, for policy routing."""
    keepalive: float = KEEPALIVE_IDLE
    """Seconds without a byte until a TCP peer is probed; 0: never."""
    freebind: bool = False
    """True if the machine need not have the local address on an interface (IP_FREEBIND)."""
    label: str = ""
    """The key that names the local address, with its value, for errors; "" for none."""

    @property
    def selectors(self) -> RouteSelectors:
        """What policy routing looks at."""
        return RouteSelectors(self.mark, self.device, self.address)

    def apply(self, sock: socket.socket) -> None:
        """Set the options of a socket that is neither bound nor connected.

        Raises OSError, and DialError without the capability for a mark.
        """
        if self.device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.device.encode())
        if self.mark:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self.mark)
            except PermissionError as error:  # would read as the refusal of a rule
                text = "cannot set the mark: CAP_NET_ADMIN is missing"
                raise DialError(Reason.GENERAL, said=text) from error
        if self.address:
            self._bind(sock)

    def fitting(self, addresses: Sequence[Address], target: Address) -> Sequence[Address]:
        """Return the addresses of a target that have the family of the local address.

        Raises DialError if there are none.
        """
        family = is_native_ipv6(self.address)
        fitting = [address for address in addresses if is_native_ipv6(address.host) == family]
        if not fitting:
            raise self._unfit(str(target))
        return fitting

    def _unfit(self, target: str) -> DialError:
        own, other = ("IPv6", "IPv4") if is_native_ipv6(self.address) else ("IPv4", "IPv6")
        said = f"{self.label} is {own}, and the target has {other} addresses only"
        return DialError(Reason.NETWORK_UNREACHABLE, target, said, decided=self.label)

    def _bind(self, sock: socket.socket) -> None:
        if (sock.family == socket.AF_INET6) != is_ipv6(self.address):
            # The callers know the target, and have refused it with its address.
            if self.label:
                raise self._unfit("")
            raise OSError(errno.EAFNOSUPPORT, f"not from {self.address}")
        if self.freebind:
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        if sock.type == socket.SOCK_STREAM:  # a port is chosen once the target is known
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind(to_sockaddr(Address(self.address, 0), sock.family))


DEFAULT_OPTIONS = SocketOptions()


def tune(sock: socket.socket, keepalive: float = KEEPALIVE_IDLE) -> None:
    """Set what every TCP connection of ours has: no Nagle, and an end when its peer vanishes.

    The peer is probed after `keepalive` seconds without a byte, 0: never.
    """
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if keepalive:
            idle = max(1, int(keepalive))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
            # With TCP_USER_TIMEOUT the kernel compares the time since the last byte, not the number
            # of probes.  A user timeout shorter than all probes would let one lost probe end the
            # connection.
            seconds = max(USER_TIMEOUT, idle + KEEPALIVE_PROBES * KEEPALIVE_INTERVAL)
            if seconds <= USER_TIMEOUT_LIMIT:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    except OSError:
        pass  # not TCP (a unix socket), or gone already: the next read will tell


def set_transparent(sock: socket.socket, enabled: bool) -> None:
    """Let a socket have addresses that are not this machine's, for rules of the kind TPROXY.

    Raises OSError: EPERM without CAP_NET_ADMIN.
    """
    sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, int(enabled))
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, int(enabled))


def check_transparent(network: str, address: Address) -> None:
    """Raise ListenError if this process may not serve what rules TPROXY lead to an address."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
            set_transparent(trial, True)
    except OSError as error:
        raise ListenError(
            f"cannot listen on {network} {address}: tproxy needs the capability CAP_NET_ADMIN"
            f" ({error.strerror})"
        ) from error


def original_target(sock: socket.socket) -> SocketAddress:
    """Return the sockaddr that a client has connected to, before a rule REDIRECT changed it.

    Raises OSError: ENOPROTOOPT without connection tracking, ENOENT if it does not know the
    connection.
    """
    local = sock.getsockname()
    if len(local) > 2 and not local[0].startswith(V4_MAPPED_TEXT):
        raw = sock.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
    else:
        raw = sock.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16)
    return unpack_sockaddr(raw)


def set_receive_timeout(sock: socket.socket) -> None:
    """End each blocking receive on `sock` after LOOK_SECONDS (SO_RCVTIMEO).  Raises OSError."""
    seconds = int(LOOK_SECONDS)
    timeval = _TIMEVAL.pack(seconds, round((LOOK_SECONDS - seconds) * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
