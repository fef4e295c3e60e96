"""TCP through a SOCKS5 proxy, against scripted servers on loopback."""

from __future__ import annotations

import socket
import time
from typing import Any, Callable

import pytest

from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.hop import Hop
from netproxy.dialer.web.http import HttpDialer
from netproxy.dialer.socks5 import Socks5Dialer
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Failure, Flow
from netproxy.interfaces.routing import Dialer
from netproxy.net.stream import complete
from tests.support.doubles import Counts, no_packets
from tests.support.flows import tcp_to
from tests.support.sockets import (
    SECONDS,
    black_hole,
    read_exactly,
    read_to_end,
    refusing,
    reset,
    server,
)

TARGET = Address("198.51.100.7", 443)
NAME = Address("example.com", 80)
BOUND = b"\x05\x00\x00\x01\x0a\x00\x00\x01\x1f\x90"
GREETING = b"\x05\x01\x00"
REQUEST = b"\x05\x01\x00\x01\xc6\x33\x64\x07\x01\xbb"


def dialer(
    server: Address,
    direct: DirectDialer,
    target_resolver: TargetResolver | None = None,
    seconds: float = SECONDS,
    **login: str,
) -> Socks5Dialer:
    url = f"{'socks5' if target_resolver else 'socks5h'}://{server}"
    hop = Hop(url, url, server, direct, seconds, login.get("user", ""), login.get("password", ""))
    return Socks5Dialer(hop, target_resolver, no_packets())


def behind(before: Dialer, server: Address) -> Socks5Dialer:
    """Return a dialer through one more proxy, which `before` reaches."""
    url = f"socks5h://{server}"
    return Socks5Dialer(Hop(url, url, server, before, 2.0), None, no_packets())


def failure(dialer: Socks5Dialer, target: Address = TARGET) -> DialError:
    """Dial and return the error."""
    with pytest.raises(DialError) as caught:
        dialer.dial(tcp_to(target))
    return caught.value


def play(*steps: bytes, step: int = 0) -> Callable[[socket.socket], None]:
    """Return a script: in turn, what the client must send and what it gets.

    The script sends `step` bytes at a time (0: at once).
    """

    def script(sock: socket.socket) -> None:
        for number, data in enumerate(steps):
            if number % 2 == 0:
                assert read_exactly(sock, len(data)) == data
            else:
                for at in range(0, len(data), step or len(data)):
                    sock.sendall(data[at : at + (step or len(data))])
                    if step:
                        time.sleep(0.001)
        read_to_end(sock)

    return script


class TestConnect:
    @pytest.mark.parametrize("step", [0, 1])
    def test_connect_sends_a_request_and_returns_the_stream(
        self, direct: DirectDialer, step: int
    ) -> None:
        with server(
            play(GREETING, b"\x05\x00", REQUEST, BOUND + b"hello", b"data", b"answer", step=step)
        ) as address:
            stream = dialer(address, direct).dial(tcp_to(TARGET))
            assert complete(stream.read_exactly(5)) == b"hello"
            stream.write(b"data")
            assert complete(stream.read_exactly(6)) == b"answer"
            stream.close()

    def test_bytes_in_the_segment_of_the_reply_are_kept(self, direct: DirectDialer) -> None:
        """Hazard 62."""
        with server(play(GREETING, b"\x05\x00", REQUEST, BOUND + b"banner" * 1000)) as address:
            stream = dialer(address, direct).dial(tcp_to(TARGET))
            assert complete(stream.read_exactly(6000)) == b"banner" * 1000
            stream.close()

    @pytest.mark.parametrize(
        "bound",
        [
            b"\x01\x00\x00\x00\x00\x00\x00",
            b"\x04" + bytes(16) + b"\x00\x50",
            b"\x03\x0bexample.com\x00\x50",
            b"\x03\x00\x00\x50",
            b"\x03\x03a b\x00\x50",
        ],
    )
    def test_reply_may_have_any_bound_address(self, direct: DirectDialer, bound: bytes) -> None:
        with server(
            play(GREETING, b"\x05\x00", REQUEST, b"\x05\x00\x00" + bound + b"x")
        ) as address:
            stream = dialer(address, direct).dial(tcp_to(TARGET))
            assert complete(stream.read_exactly(1)) == b"x"
            stream.close()

    def test_socks5h_request_has_the_name(self, direct: DirectDialer) -> None:
        request = b"\x05\x01\x00\x03\x0bexample.com\x00\x50"
        with server(play(GREETING, b"\x05\x00", request, BOUND)) as address:
            dialer(address, direct).dial(tcp_to(NAME)).close()

    def test_socks5_request_has_the_address_of_a_name(
        self, direct: DirectDialer, target_resolver: TargetResolver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with server(play(GREETING, b"\x05\x00", REQUEST, BOUND)) as address:
            monkeypatch.setattr(
                socket,
                "getaddrinfo",
                lambda *_, **__: [
                    (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("198.51.100.7", 443))
                ],
            )
            dialer(address, direct, target_resolver).dial(tcp_to(NAME._replace(port=443))).close()

    def test_unknown_name_reaches_no_proxy(
        self, direct: DirectDialer, target_resolver: TargetResolver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connected: list[Any] = []
        with server(connected.append) as address:
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
            assert failure(dialer(address, direct, target_resolver), NAME).reason is Reason.NAME
        assert not connected

    def test_stream_has_no_time_limit_after_connect(self, direct: DirectDialer) -> None:
        def script(sock: socket.socket) -> None:
            for wanted, answer in ((GREETING, b"\x05\x00"), (REQUEST, BOUND)):
                assert read_exactly(sock, len(wanted)) == wanted
                sock.sendall(answer)
            time.sleep(0.3)
            sock.sendall(b"late")

        with server(script) as address:
            stream = dialer(address, direct, seconds=0.2).dial(tcp_to(TARGET))
            assert complete(stream.read_exactly(4)) == b"late"
            stream.close()


class TestLogin:
    CREDENTIALS = b"\x01\x04user\x06secret"

    @pytest.mark.parametrize("status", [b"\x01\x00", b"\x05\x00"])
    def test_login_with_username_and_password(self, direct: DirectDialer, status: bytes) -> None:
        with server(
            play(b"\x05\x01\x02", b"\x05\x02", self.CREDENTIALS, status, REQUEST, BOUND)
        ) as address:
            dialer(address, direct, user="user", password="secret").dial(tcp_to(TARGET)).close()

    @pytest.mark.parametrize(
        "steps",
        [
            (b"\x05\x01\x02", b"\x05\xff"),
            (b"\x05\x01\x02", b"\x05\x00"),
            (b"\x05\x01\x02", b"\x05\x02", CREDENTIALS, b"\x01\x01"),
        ],
    )
    def test_refused_login_is_an_authentication_error(
        self, direct: DirectDialer, steps: tuple[bytes, ...]
    ) -> None:
        with server(play(*steps)) as address:
            error = failure(dialer(address, direct, user="user", password="secret"))
        assert error.reason is Reason.AUTHENTICATION
        assert str(error).startswith(f"socks5h://{address}: ")
        assert "secret" not in str(error)

    def test_refusal_of_the_proxy_is_not_told_as_one_of_our_own(self, direct: DirectDialer) -> None:
        refused = play(GREETING, b"\x05\x00", REQUEST, b"\x05\2" + BOUND[2:])
        with server(refused) as address:
            error = failure(dialer(address, direct))
        told = "not allowed by the rules of the upstream"
        assert str(error) == f"socks5h://{address}: {TARGET}: {told}"
        assert (error.why, error.decided_by("rules[0]")) == (told, "")
        assert Failure.of(error).reason == told

    @pytest.mark.parametrize("method", [b"\x05\xff", b"\x05\x02", b"\x05\x01"])
    def test_proxy_that_requires_a_login_is_an_authentication_error(
        self, direct: DirectDialer, method: bytes
    ) -> None:
        """A method that was not offered is an error."""
        with server(play(GREETING, method)) as address:
            assert failure(dialer(address, direct)).reason is Reason.AUTHENTICATION


class TestFailures:
    @pytest.mark.parametrize(
        "reply, reason",
        [
            (1, Reason.GENERAL),
            (2, Reason.DENIED),
            (3, Reason.NETWORK_UNREACHABLE),
            (4, Reason.HOST_UNREACHABLE),
            (5, Reason.REFUSED),
            (6, Reason.TIMEOUT),
            (7, Reason.UNSUPPORTED),
            (8, Reason.UNSUPPORTED),
            (9, Reason.GENERAL),
            (255, Reason.GENERAL),
        ],
    )
    def test_refusing_reply_has_its_reason(
        self, direct: DirectDialer, reply: int, reason: Reason
    ) -> None:
        with server(
            play(GREETING, b"\x05\x00", REQUEST, b"\x05" + bytes((reply,)) + BOUND[2:])
        ) as address:
            error = failure(dialer(address, direct))
        assert error.reason is reason
        assert str(error).startswith(f"socks5h://{address}: {TARGET}: {reason.value}")

    def test_error_shows_the_reason_once(self, direct: DirectDialer) -> None:
        with server(play(GREETING, b"\x05\x00", REQUEST, b"\x05\x05" + BOUND[2:])) as address:
            assert (
                str(failure(dialer(address, direct)))
                == f"socks5h://{address}: {TARGET}: connection refused"
            )

    def test_refusing_reply_may_have_no_address(self, direct: DirectDialer) -> None:
        with server(play(GREETING, b"\x05\x00", REQUEST, b"\x05\x05\x00\x00")) as address:
            assert failure(dialer(address, direct)).reason is Reason.REFUSED

    @pytest.mark.parametrize(
        "steps",
        [
            (GREETING, b"\x04\x00"),
            (GREETING, b"HTTP/1.1 400 Bad Request\r\n"),
            (GREETING, b"\x00\x00"),
            (GREETING, b"\x05\x00", REQUEST, b"\x04\x00\x00\x01" + bytes(6)),
            (GREETING, b"\x05\x00", REQUEST, b"\x05\x00\x00\x09" + bytes(6)),
            (b"\x05",),
        ],
    )
    def test_malformed_answer_is_an_error(
        self, direct: DirectDialer, steps: tuple[bytes, ...]
    ) -> None:
        def script(sock: socket.socket) -> None:
            if len(steps) > 1:
                play(*steps)(sock)

        with server(script) as address:
            assert failure(dialer(address, direct)).reason in (Reason.PROTOCOL, Reason.GENERAL)

    @pytest.mark.parametrize("cut", range(len(BOUND)))
    def test_incomplete_reply_is_a_protocol_error(self, direct: DirectDialer, cut: int) -> None:
        def script(sock: socket.socket) -> None:
            for wanted, answer in ((GREETING, b"\x05\x00"), (REQUEST, BOUND[:cut])):
                assert read_exactly(sock, len(wanted)) == wanted
                sock.sendall(answer)

        with server(script) as address:
            assert failure(dialer(address, direct)).reason is Reason.PROTOCOL

    def test_reset_connection_is_an_error(self, direct: DirectDialer) -> None:
        with server(lambda sock: (read_exactly(sock, 3), reset(sock))) as address:
            assert failure(dialer(address, direct)).reason is Reason.GENERAL

    def test_silent_socks5_proxy_is_a_timeout(self, direct: DirectDialer) -> None:
        with server(read_to_end) as address:
            error = failure(dialer(address, direct, seconds=0.1))
        assert error.reason is Reason.TIMEOUT
        assert str(error) == f"socks5h://{address}: timed out"

    def test_single_bytes_do_not_extend_the_time_limit(self, direct: DirectDialer) -> None:
        """The whole answer would take three times the limit, each byte a third of it."""

        def script(sock: socket.socket) -> None:
            for byte in b"\x05\x00" + BOUND:
                sock.sendall(bytes((byte,)))
                time.sleep(0.06)

        with server(script) as address:
            assert failure(dialer(address, direct, seconds=0.2)).reason is Reason.TIMEOUT

    def test_unreachable_proxy_is_a_fault_of_the_upstream(
        self, direct: DirectDialer, target_resolver: TargetResolver
    ) -> None:
        with refusing() as address:
            error = failure(dialer(address, direct))
        assert error.reason is Reason.REFUSED
        assert (str(error), error.hop) == (
            f"socks5h://{address}: connection refused",
            f"socks5h://{address}",
        )
        assert error.upstream
        with black_hole() as address:
            quick = DirectDialer(target_resolver, direct._datagrams, 0.1)
            assert failure(dialer(address, quick)).reason is Reason.TIMEOUT


def test_chain_asks_each_proxy_for_the_next_one(direct: DirectDialer) -> None:
    """The first proxy is asked for the second one, the second one for the target."""
    second = Address("192.0.2.50", 1080)
    to_second = b"\x05\x01\x00\x01\xc0\x00\x02\x32\x04\x38"
    with server(
        play(
            GREETING, b"\x05\x00", to_second, BOUND, GREETING, b"\x05\x00", REQUEST, BOUND + b"end"
        )
    ) as address:
        chain = behind(dialer(address, direct), second)
        stream = chain.dial(tcp_to(TARGET))
        assert complete(stream.read_exactly(3)) == b"end"
        stream.close()


def test_failure_of_a_chain_names_the_hop_that_reports_it(direct: DirectDialer) -> None:
    second = Address("192.0.2.50", 1080)
    to_second = b"\x05\x01\x00\x01\xc0\x00\x02\x32\x04\x38"
    with server(play(GREETING, b"\x05\x00", to_second, b"\x05\x05" + BOUND[2:])) as address:
        error = failure(behind(dialer(address, direct), second))
    assert error.reason is Reason.REFUSED
    assert (str(error), error.hop) == (
        f"socks5h://{address}: {second}: connection refused",
        f"socks5h://{address}",
    )
    # The second proxy was not reached: the upstream is at fault, not the target.
    assert error.upstream


def test_socks5_carries_udp_only_if_the_hop_before_does(direct: DirectDialer) -> None:
    server = Address("192.0.2.2", 3128)
    before = HttpDialer(Hop("http", "http", server, direct, 2.0), Counts(), udp=False)
    assert dialer(Address("192.0.2.1", 1080), direct).carries == {"tcp", "udp"}
    assert behind(
        HttpDialer(Hop("http", "http", server, direct, 2.0), Counts()), Address("192.0.2.1", 1080)
    ).carries == {"tcp", "udp"}
    socks5 = behind(before, Address("192.0.2.1", 1080))
    assert socks5.carries == {"tcp"}
    with pytest.raises(DialError) as caught:
        socks5.dial_packet(Flow("udp", TARGET, TARGET, "main", ""))
    assert caught.value.reason is Reason.UNSUPPORTED
    assert str(caught.value) == "socks5h://192.0.2.1:1080 carries no UDP"


def test_socks5_name_and_repr_contain_no_password(direct: DirectDialer) -> None:
    """Hazard 111."""
    socks5 = dialer(Address("192.0.2.1", 1080), direct, user="user", password="hunter2")
    assert socks5.name == "socks5h://192.0.2.1:1080"
    assert "hunter2" not in f"{socks5.name} {socks5!r} {socks5.hop!r}"
