"""connect-udp for all targets of a client in one stream, in the handler of HTTP.

Behind it are the NAT table and real UDP sockets.
"""

from __future__ import annotations

import re
import socket
from typing import Any, Callable, Sequence

import pytest

from netproxy.errors import DialError, FlowRefused, Reason
from netproxy.handler.announce import Announcement, Announcer, ConfiguredAddress, public_addresses
from netproxy.interfaces.addresses import UNIX_CLIENT, Address, UnixAddress
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer, Route
from netproxy.net.frames import answering
from netproxy.protocol.http.bound_udp import encode_address
from netproxy.relay.table.policy import NatPolicy
from netproxy.relay.quota import SessionLimits
from tests.handler.test_stream_udp import ACCEPTED, Rig, echo, make_rig, path, request
from tests.support.handlers import LOCALHOST, Conversation
from tests.support.sockets import HAS_IPV6, SECONDS, address_of, udp, wait_until
from tests.support.upstreams import FakeConn, FakeDialer

ASKS = b"Connect-UDP-Bind: ?1"
ANY = b"/.well-known/masque/udp/%2A/%2A/"
ALL, ALL_ACK = b"\x11\x02\x02\x00", b"\x12\x01\x02"
TARGET = Address("192.0.2.6", 443)


def datagram(context: int, data: bytes, address: Address | None = None) -> bytes:
    """Return a DATAGRAM capsule, with the address in it if there is one."""
    value = bytes((context,)) + (encode_address(address) if address else b"") + data
    assert len(value) < 64
    return b"\0%c%b" % (len(value), value)


def assign(context: int, address: Address) -> bytes:
    raw = encode_address(address)
    return b"\x11%c%c%b" % (1 + len(raw), context, raw)


def read_head(client: Conversation) -> bytes:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = client.socket.recv(1)
        assert piece, f"closed after {data!r}"
        data += piece
    return data


def begin(client: Conversation, resource: bytes = ANY) -> list[Address]:
    """Ask for a bound stream; return its public addresses."""
    client.send(request(resource, ASKS))
    head = read_head(client)
    assert head.startswith(ACCEPTED[:-2] + b"Connect-UDP-Bind: ?1\r\nProxy-Public-Address: ")
    told = head.partition(b"Proxy-Public-Address: ")[2].removesuffix(b"\r\n\r\n").decode()
    found = re.findall(r'"\[?([0-9a-f.:]+?)\]?:([0-9]+)"', told)
    assert ", ".join(f'"{Address(host, int(port))}"' for host, port in found) == told
    return [Address(host, int(port)) for host, port in found]


def test_all_targets_see_the_address_that_the_answer_has() -> None:
    """RFC 4787: the mapping is endpoint-independent."""
    with make_rig() as rig, echo() as (first, seen), echo() as (second, also):
        with Conversation(rig.http) as client:
            public, *others = begin(client)
            assert public.host == LOCALHOST and not [a for a in others if a.port != public.port]
            client.send(ALL + datagram(2, b"ping", first))
            client.expect(ALL_ACK + datagram(2, b"gnip", first))
            client.send(datagram(2, b"", second))
            client.expect(datagram(2, b"", second))
            client.send(datagram(2, b"again", first))
            client.expect(datagram(2, b"niaga", first))
        assert {peer[:2] for _, peer in seen + also} == {public}
        rig.check_clean()
        [record] = rig.records.records
        assert (record.flow.target, record.upstream) == (first, "direct")
        assert (record.datagrams_sent, record.datagrams_received) == (3, 3)
        assert [flow.target for flow in rig.flows] == [first, second]


def test_datagrams_of_strangers_arrive() -> None:
    with make_rig() as rig, Conversation(rig.http) as client, udp() as stranger:
        public = begin(client)[0]
        client.send(ALL)
        client.expect(ALL_ACK)
        stranger.sendto(b"knock", public)
        client.expect(datagram(2, b"knock", address_of(stranger)))


def test_target_of_the_request_has_context_0() -> None:
    with make_rig() as rig, echo() as (first, seen), echo() as (second, also):
        with Conversation(rig.http) as client:
            public = begin(client, path(first))[0]
            client.send(datagram(0, b"ping"))
            client.expect(datagram(0, b"gnip"))
            client.send(ALL + datagram(2, b"pong", second))
            client.expect(ALL_ACK + datagram(2, b"gnop", second))
        assert {peer[:2] for _, peer in seen + also} == {public}


def test_registered_target_goes_without_its_address_and_others_are_shut_out() -> None:
    with make_rig() as rig, echo() as (target, _), udp() as stranger:
        with Conversation(rig.http) as client:
            public = begin(client)[0]
            client.send(assign(4, target) + datagram(4, b"ping"))
            client.expect(b"\x12\x01\x04" + datagram(4, b"gnip"))
            stranger.sendto(b"knock", public)
            rig.counts.wait_for("drops", "no context")
            client.send(datagram(4, b"again"))
            client.expect(datagram(4, b"niaga"))


@pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
def test_both_ip_versions_share_the_port() -> None:
    with make_rig() as rig, echo("::1") as (sixth, seen), echo() as (fourth, also):
        with Conversation(rig.http) as client:
            port = begin(client)[0].port
            client.send(ALL + datagram(2, b"six", sixth))
            client.expect(ALL_ACK + datagram(2, b"xis", sixth))
            client.send(datagram(2, b"four", fourth))
            client.expect(datagram(2, b"ruof", fourth))
        assert {peer[1] for _, peer in seen + also} == {port}


def test_bound_stream_byte_by_byte_is_served() -> None:
    """Hazard 1."""
    with make_rig() as rig, echo() as (target, _), Conversation(rig.http) as client:
        client.trickle(request(ANY, ASKS))
        read_head(client)
        client.trickle(ALL + b"\x17\2no" + assign(4, target) + datagram(4, b"ping"))
        client.expect(ALL_ACK + b"\x12\x01\x04" + datagram(4, b"gnip"))


class Rules:
    """Refuses targets of one port."""

    def __init__(self, rig: Rig, port: int) -> None:
        self.port = port
        self._route: Callable[[Flow], Route] = rig.route
        rig.route = self.route  # type: ignore[method-assign]

    def route(self, flow: Flow) -> Route:
        if flow.target.port == self.port:
            raise DialError(Reason.DENIED, str(flow.target))
        return self._route(flow)


def test_each_target_is_routed_and_a_refused_one_gets_no_context() -> None:
    with make_rig() as rig, echo() as (target, _), Conversation(rig.http) as client:
        Rules(rig, 9)
        begin(client)
        refused = Address("192.0.2.1", 9)
        client.send(ALL + assign(4, refused) + assign(6, target))
        client.expect(ALL_ACK + b"\x13\x01\x04" + b"\x12\x01\x06")
        assert rig.counts.of("dial_failures", Reason.DENIED.value) == 1
        [record] = rig.records.records
        assert (record.flow.target, record.flow.network) == (refused, "udp")
        client.send(datagram(2, b"x", refused) + datagram(4, b"x") + datagram(6, b"ping"))
        client.expect(datagram(6, b"gnip"))
        assert rig.counts.of("drops", Reason.DENIED.value) == 1
        assert rig.counts.of("drops", "unknown context") == 1


MALFORMED = {
    "second context for all targets": ALL + b"\x11\x02\x04\x00",
    "context 0 without a target": datagram(0, b"x"),
    "context of a proxy": b"\x11\x02\x03\x00",
    "acknowledgement of nothing": b"\x12\x01\x03",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=list(MALFORMED))
def test_malformed_capsule_ends_the_stream_and_is_counted(data: bytes) -> None:
    """Hazard 176."""
    with make_rig() as rig, Conversation(rig.http) as client:
        begin(client)
        client.send(data)
        rig.counts.wait_for("drops", "malformed")
        client.socket.settimeout(SECONDS)
        assert client.read(64) in (b"", ALL_ACK)


def test_client_that_registers_and_reads_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 177."""
    monkeypatch.setattr(answering, "ANSWERS_LIMIT", 8)
    monkeypatch.setattr(answering.AnsweringStream, "_write", lambda self, data: 0)
    with make_rig() as rig, Conversation(rig.http) as client:
        begin(client)
        client.send(
            b"".join(assign(context, TARGET._replace(port=context)) for context in (2, 4, 6))
        )
        rig.counts.wait_for("drops", "too many answers")
        client.expect_closed()


def test_answers_that_wait_are_sent_once_the_stream_takes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = [True, True]
    write = answering.AnsweringStream._write

    def slow(self: Any, data: bytes) -> int:
        return 0 if full and full.pop() else write(self, data)

    with make_rig() as rig, Conversation(rig.http) as client:
        begin(client)
        monkeypatch.setattr(answering.AnsweringStream, "_write", slow)
        client.send(ALL)
        client.expect(ALL_ACK)
        assert not full


def test_end_of_the_session_ends_the_stream() -> None:
    """A public address that was told must not change."""
    with make_rig() as rig, Conversation(rig.http) as client:
        begin(client)
        [session] = list(rig.table._mappings)
        assert rig.table.expire(1e9) == []
        session.kill()
        client.expect_end()


def test_target_that_a_reload_leads_elsewhere_ends_the_stream() -> None:
    """Hazard 179."""
    with make_rig() as rig, echo() as (target, _), Conversation(rig.http) as client:
        begin(client)
        client.send(ALL + datagram(2, b"ping", target))
        client.expect(ALL_ACK + datagram(2, b"gnip", target))
        rig.dialer = FakeDialer("other")
        client.send(datagram(2, b"lost", TARGET))
        client.expect_end()
        rig.counts.wait_for("drops", "rerouted")


class Several(Rig):
    """A rig whose rules choose between two upstreams."""

    def candidates(self, flow: Flow) -> list[Dialer]:
        return [self.dialer, FakeDialer("other")]


class Blocking(Rig):
    """A rig whose rules also refuse some targets."""

    def candidates(self, flow: Flow) -> list[Dialer]:
        refuses: Any = FakeDialer("block")
        refuses.carries = frozenset()
        return [refuses, self.dialer, self.dialer]


def served(rig: Rig, resource: bytes) -> bytes:
    """Return the head of the answer to a request for a bound stream."""
    with Conversation(rig.http) as client:
        client.send(request(resource, ASKS))
        head = read_head(client)
        if head.startswith(b"HTTP/1.1 101"):
            client.send(datagram(0, b"ping"))
            client.expect(datagram(0, b"gnip"))
        return head


def symmetric(rig: Rig) -> None:
    rig.table.set_policy(NatPolicy(SessionLimits(100, 100), symmetric=True))


def without_knowledge(rig: Rig) -> None:
    type(rig.dialer).knows_bound = False


@pytest.mark.parametrize("make", [Several, Rig], ids=["two upstreams", "symmetric"])
def test_targets_with_several_addresses_are_not_bound(make: type[Rig]) -> None:
    """Hazard 180: the client gets connect-udp without the extension, or 501 without a target."""
    rig = make()
    if make is Rig:
        symmetric(rig)
    with echo() as (target, _):
        assert served(rig, path(target)) == ACCEPTED
    head = served(rig, ANY)
    assert head.startswith(b"HTTP/1.1 501 Not Implemented\r\n")
    assert b"Proxy-Status: netproxy; error=proxy_configuration_error\r\n" in head
    rig.check_clean()
    assert rig.counts.of("dial_failures", Reason.UNSUPPORTED.value) == 1
    assert "different public addresses" in rig.records.records[-1].ended


def test_rules_that_refuse_targets_do_not_prevent_it() -> None:
    rig = Blocking()
    with Conversation(rig.http) as client:
        assert begin(client)
    rig.check_clean()


def test_name_is_served_without_the_extension() -> None:
    with make_rig() as rig, echo() as (target, _):
        assert served(rig, path(target._replace(host="localhost.test"))) == ACCEPTED


class TestUpstreams:
    """The proxy in front of another upstream, whose public address it passes on."""

    def rig(self, bound: Sequence[Address]) -> tuple[Any, FakeDialer]:
        class Upstream(FakeDialer):
            knows_bound = True

            def dial_packet(self, flow: Flow) -> FakeConn:
                conn = super().dial_packet(flow)
                conn.bound = bound
                return conn

        dialer = Upstream()
        return make_rig(dialer), dialer

    def test_address_of_the_upstream_is_passed_on(self) -> None:
        public = [Address("198.51.100.7", 4000), Address("2001:db8::7", 4000)]
        made, dialer = self.rig(public)
        with made as rig, Conversation(rig.http) as client:
            assert begin(client) == public
            client.send(ALL + datagram(2, b"x", TARGET))
            client.expect(ALL_ACK)
            wait_until(lambda: dialer.conns[0].sent)
            dialer.conns[0].offer((b"y", ("203.0.113.1", 7)))
            client.expect(datagram(2, b"y", Address("203.0.113.1", 7)))
        assert len(dialer.conns) == 1

    def test_upstream_that_does_not_tell_serves_the_target_of_the_request(self) -> None:
        made, dialer = self.rig(())
        with made as rig:
            with Conversation(rig.http) as client:
                client.send(request(path(TARGET), ASKS))
                client.expect(ACCEPTED)
                # Both ends have not agreed: these are unknown capsules.
                client.send(ALL + datagram(0, b"x"))
                wait_until(lambda: dialer.conns[0].sent)
                assert [data for data, _ in dialer.conns[0].sent] == [b"x"]
                dialer.conns[0].offer((b"s", ("203.0.113.1", 7)), (b"y", TARGET))
                client.expect(datagram(0, b"y"))
                assert rig.counts.of("drops", "no context") == 1
            with Conversation(rig.http) as client:
                client.send(request(ANY, ASKS))
                assert read_head(client).startswith(b"HTTP/1.1 501 ")

    def test_failed_dial_is_answered_and_recorded(self) -> None:
        made, dialer = self.rig(())
        dialer.refusal = DialError(Reason.TIMEOUT, hop="far")
        with made as rig, Conversation(rig.http) as client:
            client.send(request(ANY, ASKS))
            assert read_head(client).startswith(b"HTTP/1.1 504 ")
        assert rig.counts.of("dial_failures", Reason.TIMEOUT.value) == 1

    def test_session_limit_is_answered_with_429(self) -> None:
        made, _ = self.rig(())
        with made as rig, Conversation(rig.http) as client:
            rig.table.set_policy(NatPolicy(SessionLimits(100, 0)))
            client.send(request(ANY, ASKS))
            assert read_head(client).startswith(b"HTTP/1.1 429 ")


class Local:
    """A stream of which only the local address is asked."""

    def __init__(self, local: Address) -> None:
        self._local = local

    def local_address(self) -> Address:
        return self._local


class TestPublicAddresses:
    CLIENT = Address("192.168.1.7", 40000)
    BOTH = [Address("0.0.0.0", 4000), Address("::", 4000)]

    @pytest.fixture(autouse=True)
    def _sources(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sources = {False: "10.0.0.1", True: ""}
        monkeypatch.setattr("netproxy.handler.announce.source_address", sources.__getitem__)

    def told(self, local: Address, announcer: Announcer | None, bound: Any = BOTH) -> list[Address]:
        return public_addresses(announcer, self.CLIENT, Local(local), bound)  # type: ignore[arg-type]

    def test_local_address_of_the_stream_is_told(self) -> None:
        """There is no route for IPv6."""
        assert self.told(Address("192.168.1.1", 1080), Announcer([])) == [
            Address("192.168.1.1", 4000)
        ]
        assert self.told(Address("2001:db8::1", 1080), None) == [
            Address("10.0.0.1", 4000),
            Address("2001:db8::1", 4000),
        ]

    def test_announced_address_is_told_with_the_port_of_the_socket(self) -> None:
        announced = Address("203.0.113.5", 1080)
        announcer = Announcer([Announcement(None, ConfiguredAddress(announced, None))])  # type: ignore[arg-type]
        assert self.told(Address("192.168.1.1", 1080), announcer) == [Address("203.0.113.5", 4000)]

    def test_client_of_a_unix_socket_is_told_the_address_of_the_default_route(self) -> None:
        assert UNIX_CLIENT.host
        assert self.told(UnixAddress.of("/run/x"), Announcer([])) == [Address("10.0.0.1", 4000)]

    def test_known_address_is_told_as_it_is(self) -> None:
        bound = [Address("198.51.100.7", 4000)]
        announcer = Announcer(
            [Announcement(None, ConfiguredAddress(Address("203.0.113.5", 0), None))]  # type: ignore[arg-type]
        )
        assert self.told(Address("192.168.1.1", 1080), announcer, bound) == bound
        assert self.told(Address("192.168.1.1", 1080), announcer, []) == []


def test_source_address_is_one_of_this_machine() -> None:
    from netproxy.net.local.interfaces import source_address

    for ipv6, family in ((False, socket.AF_INET), (True, socket.AF_INET6)):
        host = source_address(ipv6)
        if host:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.bind((host, 0))


def test_flow_that_a_limit_refuses_has_its_own_reason() -> None:
    """FlowRefused of the permission reaches the registration as a refusal."""
    with make_rig() as rig, Conversation(rig.http) as client:
        begin(client)
        real = rig.route

        def route(flow: Flow) -> Route:
            if flow.target == TARGET:
                raise FlowRefused(Reason.DENIED, said="unknown fake address", decided="dns.fake")
            return real(flow)

        rig.route = route  # type: ignore[method-assign]
        client.send(assign(2, TARGET))
        client.expect(b"\x13\x01\x02")
        assert rig.counts.of("requests_refused", "unknown fake address") == 1
