"""Disables sendmmsg(2) and recvmmsg(2) for a program that is about to be started.

dig 9.18 sends with sendmmsg(2) if the kernel has it. Dante's library does not intercept that call:
the datagrams would leave without a SOCKS5 header.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from typing import Callable

import pytest

# machine -> AUDIT_ARCH_*, and the numbers of sendmmsg and recvmmsg.
_BATCH_CALLS = {"x86_64": (0xC000003E, 307, 299), "aarch64": (0xC00000B7, 269, 243)}
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_AT, _MACHINE_AT = 0, 4
_SET_SECCOMP, _FILTER, _SET_NO_NEW_PRIVILEGES = 22, 2, 38


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def without_batches() -> Callable[[], None]:
    """Return a preexec_fn after which sendmmsg and recvmmsg fail with ENOSYS.

    Skips the test on machines whose system call numbers are not listed here.
    """
    if platform.machine() not in _BATCH_CALLS:
        pytest.skip(f"the system call numbers of {platform.machine()} are not known here")
    machine, *calls = _BATCH_CALLS[platform.machine()]
    code = b"".join(
        struct.pack("@HBBI", *line)
        for line in (
            (_LOAD, 0, 0, _MACHINE_AT),
            (_JUMP_IF_EQUAL, 0, 3, machine),
            (_LOAD, 0, 0, _NUMBER_AT),
            (_JUMP_IF_EQUAL, 2, 0, calls[0]),
            (_JUMP_IF_EQUAL, 1, 0, calls[1]),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
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
