"""System calls on TCP sockets that never wait, made without releasing the interpreter's lock.

The socket module releases the lock for every call, even for one that takes a
microsecond.  Where many threads are busy, each of these calls then waits until it has
the lock again, and a connection needs forty of them.  Here they are made through
ctypes.PyDLL, which keeps the lock: only for calls that cannot block.  Without ctypes
the methods of the socket module are used.  All of them raise OSError.  Thread: any.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
import struct
import threading

from netproxy.net.address import IPV4_NAME, from_sockaddr, pack_address, to_sockaddr, unpack_address
from netproxy.typed import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.sockets import StreamSocket

try:
    import ctypes

    _library: ctypes.PyDLL | None = ctypes.PyDLL(None, use_errno=True)
except (ImportError, OSError):
    # A Python without ctypes.
    _library = None

BUFFER = 65536
"""Bytes asked of a plain socket in one receive."""
ROOM = 2 * BUFFER
"""Bytes of each of a thread's buffers.  TLS reads more at a time, as each read costs more."""

KEPT_LOCK_LIMIT = 16384
"""Bytes sent while the lock is kept.  Copying more takes longer than releasing the lock."""
POLL_LIMIT_MS = (1 << 31) - 1
"""The longest time that poll(2) takes, an int: 24 days stand for no limit."""
NAME_ROOM = 32
"""Bytes for a sockaddr: sockaddr_in6 has 28."""
_NAME_LENGTH = struct.Struct("@I")
_NONBLOCK = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_TCP = socket.SOCK_STREAM | _NONBLOCK
_NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
LARGE_BLOCK = 131072
"""Bytes of memory that is mapped by itself, and so goes back to the system when it is free.  glibc
begins with this number, and raises it to the size of whatever it has given back: larger blocks
then leave holes in the heap."""
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_PR_SET_PDEATHSIG = 1

T = TypeVar("T")


class Buffer:
    """ROOM bytes in a mapping of their own.

    Threads that only do handshakes use one page of it, and the kernel supplies no more.
    """

    __slots__ = ("memory", "view", "address")

    def __init__(self) -> None:
        """Map the memory."""
        self.memory = mmap.mmap(-1, ROOM)
        self.view = memoryview(self.memory)
        self.address = (
            ctypes.addressof((ctypes.c_char * ROOM).from_buffer(self.memory))
            if _library is not None
            else 0
        )


class _ThreadBuffers(threading.local):
    """The buffers of the thread that asks."""

    cleartext: Buffer
    """For what a relay copies, and what TLS has decrypted; made when it is needed."""

    def __init__(self) -> None:
        self.received = Buffer()
        """For what receive() reads; callers copy what they keep."""

    def __getattr__(self, name: str) -> Buffer:
        """Make the second buffer.  Only called while the thread has none."""
        if name != "cleartext":
            raise AttributeError(name)
        self.cleartext = Buffer()
        return self.cleartext


buffers = _ThreadBuffers()


def _failure() -> OSError:
    """Return the error of the call just made."""
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def _unless_waiting(nothing: T) -> T:
    """Return `nothing` if the call just made would have waited; else raise its error."""
    if ctypes.get_errno() == errno.EAGAIN:
        return nothing
    raise _failure()


def _receive(sock: socket.socket, limit: int) -> memoryview | None:
    buffer = buffers.received
    count = _recv(sock.fileno(), buffer.address, min(limit, ROOM), socket.MSG_DONTWAIT)
    if count < 0:
        return _unless_waiting(None)
    return buffer.view[:count]


def _send(sock: socket.socket, data: bytes | bytearray | memoryview) -> int:
    size = len(data)
    if size > KEPT_LOCK_LIMIT:
        return _portable_send(sock, data)
    copy = data if type(data) is bytes else bytes(data)
    count: int = _send_bytes(sock.fileno(), copy, size, _NOW)
    if count < 0:
        return _unless_waiting(0)
    return count


def _close(sock: StreamSocket) -> None:
    descriptor = sock.detach()
    if descriptor >= 0:
        _close_descriptor(descriptor)


def _shutdown(sock: socket.socket, how: int) -> None:
    if _shutdown_descriptor(sock.fileno(), how) < 0:
        raise _failure()


def _open_tcp(family: int) -> socket.socket:
    """Return a TCP socket that does not block.  Raises OSError."""
    descriptor = _socket(family, _TCP, 0)
    if descriptor < 0:
        raise _failure()
    return socket.socket(family, _TCP, 0, descriptor)


def _connect(sock: socket.socket, family: int, address: Address) -> int:
    """Begin to connect a socket of `family` to a literal address.

    Return 0 or the errno, EINPROGRESS if it takes time.  Raises ValueError as pack_address().
    """
    name = pack_address(address, family)
    return ctypes.get_errno() if _connect_descriptor(sock.fileno(), name, len(name)) < 0 else 0


def _accept(sock: socket.socket) -> tuple[socket.socket, Address] | None:
    """Return a new connection, which does not block, and its peer; None if none waits.

    `sock` must not block.  Raises OSError.
    """
    buffer = buffers.received
    _NAME_LENGTH.pack_into(buffer.memory, NAME_ROOM, NAME_ROOM)
    name_at = buffer.address
    descriptor = _accept_descriptor(sock.fileno(), name_at, name_at + NAME_ROOM, _NONBLOCK)
    if descriptor < 0:
        if ctypes.get_errno() == errno.EAGAIN:
            return None
        raise _failure()
    (length,) = _NAME_LENGTH.unpack_from(buffer.memory, NAME_ROOM)
    peer = unpack_address(bytes(buffer.view[:length]))
    # A socket's own `family` makes an enum each time.
    family = socket.AF_INET if length == IPV4_NAME else socket.AF_INET6
    return socket.socket(family, _TCP, 0, descriptor), peer


def _local_address(sock: socket.socket) -> Address:
    """Return the local address.  Raises OSError."""
    buffer = buffers.received
    _NAME_LENGTH.pack_into(buffer.memory, NAME_ROOM, NAME_ROOM)
    if _name_of(sock.fileno(), buffer.address, buffer.address + NAME_ROOM) < 0:
        raise _failure()
    (length,) = _NAME_LENGTH.unpack_from(buffer.memory, NAME_ROOM)
    return unpack_address(bytes(buffer.view[:length]))


def _portable_open_tcp(family: int) -> socket.socket:
    return socket.socket(family, _TCP)


def _portable_connect(sock: socket.socket, family: int, address: Address) -> int:
    return sock.connect_ex(to_sockaddr(address, family))


def _portable_accept(sock: socket.socket) -> tuple[socket.socket, Address] | None:
    try:
        connection, peer = sock.accept()
    except BlockingIOError:
        return None
    connection.setblocking(False)
    return connection, from_sockaddr(peer)


def _portable_local_address(sock: socket.socket) -> Address:
    return from_sockaddr(sock.getsockname())


def _portable_receive(sock: socket.socket, limit: int) -> memoryview | None:
    view = buffers.received.view
    try:
        return view[: sock.recv_into(view, min(limit, ROOM), socket.MSG_DONTWAIT)]
    except BlockingIOError:
        return None


def _portable_send(sock: socket.socket, data: bytes | bytearray | memoryview) -> int:
    try:
        return sock.send(data, _NOW)
    except BlockingIOError:
        return 0


def _portable_close(sock: StreamSocket) -> None:
    descriptor = sock.detach()
    if descriptor >= 0:
        socket.close(descriptor)


def _portable_shutdown(sock: socket.socket, how: int) -> None:
    sock.shutdown(how)


def trim() -> None:
    """Return free memory of the process to the system, if the C library can (malloc_trim(3)).

    It takes some milliseconds for each 10 MiB.  Other threads go on meanwhile, until they need
    more memory than they have kept for themselves.
    """
    if _library is not None:
        try:
            # Unlike _library.malloc_trim(), this releases the interpreter's lock.
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t)(("malloc_trim", _library))(0)
        except AttributeError:
            pass  # not glibc


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, if it can (prctl(2))."""
    if _library is not None:
        _library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def use_one_heap() -> None:
    """Keep glibc from giving each thread a heap of its own, and large blocks to any (mallopt(3)).

    The interpreter's lock lets one thread allocate at a time, and 500 sessions save a MiB.
    """
    if _library is not None:
        try:
            _library.mallopt(_M_ARENA_MAX, 1)
            _library.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
        except AttributeError:
            pass  # not glibc


if _library is not None:
    _recv = _library.recv
    _recv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _recv.restype = ctypes.c_ssize_t
    _send_bytes = _library.send
    _send_bytes.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
    _send_bytes.restype = ctypes.c_ssize_t
    _close_descriptor = _library.close
    _close_descriptor.argtypes = [ctypes.c_int]
    _shutdown_descriptor = _library.shutdown
    _shutdown_descriptor.argtypes = [ctypes.c_int, ctypes.c_int]
    _socket = _library.socket
    _socket.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
    _connect_descriptor = _library.connect
    _connect_descriptor.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    _accept_descriptor = _library.accept4
    _accept_descriptor.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    _name_of = _library.getsockname
    _name_of.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    receive, send, close, shutdown = _receive, _send, _close, _shutdown
    open_tcp, connect = _open_tcp, _connect
    accept, local_address = _accept, _local_address
else:
    receive, send = _portable_receive, _portable_send
    close, shutdown = _portable_close, _portable_shutdown
    open_tcp, connect = _portable_open_tcp, _portable_connect
    accept, local_address = _portable_accept, _portable_local_address
