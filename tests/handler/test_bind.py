"""BIND of SOCKS4 and SOCKS5: two replies, one peer, and a listener that never outlives its client."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from netproxy.dialer.block import BlockDialer
from netproxy.errors import DialError, Reason
from netproxy.handler.announce import Announcement, Announcer
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.connections import Handshake
from netproxy.net.stream import Stream, complete
from netproxy.protocol import socks5
from tests.support.handlers import (
    LOCALHOST,
    SECONDS,
    Conversation,
    HandlerDependencies,
    check_relay,
    descriptors,
    eventually,
    refused,
    LiteralResolver,
    resolve,
)
from tests.support.sockets import tcp_pair

ANYBODY = Address("0.0.0.0", 0)
PEER = Address(LOCALHOST, 4321)  # BIND goes by its address; its port may be anything


class Socks4:
    refusal = b"\0\x5b\0\0\0\0\0\0"

    @staticmethod
    def handler(dependencies: HandlerDependencies) -> object:
        return dependencies.socks4()

    @staticmethod
    def request(target: Address) -> bytes:
        return b"\4\2" + target.port.to_bytes(2, "big") + socket.inet_aton(target.host) + b"\0"

    @staticmethod
    def reply(client: Conversation) -> Address:
        raw = client.read(8)
        assert raw[:2] == b"\0\x5a"
        return Address(socket.inet_ntoa(raw[4:]), int.from_bytes(raw[2:4], "big"))


class Socks5:
    refusal = b"\5\1\0\1\0\0\0\0\0\0"

    @staticmethod
    def handler(dependencies: HandlerDependencies) -> object:
        return dependencies.socks5()

    @staticmethod
    def request(target: Address) -> bytes:
        return b"\5\1\0" + socks5.encode_request(socks5.BIND, target)

    @staticmethod
    def reply(client: Conversation) -> Address:
        code, bound = complete(socks5.read_reply(Stream(client.socket)))
        assert code == 0
        return bound


@pytest.fixture(params=[Socks4, Socks5], ids=["socks4", "socks5"])
def version(request: pytest.FixtureRequest) -> type[Socks4] | type[Socks5]:
    return request.param


Version = type[Socks4] | type[Socks5]


def begin(
    version: Version, dependencies: HandlerDependencies, target: Address = PEER
) -> tuple[Conversation, Address]:
    """A conversation up to the first reply, and where the proxy listens."""
    client = Conversation(version.handler(dependencies))
    client.send(version.request(target))
    if version is Socks5:
        client.expect(b"\5\0")
    return client, version.reply(client)


def surroundings(**given: Any) -> HandlerDependencies:
    dependencies = HandlerDependencies(**given)
    dependencies.router.look_up = resolve
    return dependencies


def asked(peer: Address) -> Flow:
    return Flow("tcp", Address(LOCALHOST, 5000), peer, "test", "", (peer,))


def connect(address: Address, source: str = LOCALHOST) -> socket.socket:
    return socket.create_connection(address, SECONDS, (source, 0))


def test_two_replies_then_a_relay(version: Version) -> None:
    """Hazard 17."""
    dependencies = surroundings()
    client, bound = begin(version, dependencies)
    with client:
        assert client.silent()  # the second reply waits for the peer
        peer = connect(bound)
        name = Address(*peer.getsockname())
        assert version.reply(client) == name
        check_relay(client, peer)
    record = dependencies.log.records[0]
    assert record.flow.target == name
    assert (record.sent, record.received, record.ended) == (2, 8, "closed")
    assert (
        not dependencies.dialled
    )  # nothing goes out: who is asked is only which way this flow takes
    assert dependencies.router.flows[0].target == PEER


def test_a_peer_that_vanishes_is_noticed() -> None:
    """Hazard 86."""
    peers: list[socket.socket] = []
    with tcp_pair() as (near, _):

        def encode(bound: Address) -> bytes:
            peers.append(connect(bound))
            return b""

        stream, _ = complete(surroundings().binder.accept(Stream(near), asked(ANYBODY), encode))
        with peers[0], stream.socket as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


def test_a_wrong_peer_is_refused_and_the_right_one_still_accepted(version: Version) -> None:
    """Hazard 17."""
    dependencies = surroundings()
    client, bound = begin(version, dependencies)
    with client:
        for source in ("127.0.0.2", "127.0.0.3"):
            with connect(bound, source) as wrong:
                assert wrong.recv(1) == b""
        assert client.silent()
        with connect(bound) as right:
            assert version.reply(client) == Address(*right.getsockname())
    assert dependencies.counters.value("connections_refused", "wrong peer of a BIND") == 2


def test_an_unspecified_peer_is_anybody(version: Version) -> None:
    """Hazard 17."""
    if version is Socks4:
        pytest.skip("SOCKS4 has no such request: 0.0.0.0 is refused (row 13)")
    client, bound = begin(version, surroundings(), ANYBODY)
    with client, connect(bound, "127.0.0.9") as peer:
        assert version.reply(client) == Address(*peer.getsockname())


def test_only_one_peer_is_taken(version: Version) -> None:
    """Hazard 17."""
    client, bound = begin(version, surroundings())
    with client, connect(bound):
        version.reply(client)
        assert refused(bound)


def test_nobody_comes(version: Version) -> None:
    """Hazard 17."""
    before = descriptors()
    client, bound = begin(version, surroundings(bind_seconds=0.1))
    with client:
        client.expect(
            version.refusal[:1] + (b"\x06" if version is Socks5 else b"\x5b") + version.refusal[2:]
        )
        client.expect_end()
    assert refused(bound)
    assert descriptors() == before


@pytest.mark.parametrize("way", ["end", "reset"])
def test_the_listener_is_closed_when_the_client_leaves(version: Version, way: str) -> None:
    """Hazard 17."""
    before = descriptors()
    client, bound = begin(version, surroundings(bind_seconds=60))
    if way == "reset":
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    client.wait()
    assert refused(bound)
    assert descriptors() == before


def test_the_listener_is_closed_when_a_client_leaves_that_has_sent_early(version: Version) -> None:
    """Hazard 17."""
    client, bound = begin(version, surroundings(bind_seconds=60))
    client.send(b"early")
    client.close()
    client.wait()
    assert refused(bound)


def test_what_the_client_sends_early_reaches_the_peer_in_order(version: Version) -> None:
    client, bound = begin(version, surroundings())
    with client:
        client.send(b"early ")
        peer = connect(bound)
        version.reply(client)
        client.send(b"late")
        client.socket.shutdown(socket.SHUT_WR)
        with peer, peer.makefile("rb") as stream:
            assert stream.read() == b"early late"


def test_data_right_behind_the_request_reaches_the_peer(version: Version) -> None:
    dependencies = surroundings()
    with Conversation(version.handler(dependencies)) as client:
        client.send(version.request(PEER) + b"behind")
        if version is Socks5:
            client.expect(b"\5\0")
        with connect(version.reply(client)) as peer:
            assert peer.recv(16) == b"behind"


def test_it_listens_on_the_address_the_client_came_to_and_no_other(version: Version) -> None:
    """Hazard 18."""
    client, bound = begin(version, surroundings())
    with client:
        assert bound.host == LOCALHOST
        assert bound.port
        assert refused(Address("127.0.0.2", bound.port))  # which 0.0.0.0 would take


def test_an_ipv6_client_is_listened_for_on_ipv6() -> None:
    """Hazard 18."""
    with Conversation(surroundings().socks5(), "::1", "::1") as client:
        client.send(Socks5.request(Address("::", 0)))
        client.expect(b"\5\0")
        bound = Socks5.reply(client)
        assert bound.host == "::1"
        with socket.create_connection(bound, SECONDS) as peer:
            assert Socks5.reply(client) == Address(*peer.getsockname()[:2])


def test_a_peer_asked_for_by_name_is_taken() -> None:
    """Clients that leave names to the proxy name the peer of a BIND as they named the target of their CONNECT."""
    client, bound = begin(Socks5, surroundings(bind_seconds=0.5), Address("localhost", 21))
    with client, connect(bound) as peer:
        assert Socks5.reply(client) == Address(*peer.getsockname())


def test_a_peer_is_who_was_found_by_the_one_lookup_that_was_checked() -> None:
    """Hazard 75."""
    answers = iter(["127.0.0.2", LOCALHOST])  # a name server that says something else each time
    dependencies = surroundings()
    dependencies.router.look_up = lambda target: [target._replace(host=next(answers))]
    client, bound = begin(Socks5, dependencies, Address("flips.example", 21))
    with client:
        with connect(bound) as wrong:
            assert not wrong.recv(1)
        with connect(bound, "127.0.0.2") as peer:
            assert Socks5.reply(client) == Address(*peer.getsockname())
    assert next(answers) == LOCALHOST


def test_a_peer_whose_name_is_not_found_is_refused_at_once() -> None:
    with Conversation(surroundings().socks5()) as client:
        client.send(Socks5.request(Address("nowhere.example", 21)))
        client.expect(b"\5\0\5\4\0\1\0\0\0\0\0\0")
        client.expect_end()


def test_the_first_reply_names_the_announced_address(version: Version) -> None:
    announcer = Announcer([Announcement(None, Address("203.0.113.5", 0))], LiteralResolver())
    client, bound = begin(version, surroundings(announcer=announcer))
    with client:
        assert bound.host == "203.0.113.5"
        with connect(Address(LOCALHOST, bound.port)):
            version.reply(client)


def test_an_announced_port_is_the_relays_and_never_that_of_a_bind(version: Version) -> None:
    """announce: address:port tells where the published relay port is; a BIND listens on a port of its own."""
    announcer = Announcer([Announcement(None, Address("203.0.113.5", 1080))], LiteralResolver())
    client, bound = begin(version, surroundings(announcer=announcer))
    with client:
        assert bound.host == "203.0.113.5"
        assert bound.port != 1080
        with connect(Address(LOCALHOST, bound.port)):
            version.reply(client)


def test_a_way_out_that_cannot_bind_refuses(version: Version) -> None:
    dependencies = surroundings()
    dependencies.dialer.carries = frozenset({"tcp", "udp"})
    with Conversation(version.handler(dependencies)) as client:
        client.send(version.request(PEER))
        if version is Socks5:
            client.expect(b"\5\0\5\7\0\1\0\0\0\0\0\0")
        else:
            client.expect(version.refusal)
        client.expect_end()


def test_a_bind_that_the_rules_refuse_is_refused_with_02() -> None:
    """Hazard 14."""
    dependencies = surroundings()
    dependencies.router.dialer = BlockDialer()
    with Conversation(dependencies.socks5()) as client:
        client.send(Socks5.request(PEER))
        client.expect(b"\5\0\5\2\0\1\0\0\0\0\0\0")
        client.expect_end()


def test_a_socket_that_cannot_be_had_is_one_refusal(
    version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    dependencies = surroundings()
    with Conversation(version.handler(dependencies)) as client:
        monkeypatch.setattr("netproxy.handler.bind._listen", no_descriptor)
        client.send(version.request(PEER))
        if version is Socks5:
            client.expect(b"\5\0")
        client.expect(version.refusal)
        client.expect_end()


def no_descriptor(host: str) -> socket.socket:
    raise OSError(24, "Too many open files")


def test_a_hundred_binds_leave_nothing_open(version: Version) -> None:
    before = descriptors()
    dependencies = surroundings()
    for _ in range(100):
        client, bound = begin(version, dependencies)
        with client, connect(bound):
            version.reply(client)
    eventually(lambda: descriptors() == before)


def test_an_ipv4_client_of_socks4_gets_ipv4_replies_whatever_is_announced() -> None:
    announcer = Announcer([Announcement(None, Address("2001:db8::5", 0))], LiteralResolver())
    client, bound = begin(Socks4, surroundings(announcer=announcer))
    with client:
        assert bound.host == LOCALHOST


def test_the_binder_says_why_nobody_came() -> None:
    dependencies = surroundings(bind_seconds=0.05)
    with Conversation(Once(dependencies)) as client:
        client.expect_closed()
    assert isinstance(client.raised, DialError)
    assert client.raised.reason is Reason.TIMEOUT


class Once:
    def __init__(self, dependencies: HandlerDependencies) -> None:
        self.dependencies = dependencies

    def handle(self, stream: Stream, client: Address) -> Handshake:
        yield from self.dependencies.binder.accept(stream, asked(PEER), lambda bound: b"")
        return None
