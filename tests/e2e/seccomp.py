"""Makes system calls seem not to be there for a program to be started.

dig 9.18 sends by sendmmsg(2) where the kernel has it, which dante's library
does not intercept: the datagrams would go out without a SOCKS5 header.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import socket
import struct
from typing import Callable

import pytest

_SYSTEM_CALLS = {
    "x86_64": (0xC000003E, {"sendmmsg": 307, "recvmmsg": 299, "socket": 41}),
    "aarch64": (0xC00000B7, {"sendmmsg": 269, "recvmmsg": 243, "socket": 198}),
}
"""By machine: AUDIT_ARCH_* and the numbers of system calls."""
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
# Offsets in struct seccomp_data; the low half of the first argument on little endian.
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_SET_SECCOMP, _FILTER, _SET_NO_NEW_PRIVILEGES = 22, 2, 38


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def without_batches() -> Callable[[], None]:
    """Return a preexec_fn: sendmmsg and recvmmsg fail with ENOSYS from then on.

    Skips the test if the machine's system calls are not known.
    """
    machine, calls = _system_calls()
    filters = [(_JUMP_IF_EQUAL, 0, 1, calls[name]) for name in ("sendmmsg", "recvmmsg")]
    answer = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
    return _install(machine, [line for jump in filters for line in (jump, answer)])


def without_netlink() -> Callable[[], None]:
    """Return a preexec_fn: socket(AF_NETLINK, ...) fails with EAFNOSUPPORT from then on.

    As with RestrictAddressFamilies in a systemd unit.  Skips as without_batches() does.
    """
    machine, calls = _system_calls()
    return _install(
        machine,
        [
            (_JUMP_IF_EQUAL, 0, 3, calls["socket"]),
            (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
            (_JUMP_IF_EQUAL, 0, 1, socket.AF_NETLINK),
            (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
        ],
    )


def _system_calls() -> tuple[int, dict[str, int]]:
    if platform.machine() not in _SYSTEM_CALLS:
        pytest.skip(f"the system call numbers of {platform.machine()} are not known here")
    return _SYSTEM_CALLS[platform.machine()]


def _install(machine: int, filters: list[tuple[int, int, int, int]]) -> Callable[[], None]:
    """Return a preexec_fn that installs filters of the system call number."""
    code = b"".join(
        struct.pack("@HBBI", *line)
        for line in (
            (_LOAD, 0, 0, _MACHINE_AT),
            (_JUMP_IF_EQUAL, 1, 0, machine),
            (_RETURN, 0, 0, _ALLOW),
            (_LOAD, 0, 0, _NUMBER_AT),
            *filters,
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    program = _Program(len(code) // 8, code)
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def install() -> None:
        if prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or prctl(
            _SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0
        ):
            raise OSError(ctypes.get_errno(), "no system call filter")

    return install
