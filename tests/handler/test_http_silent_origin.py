"""Origins that do not answer: their clients hold no thread, and leave whenever they want."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import Iterator

import pytest

from netproxy.handler import http_exchange
from netproxy.interfaces.addresses import Address
from netproxy.listener import poller, pool
from tests.support.handlers import LOCALHOST, descriptors
from tests.support.origin import get
from tests.support.relays import Running, running
from tests.support.sockets import SECONDS, address_of, listen, read_to_end, reset, wait_until

CLIENTS, FEW_THREADS = 300, 4
CONFIGURATION = "listeners: [{listen: '127.0.0.1:0', limits: {connections: 1000}}]"


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_exchange, "HALF_CLOSED_SECONDS", 0.3)
    monkeypatch.setattr(pool, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr(poller, "TICK", 0.05)


@pytest.fixture
def silent_origin() -> Iterator[Address]:
    """A listening socket whose connections the kernel accepts, and nobody reads."""
    with listen(backlog=2 * CLIENTS) as listening:
        yield address_of(listening)


def request_for(origin: Address, method: bytes = b"GET", *fields: bytes) -> bytes:
    return get(str(origin).encode(), b"/", *fields).replace(b"GET", method, 1)


def connect(relay: Running, request: bytes) -> socket.socket:
    """Return a client that has sent a request."""
    sock = socket.create_connection((LOCALHOST, relay.port), SECONDS)
    sock.sendall(request)
    return sock


def all_waiting(relay: Running, number: int) -> bool:
    """Return whether the poller watches each client together with its origin."""
    return relay.daemon._runtime.poller.watched == 2 * number


@pytest.mark.parametrize("leaving", ["end", "reset"])
def test_clients_of_a_silent_origin_hold_no_thread(leaving: str, silent_origin: Address) -> None:
    """Nothing else ends these exchanges: an origin may be silent for minutes.

    Hazards 134 and 135.
    """
    with ExitStack() as stack:
        relay = stack.enter_context(running(CONFIGURATION))
        before = descriptors()
        request = request_for(silent_origin)
        clients = [stack.enter_context(connect(relay, request)) for _ in range(CLIENTS)]
        wait_until(lambda: all_waiting(relay, CLIENTS))
        connections = relay.daemon.pools["connection"]
        wait_until(lambda: connections.threads <= FEW_THREADS)
        assert connections.busy == 0 and relay.daemon.live == CLIENTS
        for client in clients:
            if leaving == "reset":
                reset(client)
            else:
                client.shutdown(socket.SHUT_WR)
        wait_until(lambda: not relay.daemon.live)
        if leaving == "end":
            assert [read_ending(client) for client in clients] == [b""] * CLIENTS
            for client in clients:
                client.close()
        assert descriptors() == before
        wait_until(lambda: connections.threads <= FEW_THREADS)
        assert [record.ended for record in relay.log.records] == ["client left"] * CLIENTS
        assert not len(relay.daemon._runtime.poller)


def read_ending(sock: socket.socket) -> bytes:
    """Read until the proxy closes or resets."""
    try:
        return read_to_end(sock)
    except ConnectionResetError:
        return b""


def test_client_with_an_unfinished_body_leaves_a_silent_origin(silent_origin: Address) -> None:
    """Hazard 134."""
    with running(CONFIGURATION) as relay:
        request = request_for(silent_origin, b"POST", b"Content-Length: 10") + b"begun"
        client = connect(relay, request)
        wait_until(lambda: all_waiting(relay, 1))
        reset(client)
        wait_until(lambda: not relay.daemon.live)
        assert [record.ended for record in relay.log.records] == ["failed"]


def test_half_closed_client_gets_an_answer_that_comes_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client may end its stream behind its last request."""
    monkeypatch.setattr(http_exchange, "HALF_CLOSED_SECONDS", SECONDS)
    with listen() as listening, running(CONFIGURATION) as relay:
        with connect(relay, request_for(address_of(listening))) as client:
            origin, _ = listening.accept()
            with origin:
                client.shutdown(socket.SHUT_WR)
                wait_until(lambda: all_waiting(relay, 1))
                origin.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                assert read_to_end(client).endswith(b"\r\n\r\nok")
        wait_until(lambda: not relay.daemon.live)
        assert [record.ended for record in relay.log.records] == ["done"]
