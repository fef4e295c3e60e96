"""Digest authentication (RFC 7616) of HTTP upstreams, against a proxy that checks every answer."""

from __future__ import annotations

import hashlib
import re
import socket
import time
from typing import Callable
from urllib.request import parse_http_list, parse_keqv_list

import pytest

from netproxy.dialer.web import http as http_module
from netproxy.dialer.direct import DirectDialer
from netproxy.dialer.hop import Hop
from netproxy.dialer.web.http import HttpDialer
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net.stream import complete
from tests.support.doubles import Counts
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import SECONDS, read_to_end, server

TARGET = Address("example.com", 443)
OK = b"HTTP/1.1 200 OK\r\n\r\n"
UPGRADED = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
    b"Upgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n"
)
BASIC = "Basic YWxpY2U6c2VjcmV0"


class DigestProxy:
    """An HTTP proxy that wants Digest of alice, whose password is "secret".

    `seen` has, for each request: the connection's number, then "Basic", the number of the
    nonce with the count, or "" without credentials.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []
        self.algorithm, self.qop, self.password = "MD5", 'qop="auth", ', "secret"
        # Behind a challenge.
        self.ending = b"Content-Length: 5\r\n\r\nhello"
        self.closes = False
        # Uses of a nonce until it is stale; the counts must grow.
        self.uses = 100
        self.more_challenges: tuple[bytes, ...] = ()
        self.accepted = OK
        self._connections = 0
        self._issued = 0
        self._counts: dict[str, int] = {}

    def __call__(self, sock: socket.socket) -> None:
        number, self._connections = self._connections, self._connections + 1
        while head := _head(sock):
            if self._permits(number, head):
                sock.sendall(self.accepted + b"data")
                read_to_end(sock)
                return
            sock.sendall(self._challenge())
            if self.closes:
                return

    def _challenge(self) -> bytes:
        self._issued += 1
        fields = [
            b'Digest realm="a \\"b\\"", %bnonce="%d", opaque="x", algorithm=%b, stale=true'
            % (self.qop.encode(), self._issued, self.algorithm.encode()),
            *self.more_challenges,
        ]
        lines = b"".join(b"Proxy-Authenticate: %b\r\n" % field for field in fields)
        return b"HTTP/1.1 407 Who are you\r\n" + lines + self.ending

    def _permits(self, number: int, head: str) -> bool:
        method, target, _ = head.split(" ", 2)
        found = re.search(r"\r\nProxy-Authorization: (\S+) (.*?)\r\n", head)
        if not found or found[1] != "Digest":
            self.seen.append((number, found[1] if found else ""))
            return False
        sent = parse_keqv_list(parse_http_list(found[2]))
        self.seen.append((number, f"{sent['nonce']}:{int(sent.get('nc', '0'), 16)}"))
        before = self._counts.get(sent["nonce"], 0)
        count = int(sent["nc"], 16) if self.qop else before + 1
        self._counts[sent["nonce"]] = count
        assert (sent["uri"], sent["opaque"]) == (target, "x")
        fresh = before < count <= self.uses and int(sent["nonce"]) <= self._issued
        return fresh and sent["response"] == self._response(method, sent)

    def _response(self, method: str, sent: dict[str, str]) -> str:
        name = "sha256" if self.algorithm.startswith("SHA-256") else "md5"

        def digest(*parts: str) -> str:
            return hashlib.new(name, ":".join(parts).encode()).hexdigest()

        secret = digest("alice", 'a "b"', self.password)
        if self.algorithm.endswith("-sess"):
            secret = digest(secret, sent["nonce"], sent["cnonce"])
        uses = (sent["nc"], sent["cnonce"], sent["qop"]) if self.qop else ()
        return digest(secret, sent["nonce"], *uses, digest(method, sent["uri"]))


def _head(sock: socket.socket) -> str:
    """Read a request up to the empty line; "" at the end."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = sock.recv(1)
        if not piece:
            assert not data
            return ""
        data += piece
    return data.decode()


def dialer(address: Address, direct: DirectDialer, user: str = "alice") -> HttpDialer:
    label = f"http://{address}"
    return HttpDialer(Hop("office", label, address, direct, 5.0, user, "secret"), Counts())


def connect(http: HttpDialer) -> None:
    """Connect to the target, and read what it sends at once."""
    stream = http.dial(tcp_to(TARGET))
    assert complete(stream.read_exactly(4)) == b"data"
    stream.close()


def failure(http: HttpDialer) -> DialError:
    with pytest.raises(DialError) as caught:
        http.dial(tcp_to(TARGET))
    return caught.value


@pytest.mark.parametrize("algorithm", ["MD5", "MD5-sess", "SHA-256", "SHA-256-sess"])
def test_proxy_that_wants_digest_gets_it_on_the_same_connection(
    direct: DirectDialer, algorithm: str
) -> None:
    proxy = DigestProxy()
    proxy.algorithm = algorithm
    with server(proxy) as address:
        connect(dialer(address, direct))
    assert proxy.seen == [(0, "Basic"), (0, "1:1")]


def test_proxy_of_rfc_2069_gets_digest_without_counts(direct: DirectDialer) -> None:
    proxy = DigestProxy()
    proxy.qop = ""
    with server(proxy) as address:
        http = dialer(address, direct)
        connect(http)
        connect(http)
    assert proxy.seen == [(0, "Basic"), (0, "1:0"), (1, "1:0")]


def test_accepted_nonce_is_used_again_with_the_next_count(direct: DirectDialer) -> None:
    """A dialer that goes through other members of a group shares the nonce."""
    proxy = DigestProxy()
    with server(proxy) as address:
        http = dialer(address, direct)
        for _ in range(3):
            connect(http)
        connect(http.with_via(direct))
    counts = [(1, "1:2"), (2, "1:3"), (3, "1:4")]
    assert proxy.seen == [(0, "Basic"), (0, "1:1"), *counts]


def test_stale_nonce_is_replaced(direct: DirectDialer) -> None:
    proxy = DigestProxy()
    proxy.uses = 2
    with server(proxy) as address:
        http = dialer(address, direct)
        for _ in range(4):
            connect(http)
    assert proxy.seen == [
        *((0, "Basic"), (0, "1:1"), (1, "1:2")),
        *((2, "1:3"), (2, "2:1"), (3, "2:2")),
    ]


CLOSING = {
    "says so": b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
    "says so in the old way": b"Proxy-Connection: close\r\nContent-Length: 5\r\n\r\nhello",
    "body until close": b"\r\nhello",
    "body too long": b"Content-Length: 70000\r\n\r\n" + b"x" * 70000,
    "two framings": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "closes unannounced": b"Content-Length: 0\r\n\r\n",
    "body cut short": b"Content-Length: 9\r\n\r\nhello",
}


@pytest.mark.parametrize("ending", CLOSING.values(), ids=CLOSING)
def test_answer_goes_on_a_new_connection_if_the_proxy_closes(
    direct: DirectDialer, ending: bytes
) -> None:
    proxy = DigestProxy()
    proxy.ending, proxy.closes = ending, True
    with server(proxy) as address:
        http = dialer(address, direct)
        connect(http)
        connect(http)
    first, (connection, credentials), (_, after) = proxy.seen
    assert first == (0, "Basic") and connection == 1
    # A request that was lost with its connection has used a count.
    assert (credentials, after) in (("1:1", "1:2"), ("1:2", "1:3"))


def test_new_connection_has_only_the_time_that_the_first_one_left(
    direct: DirectDialer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LaterClock:
        """A clock for which the time limit of the hop has passed."""

        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + SECONDS

    monkeypatch.setattr(http_module, "time", LaterClock)
    proxy = DigestProxy()
    proxy.ending, proxy.closes = CLOSING["says so"], True
    with server(proxy) as address:
        error = failure(dialer(address, direct))
    assert (error.reason, error.hop) == (Reason.TIMEOUT, f"http://{address}")
    assert proxy.seen[0] == (0, "Basic")


def test_closing_http_1_0_proxy_gets_digest_on_a_new_connection(direct: DirectDialer) -> None:
    class Old(DigestProxy):
        def _challenge(self) -> bytes:
            return super()._challenge().replace(b"HTTP/1.1", b"HTTP/1.0")

    proxy = Old()
    with server(proxy) as address:
        connect(dialer(address, direct))
    assert proxy.seen == [(0, "Basic"), (1, "1:1")]


@pytest.mark.parametrize("closes", [False, True])
def test_wrong_password_is_refused_after_one_answer(direct: DirectDialer, closes: bool) -> None:
    """The error is the hop's own, and has no password."""
    proxy = DigestProxy()
    proxy.password, proxy.closes = "another", closes
    proxy.ending = b"Connection: close\r\nContent-Length: 0\r\n\r\n" if closes else proxy.ending
    with server(proxy) as address:
        error = failure(dialer(address, direct))
        label = f"http://{address}"
    assert (error.reason, error.hop, error.upstream) == (Reason.AUTHENTICATION, label, True)
    assert str(error) == f"{label}: 407 who are you"
    assert proxy.seen == [(0, "Basic"), (int(closes), "1:1")]


def test_password_that_changes_is_refused_and_the_nonce_forgotten(direct: DirectDialer) -> None:
    proxy = DigestProxy()
    with server(proxy) as address:
        http = dialer(address, direct)
        connect(http)
        proxy.password = "another"
        assert failure(http).reason is Reason.AUTHENTICATION
        proxy.password = "secret"
        connect(http)
    assert [credentials for _, credentials in proxy.seen] == [
        *("Basic", "1:1"),
        *("1:2", "2:1"),
        *("Basic", "4:1"),
    ]


def test_proxy_that_offers_basic_too_has_refused_the_password(direct: DirectDialer) -> None:
    proxy = DigestProxy()
    proxy.more_challenges = (b'Basic realm="a"',)
    with server(proxy) as address:
        assert failure(dialer(address, direct)).reason is Reason.AUTHENTICATION
    assert proxy.seen == [(0, "Basic")]


def test_challenge_without_a_user_is_not_answered(direct: DirectDialer) -> None:
    proxy = DigestProxy()
    with server(proxy) as address:
        assert failure(dialer(address, direct, user="")).reason is Reason.AUTHENTICATION
    assert proxy.seen == [(0, "")]


@pytest.mark.parametrize(
    "algorithm, others, offered",
    [("SHA-512-256", (), "digest"), ("token", (b"Negotiate", b"NTLM"), "digest, negotiate, ntlm")],
)
def test_refusal_names_schemes_that_are_not_supported(
    direct: DirectDialer, algorithm: str, others: tuple[bytes, ...], offered: str
) -> None:
    """Otherwise a right password would look wrong."""
    proxy = DigestProxy()
    proxy.algorithm, proxy.more_challenges = algorithm, others
    with server(proxy) as address:
        error = failure(dialer(address, direct))
    assert str(error).endswith(f": 407 who are you (it offers {offered}, which is not supported)")
    assert proxy.seen == [(0, "Basic")]


def test_connect_udp_is_answered_for_its_own_target(direct: DirectDialer) -> None:
    """The target of the request is hashed: the proxy compares it with the request line."""
    proxy = DigestProxy()
    proxy.accepted = UPGRADED
    with server(proxy) as address:
        http = dialer(address, direct)
        for _ in range(2):
            http.dial_packet(udp_to(Address("2001:db8::1", 443))).close()
    assert proxy.seen == [(0, "Basic"), (0, "1:1"), (1, "1:2")]


Answer = Callable[[socket.socket], None]


@pytest.mark.parametrize("status", [b"401 Unauthorized", b"407 Proxy Authentication Required"])
@pytest.mark.parametrize("network", ["tcp", "udp"])
def test_401_and_407_are_refusals_of_the_hop(
    direct: DirectDialer, status: bytes, network: str
) -> None:
    """They are about our credentials: the error does not name the target."""

    def script(sock: socket.socket) -> None:
        _head(sock)
        sock.sendall(b"HTTP/1.1 " + status + b"\r\nProxy-Status: p; error=dns_error\r\n")
        sock.sendall(b'WWW-Authenticate: Basic realm="a"\r\nContent-Length: 0\r\n\r\n')
        read_to_end(sock)

    with server(script) as address:
        http = dialer(address, direct)
        with pytest.raises(DialError) as caught:
            http.dial(tcp_to(TARGET)) if network == "tcp" else http.dial_packet(udp_to(TARGET))
        error = caught.value
    assert (error.reason, error.detail, error.upstream) == (Reason.AUTHENTICATION, "", True)
    assert str(error).startswith(f"http://{address}: {status.decode().lower()}")
