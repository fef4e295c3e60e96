"""Socket calls through ctypes and through the socket module: same bytes, ends and errors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import socket
import ssl
from typing import Callable, Iterator, NamedTuple

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.sockets import StreamSocket
from netproxy.net import syscalls
from netproxy.net.address import from_sockaddr
from netproxy.net.tls_socket import TlsSocket
from tests.support.sockets import (
    HAS_IPV6,
    SECONDS,
    Task,
    listen,
    read_to_end,
    refusing,
    reset,
    tcp_pair,
)

HOSTS = [
    "127.0.0.1",
    pytest.param("::1", marks=pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")),
]


class Form(NamedTuple):
    """The calls in one of their two forms."""

    receive: Callable[[socket.socket, int], memoryview | None]
    send: Callable[[socket.socket, bytes | memoryview], int]
    close: Callable[[StreamSocket], None]
    shutdown: Callable[[socket.socket, int], None]
    open_tcp: Callable[[int], socket.socket]
    connect: Callable[[socket.socket, int, Address], int]
    accept: Callable[[socket.socket], tuple[socket.socket, Address] | None]
    local_address: Callable[[socket.socket], Address]


FORMS = {
    prefix: Form(*(getattr(syscalls, prefix + name) for name in Form._fields))
    for prefix in ("_", "_portable_")
}


@pytest.fixture(params=["_", "_portable_"], ids=["ctypes", "portable"])
def form(request: pytest.FixtureRequest) -> Form:
    return FORMS[request.param]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with tcp_pair() as (ours, theirs):
        ours.setblocking(False)
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


def wait_for(sock: socket.socket, events: int = select.POLLIN) -> None:
    poll = select.poll()
    poll.register(sock, events)
    assert poll.poll(SECONDS * 1000)


def code_of(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.strerror == os.strerror(caught.value.errno or 0)
    return caught.value.errno


def test_calls_on_a_closed_socket_fail_with_ebadf(form: Form) -> None:
    sock = socket.socket()
    sock.close()
    failing = [
        (form.receive, 100),
        (form.send, b"x"),
        (form.shutdown, socket.SHUT_WR),
        (form.accept,),
        (form.local_address,),
    ]
    for call, *arguments in failing:
        assert code_of(call, sock, *arguments) == errno.EBADF
    assert form.connect(sock, socket.AF_INET, Address("127.0.0.1", 9)) == errno.EBADF


def test_calls_on_an_unconnected_socket_fail(form: Form) -> None:
    with socket.socket() as sock:
        assert code_of(form.receive, sock, 100) == errno.ENOTCONN
        assert code_of(form.shutdown, sock, socket.SHUT_WR) == errno.ENOTCONN
        assert code_of(form.send, sock, b"x") in (errno.ENOTCONN, errno.EPIPE)


class TestReceive:
    def test_receive_returns_what_is_there(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        theirs.sendall(b"one\0two")
        wait_for(ours)
        assert form.receive(ours, 4) == b"one\0"
        assert form.receive(ours, 100) == b"two"

    def test_receive_returns_none_if_nothing_is_there_yet(self, form: Form, pair: Pair) -> None:
        assert form.receive(pair[0], 100) is None
        # A blocking socket does not make the call wait.
        pair[0].setblocking(True)
        assert form.receive(pair[0], 100) is None

    def test_receive_returns_no_bytes_at_the_end(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        theirs.sendall(b"last")
        theirs.close()
        wait_for(ours)
        assert form.receive(ours, 100) == b"last"
        wait_for(ours)
        assert [form.receive(ours, 100), form.receive(ours, 100)] == [b"", b""]

    def test_receive_returns_as_much_as_its_buffer_holds(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        data = hashlib.shake_128(b"receive").digest(4 * syscalls.BUFFER)
        sender = Task(lambda: (theirs.sendall(data), theirs.shutdown(socket.SHUT_WR)))
        received = b""
        while True:
            wait_for(ours)
            piece = form.receive(ours, syscalls.BUFFER)
            if not piece:
                break
            received += piece
        sender.result()
        assert received == data

    def test_receive_raises_after_a_reset(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        reset(theirs)
        wait_for(ours)
        assert code_of(form.receive, ours, 100) == errno.ECONNRESET


class TestSend:
    @pytest.mark.parametrize(
        "kind", [bytes, lambda data: memoryview(b"head" + data)[4:]], ids=["bytes", "view"]
    )
    def test_send_takes_bytes_and_views(
        self, form: Form, pair: Pair, kind: Callable[[bytes], bytes | memoryview]
    ) -> None:
        ours, theirs = pair
        assert form.send(ours, kind(b"one\0two")) == 7
        ours.close()
        assert read_to_end(theirs) == b"one\0two"

    def test_send_returns_0_if_it_would_wait(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        # A blocking socket does not make the call wait.
        ours.setblocking(True)
        sent = 0
        for piece in (bytes(1 << 20), bytes(1000), b"x"):
            while count := form.send(ours, piece):
                sent += count
        assert sent > 0 and form.send(ours, b"x") == 0
        reader = Task(read_to_end, theirs)
        ours.close()
        assert len(reader.result()) == sent

    @pytest.mark.parametrize(
        "size", [syscalls.KEPT_LOCK_LIMIT, syscalls.KEPT_LOCK_LIMIT + 1, 8 << 20]
    )
    def test_large_data_arrives_whole(self, form: Form, pair: Pair, size: int) -> None:
        ours, theirs = pair
        data = hashlib.shake_128(b"send").digest(size)
        reader = Task(read_to_end, theirs)
        view = memoryview(data)
        while view:
            view = view[form.send(ours, view) :]
            wait_for(ours, select.POLLOUT)
        ours.shutdown(socket.SHUT_WR)
        assert hashlib.sha256(reader.result()).digest() == hashlib.sha256(data).digest()

    @pytest.mark.parametrize("size", [1, 1 << 20])
    def test_send_raises_after_a_reset(self, form: Form, pair: Pair, size: int) -> None:
        ours, theirs = pair
        reset(theirs)
        wait_for(ours)
        assert code_of(form.send, ours, bytes(size)) == errno.ECONNRESET
        # An error, and no signal SIGPIPE.
        assert code_of(form.send, ours, bytes(size)) == errno.EPIPE


class TestCloseAndShutdown:
    def test_close_ends_the_connection(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        descriptor = ours.fileno()
        form.close(ours)
        assert read_to_end(theirs) == b"" and ours.fileno() == -1
        assert code_of(os.fstat, descriptor) == errno.EBADF
        # Closing again does no harm.
        form.close(ours)

    def test_close_of_a_closed_socket_spares_the_new_owner_of_its_descriptor(
        self, form: Form, pair: Pair
    ) -> None:
        ours, theirs = pair
        descriptor = ours.fileno()
        form.close(ours)
        os.dup2(theirs.fileno(), descriptor)
        with socket.socket(fileno=descriptor) as other:
            form.close(ours)
            assert other.getpeername() == theirs.getpeername()

    def test_close_closes_a_socket_within_tls(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        secured = TlsSocket(ours, syscalls, ssl.create_default_context(), "localhost")
        form.close(secured)
        assert read_to_end(theirs) == b"" and secured.fileno() == -1
        form.close(secured)

    def test_shutdown_ends_one_direction(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        form.shutdown(ours, socket.SHUT_WR)
        assert read_to_end(theirs) == b""
        theirs.sendall(b"answer")
        wait_for(ours)
        assert form.receive(ours, 100) == b"answer"
        assert code_of(form.send, ours, b"x") == errno.EPIPE


class TestOpenAndConnect:
    @pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
    def test_open_tcp_returns_a_non_blocking_socket(self, form: Form, family: int) -> None:
        with form.open_tcp(family) as sock:
            assert (sock.family, sock.type, sock.gettimeout()) == (family, socket.SOCK_STREAM, 0.0)
            assert not os.get_blocking(sock.fileno()) and not os.get_inheritable(sock.fileno())

    @pytest.mark.parametrize("host", HOSTS)
    def test_connect_leads_to_the_listener(self, form: Form, host: str) -> None:
        with listen(host) as listening, form.open_tcp(listening.family) as sock:
            target = from_sockaddr(listening.getsockname())
            assert form.connect(sock, listening.family, target) in (0, errno.EINPROGRESS)
            wait_for(sock, select.POLLOUT)
            accepted, peer = listening.accept()
            with accepted:
                assert peer == sock.getsockname()
                assert form.local_address(sock) == from_sockaddr(peer)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            assert form.connect(sock, listening.family, target) in (0, errno.EISCONN)

    def test_connect_to_a_closed_port_is_refused_at_once_or_later(self, form: Form) -> None:
        with refusing() as address, form.open_tcp(socket.AF_INET) as sock:
            outcome = form.connect(sock, socket.AF_INET, Address(*address))
            if outcome == errno.EINPROGRESS:
                wait_for(sock, select.POLLOUT)
                outcome = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            assert outcome == errno.ECONNREFUSED


@contextlib.contextmanager
def waiting(host: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield a listener that does not block, and a client that it has not accepted."""
    with (
        listen(host) as listening,
        socket.create_connection(listening.getsockname()[:2], SECONDS) as client,
    ):
        listening.setblocking(False)
        wait_for(listening)
        yield listening, client


class TestAccept:
    @pytest.mark.parametrize("host", HOSTS)
    def test_accept_returns_the_connection_and_its_peer(self, form: Form, host: str) -> None:
        with waiting(host) as (listening, client):
            accepted = form.accept(listening)
            assert accepted is not None
            with accepted[0] as sock:
                assert accepted[1] == from_sockaddr(client.getsockname())
                assert (sock.family, sock.type, sock.gettimeout()) == (
                    listening.family,
                    socket.SOCK_STREAM,
                    0.0,
                )
                assert not os.get_blocking(sock.fileno()) and not os.get_inheritable(sock.fileno())
                client.sendall(b"hello")
                wait_for(sock)
                assert form.receive(sock, 100) == b"hello"
            assert form.accept(listening) is None

    @pytest.mark.parametrize("host", HOSTS)
    def test_accepted_connection_has_the_listeners_address(self, form: Form, host: str) -> None:
        with waiting(host) as (listening, client):
            accepted = form.accept(listening)
            assert accepted is not None
            with accepted[0] as sock:
                assert listening.getsockname() == client.getpeername()
                assert form.local_address(sock) == from_sockaddr(client.getpeername())

    def test_accept_returns_none_if_no_client_waits(self, form: Form) -> None:
        with listen() as listening:
            listening.setblocking(False)
            assert form.accept(listening) is None

    def test_accept_fails_on_a_listener_that_was_shut_down(self, form: Form) -> None:
        with listen() as listening:
            listening.setblocking(False)
            listening.shutdown(socket.SHUT_RDWR)
            assert code_of(form.accept, listening) == errno.EINVAL
