"""The name in the first bytes of a connection becomes that of the flow; all bytes are relayed."""

from __future__ import annotations

import select
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from netproxy.handler.forward import TcpForward
from netproxy.handler.transparent import sniffer
from netproxy.handler.sni.first_bytes import LOOKS_LIMIT
from netproxy.handler.transparent.sniffer import Sniffer
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow, SeenName, is_public
from netproxy.net.stream import Stream, complete
from netproxy.observe.records import access_fields, access_text, as_text
from netproxy.protocol.http.request_host import HEAD_LIMIT
from netproxy.protocol.tls_hello import parse_client_hello
from tests.support.exchanges import EchoTarget, converse
from tests.support.handlers import (
    SECONDS,
    Conversation,
    HandlerDependencies,
    check_relay,
    eventually,
    tcp_pair,
)
from tests.support.relays import Running, running
from tests.support.sockets import server

HELLOS = Path(__file__).parents[1] / "protocol" / "client_hellos"
HELLO = (HELLOS / "curl.bin").read_bytes()
NAMELESS = (HELLOS / "curl-address.bin").read_bytes()
REQUEST = b"GET / HTTP/1.1\r\nAccept: */*\r\nHost: web.example:80\r\n\r\n"
TARGET = Address("203.0.113.9", 443)
BOTH = frozenset({"tls", "http"})
TLS_NAME, HTTP_NAME = SeenName("curl.example", "tls"), SeenName("web.example", "http")


class Forward:
    """A listener with a fixed target that looks at the first bytes."""

    def __init__(self, look: Sniffer) -> None:
        self.parts = HandlerDependencies()
        self.handler = TcpForward("test", self.parts.outbound, TARGET, self.parts.permission, look)

    def conversation(self) -> Conversation:
        return Conversation(self.handler)

    def target(self) -> socket.socket:
        return self.parts.dialer.target()

    def flow(self) -> Flow:
        (flow,) = self.parts.router.flows
        return flow


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at first bytes for as long as they come: on a busy machine that takes seconds."""
    monkeypatch.setattr(sniffer, "SECONDS", SECONDS)


def fixed(kinds: frozenset[str] = BOTH, skipped: tuple[range, ...] = ()) -> Sniffer:
    return Sniffer(kinds, skipped, True, False)


def received(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += sock.recv(count - len(data))
    return data


FIRST_BYTES = {
    "tls": (HELLO, TLS_NAME),
    "http": (REQUEST, HTTP_NAME),
    "tls without a name": (NAMELESS, None),
    "http without a name": (b"GET / HTTP/1.0\r\n\r\n", None),
    "another protocol": (b"SSH-2.0-client\r\n", None),
    "a broken ClientHello": (b"\x16\x03\x01\x00\x00", None),
    "a long line": (b"GET /" + b"a" * HEAD_LIMIT, None),
}


@pytest.mark.parametrize(("data", "seen"), FIRST_BYTES.values(), ids=FIRST_BYTES)
def test_first_bytes_name_the_flow_and_are_relayed(data: bytes, seen: SeenName | None) -> None:
    """Hazard 153."""
    forward = Forward(fixed())
    with forward.conversation() as client:
        client.send(data)
        with forward.target() as target:
            assert received(target, len(data)) == data
            check_relay(client, target)
    assert forward.flow().seen == seen
    assert forward.parts.dialled == [TARGET]


def seen_of(*pieces: bytes) -> SeenName | None:
    """Return the name of a flow whose first bytes come in pieces."""
    near, far = tcp_pair()
    with far:
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = Stream(near)
        steps = fixed().named(Flow("tcp", TARGET, TARGET, "test", ""), stream)
        need = next(steps)
        try:
            for piece in pieces:
                far.sendall(piece)
                assert need is stream
                stream.wait(select.POLLIN)
                need = steps.send(stream.read_ahead())
        except StopIteration as end:
            seen: SeenName | None = end.value.seen
        else:
            pytest.fail("more bytes are wanted")
        assert b"".join(pieces).startswith(stream.unread())
        stream.close()
    return seen


def one_by_one(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def test_request_byte_by_byte_names_the_flow() -> None:
    """Hazard 153."""
    assert seen_of(*one_by_one(REQUEST)) == HTTP_NAME


@pytest.mark.parametrize("path", sorted(HELLOS.iterdir()), ids=lambda path: path.stem)
def test_hello_of_a_program_names_the_flow_whole_and_byte_by_byte(path: Path) -> None:
    """Hazard 153."""
    data = path.read_bytes()
    hello = parse_client_hello(data)
    assert not isinstance(hello, int)
    expected = SeenName(hello.name, "tls") if hello.name else None
    assert seen_of(data) == expected
    assert seen_of(*one_by_one(data)) == expected


def test_looks_at_dripping_lines_are_bounded() -> None:
    """Hazard 154."""
    near, far = tcp_pair()
    with far:
        stream = Stream(near)
        steps = fixed().named(Flow("tcp", TARGET, TARGET, "test", ""), stream)
        need, sent = next(steps), b""
        with pytest.raises(StopIteration) as end:
            for _ in range(LOOKS_LIMIT + 2):
                piece = b"a: b\n" if sent else b"GET / HTTP/1.1\n"
                far.sendall(piece)
                sent += piece
                assert need is stream
                stream.wait(select.POLLIN)
                need = steps.send(stream.read_ahead())
        assert end.value.value.seen is None
        assert stream.unread() == sent
        stream.close()


@pytest.mark.parametrize("sent", [b"", HELLO[:100], REQUEST[:20]])
def test_silent_client_is_connected_without_a_name(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 154."""
    monkeypatch.setattr(sniffer, "SECONDS", 0.1)
    forward = Forward(fixed())
    with forward.conversation() as client:
        client.send(sent)
        with forward.target() as target:
            target.sendall(b"220 ready\r\n")
            client.expect(b"220 ready\r\n")
            assert received(target, len(sent)) == sent
            check_relay(client, target)
    assert forward.flow().seen is None


def test_deadline_of_the_handshake_is_kept() -> None:
    near, far = tcp_pair()
    with far:
        stream = Stream(near)
        stream.limit(SECONDS)
        before = stream.deadline
        far.sendall(REQUEST)
        complete(fixed().named(Flow("tcp", TARGET, TARGET, "test", ""), stream))
        assert stream.deadline == before
        stream.close()


def test_end_of_stream_within_a_hello_is_relayed() -> None:
    forward = Forward(fixed())
    with forward.conversation() as client:
        client.send(HELLO[:50])
        client.socket.shutdown(socket.SHUT_WR)
        with forward.target() as target:
            assert received(target, 50) == HELLO[:50]
            assert target.recv(1) == b""
            target.sendall(b"bye")
            target.shutdown(socket.SHUT_WR)
            client.expect(b"bye")
            client.expect_end()


def test_skipped_port_is_dialled_before_the_client_sends() -> None:
    forward = Forward(fixed(skipped=(range(400, 500),)))
    with forward.conversation() as client:
        client.send(HELLO)
        with forward.target() as target:
            assert received(target, len(HELLO)) == HELLO
            check_relay(client, target)
    assert forward.flow().seen is None


def test_only_the_configured_kinds_are_looked_for() -> None:
    for kinds, data in ((frozenset({"http"}), HELLO), (frozenset({"tls"}), REQUEST)):
        forward = Forward(fixed(kinds))
        with forward.conversation() as client:
            client.send(data)
            with forward.target() as target:
                assert received(target, len(data)) == data
                check_relay(client, target)
        assert forward.flow().seen is None


def test_name_leads_only_at_a_transparent_listener_and_for_an_address() -> None:
    for is_fixed, host, leads in (
        (True, "203.0.113.9", False),
        (False, "203.0.113.9", True),
        (False, "2001:db8::9", True),
        (False, "other.example", False),
    ):
        near, far = tcp_pair()
        with far:
            stream = Stream(near)
            far.sendall(HELLO)
            flow = Flow("tcp", TARGET, Address(host, 443), "test", "")
            named = complete(Sniffer(BOTH, (), is_fixed, False).named(flow, stream))
            assert named == flow._replace(seen=SeenName("curl.example", "tls", leads))
            stream.close()


def test_name_of_a_local_network_does_not_lead() -> None:
    """Hazard 155."""
    for name, public in (("a.example", True), ("lan.example", True), ("printer", False)):
        assert is_public(name) == public
    for zone in ("localhost", "local", "lan", "internal", "home.arpa"):
        assert not is_public(f"printer.{zone}")
    for by_name in (False, True):
        near, far = tcp_pair()
        with far:
            stream = Stream(near)
            far.sendall(b"GET / HTTP/1.1\r\nHost: printer.lan\r\n\r\n")
            flow = Flow("tcp", TARGET, TARGET, "test", "")
            named = complete(Sniffer(BOTH, (), False, by_name).named(flow, stream))
            assert named == flow._replace(seen=SeenName("printer.lan", "http"))
            stream.close()


def test_name_is_dialled_in_place_of_the_address_if_configured() -> None:
    for is_fixed, host in ((False, "curl.example"), (True, "203.0.113.9")):
        near, far = tcp_pair()
        with far:
            stream = Stream(near)
            far.sendall(HELLO)
            flow = Flow("tcp", TARGET, TARGET, "test", "")
            named = complete(Sniffer(BOTH, (), is_fixed, True).named(flow, stream))
            assert named.target == Address(host, 443)
            stream.close()


# -- in a whole daemon


def config(target: Address, rest: str = "") -> str:
    listener = f"{{protocol: tcp, listen: '127.0.0.1:0', target: '{target}', sniff: [tls, http]}}"
    return f"listeners: [{listener}]\n{rest}"


def talk(relay: Running, *pieces: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", relay.port), SECONDS) as sock:
        return converse(sock, *pieces)


def test_rules_decide_by_the_name_in_the_first_bytes() -> None:
    rules = """
rules:
- {sni: "*.example", not: {domain: curl.example}, via: block}
- {sni: curl.example, via: direct}
- {domain: web.example, via: direct}
default: block
"""
    python = (HELLOS / "python.bin").read_bytes()
    with server(EchoTarget()) as target, running(config(target, rules)) as relay:
        assert talk(relay, HELLO) == b"got " + HELLO
        assert talk(relay, REQUEST) == b"got " + REQUEST
        assert talk(relay, HELLO[:3], HELLO[3:200], HELLO[200:]) == b"got " + HELLO
        for refused in (python, NAMELESS, b"GET / HTTP/1.1\r\nHost: curl.example\r\n\r\n"):
            assert talk(relay, refused) == b""
        eventually(lambda: len(relay.log.records) == 6)
        records = relay.log.records
    decided = sorted(
        (record.rule, str(record.flow.seen and record.flow.seen[:2])) for record in records
    )
    assert decided == [
        ("default", "('curl.example', 'http')"),
        ("default", "None"),
        ("rules[0]", "('python.example', 'tls')"),
        ("rules[1]", "('curl.example', 'tls')"),
        ("rules[1]", "('curl.example', 'tls')"),
        ("rules[2]", "('web.example', 'http')"),
    ]
    assert {record.flow.target for record in records} == {target}
    lines = [as_text(access_fields(record)) for record in records]
    assert sum("name=curl.example seen_in=tls" in line for line in lines) == 2
    assert sum("name=" in line for line in lines) == 5
    assert not any(map(access_text, records[:1]))


def test_silent_clients_hold_no_thread() -> None:
    """Hazard 154."""
    with server(EchoTarget()) as target, running(config(target)) as relay, ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", relay.port), SECONDS))
            for _ in range(50)
        ]
        for sock in clients:
            sock.sendall(HELLO[:10])
        eventually(lambda: len(relay.daemon._runtime.poller) == len(clients))
        assert relay.daemon.pools["connection"].threads == 0
        for sock in clients:
            assert converse(sock, HELLO[10:]) == b"got " + HELLO
