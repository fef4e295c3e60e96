"""Socket calls in both their forms, ctypes' and the socket module's: same bytes, same ends, same errors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import socket
from typing import Callable, Iterator, NamedTuple

import pytest

from netproxy.net import syscalls
from tests.support.sockets import HAS_IPV6, Task, listen, read_to_end, refusing, reset, tcp_pair

HOSTS = [
    "127.0.0.1",
    pytest.param("::1", marks=pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")),
]


class Form(NamedTuple):
    receive: Callable[[socket.socket, int], memoryview | None]
    send: Callable[[socket.socket, bytes | memoryview], int]
    close: Callable[[socket.socket], None]
    shutdown: Callable[[socket.socket, int], None]
    open_tcp: Callable[[int], socket.socket]
    connect: Callable[[socket.socket, tuple], int]
    accept: Callable[[socket.socket], tuple[socket.socket, tuple] | None]
    local_sockaddr: Callable[[socket.socket], tuple]


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
    assert poll.poll(5000)


def code_of(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.strerror == os.strerror(caught.value.errno or 0)
    return caught.value.errno


def test_each_tells_of_a_closed_socket(form: Form) -> None:
    sock = socket.socket()
    sock.close()
    failing = [
        (form.receive, 100),
        (form.send, b"x"),
        (form.shutdown, socket.SHUT_WR),
        (form.accept,),
        (form.local_sockaddr,),
    ]
    for call, *arguments in failing:
        assert code_of(call, sock, *arguments) == errno.EBADF
    assert form.connect(sock, ("127.0.0.1", 9)) == errno.EBADF


def test_each_tells_of_a_socket_without_a_peer(form: Form) -> None:
    with socket.socket() as sock:
        assert code_of(form.receive, sock, 100) == errno.ENOTCONN
        assert code_of(form.shutdown, sock, socket.SHUT_WR) == errno.ENOTCONN
        assert code_of(form.send, sock, b"x") in (errno.ENOTCONN, errno.EPIPE)


class TestReceive:
    def test_gives_what_is_there(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        theirs.sendall(b"one\0two")
        wait_for(ours)
        assert form.receive(ours, 4) == b"one\0"
        assert form.receive(ours, 100) == b"two"

    def test_gives_none_for_nothing_yet(self, form: Form, pair: Pair) -> None:
        assert form.receive(pair[0], 100) is None
        pair[0].setblocking(True)  # the call does not wait even so
        assert form.receive(pair[0], 100) is None

    def test_gives_no_bytes_at_the_end(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        theirs.sendall(b"last")
        theirs.close()
        wait_for(ours)
        assert form.receive(ours, 100) == b"last"
        wait_for(ours)
        assert [form.receive(ours, 100), form.receive(ours, 100)] == [b"", b""]

    def test_fills_its_whole_buffer(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        data = hashlib.shake_128(b"receive").digest(4 * syscalls.BUFFER)
        sender = Task(lambda: (theirs.sendall(data), theirs.shutdown(socket.SHUT_WR)))
        found = b""
        while True:
            wait_for(ours)
            piece = form.receive(ours, syscalls.BUFFER)
            if not piece:
                break
            found += piece
        sender.result()
        assert found == data

    def test_tells_of_a_reset(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        reset(theirs)
        wait_for(ours)
        assert code_of(form.receive, ours, 100) == errno.ECONNRESET


class TestSend:
    @pytest.mark.parametrize(
        "kind", [bytes, lambda data: memoryview(b"head" + data)[4:]], ids=["bytes", "view"]
    )
    def test_sends_what_it_is_given(
        self, form: Form, pair: Pair, kind: Callable[[bytes], bytes | memoryview]
    ) -> None:
        ours, theirs = pair
        assert form.send(ours, kind(b"one\0two")) == 7
        ours.close()
        assert read_to_end(theirs) == b"one\0two"

    def test_gives_0_when_it_would_wait(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        ours.setblocking(True)  # the call does not wait even so
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
    def test_large_ones_arrive_whole(self, form: Form, pair: Pair, size: int) -> None:
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
    def test_tells_of_a_reset(self, form: Form, pair: Pair, size: int) -> None:
        ours, theirs = pair
        reset(theirs)
        wait_for(ours)
        assert code_of(form.send, ours, bytes(size)) == errno.ECONNRESET
        assert code_of(form.send, ours, bytes(size)) == errno.EPIPE  # and no signal


class TestCloseAndShutdown:
    def test_close_ends_the_connection(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        descriptor = ours.fileno()
        form.close(ours)
        assert read_to_end(theirs) == b"" and ours.fileno() == -1
        assert code_of(os.fstat, descriptor) == errno.EBADF
        form.close(ours)  # again does no harm

    def test_close_again_leaves_the_number_to_who_has_it_now(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        descriptor = ours.fileno()
        form.close(ours)
        os.dup2(theirs.fileno(), descriptor)
        with socket.socket(fileno=descriptor) as other:
            form.close(ours)
            assert other.getpeername() == theirs.getpeername()

    def test_shutdown_ends_one_way(self, form: Form, pair: Pair) -> None:
        ours, theirs = pair
        form.shutdown(ours, socket.SHUT_WR)
        assert read_to_end(theirs) == b""
        theirs.sendall(b"answer")
        wait_for(ours)
        assert form.receive(ours, 100) == b"answer"
        assert code_of(form.send, ours, b"x") == errno.EPIPE


class TestOpenAndConnect:
    @pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
    def test_opens_a_socket_that_does_not_block(self, form: Form, family: int) -> None:
        with form.open_tcp(family) as sock:
            assert (sock.family, sock.type, sock.gettimeout()) == (family, socket.SOCK_STREAM, 0.0)
            assert not os.get_blocking(sock.fileno()) and not os.get_inheritable(sock.fileno())

    @pytest.mark.parametrize("host", HOSTS)
    def test_connects(self, form: Form, host: str) -> None:
        with listen(host) as listening, form.open_tcp(listening.family) as sock:
            assert form.connect(sock, listening.getsockname()) in (0, errno.EINPROGRESS)
            wait_for(sock, select.POLLOUT)
            accepted, peer = listening.accept()
            with accepted:
                assert peer == sock.getsockname() == form.local_sockaddr(sock)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            assert form.connect(sock, listening.getsockname()) in (0, errno.EISCONN)

    def test_a_refusal_comes_at_once_or_later(self, form: Form) -> None:
        with refusing() as address, form.open_tcp(socket.AF_INET) as sock:
            outcome = form.connect(sock, tuple(address))
            if outcome == errno.EINPROGRESS:
                wait_for(sock, select.POLLOUT)
                outcome = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            assert outcome == errno.ECONNREFUSED


@contextlib.contextmanager
def waiting(host: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A listener that does not block, and a client that it has not accepted."""
    with (
        listen(host) as listening,
        socket.create_connection(listening.getsockname()[:2], 5) as client,
    ):
        listening.setblocking(False)
        wait_for(listening)
        yield listening, client


class TestAccept:
    @pytest.mark.parametrize("host", HOSTS)
    def test_gives_the_connection_and_its_peer(self, form: Form, host: str) -> None:
        with waiting(host) as (listening, client):
            found = form.accept(listening)
            assert found is not None
            with found[0] as sock:
                assert found[1] == client.getsockname()
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
    def test_the_connections_own_address(self, form: Form, host: str) -> None:
        with waiting(host) as (listening, client):
            found = form.accept(listening)
            assert found is not None
            with found[0] as sock:
                assert form.local_sockaddr(sock) == listening.getsockname() == client.getpeername()

    def test_gives_none_where_nobody_waits(self, form: Form) -> None:
        with listen() as listening:
            listening.setblocking(False)
            assert form.accept(listening) is None

    def test_tells_of_a_listener_that_was_shut_down(self, form: Form) -> None:
        with listen() as listening:
            listening.setblocking(False)
            listening.shutdown(socket.SHUT_RDWR)
            assert code_of(form.accept, listening) == errno.EINVAL
