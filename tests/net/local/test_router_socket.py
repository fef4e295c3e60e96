"""What asks the router: tries again, skips what is no answer, and gives up."""

from __future__ import annotations

import socket
import threading
from typing import Iterator

import pytest

from netproxy.errors import DialError, ProtocolError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net.local.router_socket import RouterSocket
from tests.support.handlers import LOCALHOST, SECONDS


@pytest.fixture
def router() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((LOCALHOST, 0))
        sock.settimeout(SECONDS)
        yield sock


def connect(router: socket.socket, source: str = "") -> RouterSocket:
    return RouterSocket(Address(*router.getsockname()), source)


def accept(datagram: bytes) -> bytes | None:
    """Accept "yes" alone."""
    if datagram == b"malformed":
        raise ProtocolError("malformed")
    return datagram if datagram == b"yes" else None


def test_lost_request_is_sent_again_and_other_answers_are_skipped(router: socket.socket) -> None:
    requests: list[bytes] = []

    def serve() -> None:
        requests.append(router.recv(100))
        datagram, client = router.recvfrom(100)
        requests.append(datagram)
        for answer in (b"malformed", b"no", b"yes", b"yes"):
            router.sendto(answer, client)

    thread = threading.Thread(target=serve)
    thread.start()
    exchange = connect(router)
    assert exchange.ask(b"map", accept, (0.05, SECONDS)) == b"yes"
    thread.join()
    exchange.close()
    assert requests == [b"map", b"map"]


def test_answer_of_another_host_does_not_come(router: socket.socket) -> None:
    exchange = connect(router)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        exchange._socket.send(b"where are you")
        _, client = router.recvfrom(100)
        other.sendto(b"yes", client)
        with pytest.raises(DialError, match="no answer") as caught:
            exchange.ask(b"map", accept, (0.01, 0.01))
    exchange.close()
    assert caught.value.reason is Reason.TIMEOUT


def test_router_without_the_protocol_is_known_at_once(router: socket.socket) -> None:
    exchange = connect(router)
    address = router.getsockname()
    router.close()
    with pytest.raises(DialError, match=f"{LOCALHOST}:{address[1]}: nothing listens there"):
        exchange.ask(b"map", accept, (SECONDS, SECONDS))
    exchange.close()


def test_source_is_the_address_that_the_router_sees(router: socket.socket) -> None:
    exchange = connect(router, "127.0.0.2")
    assert exchange.local == "127.0.0.2"
    exchange._socket.send(b"map")
    assert router.recvfrom(100)[1][0] == "127.0.0.2"
    exchange.close()


def test_source_of_another_machine_is_an_error(router: socket.socket) -> None:
    with pytest.raises(DialError, match="assign"):
        connect(router, "203.0.113.99")
