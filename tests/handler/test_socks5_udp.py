"""SOCKS5 datagrams through a real daemon: what passes, what is dropped and counted."""

from __future__ import annotations

from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.socks5 import encode_header
from tests.support.handlers import LOCALHOST, descriptors, eventually
from tests.support.relays import (
    NO_HINT,
    SPS,
    Running,
    UdpClient,
    UdpPort,
    running,
    send_train,
    sessions_threads,
)

UNKNOWN_HOST = "127.0.0.9"


@pytest.fixture(params=["mmsg", "trains", "single"])
def relay(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A relay at each level of batching.  Clients must not notice which."""
    with running(SPS + "\nudp: {batching: %s}" % request.param) as relay:
        yield relay


def header(target: UdpPort) -> bytes:
    return encode_header(target.address)


def check_dropped(relay: Running, reason: str, before: int = 0) -> None:
    """Wait until one datagram has been dropped for a reason."""
    eventually(lambda: relay.count("drops", reason) == before + 1)


def check_order(relay: Running, sizes: list[int]) -> None:
    """Send datagrams of these lengths in one batch, in both directions."""
    sent = [bytes((at,)) * size for at, size in enumerate(sizes)]
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        with relay.held():
            for data in sent:
                client.to(target.address, data)
        for data in sent:
            target.expect(data)
        for data in sent:
            target.send(data, seen)
        assert [client.receive()[0] for _ in sent] == sent


# -- what passes


def test_two_targets_see_one_port_of_a_client(relay: Running) -> None:
    with (
        UdpClient(relay.port) as client,
        UdpPort("127.0.0.1") as first,
        UdpPort("127.0.0.2") as other,
    ):
        seen = {client.check_echo(first), client.check_echo(other), client.check_echo(first)}
        assert len({address.port for address in seen}) == 1
        assert relay.state() == {"associations": 1, "sessions": 1, "entries": 2}


def test_ipv6_target_sees_the_same_port(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as first, UdpPort("::1") as other:
        assert client.check_echo(first).port == client.check_echo(other).port


def test_two_clients_have_two_ports(relay: Running) -> None:
    with UdpClient(relay.port) as first, UdpClient(relay.port) as other, UdpPort() as target:
        assert first.check_echo(target, b"one").port != other.check_echo(target, b"other").port


def test_target_by_name_is_reached_and_replies(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort("::") as target:
        for data in (b"first", b"second"):
            client.to(Address("localhost", target.address.port), data)
            seen = target.expect(data)
            target.send(b"back " + data, seen)
            answer, source = client.receive()
            assert answer == b"back " + data
            assert source.host in ("127.0.0.1", "::1") and source.port == target.address.port


def test_name_that_is_not_found_loses_its_datagrams_only(
    relay: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise OSError("no such name")

    with UdpClient(relay.port) as client, UdpPort() as target:
        monkeypatch.setattr("socket.getaddrinfo", unknown)
        client.to(Address("nowhere.invalid", 53), b"lost")
        check_dropped(relay, "name not resolved")
        client.check_echo(target)


def test_datagrams_keep_their_order_and_lengths(relay: Running) -> None:
    """Runs and trains are not visible from outside."""
    check_order(relay, [1, 1200, 1200, 1200, 7, 7, 1200, 1200, 1201, 9000, 9000, 3, 1200])


@pytest.mark.parametrize("sizes", [[0], [0, 0], [0, 1], [7, 0], [7, 7, 0], [7, 0, 0, 7]], ids=str)
def test_empty_datagrams_among_others_arrive_in_order(relay: Running, sizes: list[int]) -> None:
    """Hazard 27."""
    check_order(relay, sizes)


def test_datagrams_of_one_batch_reach_the_targets_they_name(relay: Running) -> None:
    with (
        UdpClient(relay.port) as client,
        UdpPort() as first,
        UdpPort("127.0.0.2") as other,
        UdpPort("::1") as third,
    ):
        client.check_echo(first)
        targets = [first, other, first, first, third, other, third, first]
        with relay.held():
            for at, target in enumerate(targets):
                client.to(target.address, b"%d" % at)
        for at, target in enumerate(targets):
            target.expect(b"%d" % at)


def test_datagrams_of_a_train_reach_the_targets_they_name(relay: Running) -> None:
    with (
        UdpClient(relay.port) as client,
        UdpPort("127.0.0.1") as first,
        UdpPort("127.0.0.2") as other,
    ):
        client.check_echo(first)
        targets = [first] * 4 + [other] * 3 + [first]
        send_train(
            client.socket,
            [header(target) + b"%04d" % at for at, target in enumerate(targets)],
            client.bound,
        )
        for at, target in enumerate(targets):
            target.expect(b"%04d" % at)


@pytest.mark.parametrize("last", [b"last", b"short", b""], ids=["shorter", "equal", "empty"])
@pytest.mark.parametrize("host", [LOCALHOST, "::1"])
def test_train_to_one_target_arrives_whole_and_in_order(
    relay: Running, host: str, last: bytes
) -> None:
    """The last datagram may be a header alone: no train to the target can end with it."""
    with UdpClient(relay.port) as client, UdpPort(host) as target:
        client.check_echo(target)
        payloads = [b"%05d" % at for at in range(20)] + [last]
        send_train(client.socket, [header(target) + data for data in payloads], client.bound)
        for data in payloads:
            target.expect(data)


def test_datagram_of_60000_bytes_passes_in_both_directions(relay: Running) -> None:
    data = bytes(range(250)) * 240
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target, data)


def test_longest_datagram_passes_and_its_reply_is_dropped_whole(relay: Running) -> None:
    """Hazard 28."""
    longest = b"l" * (65507 - 10)
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.to(target.address, longest)
        seen = target.expect(longest)
        # With the header it is longer than a datagram can be.
        target.send(b"r" * 65507, seen)
        check_dropped(relay, "too big")
        target.send(b"r" * 65497, seen)
        assert client.receive() == (b"r" * 65497, target.address)
        client.check_echo(target)


@pytest.mark.parametrize("size", [32000, 60000, 65000, 65001, 65497])
def test_long_datagrams_that_arrive_together_all_pass(relay: Running, size: int) -> None:
    """Hazard 28."""
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        with relay.held():
            for letter in (b"a", b"b", b"c"):
                client.to(target.address, letter * size)
        for letter in (b"a", b"b", b"c"):
            target.expect(letter * size)
        client.check_echo(target)


@pytest.mark.parametrize(
    "filtering, port_passes, host_passes",
    [
        ("endpoint-independent", True, True),
        ("address-dependent", True, False),
        ("address-and-port-dependent", False, False),
    ],
)
def test_reply_from_elsewhere_has_its_true_source_if_the_filtering_permits_it(
    filtering: str, port_passes: bool, host_passes: bool
) -> None:
    """Hazard 30."""
    text = "listeners: [{listen: '127.0.0.1:0', udp: {filtering: %s}}]" % filtering
    with running(text) as relay, UdpClient(relay.port) as client:
        with UdpPort() as target, UdpPort() as port, UdpPort("127.0.0.3") as host:
            seen = client.check_echo(target)
            for other, passes in ((port, port_passes), (host, host_passes)):
                other.send(b"unasked", seen)
                if passes:
                    assert client.receive() == (b"unasked", other.address)
                # Nothing came before the echo.
                client.check_echo(target)
            assert client.check_echo(host) == seen
            host.send(b"asked", seen)
            assert client.receive() == (b"asked", host.address)


def test_two_clients_reach_each_other_through_the_ports_that_targets_see(relay: Running) -> None:
    """Hairpinning: RFC 4787 REQ-9, hazard 37."""
    with UdpClient(relay.port) as first, UdpClient(relay.port) as other, UdpPort() as target:
        ports = [client.check_echo(target).port for client in (first, other)]
        first.to(Address(LOCALHOST, ports[1]), b"hairpin")
        assert other.receive() == (b"hairpin", Address(LOCALHOST, ports[0]))


# -- what is dropped


def test_datagram_from_another_address_is_dropped_without_reply(relay: Running) -> None:
    """Hazard 21."""
    with UdpClient(relay.port) as client, UdpPort() as target, UdpPort(UNKNOWN_HOST) as unknown:
        client.check_echo(target)
        before, state = descriptors(), relay.state()
        unknown.send(header(target) + b"let me in", client.bound)
        check_dropped(relay, "unknown sender")
        assert (descriptors(), relay.state()) == (before, state)
        # Nothing came before the echo.
        client.check_echo(target, b"next")
        assert unknown.silent() and target.silent()
        assert relay.drops() == {"unknown sender": 1}


def test_endpoint_beside_the_named_one_is_dropped(relay: Running) -> None:
    """Hazard 22."""
    with UdpClient(relay.port) as client, UdpPort() as target, UdpPort() as second:
        client.check_echo(target)
        second.send(header(target) + b"me too", client.bound)
        check_dropped(relay, "unknown sender")
        client.check_echo(target, b"first still works")
        assert second.silent() and target.silent()
        assert relay.state()["sessions"] == 1


def test_forged_first_datagram_does_not_take_the_association(relay: Running) -> None:
    """Hazard 23."""
    with (
        UdpClient(relay.port, hint=NO_HINT) as client,
        UdpPort() as target,
        UdpPort(UNKNOWN_HOST) as unknown,
    ):
        unknown.send(header(target) + b"first", client.bound)
        check_dropped(relay, "unknown sender")
        client.check_echo(target)
        assert unknown.silent() and target.silent()


def test_sender_without_association_gets_no_reply_and_leaves_no_state() -> None:
    """Hazard 24."""
    users = (
        "users: {alice: {password: secret}}\nlisteners: [{listen: '127.0.0.1:0', auth: required}]"
    )
    with running(users) as relay, UdpPort() as target, UdpPort() as unknown:
        before = descriptors()
        for data in (header(target) + b"let me in", b"", b"x", header(target)):
            unknown.send(data, Address(LOCALHOST, relay.port))
        eventually(lambda: sum(relay.drops().values()) == 4)
        assert unknown.silent() and target.silent()
        assert relay.idle() and descriptors() == before and not sessions_threads()
        assert relay.drops() == {"unknown sender": 2, "malformed": 2}


@pytest.mark.parametrize(
    "hint",
    [
        NO_HINT,
        Address("0.0.0.0", 9),
        Address("8.8.8.8", 53),
        Address("::", 0),
        Address("0", 0),
        Address("no such host", 1),
        Address("a.b.c.example", 0),
    ],
    ids=str,
)
def test_any_address_in_the_request_works_and_admits_nobody_else(
    relay: Running, hint: Address
) -> None:
    """Hazard 26."""
    with (
        UdpClient(relay.port, hint=hint) as client,
        UdpPort() as target,
        UdpPort(UNKNOWN_HOST) as unknown,
    ):
        unknown.send(header(target) + b"first", client.bound)
        check_dropped(relay, "unknown sender")
        client.check_echo(target)
        assert unknown.silent() and target.silent()


def test_target_as_the_address_in_the_request_works(relay: Running) -> None:
    """Hazard 26.  v2ray does so."""
    with UdpPort() as target, UdpClient(relay.port, hint=target.address) as client:
        client.check_echo(target)


BROKEN = {
    "empty": (b"", "malformed"),
    "1 byte": (b"\0", "malformed"),
    "3 bytes": (b"\0\0\0", "malformed"),
    "4 bytes": (b"\0\0\0\1", "malformed"),
    "7 bytes": (b"\0\0\0\1\x7f\0\0", "malformed"),
    "9 bytes": (b"\0\0\0\1\x7f\0\0\1\0", "malformed"),
    "IPv6 of 21 bytes": (b"\0\0\0\4" + b"\1" * 17, "malformed"),
    "name longer than the datagram": (b"\0\0\0\3\xffabcdefgh", "malformed"),
    "address type 0": (b"\0\0\0\0\x7f\0\0\1\0\x50data", "malformed"),
    "address type 2": (b"\0\0\0\2\x7f\0\0\1\0\x50data", "malformed"),
    "address type 255": (b"\0\0\0\xff\x7f\0\0\1\0\x50data", "malformed"),
    "fragment 1": (b"\0\0\1\1\x7f\0\0\1\0\x50data", "fragment"),
    "last fragment": (b"\0\0\x81\1\x7f\0\0\1\0\x50data", "fragment"),
    "name empty": (b"\0\0\0\3\0\0\x50data", "bad target"),
    "name with NUL": (b"\0\0\0\3\3a\0b\0\x50", "bad target"),
    "name with CRLF": (b"\0\0\0\3\4a\r\nb\0\x50", "bad target"),
    "name 1.2.3.4.5": (b"\0\0\0\3\x091.2.3.4.5\0\x50", "bad target"),
    "port 0": (b"\0\0\0\1\x7f\0\0\1\0\0data", "bad target"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_datagram_is_dropped_and_counted_by_reason(relay: Running, case: str) -> None:
    """Hazard 27."""
    data, reason = BROKEN[case]
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        client.raw(data)
        check_dropped(relay, reason)
        client.check_echo(target, b"the next passes")
        assert relay.drops() == {reason: 1}
        assert relay.state() == {"associations": 1, "sessions": 1, "entries": 1}


def test_broken_datagrams_do_not_affect_others_of_their_batch(relay: Running) -> None:
    """Hazard 27."""
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        with relay.held():
            before = sum(relay.drops().values())
            for at, (data, _) in enumerate(BROKEN.values()):
                client.raw(data)
                client.to(target.address, b"good %d" % at)
        for at in range(len(BROKEN)):
            target.expect(b"good %d" % at)
        assert sum(relay.drops().values()) == before + len(BROKEN)


@pytest.mark.parametrize("reserved", [b"\0\1", b"\xff\xff"])
def test_reserved_bytes_are_ignored(relay: Running, reserved: bytes) -> None:
    """Hazard 27."""
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.raw(reserved + header(target)[2:] + b"data")
        target.expect(b"data")


def test_empty_payload_is_forwarded(relay: Running) -> None:
    """Hazard 27."""
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target, b"")


@pytest.mark.parametrize(
    "reason, data",
    [
        ("unknown sender", b"\0\0\0\1\x7f\0\0\1\0\x50data"),
        ("malformed", b"12345"),
        ("fragment", b"\0\0\1\1\x7f\0\0\1\0\x50data"),
        ("bad target", b"\0\0\0\1\x7f\0\0\1\0\0data"),
    ],
)
def test_dropped_datagrams_of_a_train_are_each_counted(
    relay: Running, reason: str, data: bytes
) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target, UdpPort(UNKNOWN_HOST) as unknown:
        client.check_echo(target)
        send_train(
            unknown.socket if reason == "unknown sender" else client.socket,
            [data] * 5,
            client.bound,
        )
        client.check_echo(target, b"fence")
        assert relay.drops() == {reason: 5}


def test_many_unreachable_targets_do_not_affect_others(relay: Running) -> None:
    """Hazard 29."""
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        for turn in range(60):
            for at in range(50):
                client.to(Address(f"127.4.{turn}.{at}", 9), b"into the void")
                client.to(target.address, b"%d" % at)
            for at in range(50):
                assert target.expect(b"%d" % at) == seen
        assert not relay.drops()


def test_unreachable_target_does_not_affect_others(relay: Running) -> None:
    """Hazard 29."""
    with UdpClient(relay.port) as client, UdpPort() as target:
        with UdpPort("127.0.0.4") as gone:
            seen = client.check_echo(target)
            client.check_echo(gone)
        for at in range(5):
            client.to(gone.address, b"into the void")
            assert client.check_echo(target, b"%d" % at) == seen
        assert relay.state() == {"associations": 1, "sessions": 1, "entries": 2}
