"""Control connections of associations that a worker hands over to the owner of their client."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from typing import Any, Callable, Iterator

import pytest

from netproxy.daemon.workers.hand_over import HandOvers
from netproxy.daemon.workers.messages import (
    ASSOCIATION,
    Message,
    MessageError,
    association_fields,
    message_pair,
    parse_association,
    receive,
    send,
)
from netproxy.daemon.workers.inbox import Inbox
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import ActivationAddress, Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.listeners import EVICTED
from netproxy.net.stream import Stream, poll_watched
from netproxy.protocol import socks5
from tests.support.certificates import certificates
from tests.support.doubles import Counts, Lines
from tests.support.relays import UdpPort
from tests.support.sockets import SECONDS, nothing_comes, read_exactly, reset, tcp_pair, wait_until
from tests.support.teams import Team, team

SPS = "listeners: [{listen: '127.0.0.1:0', name: main}]"
USERS = SPS + "\nusers: {alice: {password: secret}}"
OWN_PORT = "listeners: [{listen: '127.0.0.1:0', name: main, udp: {relay_port: %s}}]"
NO_HINT = Address("0.0.0.0", 0)
ASSOCIATE = socks5.encode_request(socks5.UDP_ASSOCIATE, NO_HINT)
REACHED = Address("127.0.0.1", 1080)

Make = Callable[..., Team]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:
        yield lambda text=SPS, **more: stack.enter_context(team(monkeypatch, text, **more))


def secure() -> str:
    return f"{SPS[:-2]}, tls: {certificates().listener()}}}]"


class Client:
    """An association whose control connection one worker accepts for a client of another one."""

    def __init__(self, ours: Team, accepting: int, owner: int, place: int = 0) -> None:
        self.host = ours.client_of(owner, place)
        self.control: socket.socket = ours.connect(accepting, source=self.host)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((self.host, 0))
        self.socket.settimeout(SECONDS)

    def secure(self) -> None:
        self.control = certificates().secure(self.control)

    def greet(self) -> None:
        self.control.sendall(b"\5\1\0")
        assert read_exactly(self.control, 2) == b"\5\0"

    def read_reply(self) -> int:
        """Return the code of the reply."""
        reply = read_exactly(self.control, 10)
        self.bound = (socket.inet_ntoa(reply[4:8]), struct.unpack("!H", reply[8:])[0])
        return reply[1]

    def associate(self) -> None:
        self.greet()
        self.control.sendall(ASSOCIATE)
        assert self.read_reply() == 0

    def check(self, target: UdpPort, data: bytes = b"ping") -> None:
        """Send a datagram to a target and one back."""
        self.socket.sendto(socks5.encode_header(target.address) + data, self.bound)
        seen = target.expect(data)
        target.send(data[::-1], seen)
        header = socks5.encode_header(target.address)
        assert self.socket.recv(1024) == header + data[::-1]

    def close(self) -> None:
        self.control.close()
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.mark.parametrize("accepting", [0, 1])
@pytest.mark.parametrize("owner", [0, 1])
def test_association_works_wherever_it_was_accepted(make: Make, accepting: int, owner: int) -> None:
    ours = make()
    with UdpPort() as target, Client(ours, accepting, owner) as client:
        client.associate()
        client.check(target)
        there = [0, 0]
        there[owner] = 1
        assert ours.associations() == there
        # The worker that accepted it counts it until its end.
        counted = [0, 0]
        counted[accepting] = 1
        assert ours.counted() == counted
        client.check(target, b"again")
        client.control.close()
        wait_until(lambda: ours.associations() == [0, 0])
    wait_until(lambda: ours.live() == [0, 0])


@pytest.mark.parametrize("ports", ["any", "30000-30999"])
def test_association_with_a_port_of_its_own_is_of_the_owner(make: Make, ports: str) -> None:
    ours = make(OWN_PORT % ports)
    with UdpPort() as target, Client(ours, 0, 1) as client:
        client.associate()
        assert client.bound[1] != ours.port
        client.check(target)
        assert ours.associations() == [0, 1]


def test_bytes_behind_the_request_are_no_harm(make: Make) -> None:
    """They were read by the worker that accepted, and go with the connection."""
    ours = make()
    with UdpPort() as target, Client(ours, 0, 1) as client:
        client.greet()
        client.control.sendall(ASSOCIATE + b"more than it should say" * 100)
        assert client.read_reply() == 0
        client.check(target)


def test_user_and_facts_of_the_client_are_kept(make: Make) -> None:
    ours = make(USERS)
    with UdpPort() as target, Client(ours, 0, 1) as client:
        client.control.sendall(b"\5\1\2" + socks5.encode_credentials("alice", "secret"))
        assert read_exactly(client.control, 4) == b"\5\2\1\0"
        client.control.sendall(ASSOCIATE)
        assert client.read_reply() == 0
        client.check(target)
        client.control.close()
    wait_until(lambda: any(record.flow.network == "udp" for record in ours.log.records))
    (flow,) = (record.flow for record in ours.log.records if record.flow.network == "udp")
    assert (flow.client.host, flow.user, flow.listener) == (client.host, "alice", "main")


@pytest.mark.parametrize("way", ["end", "half", "reset"])
def test_end_of_the_client_ends_the_association(make: Make, way: str) -> None:
    ours = make()
    with UdpPort() as target, Client(ours, 0, 1) as client:
        client.associate()
        client.check(target)
        if way == "end":
            client.control.close()
        elif way == "half":
            client.control.shutdown(socket.SHUT_WR)
        else:
            reset(client.control)
        wait_until(lambda: ours.associations() == [0, 0])
        wait_until(lambda: ours.live() == [0, 0])


def test_worker_that_accepted_an_association_can_end_it(make: Make) -> None:
    """It counts the connection, and so may have to end it for that of another client."""
    ours = make()
    with UdpPort() as target, Client(ours, 0, 1) as client:
        client.associate()
        client.check(target)
        (listener,) = ours.worker(0).daemon._tcp_listeners()
        (connection,) = listener.connections()
        connection.evict()
        assert client.control.recv(1) == b""
        wait_until(lambda: ours.live() == [0, 0])
    assert ours.count_of("connections_refused", EVICTED) == [1, 0]
    assert ours.associations() == [0, 0]


def test_association_of_a_listener_that_was_removed_meanwhile_is_closed(make: Make) -> None:
    """The owner has put a reload into force before the worker that has accepted it."""
    ours = make()
    flow = Flow("tcp", Address(ours.client_of(1), 4000), NO_HINT, "removed", "")
    fields = association_fields("removed", REACHED, flow, REACHED)
    with tcp_pair() as (accepted, client):
        near, far = socket.socketpair()
        with near, far:
            sent = [accepted.fileno(), far.fileno()]
            send(ours.parent._workers.outboxes[1], Message(fields, b"", sent))
            accepted.close()
            far.close()
            assert client.recv(1) == near.recv(1) == b""
    assert ours.count_of("connections", "listener removed") == [0, 1]


def test_owner_that_takes_nothing_is_a_general_failure(make: Make) -> None:
    """The worker that has accepted the connection says so itself, at once."""
    ours = make()
    outbox, go_on = ours.parent._workers.outboxes[1], threading.Event()
    takers = ours.worker(1)._inbox._takers
    assert isinstance(takers, dict)
    takers.update(wait=lambda message: go_on.wait(SECONDS), filler=lambda message: None)
    send(outbox, Message({"kind": "wait"}))
    for size in (10_000, 0):
        with contextlib.suppress(MessageError):
            while True:
                send(outbox, Message({"kind": "filler"}, b"x" * size))
    with Client(ours, 0, 1) as client:
        client.greet()
        client.control.sendall(ASSOCIATE)
        assert client.read_reply() == 1
        assert client.control.recv(1) == b""
    wait_until(lambda: ours.live() == [0, 0])
    assert ours.count_of("requests_refused", Reason.GENERAL.value) == [1, 0]
    go_on.set()
    with UdpPort() as target, Client(ours, 0, 1) as client:
        client.associate()
        client.check(target)


def led_by_route(main: str) -> str:
    """Return a configuration whose first listener leads to a proxy, "main"."""
    web = "{protocol: sni, listen: '127.0.0.1:0', name: web, routes: [{listener: main}]}"
    return main.replace("listeners: [", f"listeners: [{web}, ")


@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "tls"])
def test_association_by_a_route_counts_where_it_was_accepted(make: Make, is_secure: bool) -> None:
    ours = make(led_by_route(secure() if is_secure else SPS))
    (udp,) = ours.ports("udp")
    with UdpPort() as target, Client(ours, 0, 1) as client:
        if is_secure:
            client.secure()
        client.associate()
        assert client.bound[1] == udp != ours.port
        client.check(target)
        assert ours.associations() == [0, 1]
        # The worker that has accepted it counts it, whoever serves it.
        web, main = (
            [worker.daemon._plan.admissions[name].live for worker in ours.workers]
            for name in ("web", "main")
        )
        assert (web, main) == ([1, 0], [0, 0])
        client.control.close()
        wait_until(lambda: ours.associations() == [0, 0])
    wait_until(lambda: ours.live() == [0, 0])


# -- within TLS


@pytest.mark.parametrize("accepting", [0, 1])
@pytest.mark.parametrize("owner", [0, 1])
def test_association_within_tls_works_wherever_it_was_accepted(
    make: Make, accepting: int, owner: int
) -> None:
    ours = make(secure())
    with UdpPort() as target, Client(ours, accepting, owner) as client:
        client.secure()
        client.associate()
        client.check(target)
        there = [0, 0]
        there[owner] = 1
        assert ours.associations() == there
        client.control.sendall(b"x" * 100_000)
        client.check(target, b"again")
        client.control.close()
        wait_until(lambda: ours.associations() == [0, 0])
    wait_until(lambda: ours.live() == [0, 0])


@pytest.mark.parametrize("way", ["end", "half", "reset"])
def test_end_of_the_client_within_tls_ends_the_association(make: Make, way: str) -> None:
    ours = make(secure())
    with UdpPort() as target, Client(ours, 0, 1) as client:
        client.secure()
        client.associate()
        client.check(target)
        assert isinstance(client.control, ssl.SSLSocket)
        if way == "end":
            client.control.close()
        elif way == "half":
            client.control.settimeout(SECONDS)
            with contextlib.suppress(OSError):
                client.control.unwrap()
        else:
            reset(client.control)
        wait_until(lambda: ours.associations() == [0, 0])
        wait_until(lambda: ours.live() == [0, 0])


def test_end_of_the_association_ends_the_connection_within_tls(make: Make) -> None:
    """Its owner ends it when the listener goes, or when it stops."""
    ours = make(secure())
    with UdpPort() as target, Client(ours, 0, 1) as client:
        client.secure()
        client.associate()
        client.check(target)
        ours.parent.stop()
        with contextlib.suppress(OSError):
            assert client.control.recv(1) == b""
    assert ours.live() == [0, 0]


# -- parts


class Wire(Stream):
    """A stream whose bytes are not what its socket holds, as within TLS."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.plain = False


@pytest.fixture
def boxes() -> Iterator[tuple[HandOvers, list[socket.socket]]]:
    pairs = [message_pair() for _ in range(2)]
    hand_overs = HandOvers([writing for _, writing in pairs])
    hand_overs.use_index(0)
    yield hand_overs, [reading for reading, _ in pairs]
    for pair in pairs:
        for sock in pair:
            sock.close()


Boxes = tuple[HandOvers, list[socket.socket]]


def received(sock: socket.socket) -> Message:
    message = receive(sock, SECONDS)
    assert message is not None
    return message


def test_plain_connection_is_given_with_its_unread_bytes(boxes: Boxes) -> None:
    hand_overs, inboxes = boxes
    with tcp_pair() as (ours, theirs):
        stream = Stream(ours, b"read so far")
        wait = hand_overs.give(1, stream, {"kind": "this"})
        message = received(inboxes[1])
        assert (message.kind, message.data) == ("this", b"read so far")
        given, lifetime = message.sockets()
        with given, lifetime:
            # It goes on although the one that gave it has closed its descriptor.
            theirs.sendall(b"more")
            assert given.recv(16) == b"more"
            given.sendall(b"answer")
            assert theirs.recv(16) == b"answer"
            assert not poll_watched(wait.watched, 0)
            # An event of the last owner of the descriptor ends nothing (hazard 187).
            assert wait.step is not None and wait.step(0, 0) is wait and stream in hand_overs.given
            # Whoever ends the connection here asks the other worker to do so.
            stream.shutdown()
            assert lifetime.recv(16) == b"\0"
        assert theirs.recv(16) == b""
        assert poll_watched(wait.watched, SECONDS)
        assert wait.step(0, 0) is None and stream not in hand_overs.given
        stream.close()
    assert receive(inboxes[0], 0) is None


def run(wait: Any, until: Callable[[], bool]) -> Any:
    """Resume a wait until a condition holds or it ends; return what it waits for then."""
    deadline = time.monotonic() + SECONDS
    while wait is not None and not until():
        assert time.monotonic() < deadline
        poll = select.poll()
        for sock, events in wait.watched:
            poll.register(sock, events)
        if not wait.watched or poll.poll(10):
            wait = wait.resume(True)
    return wait


def test_encrypted_connection_is_relayed_in_both_directions(boxes: Boxes) -> None:
    hand_overs, inboxes = boxes
    with tcp_pair() as (ours, theirs):
        ours.setblocking(False)
        wait = hand_overs.give(1, Wire(ours), {"kind": "this"})
        (far,) = received(inboxes[1]).sockets()
        with far:
            far.settimeout(SECONDS)
            theirs.sendall(b"up")
            wait = run(wait, lambda: not nothing_comes(far, 0))
            assert far.recv(16) == b"up"
            far.sendall(b"down")
            wait = run(wait, lambda: not nothing_comes(theirs, 0))
            assert theirs.recv(16) == b"down"
            # Half-close, in one direction and in the other.
            theirs.shutdown(socket.SHUT_WR)
            wait = run(wait, lambda: not nothing_comes(far, 0))
            assert far.recv(16) == b""
            far.sendall(b"late")
            far.shutdown(socket.SHUT_WR)
            wait = run(wait, lambda: False)
            assert theirs.recv(16) == b"late"
            assert theirs.recv(16) == b""
    assert wait is None


def test_unread_bytes_of_an_encrypted_connection_are_relayed_first(boxes: Boxes) -> None:
    hand_overs, inboxes = boxes
    with tcp_pair() as (ours, theirs):
        ours.setblocking(False)
        stream = Wire(ours)
        stream._unread = b"read so far,"
        theirs.sendall(b" and more")
        wait = hand_overs.give(1, stream, {"kind": "this"})
        (far,) = received(inboxes[1]).sockets()
        with far:
            got = b""

            def arrived() -> bool:
                nonlocal got
                if not nothing_comes(far, 0):
                    got += far.recv(64)
                return len(got) >= 21

            far.settimeout(SECONDS)
            wait = run(wait, arrived)
            assert got == b"read so far, and more"
        run(wait, lambda: False)


def test_connection_that_cannot_be_told_of_stays_whole(boxes: Boxes) -> None:
    """The caller answers it; nothing of it is left in the box, and no descriptor of a pair."""
    hand_overs, inboxes = boxes
    inboxes[1].close()
    for stream_class in (Stream, Wire):
        with tcp_pair() as (ours, theirs):
            stream = stream_class(ours)
            with pytest.raises(MessageError):
                hand_overs.give(1, stream, {"kind": "this"})
            stream.reply(b"sorry")
            assert theirs.recv(16) == b"sorry"


def test_untold_association_is_a_general_failure(boxes: Boxes) -> None:
    hand_overs, inboxes = boxes
    inboxes[1].close()
    owners = hand_overs.associations("main", REACHED)
    client = next(
        Address(host, 4000)
        for host in (f"127.0.0.{number}" for number in range(1, 99))
        if hand_overs.owner_of(host) == 1
    )
    flow = Flow("tcp", client, NO_HINT, "main", "")
    with tcp_pair() as (ours, _), pytest.raises(DialError) as raised:
        owners.hand_over(Stream(ours), flow, REACHED)
    assert raised.value.reason is Reason.GENERAL


def test_activation_socket_has_its_associations_in_the_first_worker(boxes: Boxes) -> None:
    hand_overs, _ = boxes
    owners = hand_overs.associations("main", ActivationAddress("systemd:main", 0))
    clients = [f"127.0.0.{number}" for number in range(1, 99)]
    assert not any(owners.is_elsewhere(client) for client in clients)
    hand_overs.use_index(1)
    assert all(owners.is_elsewhere(client) for client in clients)


@pytest.mark.parametrize("stamp", [None, b"\0\xff bytes", "text", 7, True])
def test_facts_of_an_association_survive_the_message(boxes: Boxes, stamp: object) -> None:
    hand_overs, inboxes = boxes
    client, target = Address("2001:db8::7", 4000), Address("a.name.test", 5000)
    flow = Flow("tcp", client, target, "main", "b\u00fcrger", stamp=stamp)
    fields = association_fields("main", REACHED, flow, Address("192.0.2.1", 1080))
    hand_overs.tell(1, Message(fields))
    message = received(inboxes[1])
    assert message.kind == ASSOCIATION
    listener, address, parsed, reached = parse_association(message)
    assert (listener, address) == ("main", str(REACHED))
    assert reached == Address("192.0.2.1", 1080)
    assert (parsed.client, parsed.target, parsed.user) == (client, target, flow.user)
    assert parsed.stamp == stamp
    assert parsed == flow


@pytest.mark.parametrize(
    "change",
    [
        {"client": "text"},
        {"client": ["127.0.0.1"]},
        {"client": ["127.0.0.1", "no port"]},
        {"stamp": {"hex": "no"}},
        {"reached": None},
    ],
)
def test_malformed_facts_are_an_error(change: dict[str, object]) -> None:
    flow = Flow("tcp", REACHED, NO_HINT, "main", "")
    fields = {**association_fields("main", REACHED, flow, REACHED), **change}
    with pytest.raises((KeyError, TypeError, ValueError)):
        parse_association(Message(fields))


# -- the inbox


def test_inbox_gives_each_message_to_the_taker_of_its_kind() -> None:
    reading, writing = message_pair()
    counts, lines, taken = Counts(), Lines(), []
    box = Inbox(
        reading,
        {"a": lambda message: taken.append(("a", message.data)), "b": taken.append},  # type: ignore[dict-item]
        counts,
        lines,
    )
    with reading, writing:
        box.start()
        for data in (b"1", b"2"):
            send(writing, Message({"kind": "a"}, data))
        send(writing, Message({"kind": "b"}))
        wait_until(lambda: len(taken) == 3)
        box.stop()
    assert taken[:2] == [("a", b"1"), ("a", b"2")]
    assert not counts.counts


def test_inbox_goes_on_after_a_taker_that_fails() -> None:
    reading, writing = message_pair()
    counts, lines, taken = Counts(), Lines(), []

    def fail(message: Message) -> None:
        raise ValueError("broken")

    with reading, writing:
        box = Inbox(reading, {"bad": fail, "good": taken.append}, counts, lines)  # type: ignore[dict-item]
        box.start()
        for kind in ("bad", "unknown", "good"):
            send(writing, Message({"kind": kind}))
        wait_until(lambda: taken)
        box.stop()
    assert counts.of("connections", "internal error") == 1
    assert len(lines.of("exception")) == 1
    assert lines.of("limited") == ["another worker sends 'unknown'"]


def test_inbox_that_has_stopped_leaves_messages_to_its_successor() -> None:
    reading, writing = message_pair()
    taken: list[bytes] = []
    takers = {"a": lambda message: taken.append(message.data)}
    with reading, writing:
        first = Inbox(reading, takers, Counts(), Lines())
        first.start()
        first.stop()
        send(writing, Message({"kind": "a"}, b"waiting"))
        second = Inbox(reading, takers, Counts(), Lines())
        second.start()
        wait_until(lambda: taken)
        second.stop()
    assert taken == [b"waiting"]


def test_inbox_ends_with_all_who_send() -> None:
    reading, writing = message_pair()
    with reading:
        box = Inbox(reading, {}, Counts(), Lines())
        box.start()
        writing.close()
        box.thread.join(SECONDS)
        assert not box.thread.is_alive()
        box.stop()


def test_descriptors_of_a_message_that_nobody_takes_are_closed() -> None:
    reading, writing = message_pair()
    with reading, writing, tcp_pair() as (ours, theirs):
        box = Inbox(reading, {}, Counts(), Lines())
        box.start()
        send(writing, Message({"kind": "unknown"}, descriptors=[ours.fileno()]))
        ours.close()
        assert theirs.recv(1) == b""
        box.stop()
