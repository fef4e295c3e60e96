"""Messages between processes: their parts, their limits, and receivers that are gone or slow."""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import ExitStack
from typing import Iterator

import pytest

from netproxy.daemon.workers import messages
from netproxy.daemon.workers.messages import (
    DESCRIPTORS_LIMIT,
    MESSAGE_LIMIT,
    Message,
    MessageError,
    file_in_memory,
    message_pair,
    read_file,
    receive,
    send,
)
from tests.support.sockets import SECONDS, Task

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, far = message_pair()
    with near, far:
        yield near, far


def received(sock: socket.socket) -> Message:
    message = receive(sock, SECONDS)
    assert message is not None
    return message


def test_message_arrives_with_its_fields_and_bytes(pair: Pair) -> None:
    near, far = pair
    fields = {"kind": "order", "text": "h\u00fcrde\n", "list": [1, None, "x"], "map": {"a": True}}
    send(near, Message(fields, b"\n\0bytes\n"))
    message = received(far)
    assert (message.kind, message.fields, message.data) == ("order", fields, b"\n\0bytes\n")
    assert list(message.descriptors) == []


def test_messages_keep_their_order_and_bounds(pair: Pair) -> None:
    near, far = pair
    for number in range(20):
        send(near, Message({"kind": str(number)}, b"x" * number))
    messages = [received(far) for _ in range(20)]
    assert [(message.kind, len(message.data)) for message in messages] == [
        (str(number), number) for number in range(20)
    ]


def test_message_without_a_kind_has_none(pair: Pair) -> None:
    near, far = pair
    send(near, Message({}))
    assert received(far).kind == ""


def test_descriptors_arrive_and_belong_to_the_receiver(pair: Pair) -> None:
    near, far = pair
    ours, theirs = socket.socketpair()
    with ours:
        send(near, Message({"kind": "sockets"}, descriptors=[theirs.fileno()]))
        theirs.close()
        message = received(far)
        assert not os.get_inheritable(message.descriptors[0])
        (sock,) = message.sockets()
        with sock:
            ours.sendall(b"through it")
            assert sock.recv(16) == b"through it"


def test_listening_socket_and_its_kind_arrive(pair: Pair) -> None:
    near, far = pair
    kinds = [
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_INET, socket.SOCK_DGRAM),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET),
    ]
    with ExitStack() as stack:
        sent = [stack.enter_context(socket.socket(*kind)) for kind in kinds]
        send(near, Message({}, descriptors=[sock.fileno() for sock in sent]))
        got = [stack.enter_context(sock) for sock in received(far).sockets()]
        assert [(sock.family, sock.type) for sock in got] == kinds


def test_longest_message_arrives(pair: Pair) -> None:
    near, far = pair
    head = len(b'{"kind": "long"}\n')
    send(near, Message({"kind": "long"}, b"x" * (MESSAGE_LIMIT - head)))
    assert len(received(far).data) == MESSAGE_LIMIT - head


def test_message_with_all_its_descriptors_arrives(pair: Pair) -> None:
    near, far = pair
    with open(os.devnull, "rb") as null:
        send(near, Message({}, descriptors=[null.fileno()] * DESCRIPTORS_LIMIT))
    descriptors = received(far).descriptors
    for descriptor in descriptors:
        os.close(descriptor)
    assert len(set(descriptors)) == DESCRIPTORS_LIMIT


@pytest.mark.parametrize(
    "data, descriptors", [(b"x" * MESSAGE_LIMIT, 0), (b"", DESCRIPTORS_LIMIT + 1)]
)
def test_message_that_is_too_long_is_not_sent(pair: Pair, data: bytes, descriptors: int) -> None:
    near, far = pair
    with pytest.raises(MessageError, match="too long"):
        send(near, Message({}, data, [near.fileno()] * descriptors))
    assert receive(far, 0) is None


def test_sending_to_nobody_fails_without_a_signal(pair: Pair) -> None:
    near, far = pair
    far.close()
    with pytest.raises(MessageError, match="Broken pipe|reset"):
        send(near, Message({}))


def test_sending_to_who_does_not_read_fails_at_once(pair: Pair) -> None:
    near, far = pair
    sent = 0
    with pytest.raises(MessageError):
        while sent < 10_000:
            send(near, Message({"kind": "more"}, b"x" * 1000))
            sent += 1
    assert sent
    # What was sent before is there, whole.
    for _ in range(sent):
        assert received(far).data == b"x" * 1000
    assert receive(far, 0) is None
    send(near, Message({"kind": "again"}))
    assert received(far).kind == "again"


def test_sending_a_closed_descriptor_fails(pair: Pair) -> None:
    near, far = pair
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    with pytest.raises(MessageError):
        send(near, Message({}, descriptors=[descriptor]))
    assert receive(far, 0) is None


def test_receiving_waits_no_longer_than_it_may(pair: Pair) -> None:
    _, far = pair
    assert receive(far, 0) is None
    assert receive(far, 0.01) is None


def test_receiving_without_a_limit_waits_for_a_message(pair: Pair) -> None:
    near, far = pair
    task = Task(receive, far)
    assert not task.done
    send(near, Message({"kind": "late"}))
    assert task.result().kind == "late"


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOBUFS])
def test_message_waits_while_there_is_no_memory(
    pair: Pair, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither side takes the other one for dead, and none that waits has waited in vain."""
    real, left = messages.select.poll, [1, 2, 3]

    def fail() -> object:
        if left:
            left.pop()
            raise OSError(code, os.strerror(code))
        return real()

    near, far = pair
    send(near, Message({"kind": "stop"}))
    monkeypatch.setattr(messages.select, "poll", fail)
    monkeypatch.setattr(messages, "PAUSE", 0)
    assert receive(far, 0) is None
    assert received(far).kind == "stop" and not left


def test_end_comes_after_the_last_message(pair: Pair) -> None:
    near, far = pair
    send(near, Message({"kind": "last"}))
    near.close()
    assert received(far).kind == "last"
    for _ in range(2):
        with pytest.raises(EOFError):
            receive(far, SECONDS)


def test_end_comes_when_all_who_send_are_gone(pair: Pair) -> None:
    near, far = pair
    with near.dup():
        near.close()
        assert receive(far, 0) is None
    with pytest.raises(EOFError):
        receive(far, SECONDS)


def test_two_who_read_one_channel_share_its_messages(pair: Pair) -> None:
    """A successor reads what its predecessor has not; nobody waits for a message of the other."""
    near, far = pair
    with far.dup() as duplicate:
        for number in range(10):
            send(near, Message({"kind": str(number)}))
        kinds = [received(sock).kind for sock in (far, duplicate) * 5]
        assert kinds == [str(number) for number in range(10)]
        assert receive(far, 0) is None


def test_message_whose_descriptors_have_no_room_is_not_whole(pair: Pair) -> None:
    near, far = pair
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull, "rb") as null:
        send(near, Message({"kind": "sockets"}, descriptors=[null.fileno()] * 3))
    highest = os.open(os.devnull, os.O_RDONLY)
    os.close(highest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        message = received(far)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (message.kind, message.is_whole, list(message.descriptors)) == ("sockets", False, [])


# -- files in memory


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_file_in_memory_is_read_by_all_who_get_it(pair: Pair, size: int) -> None:
    near, far = pair
    content = os.urandom(size)
    with file_in_memory(content) as file:
        for _ in range(3):
            send(near, Message({"kind": "file"}, descriptors=[file.fileno()]))
    for _ in range(3):
        (descriptor,) = received(far).descriptors
        assert read_file(descriptor) == content
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_file_in_memory_has_no_name() -> None:
    with file_in_memory(b"secret") as file:
        assert os.readlink(f"/proc/self/fd/{file.fileno()}").endswith("(deleted)")
