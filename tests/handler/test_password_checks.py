"""Logins of a daemon whose passwords are hashed, while their checks wait."""

from __future__ import annotations

import _hashlib
import socket
import threading
from contextlib import ExitStack
from typing import Any

import pytest

from netproxy.access.users import hash_password
from tests.support.handlers import LOCALHOST, eventually
from tests.support.relays import Running, running
from tests.support.sockets import SECONDS, read_exactly

CONFIG = f"""
listeners: [{{listen: '127.0.0.1:0', name: main, auth: required}}]
users: {{alice: {{password: '{hash_password("secret", 1024)}'}}}}
"""
GUESSES = 50


def login(relay: Running, user: str, password: str) -> socket.socket:
    """Send a login by SOCKS5."""
    client = socket.create_connection((LOCALHOST, relay.port), SECONDS)
    name, secret = user.encode(), password.encode()
    client.sendall(b"\5\1\2\1%c%b%c%b" % (len(name), name, len(secret), secret))
    return client


class SlowHash:
    """scrypt that waits until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self._real = _hashlib.scrypt
        monkeypatch.setattr(_hashlib, "scrypt", self._scrypt)

    def _scrypt(self, *values: Any, **options: Any) -> bytes:
        self.began.set()
        assert self.go_on.wait(SECONDS)
        return self._real(*values, **options)


def test_logins_that_wait_for_their_check_hold_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 110."""
    with running(CONFIG) as relay, ExitStack() as stack:
        runtime = relay.daemon._runtime
        runtime.back_off._first = runtime.back_off._longest = 0.0
        with login(relay, "alice", "secret") as client:
            assert read_exactly(client, 4) == b"\5\2\1\0"
        slow = SlowHash(monkeypatch)
        stack.callback(slow.go_on.set)
        guesses = [login(relay, f"user{number}", "guess") for number in range(GUESSES)]
        for guess in guesses:
            stack.enter_context(guess)
        lane = runtime.pools["password"]
        eventually(lambda: lane.busy == GUESSES and not runtime.connections.busy)
        # A login that is remembered does not wait.
        with login(relay, "alice", "secret") as client:
            assert read_exactly(client, 4) == b"\5\2\1\0"
        assert lane.busy == GUESSES and lane.threads == 1
        slow.go_on.set()
        for guess in guesses:
            assert read_exactly(guess, 4) == b"\5\2\1\1"
        assert relay.count("authentication", "refused") == GUESSES
        assert runtime.pools["suspect"].threads == 1


def test_wrong_login_is_counted_although_its_client_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hazard 110: leaving early is no way to guess without a record."""
    slow = SlowHash(monkeypatch)
    with running(CONFIG) as relay, ExitStack() as stack:
        stack.callback(slow.go_on.set)
        guess = login(relay, "alice", "guess")
        assert slow.began.wait(SECONDS)
        # A reset: the end alone would not tell that the client cannot read.
        guess.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        guess.close()
        eventually(lambda: not relay.daemon.live)
        slow.go_on.set()
        relay.wait_for_count("authentication", "refused", 1)
        assert len(relay.daemon._runtime.back_off) == 1
        assert any(line.startswith("auth_failed") for line in relay.log.lines)
