"""Socket calls that never wait, made without handing the interpreter's lock over.

The socket module lets the lock go for every call, even one that takes a
microsecond; where many threads are busy each of those calls then waits for its
turn again, and a connection that needs forty of them waits forty times.  Here
they are made through ctypes.PyDLL, which keeps the lock.  Only for calls that
cannot block.  Without ctypes the socket module's own serve.  Any thread.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import threading
from typing import Any

from netproxy.net.address import pack_sockaddr, unpack_sockaddr

try:
    import ctypes

    _library: Any = ctypes.PyDLL(None, use_errno=True)
except (ImportError, OSError):  # a Python without ctypes
    _library = None

BUFFER = 65536  # bytes that one receive of a plain socket is asked for
ROOM = (
    2 * BUFFER
)  # and for which there is room: what is encrypted costs more each time, and comes in larger pieces
KEPT_LOCK_LIMIT = (
    16384  # bytes sent with the lock kept: beyond, copying takes longer than a hand-over
)
POLL_LIMIT_MS = (1 << 31) - 1  # poll(2) takes an int: 24 days are as good as for ever
NAME_ROOM = 32  # bytes for a sockaddr_in6 (28)
_NAME_LENGTH = struct.Struct("@I")
_NONBLOCK = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_TCP = socket.SOCK_STREAM | _NONBLOCK
_NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_local = threading.local()


class Buffer:
    """A mapping of its own: the many threads that only shake hands use one page of it, and hold no more."""

    __slots__ = ("memory", "view", "address")

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, ROOM)
        self.view = memoryview(self.memory)
        self.address = (
            ctypes.addressof((ctypes.c_char * ROOM).from_buffer(self.memory)) if _library else 0
        )


def thread_buffer() -> Buffer:
    """One for each thread, for what is on its way through: whoever needs it for longer copies it."""
    try:
        return _local.buffer
    except AttributeError:
        _local.buffer = Buffer()
        return _local.buffer


def thread_clear() -> Buffer:
    """The thread's second one, for what a relay moves, which may have been deciphered out of the first."""
    try:
        return _local.clear
    except AttributeError:
        _local.clear = Buffer()
        return _local.clear


def _failure() -> OSError:
    """Of the call just made."""
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def _unless_waiting(nothing: Any) -> Any:
    """`nothing` where the call just made would have had to wait; else raises what it failed with."""
    if ctypes.get_errno() == errno.EAGAIN:
        return nothing
    raise _failure()


def _name_in(buffer: Buffer) -> tuple:
    """The sockaddr that the kernel has written there, its length behind it."""
    (length,) = _NAME_LENGTH.unpack_from(buffer.memory, NAME_ROOM)
    return unpack_sockaddr(bytes(buffer.view[:length]))


def _receive(sock: socket.socket, limit: int) -> memoryview | None:
    """What is there now, in the thread's buffer until its next receive; empty at the end, None for nothing yet.  OSError."""
    buffer = thread_buffer()
    count = _recv(sock.fileno(), buffer.address, min(limit, ROOM), socket.MSG_DONTWAIT)
    if count < 0:
        return _unless_waiting(None)
    return buffer.view[:count]


def _send(sock: socket.socket, data: bytes | memoryview) -> int:
    """How many bytes of `data` went; 0 where none go now.  OSError."""
    size = len(data)
    if size > KEPT_LOCK_LIMIT:
        return _portable_send(sock, data)
    count = _send_bytes(sock.fileno(), data if type(data) is bytes else bytes(data), size, _NOW)
    if count < 0:
        return _unless_waiting(0)
    return count


def _close(sock: socket.socket) -> None:
    descriptor = sock.detach()
    if descriptor >= 0:
        _close_descriptor(descriptor)


def _shutdown(sock: socket.socket, how: int) -> None:
    """OSError."""
    if _shutdown_descriptor(sock.fileno(), how) < 0:
        raise _failure()


def _open(family: int) -> socket.socket:
    """A TCP socket that does not block; OSError."""
    descriptor = _socket(family, _TCP, 0)
    if descriptor < 0:
        raise _failure()
    return socket.socket(family, _TCP, 0, descriptor)


def _connect(sock: socket.socket, sockaddr: tuple) -> int:
    """Begins to connect: 0, or the errno, EINPROGRESS where it takes its time."""
    name = pack_sockaddr(sockaddr)
    return ctypes.get_errno() if _connect_descriptor(sock.fileno(), name, len(name)) < 0 else 0


def _accept(sock: socket.socket) -> tuple[socket.socket, tuple] | None:
    """A connection that waits, which does not block, and its peer; None where none waits.  OSError.  `sock` must not block."""
    buffer = thread_buffer()
    _NAME_LENGTH.pack_into(buffer.memory, NAME_ROOM, NAME_ROOM)
    descriptor = _accept_descriptor(
        sock.fileno(), buffer.address, buffer.address + NAME_ROOM, _NONBLOCK
    )
    if descriptor < 0:
        return _unless_waiting(None)
    return socket.socket(sock.family, _TCP, 0, descriptor), _name_in(buffer)


def _local_sockaddr(sock: socket.socket) -> tuple:
    buffer = thread_buffer()
    _NAME_LENGTH.pack_into(buffer.memory, NAME_ROOM, NAME_ROOM)
    if _name_of(sock.fileno(), buffer.address, buffer.address + NAME_ROOM) < 0:
        raise _failure()
    return _name_in(buffer)


def _portable_open(family: int) -> socket.socket:
    return socket.socket(family, _TCP)


def _portable_connect(sock: socket.socket, sockaddr: tuple) -> int:
    return sock.connect_ex(sockaddr)


def _portable_accept(sock: socket.socket) -> tuple[socket.socket, tuple] | None:
    try:
        connection, peer = sock.accept()
    except BlockingIOError:
        return None
    connection.setblocking(False)
    return connection, peer


def _portable_local_sockaddr(sock: socket.socket) -> tuple:
    return sock.getsockname()


def _portable_receive(sock: socket.socket, limit: int) -> memoryview | None:
    view = thread_buffer().view
    try:
        return view[: sock.recv_into(view, min(limit, ROOM), socket.MSG_DONTWAIT)]
    except BlockingIOError:
        return None


def _portable_send(sock: socket.socket, data: bytes | memoryview) -> int:
    try:
        return sock.send(data, _NOW)
    except BlockingIOError:
        return 0


def _portable_close(sock: socket.socket) -> None:
    sock.close()


def _portable_shutdown(sock: socket.socket, how: int) -> None:
    sock.shutdown(how)


def trim() -> None:
    """Gives memory that is free within the process back to the system, where the C library can."""
    try:
        _library.malloc_trim(0)
    except AttributeError:  # no ctypes, or another C library
        pass


if _library:
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
    open_tcp, connect, accept, local_sockaddr = _open, _connect, _accept, _local_sockaddr
else:
    receive, send, close, shutdown = (
        _portable_receive,
        _portable_send,
        _portable_close,
        _portable_shutdown,
    )
    open_tcp, connect, accept, local_sockaddr = (
        _portable_open,
        _portable_connect,
        _portable_accept,
        _portable_local_sockaddr,
    )
