"""Tells which addresses are this machine's, by asking the kernel for the route to them.

A request over rtnetlink (RTM_GETROUTE, rtnetlink(7)) takes two system calls, some 6
microseconds together.  It waits for nothing: the kernel has queued the answer when the send
returns.  So nothing is cached, and an address that was added a moment ago counts.
If netlink is not permitted, a UDP socket is connected instead, which sends nothing.
Thread: any.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
import threading

from netproxy.errors import DialError
from netproxy.interfaces.addresses import V4_MAPPED_PREFIX, Address, ip_text, pack_ip
from netproxy.interfaces.routing import ANY_ROUTE, RouteSelectors
from netproxy.net import syscalls
from netproxy.net.address import from_sockaddr, to_sockaddr
from netproxy.net.socket_options import SocketOptions
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.services import Log

RTN_UNICAST, RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST, RTN_MULTICAST = 1, 2, 3, 4, 5
"""Types of routes (linux/rtnetlink.h)."""
RTN_UNREACHABLE = 7
"""The type for all addresses that the kernel sends nothing to."""
OWN_TYPES = frozenset((RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST, RTN_MULTICAST))
"""Types of routes whose packets this machine receives itself, alone or with others."""

_NLMSG_ERROR, _RTM_NEWROUTE, _RTM_GETROUTE, _NLM_F_REQUEST = 2, 24, 26, 1
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_MARK, _RTA_IP_PROTO, _RTA_DPORT = 1, 2, 4, 16, 27, 29
_RTA_GATEWAY = 5
_MESSAGE_HEADER = struct.Struct("=IHHII")
_ROUTE_HEADER = struct.Struct("=8BI")
_ATTRIBUTE_HEADER = struct.Struct("=HH")
_ERROR_CODE = struct.Struct("=i")
_NUMBER = struct.Struct("=I")
_IP_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}

ANSWER_LIMIT = 8192
"""Bytes of an answer: one route with its metrics has a few hundred."""

SPARE_LIMIT = 1
"""Netlink sockets kept for the next queries: two threads rarely ask at once."""

_NO_ROUTE = frozenset((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES))
"""Errors that stand for an address without a route, or with a route that refuses."""

_EXHAUSTED = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN, errno.EINTR)
)
"""Temporary errors, which are not logged."""

_FORBIDDEN = frozenset(
    (errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ENOSYS)
)
"""Errors that mean that netlink is not permitted, or that the kernel does not have it."""

# IP_MTU and IPV6_MTU, which the socket module of Python 3.10 and 3.11 does not name.
_PATH_MTU = {socket.AF_INET: (socket.IPPROTO_IP, 14), socket.AF_INET6: (socket.IPPROTO_IPV6, 24)}


class RouteQuery(NamedTuple):
    """The question how the kernel would route to an address."""

    network: str
    """ "tcp" or "udp"."""
    address: Address
    """A literal; the scope of a link-local one as "%N"."""
    selectors: RouteSelectors = ANY_ROUTE


def encode_query(query: RouteQuery, sequence: int) -> bytes:
    """Return an RTM_GETROUTE request.

    Raises ValueError for a name, OSError for an interface that does not exist::

        struct nlmsghdr                   struct rtmsg                   struct rtattr, each
        0   4   length of the message     16  1   AF_INET or AF_INET6    0  2  4 + length of
        4   2   type                      17  1   bits of RTA_DST              the value
        6   2   flags                     18  1   bits of RTA_SRC        2  2  type
        8   4   sequence number           19  5   tos, table, protocol,  4     value, padded to
        12  4   port ID, 0: the kernel            scope, type                  4 bytes
                                          24  4   flags
    """
    host, _, scope = query.address.host.partition("%")
    selectors = query.selectors
    target = pack_ip(host)
    if target is None:
        raise ValueError(f"'{host}' is not an IP address")
    family = socket.AF_INET if len(target) == 4 else socket.AF_INET6
    source = pack_ip(selectors.source) or b""
    source = source if len(source) == len(target) else b""
    interface = int(scope) if scope.isdigit() else 0
    if selectors.device:
        interface = socket.if_nametoindex(selectors.device)
    attributes = [
        (_RTA_DST, target),
        (_RTA_IP_PROTO, bytes([_IP_PROTOCOLS[query.network]])),
        (_RTA_DPORT, query.address.port.to_bytes(2, "big")),
    ]
    if source:
        attributes.append((_RTA_SRC, source))
    if interface:
        attributes.append((_RTA_OIF, _NUMBER.pack(interface)))
    if selectors.mark:
        attributes.append((_RTA_MARK, _NUMBER.pack(selectors.mark)))
    bits = len(target) * 8, len(source) * 8
    body = _ROUTE_HEADER.pack(family, *bits, 0, 0, 0, 0, 0, 0) + b"".join(
        _ATTRIBUTE_HEADER.pack(_ATTRIBUTE_HEADER.size + len(value), kind)
        + value
        + bytes(-len(value) % 4)
        for kind, value in attributes
    )
    length = _MESSAGE_HEADER.size + len(body)
    return _MESSAGE_HEADER.pack(length, _RTM_GETROUTE, _NLM_F_REQUEST, sequence, 0) + body


class FoundRoute(NamedTuple):
    """What the kernel says of a route."""

    kind: int
    """Its type (RTN_*); RTN_UNREACHABLE if there is none."""
    gateway: str = ""
    """The next router; "" if the address is reached without one."""


def parse_answer(message: bytes | memoryview, sequence: int) -> FoundRoute:
    """Return the route in the answer to a request.

    Raises ValueError for anything else than the answer to the request of this number.  Its
    layout is that of a request, with the type of the route at 23; or, for a failure::

        16  4   negative errno
        20      the request
    """
    if len(message) < _MESSAGE_HEADER.size + _ERROR_CODE.size:
        raise ValueError("netlink: truncated message")
    _, kind, _, answered, _ = _MESSAGE_HEADER.unpack_from(message)
    if answered != sequence:
        raise ValueError("netlink: answer to another request")
    if kind == _NLMSG_ERROR:
        (code,) = _ERROR_CODE.unpack_from(message, _MESSAGE_HEADER.size)
        if -code in _NO_ROUTE:
            return FoundRoute(RTN_UNREACHABLE)
        raise ValueError(f"netlink: error {-code}")
    if kind != _RTM_NEWROUTE or len(message) < _MESSAGE_HEADER.size + _ROUTE_HEADER.size:
        raise ValueError("netlink: not a route")
    route_type: int = _ROUTE_HEADER.unpack_from(message, _MESSAGE_HEADER.size)[7]
    return FoundRoute(route_type, _gateway(bytes(message)))


def _gateway(message: bytes) -> str:
    """Return the address in the attribute RTA_GATEWAY of an answer, "" without it."""
    at = _MESSAGE_HEADER.size + _ROUTE_HEADER.size
    while at + _ATTRIBUTE_HEADER.size <= len(message):
        size, kind = _ATTRIBUTE_HEADER.unpack_from(message, at)
        value = message[at + _ATTRIBUTE_HEADER.size : at + size]
        if kind == _RTA_GATEWAY and len(value) in (4, 16):
            return ip_text(value)
        at += max(_ATTRIBUTE_HEADER.size, (size + 3) & ~3)
    return ""


class KernelRoutes:
    """Answers whether packets to an address come back to this machine."""

    def __init__(self, log: Log) -> None:
        """`log` is told once if netlink is not permitted."""
        self._log = log
        self._sequence = itertools.count(1)
        # Sockets that no query uses.  A list's pop() and append() are atomic.
        self._spare: list[socket.socket] = []
        # Guards changes of _permitted.
        self._lock = threading.Lock()
        self._permitted = True

    def open(self) -> None:
        """Open the first netlink socket, so that no query costs a descriptor later.

        Logs a warning if netlink is not permitted.  Queries may come without it as well.
        """
        try:
            self._spare.append(_open())
        except OSError as error:
            self._consider(error)

    def is_local(
        self, network: str, address: Address, selectors: RouteSelectors = ANY_ROUTE
    ) -> bool:
        """Return whether this machine itself receives what is sent to a literal address.

        True for its addresses, for addresses of routes of type local and anycast, for
        multicast and broadcast, and if descriptors or memory are lacking.  False for a name.
        `selectors`: of the socket that would send.  Never waits.
        """
        packed = pack_ip(address.host.partition("%")[0])
        if packed is None:
            return False
        if packed.startswith(V4_MAPPED_PREFIX):
            # Sockets of both families reach the IPv4 address.
            address, packed = address._replace(host=ip_text(packed)), packed[12:]
        if not any(packed) or _is_multicast(packed):
            return True
        query = RouteQuery(network, address, selectors)
        if self._permitted:
            try:
                return self._ask(query).kind in OWN_TYPES
            except ValueError:
                pass  # an answer that does not decide
            except OSError as error:
                self._consider(error)
        return _returns_by_trial(query)

    def has_route(self, address: Address, selectors: RouteSelectors = ANY_ROUTE) -> bool:
        """Return whether a socket could send to a literal address; True if that is not known.

        `selectors`: of that socket.  Never waits.
        """
        if selectors.source and (":" in selectors.source) != (":" in address.host):
            return False
        query = RouteQuery("udp", address, selectors)
        if self._permitted:
            try:
                return self._ask(query).kind != RTN_UNREACHABLE
            except ValueError:
                pass  # an answer that does not decide
            except OSError as error:
                self._consider(error)
        return _connects(query)

    def gateway_to(self, address: Address) -> str:
        """Return the router that leads to a literal address; "" if none does, or is known.

        Never waits.
        """
        if self._permitted:
            try:
                return self._ask(RouteQuery("udp", address)).gateway
            except ValueError:
                pass  # an answer that does not decide
            except OSError as error:
                self._consider(error)
        return ""

    def close(self) -> None:
        """Close the spare sockets."""
        self._close_spare(0)

    def _ask(self, query: RouteQuery) -> FoundRoute:
        """Return the route.

        Raises OSError if netlink cannot be used, ValueError if the answer does not tell.
        """
        sequence = next(self._sequence) & 0xFFFFFFFF
        try:
            request = encode_query(query, sequence)
        except OSError as error:
            raise ValueError(f"no interface {query.selectors.device}") from error
        try:
            sock = self._spare.pop()
        except IndexError:
            sock = _open()
        try:
            syscalls.send(sock, request)
            answer = syscalls.receive(sock, ANSWER_LIMIT)
            if answer is None:
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            route = parse_answer(answer, sequence)
        except BaseException:
            # What the socket still holds must not be taken for a later answer.
            sock.close()
            raise
        self._spare.append(sock)
        self._close_spare(SPARE_LIMIT)
        return route

    def _close_spare(self, kept: int) -> None:
        """Close all spare sockets except so many."""
        while len(self._spare) > kept:
            try:
                self._spare.pop().close()
            except IndexError:
                # Another thread has taken the last one.
                return

    def _consider(self, error: OSError) -> None:
        """Ask no more if netlink is not permitted, and say so once.

        After any other error the next query is asked again.
        """
        if error.errno in _EXHAUSTED:
            return
        if error.errno not in _FORBIDDEN:
            self._log.limited("routes", "cannot ask the kernel for a route: %s", error.strerror)
            return
        with self._lock:
            is_first, self._permitted = self._permitted, False
        if is_first:
            self._log.warning(
                "cannot ask the kernel for routes (AF_NETLINK: %s); "
                "this machine's addresses are recognized by the MTU of the path to them",
                error.strerror or error,
            )


def _open() -> socket.socket:
    return socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    )


def _is_multicast(packed: bytes) -> bool:
    """Return whether a packed address is multicast, or the IPv4 limited broadcast.

    Sockets that listen on all addresses receive multicast even if they have joined no group.
    """
    if len(packed) == 16:
        return packed[0] == 0xFF
    return 224 <= packed[0] <= 239 or packed == b"\xff\xff\xff\xff"


def _returns_by_trial(query: RouteQuery) -> bool:
    """Return whether a UDP socket that is connected to the address would send to this machine.

    The kernel connects it by the same route.  Routes of type local and anycast lead through
    the loopback interface, which the path MTU shows (65,535 for IPv4, 65,536 for IPv6).
    """
    family = socket.AF_INET6 if ":" in query.address.host else socket.AF_INET
    try:
        source, mtu = _connect_trial(family, query.address, query.selectors)
        if source == query.address.host.partition("%")[0]:
            return True
        host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
        loopback = query.address._replace(host=host)
        return mtu != 0 and mtu == _connect_trial(family, loopback, ANY_ROUTE)[1]
    except (OSError, DialError) as error:
        # Other errors are those of a dial as well: nothing is reached.
        return isinstance(error, OSError) and error.errno in _EXHAUSTED


def _connects(query: RouteQuery) -> bool:
    """Return whether the kernel connects a UDP socket to the address."""
    family = socket.AF_INET6 if ":" in query.address.host else socket.AF_INET
    try:
        _connect_trial(family, query.address, query.selectors)
    except OSError as error:
        return error.errno in _EXHAUSTED
    except DialError:
        pass  # the dial will say what is missing
    return True


def _connect_trial(
    family: socket.AddressFamily, address: Address, selectors: RouteSelectors
) -> tuple[str, int]:
    """Connect a UDP socket; return the source address it has got, and the path MTU or 0.

    Sends nothing.  Raises OSError, or DialError if the mark is not permitted.
    """
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        # Freely bound, as the socket that would connect may be.
        options = SocketOptions(selectors.source, selectors.device, selectors.mark, freebind=True)
        options.apply(sock)
        sock.connect(to_sockaddr(address, family))
        own = from_sockaddr(sock.getsockname()).host.partition("%")[0]
        try:
            return own, sock.getsockopt(*_PATH_MTU[family])
        except OSError:
            return own, 0
