"""System calls that fail once, in the threads of a daemon in this process.

All calls of the relay paths go through a few places: the C functions of net.syscalls and
net.mmsg, the methods of socket.socket, os.splice and pipes, poll and epoll.  Faults stands in
all of them, counts the calls, and lets one of them fail with an errno.  A call that fails has
not been made.  Threads of the test itself are left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import threading
from collections import Counter
from typing import Any, Callable, Iterator

import pytest

from netproxy.net import mmsg, syscalls

# How the threads of a test are named; all others are the daemon's.
_OF_TESTS = ("MainThread", "test-", "Thread-")


class Faults:
    """Counts system calls, and makes one of them fail."""

    def __init__(self) -> None:
        # Guards everything below.
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        """Calls since begin(), by name."""
        self._call = ""
        self._number = 0
        self._code = 0
        self._main = False
        self.fired = False
        """True once the call has failed."""

    def begin(self, call: str = "", number: int = 0, code: int = 0, main: bool = False) -> None:
        """Count anew, and let call `number` (from 1) of this name fail.

        `main`: calls of the main thread count, as a daemon starts on it.
        """
        with self._lock:
            self.counts.clear()
            self._call, self._number, self._code, self._main = call, number, code, main
            self.fired = False

    def end(self) -> bool:
        """Let no further call fail; return whether one has."""
        with self._lock:
            self._call = ""
            return self.fired

    def code(self, call: str) -> int:
        """Count a call; return the errno with which it fails, or 0."""
        name = threading.current_thread().name
        if name.startswith(_OF_TESTS) and not (self._main and name == "MainThread"):
            return 0
        with self._lock:
            self.counts[call] += 1
            if call == self._call and self.counts[call] == self._number:
                self.fired = True
                return self._code
        return 0

    def check(self, call: str) -> None:
        """Count a call.  Raises OSError if it is to fail."""
        if code := self.code(call):
            raise OSError(code, os.strerror(code))


_SOCKET_CALLS = {
    "recv_into": "recv",
    "recvmsg": "recvmsg",
    "recvmsg_into": "recvmsg",
    "send": "send",
    "sendmsg": "sendmsg",
    "bind": "bind",
    "listen": "listen",
    "accept": "accept",
    "getsockopt": "getsockopt",
    "setsockopt": "setsockopt",
    "getsockname": "getsockname",
    "getpeername": "getpeername",
}
_C_FUNCTIONS = {
    (syscalls, "_recv"): "recv",
    (syscalls, "_send_bytes"): "send",
    (syscalls, "_shutdown_descriptor"): "shutdown",
    (syscalls, "_socket"): "socket",
    (syscalls, "_connect_descriptor"): "connect",
    (syscalls, "_accept_descriptor"): "accept",
    (syscalls, "_name_of"): "getsockname",
    (mmsg, "_recvmmsg"): "recvmmsg",
    (mmsg, "_recvmmsg_waiting"): "recvmmsg",
    (mmsg, "_sendmsg"): "sendmsg",
}
_OS_CALLS = {"splice": "splice", "pipe2": "pipe", "pipe": "pipe"}


@contextlib.contextmanager
def installed() -> Iterator[Faults]:
    """Stand in all places; what is opened before keeps its own calls."""
    faults = Faults()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", _socket_class(faults))
        for (module, name), call in _C_FUNCTIONS.items():
            patch.setattr(module, name, _c_function(getattr(module, name), faults, call))
        for name, call in _OS_CALLS.items():
            patch.setattr(os, name, _function(getattr(os, name), faults, call))
        patch.setattr(fcntl, "fcntl", _function(fcntl.fcntl, faults, "fcntl"))
        patch.setattr(select, "epoll", _epoll_class(select.epoll, faults))
        patch.setattr(select, "poll", _poll_class(select.poll, faults))
        yield faults


# Any in what follows: the signatures are those of the functions that are replaced.
_Function = Callable[..., Any]


def _function(original: _Function, faults: Faults, call: str) -> _Function:
    def stand_in(*arguments: Any, **named: Any) -> Any:
        faults.check(call)
        return original(*arguments, **named)

    return stand_in


def _c_function(original: _Function, faults: Faults, call: str) -> _Function:
    def stand_in(*arguments: Any) -> Any:
        if code := faults.code(call):
            ctypes.set_errno(code)
            return -1
        return original(*arguments)

    return stand_in


def _socket_class(faults: Faults) -> type[socket.socket]:
    def initialize(self: Any, *arguments: Any, **named: Any) -> None:
        # With a descriptor no system call is made.
        if len(arguments) < 4 and named.get("fileno") is None:
            faults.check("socket")
        socket_class.__init__(self, *arguments, **named)

    def shutdown(self: socket.socket, how: int) -> None:
        # One that fails has done its work all the same: it wakes who waits.
        code = faults.code("shutdown")
        socket_class.shutdown(self, how)
        if code:
            raise OSError(code, os.strerror(code))

    socket_class = socket.socket
    methods: dict[str, Any] = {
        name: _function(getattr(socket_class, name), faults, call)
        for name, call in _SOCKET_CALLS.items()
    }
    methods |= {"__init__": initialize, "shutdown": shutdown}
    return type("FaultySocket", (socket_class,), methods)


def _epoll_class(original: Any, faults: Faults) -> Any:
    class Epoll:
        def __init__(self, *arguments: Any) -> None:
            faults.check("epoll_create")
            self._epoll = original(*arguments)

        def register(self, *arguments: Any) -> None:
            faults.check("epoll_ctl")
            self._epoll.register(*arguments)

        def modify(self, *arguments: Any) -> None:
            faults.check("epoll_ctl")
            self._epoll.modify(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._epoll, name)

    return Epoll


def _poll_class(original: Any, faults: Faults) -> Any:
    class Poll:
        def __init__(self) -> None:
            self._poll = original()

        def poll(self, *arguments: Any) -> Any:
            faults.check("poll")
            return self._poll.poll(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._poll, name)

    return Poll
