"""Steers clients to the processes that share a port.

The sockets of a port form a group (SO_REUSEPORT), and a classic BPF program chooses the socket
of each datagram or connection by its place in the group: its process's number.  A socket that
another program adds to the group has a higher place, which is never chosen.  owner() tells which
process has a client.  Works for IPv4, IPv6 and IPv4 on IPv6 sockets (socket(7), bpf(2)).
"""

from __future__ import annotations

import array
import os
import socket
import struct

from netproxy.interfaces.addresses import pack_ip

SO_ATTACH_REUSEPORT_CBPF = 51
"""Linux; the socket module does not name it."""
_NETWORK = 0xFFF00000
"""SKF_NET_OFF: offsets count from the header of IP."""
_IPV4_SOURCE, _IPV6_SOURCE, _IPV6_SIZE = 12, 8, 40
# linux/bpf_common.h: BPF_LD and BPF_LDX from the packet (absolute, indexed by X) and from a cell.
_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE, _LOAD_HALF_INDEXED = 0x20, 0x28, 0x30, 0x48
_LOAD_HEADER_SIZE, _STORE, _LOAD_X_CELL = 0xB1, 0x02, 0x61
_A_TO_X, _XOR_X = 0x07, 0xAC
_MULTIPLY, _SHIFT_RIGHT, _MODULO = 0x24, 0x74, 0x94
_JUMP_IF_EQUAL, _RETURN_A = 0x15, 0x16
_MULTIPLIER, _SHIFT = 0x9E3779B1, 16
"""2**32 divided by the golden ratio: neighbouring addresses come to different processes."""

_Instruction = tuple[int, int, int, int]
"""struct sock_filter: code, jumps if true and if false, operand."""


def owner(host: str, processes: int) -> int:
    """Return the number of the process that has a client's datagrams, 0 to processes - 1.

    An IPv6 client is known by its network, as client_key().
    """
    packed = pack_ip(host.partition("%")[0]) or bytes(4)
    key = int.from_bytes(packed[:4], "big")
    if len(packed) > 4:
        key ^= int.from_bytes(packed[4:8], "big")
    return ((key * _MULTIPLIER & 0xFFFFFFFF) >> _SHIFT) % processes


def steer_by_client(sock: socket.socket, processes: int) -> None:
    """Choose the sockets of a group by the client's address; `sock` is one of them.

    Raises OSError.
    """
    ipv4 = [(_LOAD_WORD, 0, 0, _NETWORK + _IPV4_SOURCE)]
    _attach(sock, _program(ipv4, _ipv6_network(), processes))


def steer_by_connection(sock: socket.socket, processes: int) -> None:
    """Choose the sockets of a TCP group by the client's address and port.

    Raises OSError.
    """
    ipv4 = [
        (_LOAD_WORD, 0, 0, _NETWORK + _IPV4_SOURCE),
        (_STORE, 0, 0, 0),
        (_LOAD_HEADER_SIZE, 0, 0, _NETWORK),
        (_LOAD_HALF_INDEXED, 0, 0, _NETWORK),
        (_LOAD_X_CELL, 0, 0, 0),
        (_XOR_X, 0, 0, 0),
    ]
    ipv6 = _ipv6_network()
    ipv6 += [(_A_TO_X, 0, 0, 0), (_LOAD_HALF, 0, 0, _NETWORK + _IPV6_SIZE), (_XOR_X, 0, 0, 0)]
    _attach(sock, _program(ipv4, ipv6, processes))


def steer_by_identifier(sock: socket.socket, processes: int, offset: int) -> None:
    """Choose the sockets of a UDP group by the byte at `offset` of each datagram.

    It is the first byte of an identifier().  Raises OSError.
    """
    # The program of a group sees the payload of UDP; a datagram that is too short goes to 0.
    _attach(sock, [(_LOAD_BYTE, 0, 0, offset), (_MODULO, 0, 0, processes), (_RETURN_A, 0, 0, 0)])


def identifier(size: int, process: int, processes: int) -> bytes:
    """Return `size` random bytes, the first of which leads to a process of a group."""
    first, *rest = os.urandom(size)
    first += process - first % processes
    return bytes((first if first < 256 else first - processes, *rest))


def _ipv6_network() -> list[_Instruction]:
    """Return what loads the first 64 bits of the source, one half combined with the other."""
    return [
        (_LOAD_WORD, 0, 0, _NETWORK + _IPV6_SOURCE),
        (_A_TO_X, 0, 0, 0),
        (_LOAD_WORD, 0, 0, _NETWORK + _IPV6_SOURCE + 4),
        (_XOR_X, 0, 0, 0),
    ]


def _program(
    ipv4: list[_Instruction], ipv6: list[_Instruction], processes: int
) -> list[_Instruction]:
    """Return a program that loads a key, by the version of IP, and returns its place."""
    place: list[_Instruction] = [
        (_MULTIPLY, 0, 0, _MULTIPLIER),
        (_SHIFT_RIGHT, 0, 0, _SHIFT),
        (_MODULO, 0, 0, processes),
        (_RETURN_A, 0, 0, 0),
    ]
    version = [(_LOAD_BYTE, 0, 0, _NETWORK), (_SHIFT_RIGHT, 0, 0, 4)]
    choice = [(_JUMP_IF_EQUAL, 0, len(ipv4) + len(place), 4)]
    return [*version, *choice, *ipv4, *place, *ipv6, *place]


def _attach(sock: socket.socket, program: list[_Instruction]) -> None:
    code = array.array("B", b"".join(struct.pack("=HBBI", *line) for line in program))
    # struct sock_fprog; the kernel copies the program.
    filters = struct.pack("@HP", len(program), code.buffer_info()[0])
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, filters)
