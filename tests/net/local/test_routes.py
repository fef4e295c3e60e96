"""Which addresses are this machine's: the rtnetlink codec, the queries, and the way without.

The bytes were recorded from Linux 6.18, on a machine whose interface 3 has 10.77.0.1/24,
10.77.0.5/24 and 2001:db8:7::1/64, and forwards IPv6.  Queries go to the kernel of the machine
that runs the tests; addresses that it does not have are tried in tests/e2e/test_own_sockets.py.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.routing import ANY_ROUTE, RouteSelectors
from netproxy.net.local import routes
from netproxy.net.local.routes import (
    OWN_TYPES,
    RTN_ANYCAST,
    RTN_LOCAL,
    RTN_UNICAST,
    RTN_UNREACHABLE,
    SPARE_LIMIT,
    KernelRoutes,
    RouteQuery,
    encode_query,
    parse_answer,
)
from tests.support.doubles import Lines
from tests.support.sockets import HAS_IPV6

SEQUENCE = 7
little_endian = pytest.mark.skipif(sys.byteorder != "little", reason="recorded on little endian")

SECONDARY = bytes.fromhex(
    "680000001800000007000000dcefa69c 02200000fe00000200020000"
    "08000f00fe000000 080001000a4d0005 0800040001000000 080007000a4d0001 0800190000000000"
    "24000c0001000000 00000000000000000000000000000000000000000000000000000000"
)
ANYCAST = bytes.fromhex(
    "9c000000180000000700000053430000 0a808000ff02000400000000"
    "08000f00ff000000 1400010020010db8000700000000000000000000"
    "1400020000000000000000000000000000000001 1400070020010db8000700000000000000000001"
    "0800060000000000 0800040001000000"
    "24000c0003000000 00000000000000000000000000000000000000000000000000000000 0500140000000000"
)
NEIGHBOUR = bytes.fromhex(
    "9c000000180000000700000053430000 0a808000fe02000100000000"
    "08000f00fe000000 1400010020010db8000700000000000000000002"
    "1400020000000000000000000000000000000001 1400070020010db8000700000000000000000001"
    "0800060000010000 0800040003000000"
    "24000c0003000000 00000000000000000000000000000000000000000000000000000000 0500140000000000"
)
UNREACHABLE = bytes.fromhex(
    "48000000020000000700000053430000 8fffffff"
    "340000001a0001000700000000000000 022000000000000000000000"
    "080001000a2e0001 05001b0006000000 06001d0004380000"
)
BLACKHOLE = bytes.fromhex(
    "48000000020000000700000053430000 eaffffff"
    "340000001a0001000700000000000000 022000000000000000000000"
    "080001000a2c0001 05001b0006000000 06001d0004380000"
)


def query(
    host: str, selectors: RouteSelectors = ANY_ROUTE, network: str = "tcp", port: int = 1080
) -> RouteQuery:
    return RouteQuery(network, Address(host, port), selectors)


@little_endian
class TestCodec:
    """Hazard 136."""

    @pytest.mark.parametrize(
        "question, expected",
        [
            (
                query("10.77.0.5"),
                "340000001a0001000700000000000000 022000000000000000000000"
                "080001000a4d0005 05001b0006000000 06001d0004380000",
            ),
            (
                query("10.55.0.1", RouteSelectors(mark=5)),
                "3c0000001a0001000700000000000000 022000000000000000000000"
                "080001000a370001 05001b0006000000 06001d0004380000 0800100005000000",
            ),
            (
                query("10.22.0.1", RouteSelectors(source="10.77.0.5")),
                "3c0000001a0001000700000000000000 022020000000000000000000"
                "080001000a160001 05001b0006000000 06001d0004380000 080002000a4d0005",
            ),
            (
                query("2001:db8:7::"),
                "400000001a0001000700000000000000 0a8000000000000000000000"
                "1400010020010db8000700000000000000000000 05001b0006000000 06001d0004380000",
            ),
            (
                query("fe80::%3"),
                "480000001a0001000700000000000000 0a8000000000000000000000"
                "14000100fe800000000000000000000000000000 05001b0006000000 06001d0004380000"
                "0800040003000000",
            ),
            (
                query("10.77.0.5", network="udp", port=53),
                "340000001a0001000700000000000000 022000000000000000000000"
                "080001000a4d0005 05001b0011000000 06001d0000350000",
            ),
        ],
        ids=["address", "mark", "source", "ipv6", "scope", "udp"],
    )
    def test_request_is_what_the_kernel_takes(self, question: RouteQuery, expected: str) -> None:
        assert encode_query(question, SEQUENCE) == bytes.fromhex(expected)

    def test_source_of_the_other_family_does_not_count(self) -> None:
        """Such a socket cannot connect at all."""
        selectors = RouteSelectors(source="2001:db8:7::1")
        assert encode_query(query("10.77.0.5", selectors), 1) == encode_query(query("10.77.0.5"), 1)

    def test_interface_is_asked_by_its_number(self) -> None:
        index = socket.if_nametoindex("lo").to_bytes(4, "little")
        request = encode_query(query("127.0.0.1", RouteSelectors(device="lo")), SEQUENCE)
        assert request.endswith(bytes.fromhex("08000400") + index)

    def test_name_cannot_be_asked_for(self) -> None:
        with pytest.raises(ValueError, match="'a.test' is not an IP address"):
            encode_query(query("a.test"), SEQUENCE)

    @pytest.mark.parametrize(
        "message, route_type",
        [
            (SECONDARY, RTN_LOCAL),
            (ANYCAST, RTN_ANYCAST),
            (NEIGHBOUR, RTN_UNICAST),
            (UNREACHABLE, RTN_UNREACHABLE),
        ],
        ids=["secondary", "anycast", "neighbour", "unreachable"],
    )
    def test_answer_gives_the_type_of_the_route(self, message: bytes, route_type: int) -> None:
        assert parse_answer(message, SEQUENCE).kind == route_type
        assert parse_answer(memoryview(message + b"more"), SEQUENCE).kind == route_type

    @pytest.mark.parametrize("message", [SECONDARY, UNREACHABLE])
    def test_truncated_answer_is_an_error(self, message: bytes) -> None:
        needed = 28 if message is SECONDARY else 20
        for size in range(needed):
            with pytest.raises(ValueError):
                parse_answer(message[:size], SEQUENCE)
        parse_answer(message[:needed], SEQUENCE)

    @pytest.mark.parametrize(
        "message",
        [
            BLACKHOLE,
            SECONDARY[:8] + b"\x06" + SECONDARY[9:],
            SECONDARY[:4] + b"\x14" + SECONDARY[5:],
            UNREACHABLE[:16] + b"\0\0\0\x80" + UNREACHABLE[20:],
        ],
        ids=["invalid", "other sequence", "other type", "no errno"],
    )
    def test_answer_that_tells_nothing_is_an_error(self, message: bytes) -> None:
        with pytest.raises(ValueError):
            parse_answer(message, SEQUENCE)

    @pytest.mark.parametrize(
        "attributes, gateway",
        [
            ("", ""),
            ("08000500c0a80101", "192.168.1.1"),
            ("0500070001000000 14000500fe800000000000000000000000000001", "fe80::1"),
            ("06000500c0a80000", ""),
            ("08000500c0a8", ""),
            ("0000000008000500c0a80101", "192.168.1.1"),
        ],
        ids=["none", "IPv4", "IPv6 behind another", "two bytes", "truncated", "no length"],
    )
    @little_endian
    def test_answer_gives_the_gateway(self, attributes: str, gateway: str) -> None:
        message = SECONDARY[:28] + bytes.fromhex(attributes)
        assert parse_answer(message, SEQUENCE).gateway == gateway

    def test_any_bytes_are_a_type_or_an_error(self) -> None:
        for message in (SECONDARY, ANYCAST, UNREACHABLE):
            for index in range(len(message)):
                for value in (0, 1, 0x7F, 0x80, 0xFF):
                    changed = bytearray(message)
                    changed[index] = value
                    try:
                        assert 0 <= parse_answer(bytes(changed), SEQUENCE).kind <= 255
                    except ValueError:
                        pass


class Refusal:
    """Stands in for the opening of netlink sockets, and fails."""

    def __init__(self, code: int) -> None:
        self.calls = 0
        self._code = code

    def __call__(self) -> socket.socket:
        self.calls += 1
        raise OSError(self._code, os.strerror(self._code))


OWN = ["127.0.0.1", "127.3.2.1", "0.0.0.0", "::ffff:127.0.0.1", "::ffff:7f00:1", "::"]
MULTICAST = ["224.0.0.1", "239.255.255.250", "255.255.255.255", "ff02::1", "ff05::2%1"]
FOREIGN = ["203.0.113.1", "::ffff:203.0.113.1", "2001:db8:ffff::1", "a.test", "", "0.example"]


class TestQueries:
    """Hazard 136."""

    @pytest.fixture(params=["netlink", "trial"])
    def kernel(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
        if request.param == "trial":
            monkeypatch.setattr(routes, "_open", Refusal(errno.EAFNOSUPPORT))
        kernel = KernelRoutes(Lines())
        yield kernel
        kernel.close()

    @pytest.mark.parametrize("network", ["tcp", "udp"])
    @pytest.mark.parametrize("host", [*OWN, *MULTICAST, *(["::1"] if HAS_IPV6 else [])])
    def test_own_addresses_and_groups_are_local(
        self, kernel: KernelRoutes, host: str, network: str
    ) -> None:
        assert kernel.is_local(network, Address(host, 1080))

    @pytest.mark.parametrize("host", FOREIGN)
    def test_addresses_of_other_machines_and_names_are_not_local(
        self, kernel: KernelRoutes, host: str
    ) -> None:
        assert not kernel.is_local("tcp", Address(host, 1080))

    def test_interface_that_does_not_exist_leads_nowhere(self, kernel: KernelRoutes) -> None:
        """It ends the dial as well."""
        selectors = RouteSelectors(device="no-such-device")
        assert not kernel.is_local("tcp", Address("203.0.113.1", 80), selectors)

    def test_loopback_has_a_route(self, kernel: KernelRoutes) -> None:
        assert kernel.has_route(Address("127.0.0.1", 80))

    def test_ipv6_source_has_no_route_to_ipv4(self, kernel: KernelRoutes) -> None:
        assert not kernel.has_route(Address("127.0.0.1", 80), RouteSelectors(source="::1"))
        assert kernel.has_route(Address("127.0.0.1", 80), RouteSelectors(source="127.0.0.1"))

    def test_interface_that_does_not_exist_has_no_route(self, kernel: KernelRoutes) -> None:
        selectors = RouteSelectors(device="no-such-device")
        assert not kernel.has_route(Address("203.0.113.1", 80), selectors)

    def test_threads_ask_at_the_same_time(self, kernel: KernelRoutes) -> None:
        hosts = ["127.0.0.1", "203.0.113.1"] * 200

        def ask(host: str) -> bool:
            return kernel.is_local("tcp", Address(host, 80))

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, hosts)) == [True, False] * 200
        assert len(kernel._spare) <= SPARE_LIMIT


def test_descriptors_are_kept_for_the_next_query_and_closed_at_the_end() -> None:
    kernel = KernelRoutes(Lines())
    kernel.open()
    (spare,) = kernel._spare
    kernel.is_local("tcp", Address("127.0.0.1", 80))
    assert kernel._spare == [spare]
    kernel.close()
    assert spare.fileno() < 0 and not kernel._spare


def test_unread_answer_is_not_taken_for_the_next_one() -> None:
    """A query that was interrupted leaves its answer in the socket."""
    kernel = KernelRoutes(Lines())
    sock = routes._open()
    sock.send(encode_query(query("127.0.0.1"), 0xFFFF0000))
    kernel._spare.append(sock)
    assert not kernel.is_local("tcp", Address("203.0.113.1", 80))
    assert sock.fileno() < 0
    assert kernel.is_local("tcp", Address("127.0.0.1", 80))
    kernel.close()


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES])
def test_missing_permission_is_said_once(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    refusal, log = Refusal(code), Lines()
    monkeypatch.setattr(routes, "_open", refusal)
    kernel = KernelRoutes(log)
    kernel.open()
    for _ in range(3):
        assert kernel.is_local("tcp", Address("127.0.0.1", 80))
        assert not kernel.is_local("tcp", Address("203.0.113.1", 80))
    assert refusal.calls == 1
    ((level, line),) = log.lines
    assert level == "warning"
    assert line.startswith("cannot ask the kernel for routes (AF_NETLINK: ")


def test_lack_of_descriptors_is_no_missing_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[], socket.socket] = routes._open
    log = Lines()
    kernel = KernelRoutes(log)
    monkeypatch.setattr(routes, "_open", Refusal(errno.EMFILE))
    assert kernel.is_local("tcp", Address("127.0.0.1", 80))
    assert not kernel.is_local("tcp", Address("203.0.113.1", 80))
    monkeypatch.setattr(routes, "_open", real)
    assert kernel.is_local("tcp", Address("127.0.0.1", 80))
    assert kernel._spare and not log.lines
    kernel.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENETDOWN])
def test_kernel_is_asked_again_after_an_error_of_one_query(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real: Callable[[], socket.socket] = routes._open
    log = Lines()
    kernel = KernelRoutes(log)
    monkeypatch.setattr(routes, "_open", Refusal(code))
    assert kernel.is_local("tcp", Address("127.0.0.1", 80))
    monkeypatch.setattr(routes, "_open", real)
    assert kernel.is_local("tcp", Address("127.0.0.1", 80))
    assert kernel._spare
    ((level, line),) = log.lines
    assert line == f"cannot ask the kernel for a route: {os.strerror(code)}", level
    kernel.close()


def test_address_that_cannot_be_examined_counts_as_local(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoSocket(socket.socket):
        def __init__(self, *more: Any, **named: Any) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        def close(self) -> None:
            pass

    monkeypatch.setattr(socket, "socket", NoSocket)
    assert KernelRoutes(Lines()).is_local("tcp", Address("203.0.113.1", 80))


@pytest.mark.parametrize("answer, expected", [(RTN_UNREACHABLE, False), (RTN_UNICAST, True)])
def test_unreachable_address_has_no_route(
    monkeypatch: pytest.MonkeyPatch, answer: int, expected: bool
) -> None:
    kernel = KernelRoutes(Lines())
    monkeypatch.setattr(kernel, "_ask", lambda query: routes.FoundRoute(answer))
    assert kernel.has_route(Address("203.0.113.1", 80)) is expected


@pytest.mark.parametrize("code, expected", [(errno.ENETUNREACH, False), (errno.EMFILE, True)])
def test_route_without_netlink_is_found_by_trial(
    monkeypatch: pytest.MonkeyPatch, code: int, expected: bool
) -> None:
    """A lack of descriptors says nothing of routes."""

    def connect(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(routes, "_open", Refusal(errno.EPERM))
    monkeypatch.setattr(routes, "_connect_trial", connect)
    assert KernelRoutes(Lines()).has_route(Address("203.0.113.1", 80)) is expected


def test_types_of_routes_that_come_back() -> None:
    assert RTN_LOCAL in OWN_TYPES and RTN_ANYCAST in OWN_TYPES
    assert not OWN_TYPES & {RTN_UNICAST, RTN_UNREACHABLE}
