"""BIND of SOCKS4 and SOCKS5: two replies, one peer, and the listening socket is closed."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import pytest

from netproxy.dialer.plain.block import BlockDialer
from netproxy.errors import DialError, Reason
from netproxy.handler import bind
from netproxy.handler.announce import Announcement, Announcer, ConfiguredAddress
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Blocking, Events, Handshake
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import Stream, complete
from netproxy.protocol import socks5
from tests.support.handlers import (
    LOCALHOST,
    SECONDS,
    Conversation,
    HandlerDependencies,
    LiteralResolver,
    check_relay,
    descriptors,
    eventually,
    refused,
    reset,
    resolve,
)
from tests.support.sockets import tcp_pair

ANY_PEER = Address("0.0.0.0", 0)
# BIND compares the address of the peer, not its port.
PEER = Address(LOCALHOST, 4321)


class Socks4:
    """Requests and replies of SOCKS4."""

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
    """Requests and replies of SOCKS5."""

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
    """Return a conversation up to the first reply, and the address on which the proxy listens."""
    client = Conversation(version.handler(dependencies))
    client.send(version.request(target))
    if version is Socks5:
        client.expect(b"\5\0")
    return client, version.reply(client)


def dependencies_of(**given: Any) -> HandlerDependencies:
    """Return HandlerDependencies whose router resolves literal addresses and localhost."""
    dependencies = HandlerDependencies(**given)
    dependencies.router.look_up = resolve
    return dependencies


def flow_for(peer: Address) -> Flow:
    return Flow("tcp", Address(LOCALHOST, 5000), peer, "test", "", (peer,))


def connect(address: Address, source: str = LOCALHOST) -> socket.socket:
    return socket.create_connection(address, SECONDS, (source, 0))


def test_bind_sends_two_replies_then_relays(version: Version) -> None:
    """Hazard 17."""
    dependencies = dependencies_of()
    client, bound = begin(version, dependencies)
    with client:
        assert client.silent()
        peer = connect(bound)
        name = Address(*peer.getsockname())
        assert version.reply(client) == name
        check_relay(client, peer)
    record = dependencies.log.records[0]
    assert record.flow.target == name
    assert (record.sent, record.received, record.ended) == (2, 8, "closed")
    # The router chooses an upstream for the flow, but nothing is dialled.
    assert not dependencies.dialled
    assert dependencies.router.flows[0].target == PEER
    assert dependencies.router.flows[0].command == "bind"


def test_accepted_peer_has_keepalive_and_user_timeout() -> None:
    """Hazard 86."""
    peers: list[socket.socket] = []
    with tcp_pair() as (near, _):

        def encode(bound: Address) -> bytes:
            peers.append(connect(bound))
            return b""

        stream, _ = complete(
            dependencies_of().binder.accept(Stream(near), flow_for(ANY_PEER), encode)
        )
        with peers[0], stream.socket as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


def test_wrong_peer_is_refused_and_right_peer_still_accepted(version: Version) -> None:
    """Hazard 17."""
    dependencies = dependencies_of()
    client, bound = begin(version, dependencies)
    with client:
        for source in ("127.0.0.2", "127.0.0.3"):
            with connect(bound, source) as wrong:
                assert wrong.recv(1) == b""
        assert client.silent()
        with connect(bound) as right:
            assert version.reply(client) == Address(*right.getsockname())
    assert dependencies.counters.value("connections_refused", "wrong peer of a BIND") == 2


def test_bind_for_unspecified_address_accepts_any_peer(version: Version) -> None:
    """Hazard 17."""
    client, bound = begin(version, dependencies_of(), ANY_PEER)
    with client, connect(bound, "127.0.0.9") as peer:
        assert version.reply(client) == Address(*peer.getsockname())


def test_bind_stops_listening_after_its_peer(version: Version) -> None:
    """Hazard 17."""
    client, bound = begin(version, dependencies_of())
    with client, connect(bound):
        version.reply(client)
        assert refused(bound)


def test_bind_without_peer_is_refused_and_stops_listening(version: Version) -> None:
    """Hazard 17."""
    before = descriptors()
    client, bound = begin(version, dependencies_of(bind_seconds=0.1))
    with client:
        client.expect(
            version.refusal[:1] + (b"\x06" if version is Socks5 else b"\x5b") + version.refusal[2:]
        )
        client.expect_end()
    assert refused(bound)
    assert descriptors() == before


@pytest.mark.parametrize("closed_by", ["end", "reset"])
def test_bind_stops_listening_when_client_leaves(version: Version, closed_by: str) -> None:
    """Hazard 17."""
    before = descriptors()
    dependencies = dependencies_of(bind_seconds=60)
    client, bound = begin(version, dependencies)
    if closed_by == "reset":
        reset(client.socket)
    client.close()
    client.wait()
    assert refused(bound)
    assert descriptors() == before
    records = dependencies.log.records
    assert [record.ended for record in records] == ["client left"]


def test_record_of_a_bind_that_cannot_listen_tells_why(
    version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(host: str) -> tuple[socket.socket, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(bind, "_listen", fail)
    dependencies = dependencies_of()
    with Conversation(version.handler(dependencies)) as client:
        client.send(version.request(PEER))
        if version is Socks5:
            client.expect(b"\5\0")
        client.expect(version.refusal)
        client.expect_end()
    records = dependencies.log.records
    assert [record.ended for record in records] == ["Too many open files"]


def test_bind_stops_listening_when_client_leaves_after_early_data(version: Version) -> None:
    """Hazard 17."""
    client, bound = begin(version, dependencies_of(bind_seconds=60))
    client.send(b"early")
    client.close()
    client.wait()
    assert refused(bound)


def test_early_data_of_client_reaches_peer_in_order(version: Version) -> None:
    client, bound = begin(version, dependencies_of())
    with client:
        client.send(b"early ")
        peer = connect(bound)
        version.reply(client)
        client.send(b"late")
        client.socket.shutdown(socket.SHUT_WR)
        with peer, peer.makefile("rb") as stream:
            assert stream.read() == b"early late"


def test_data_behind_the_request_reaches_peer(version: Version) -> None:
    dependencies = dependencies_of()
    with Conversation(version.handler(dependencies)) as client:
        client.send(version.request(PEER) + b"behind")
        if version is Socks5:
            client.expect(b"\5\0")
        with connect(version.reply(client)) as peer:
            assert peer.recv(16) == b"behind"


def test_bind_listens_only_on_the_address_that_the_client_connected_to(version: Version) -> None:
    """Hazard 18."""
    client, bound = begin(version, dependencies_of())
    with client:
        assert bound.host == LOCALHOST
        assert bound.port
        # A socket on 0.0.0.0 would accept this connection.
        assert refused(Address("127.0.0.2", bound.port))


def test_bind_of_ipv6_client_listens_on_ipv6() -> None:
    """Hazard 18."""
    with Conversation(dependencies_of().socks5(), "::1", "::1") as client:
        client.send(Socks5.request(Address("::", 0)))
        client.expect(b"\5\0")
        bound = Socks5.reply(client)
        assert bound.host == "::1"
        with socket.create_connection(bound, SECONDS) as peer:
            assert Socks5.reply(client) == Address(*peer.getsockname()[:2])


def test_peer_named_by_host_name_is_accepted() -> None:
    """Clients that let the proxy resolve names send a name for the peer of a BIND too."""
    client, bound = begin(Socks5, dependencies_of(bind_seconds=0.5), Address("localhost", 21))
    with client, connect(bound) as peer:
        assert Socks5.reply(client) == Address(*peer.getsockname())


def test_peer_is_the_address_of_the_lookup_that_the_policy_checked() -> None:
    """Hazard 75."""
    # A name server whose second answer differs.
    answers = iter(["127.0.0.2", LOCALHOST])
    dependencies = dependencies_of()
    dependencies.router.look_up = lambda target: [target._replace(host=next(answers))]
    client, bound = begin(Socks5, dependencies, Address("flips.example", 21))
    with client:
        with connect(bound) as wrong:
            assert not wrong.recv(1)
        with connect(bound, "127.0.0.2") as peer:
            assert Socks5.reply(client) == Address(*peer.getsockname())
    assert next(answers) == LOCALHOST


def test_unknown_name_of_peer_is_refused_at_once() -> None:
    with Conversation(dependencies_of().socks5()) as client:
        client.send(Socks5.request(Address("nowhere.example", 21)))
        client.expect(b"\5\0\5\4\0\1\0\0\0\0\0\0")
        client.expect_end()


def announcing(address: Address) -> Announcer:
    """Return an Announcer that tells all clients an address."""
    return Announcer([Announcement(None, ConfiguredAddress(address, LiteralResolver()))])


def test_first_reply_names_the_announced_address(version: Version) -> None:
    announcer = announcing(Address("203.0.113.5", 0))
    client, bound = begin(version, dependencies_of(announcer=announcer))
    with client:
        assert bound.host == "203.0.113.5"
        with connect(Address(LOCALHOST, bound.port)):
            version.reply(client)


def test_announced_port_is_never_told_for_a_bind(version: Version) -> None:
    """The port in `announce` is that of the UDP relay; a BIND listens on another port."""
    announcer = announcing(Address("203.0.113.5", 1080))
    client, bound = begin(version, dependencies_of(announcer=announcer))
    with client:
        assert bound.host == "203.0.113.5"
        assert bound.port != 1080
        with connect(Address(LOCALHOST, bound.port)):
            version.reply(client)


def test_announced_name_is_looked_up_by_a_pool_thread() -> None:
    """A lookup blocks, and would stop the poller's thread, which serves all connections."""
    binder = dependencies_of(announcer=announcing(Address("localhost", 0))).binder
    replies: list[Address] = []

    def encode(bound: Address) -> bytes:
        replies.append(bound)
        return b"first reply"

    with tcp_pair() as (near, far):
        steps = binder.accept(Stream(near), flow_for(PEER), encode)
        need = next(steps)
        assert isinstance(need, Blocking) and not replies
        assert isinstance(steps.send(need.block()), Events)
        assert [bound.host for bound in replies] == [LOCALHOST] and far.recv(64) == b"first reply"
        steps.close()


def test_upstream_without_bind_is_refused(version: Version) -> None:
    dependencies = dependencies_of()
    dependencies.dialer.carries = frozenset({"tcp", "udp"})
    with Conversation(version.handler(dependencies)) as client:
        client.send(version.request(PEER))
        if version is Socks5:
            client.expect(b"\5\0\5\7\0\1\0\0\0\0\0\0")
        else:
            client.expect(version.refusal)
        client.expect_end()


def test_bind_that_the_rules_block_is_refused_with_code_2() -> None:
    """Hazard 14."""
    dependencies = dependencies_of()
    dependencies.router.dialer = BlockDialer()
    with Conversation(dependencies.socks5()) as client:
        client.send(Socks5.request(PEER))
        client.expect(b"\5\0\5\2\0\1\0\0\0\0\0\0")
        client.expect_end()


def test_bind_without_descriptors_is_refused_once(
    version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    dependencies = dependencies_of()
    with Conversation(version.handler(dependencies)) as client:
        monkeypatch.setattr("netproxy.handler.bind._listen", no_descriptor)
        client.send(version.request(PEER))
        if version is Socks5:
            client.expect(b"\5\0")
        client.expect(version.refusal)
        client.expect_end()


def no_descriptor(host: str) -> socket.socket:
    raise OSError(24, "Too many open files")


def test_hundred_binds_leave_no_descriptor_open(version: Version) -> None:
    before = descriptors()
    dependencies = dependencies_of()
    for _ in range(100):
        client, bound = begin(version, dependencies)
        with client, connect(bound):
            version.reply(client)
    eventually(lambda: descriptors() == before)


def test_socks4_replies_are_ipv4_though_ipv6_is_announced() -> None:
    announcer = announcing(Address("2001:db8::5", 0))
    client, bound = begin(Socks4, dependencies_of(announcer=announcer))
    with client:
        assert bound.host == LOCALHOST


def test_binder_without_peer_raises_timeout() -> None:
    dependencies = dependencies_of(bind_seconds=0.05)
    with Conversation(BindHandler(dependencies)) as client:
        client.expect_closed()
    assert isinstance(client.raised, DialError)
    assert client.raised.reason is Reason.TIMEOUT


class BindHandler:
    def __init__(self, dependencies: HandlerDependencies) -> None:
        self.dependencies = dependencies

    def handle(self, stream: Stream, client: Address) -> Handshake:
        yield from self.dependencies.binder.accept(stream, flow_for(PEER), lambda bound: b"")
        return None
