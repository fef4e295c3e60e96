"""Penalties of clients whose logins have failed too often, by each protocol.

The clients come from other machines: a PROXY protocol header says so.
"""

from __future__ import annotations

import base64
import socket
from typing import Iterator

import pytest

from tests.support.handlers import LOCALHOST, eventually
from tests.support.relays import Running, running
from tests.support.sockets import SECONDS, read_to_end

CONFIG = """
users: {alice: {password: secret}, bob: {password: secret}}
listeners: [{listen: '127.0.0.1:0', name: main, auth: required, proxy_protocol: [127.0.0.1]}]
penalty: {after: 2, for: 5m, longest: 10m}
"""
GUESSER = "192.0.2.7"
SOCKS5_FAILED = b"\5\2\1\1"
SOCKS5_PASSED = b"\5\2\1\0"


def from_client(client: str, data: bytes) -> bytes:
    return f"PROXY TCP4 {client} 192.0.2.1 4000 1080\r\n".encode() + data


def by_socks5(user: str, password: str) -> bytes:
    name, word = user.encode(), password.encode()
    return b"\5\1\2\1" + bytes([len(name)]) + name + bytes([len(word)]) + word


def by_http(user: str, password: str, method: str = "CONNECT 192.0.2.9:25") -> bytes:
    credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
    head = f"{method} HTTP/1.1\r\nHost: a.example\r\nProxy-Authorization: Basic {credentials}"
    return f"{head}\r\n\r\n".encode()


def ask(relay: Running, data: bytes, client: str = GUESSER) -> bytes:
    """Return all that the daemon answers to a client that sends no more."""
    with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
        sock.sendall(from_client(client, data))
        sock.shutdown(socket.SHUT_WR)
        return read_to_end(sock)


def guess(relay: Running, times: int = 2, client: str = GUESSER) -> None:
    for _ in range(times):
        assert ask(relay, by_socks5("bob", "wrong"), client) == SOCKS5_FAILED


@pytest.fixture
def relay() -> Iterator[Running]:
    with running(CONFIG) as relay:
        relay.daemon._runtime.back_off._first = 0.001
        yield relay


def test_socks5_login_during_a_penalty_is_refused_counted_and_recorded(relay: Running) -> None:
    """Hazard 110."""
    guess(relay)
    assert ask(relay, by_socks5("bob", "secret")) == SOCKS5_FAILED
    assert relay.count("authentication", "refused") == 2
    assert relay.count("authentication", "penalty") == 1
    lines = [line for line in relay.log.lines if "auth_failed" in line]
    assert lines == [f"auth_failed client={GUESSER} user=bob listener=main"] * 2
    (record,) = [line for line in relay.log.lines if "reason=penalty" in line]
    assert f"client={GUESSER} user=bob" in record and " decided=penalty id=" in record
    assert relay.count("requests_refused", "bad request") == 0


@pytest.mark.parametrize(
    "method",
    [
        "CONNECT 192.0.2.9:443",
        "GET http://192.0.2.9/",
        "GET http://a.example/.well-known/masque/udp/192.0.2.9/53/",
    ],
)
def test_http_request_during_a_penalty_is_answered_with_429(relay: Running, method: str) -> None:
    """Hazard 110."""
    guess(relay)
    answer = ask(relay, by_http("bob", "secret", method))
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = head.split(b"\r\n")
    assert status == b"HTTP/1.1 429 Too Many Requests"
    (retry_after,) = [int(field[13:]) for field in fields if field.startswith(b"Retry-After: ")]
    assert 290 <= retry_after <= 300
    assert (
        b"Proxy-Authenticate" not in head and body == b"too many failed logins from this address\n"
    )
    assert relay.count("authentication", "penalty") == 1
    assert relay.count("requests_refused", "too many requests") == 0


def test_client_of_another_address_logs_in_during_a_penalty(relay: Running) -> None:
    """Hazard 110."""
    guess(relay)
    assert ask(relay, by_socks5("bob", "secret"), "192.0.2.8")[:4] == SOCKS5_PASSED


def test_user_who_has_logged_in_before_logs_in_during_a_penalty(relay: Running) -> None:
    """Hazard 110: many users may share one address."""
    assert ask(relay, by_socks5("alice", "secret"), "192.0.2.8")[:4] == SOCKS5_PASSED
    guess(relay)
    assert ask(relay, by_socks5("alice", "secret"))[:4] == SOCKS5_PASSED
    assert ask(relay, by_http("alice", "secret")).startswith(b"HTTP/1.1 403")  # port 25
    assert ask(relay, by_socks5("bob", "secret")) == SOCKS5_FAILED


def test_request_without_credentials_is_challenged_during_a_penalty(relay: Running) -> None:
    guess(relay)
    answer = ask(relay, b"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 407")


def test_reload_changes_when_penalties_begin(relay: Running) -> None:
    assert ask(relay, by_socks5("alice", "secret"), "192.0.2.8")[:4] == SOCKS5_PASSED
    relay.reload(CONFIG.replace("after: 2", "after: 0"))
    guess(relay, 4)
    assert ask(relay, by_socks5("bob", "secret"))[:4] == SOCKS5_PASSED
    relay.reload(CONFIG)
    guess(relay, client="192.0.2.9")
    assert ask(relay, by_socks5("bob", "wrong"), "192.0.2.9") == SOCKS5_FAILED
    assert relay.count("authentication", "penalty") == 1
    assert ask(relay, by_socks5("alice", "secret"), "192.0.2.9")[:4] == SOCKS5_PASSED


def test_flood_of_logins_during_a_penalty_has_a_bounded_number_of_records(relay: Running) -> None:
    """Hazard 110."""
    guess(relay)
    for _ in range(50):
        assert ask(relay, by_socks5("bob", "secret")) == SOCKS5_FAILED
    assert relay.count("authentication", "penalty") == 50
    assert len([line for line in relay.log.lines if "reason=penalty" in line]) == 5
    eventually(lambda: not relay.daemon.live)
