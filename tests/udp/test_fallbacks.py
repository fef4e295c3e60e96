"""Machines without ctypes, IPv6, UDP_SEGMENT or UDP_GRO, or with a device that cannot cut.

No datagram is lost by that.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import socket
import sys
from typing import Any, Callable

import pytest

import netproxy.net
from netproxy.interfaces.addresses import Address
from netproxy.net import datagram
from netproxy.net import datagram_socket
from netproxy.net import mmsg
from netproxy.net import mmsg_arena
from netproxy.protocol.socks5 import encode_header
from tests.support.handlers import eventually
from tests.support.relays import SPS, Running, UdpClient, UdpPort, running
from tests.udp.flows import put_on, settled

SEGMENT = (datagram.SOL_UDP, datagram.UDP_SEGMENT)


def check_trains(relay: Running) -> None:
    """Send trains and single datagrams up and down: each arrives exactly once and in order."""
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        settled(relay)
        header = encode_header(target.address)
        sent = [b"%04d" % at + b"x" * 500 for at in range(40)]
        with relay.held():
            put_on(
                client.socket,
                b"".join(header + data for data in sent[:20]),
                len(header) + 504,
                client.bound,
            )
            for data in sent[20:]:
                client.to(target.address, data)
        assert [target.receive()[0] for _ in sent] == sent
        put_on(target.socket, b"".join(sent[:20]), 504, seen)
        for data in sent[20:]:
            target.send(data, seen)
        assert [client.receive()[0] for _ in sent] == sent
        client.check_echo(target, b"and nothing behind it")
    # held() sends malformed datagrams.
    assert not {reason for reason in relay.drops()} - {"malformed"}


# -- no ctypes


@pytest.mark.parametrize("wanted", ["auto", "mmsg"])
def test_relay_without_ctypes_loses_no_datagram(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.delattr(netproxy.net, "mmsg", raising=False)
    monkeypatch.setitem(sys.modules, "netproxy.net.mmsg", None)
    with running(SPS + "\nudp: {batching: %s}" % wanted) as relay:
        assert relay.daemon._runtime.datagrams.level == "trains"
        check_trains(relay)


# -- no IPv6


@pytest.fixture
def no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    class Socket(socket.socket):
        def __init__(self, family: int = -1, *more: Any, **named: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *more, **named)

    monkeypatch.setattr(socket, "socket", Socket)


def test_relay_without_ipv6_drops_datagrams_to_ipv6_only(no_ipv6: None, level: str) -> None:
    with running(
        "listeners: [{listen: ':0', allow_open: true}]\ndestinations: {deny: []}" + level
    ) as relay:
        check_trains(relay)
        with UdpClient(relay.port) as client, UdpPort() as target:
            client.check_echo(target)
            before = relay.drops()
            client.to(Address("::1", 9), b"no way")
            eventually(lambda: sum(relay.drops().values()) == sum(before.values()) + 1)
            client.check_echo(target)
            with UdpPort() as gone:
                address = gone.address
            client.to(address, b"into the void")
            eventually(lambda: relay.count("icmp", "refused") == 1)
            client.check_echo(target)


# -- a kernel without UDP_SEGMENT and UDP_GRO


def test_kernel_without_trains_loses_no_datagram(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    enable = datagram.enable

    def only_others(sock: socket.socket, of: int, option: int, value: int) -> bool:
        return of != datagram.SOL_UDP and enable(sock, of, option, value)

    monkeypatch.setattr(datagram, "enable", only_others)
    with running(SPS + level) as relay:
        check_trains(relay)


def test_kernel_without_any_socket_option_loses_no_datagram(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """No option at all can be set: no large buffers, no ICMP errors, no count of overruns."""
    monkeypatch.setattr(datagram, "enable", lambda *_: False)
    with running(SPS + level) as relay:
        check_trains(relay)


# -- a device or a path that cannot


class Refusing:
    """Makes sends fail with `code` if the kernel is to cut them into more than `longest` bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, longest: int = 0) -> None:
        self._code = code
        self._longest = longest
        self.refused: list[int] = []
        """Lengths of the segments of sends that failed, in order."""
        self.passed: list[int] = []
        monkeypatch.setattr(mmsg, "_sendmsg", self._instead_of_mmsg(mmsg._sendmsg))
        monkeypatch.setattr(datagram_socket.BatchSocket, "_send_message", self._instead_of_trains())

    def _refuses(self, segment: int) -> bool:
        if segment and segment > self._longest:
            self.refused.append(segment)
            return True
        if segment:
            self.passed.append(segment)
        return False

    def _instead_of_mmsg(
        self, send: Callable[[int, int, int], int]
    ) -> Callable[[int, int, int], int]:
        def sendmsg(descriptor: int, message: int, flags: int) -> int:
            fields = mmsg_arena.MESSAGE.unpack(ctypes.string_at(message, mmsg_arena.MESSAGE.size))
            control = ctypes.string_at(fields[4], fields[5]) if fields[5] else b""
            if self._refuses(_segment_of(control)):
                ctypes.set_errno(self._code)
                return -1
            return send(descriptor, message, flags)

        return sendmsg

    def _instead_of_trains(self) -> Callable[..., int]:
        send = datagram_socket.BatchSocket._send_message

        def send_message(local: Any, parts: list, control: list, sockaddr: tuple) -> int:
            segments = [
                int.from_bytes(data, sys.byteorder)
                for of, kind, data in control
                if (of, kind) == SEGMENT
            ]
            return (
                self._code
                if self._refuses(segments[0] if segments else 0)
                else send(local, parts, control, sockaddr)
            )

        return send_message


def _segment_of(control: bytes) -> int:
    """Return the segment length in the control messages of a send, 0 if it has none."""
    at = 0
    while at + mmsg_arena.CMSG.size <= len(control):
        size, of, kind = mmsg_arena.CMSG.unpack_from(control, at)
        if (of, kind) == SEGMENT:
            return int.from_bytes(
                control[at + mmsg_arena.CMSG_SIZE : at + mmsg_arena.CMSG_SIZE + 2], sys.byteorder
            )
        at += max(1, -(-size // mmsg_arena.LONG) * mmsg_arena.LONG)
    return 0


def test_device_that_cannot_cut_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """EIO: the datagrams go singly, and from then on all do."""
    refusing = Refusing(monkeypatch, errno.EIO)
    with running(SPS + level) as relay, UdpClient(relay.port) as client, UdpPort() as target:
        check_trains(relay)
        first = len(refusing.refused)
        # The session's socket and the listener's have failed once each.
        assert first == (0 if "single" in level else 2)
        seen = client.check_echo(target)
        for _ in range(5):
            put_on(target.socket, b"down" * 10, 4, seen)
            assert [client.receive()[0] for _ in range(10)] == [b"down"] * 10
        assert len(refusing.refused) == first and not refusing.passed


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EMSGSIZE])
def test_segments_longer_than_the_path_go_singly_and_shorter_ones_as_trains(
    monkeypatch: pytest.MonkeyPatch, level: str, code: int
) -> None:
    """EINVAL, in newer kernels EMSGSIZE: segments of that length are not tried again."""
    refusing = Refusing(monkeypatch, code, 300)
    with running(SPS + level) as relay, UdpClient(relay.port) as client, UdpPort() as target:
        check_trains(relay)
        assert len(set(refusing.refused)) == (0 if "single" in level else 2)
        seen = client.check_echo(target)
        for size in (280, 400, 280, 400, 301):
            sent = [bytes((at,)) * size for at in range(10)]
            put_on(target.socket, b"".join(sent), size, seen)
            assert [client.receive()[0] for _ in range(10)] == sent
        # A refused length is tried again at once, because the error may be that of an earlier
        # send, but never later.
        episodes = [size for size, _ in itertools.groupby(refusing.refused)]
        assert len(episodes) == len(set(episodes))
        assert bool(refusing.passed) == ("single" not in level)
