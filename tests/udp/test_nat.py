"""The relay as a NAT (RFC 4787): mapping, filtering, hairpinning, ICMP errors."""

from __future__ import annotations

import time

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.socks5 import encode_header
from tests.support.handlers import LOCALHOST, eventually
from tests.support.relays import Running, UdpClient, UdpPort, running, sessions_threads
from tests.udp.flows import ICMP_PACE, put_on

LISTENER = "listeners: [{listen: '127.0.0.1:0', udp: {%s}}]"
REFUSED = ("icmp", "refused")


# -- mapping


def test_endpoint_independent_mapping_has_one_port_for_all_targets(relay: Running) -> None:
    """REQ-1.  IPv4 and IPv6 targets share the port."""
    with (
        UdpClient(relay.port) as client,
        UdpPort() as first,
        UdpPort() as port,
        UdpPort("127.0.0.7") as host,
        UdpPort("::1") as v6,
    ):
        seen = [client.check_echo(target).port for target in (first, port, host, v6, first)]
        assert len(set(seen)) == 1
        assert (
            relay.state() == {"associations": 1, "sessions": 1, "entries": 4}
            and sessions_threads() == 1
        )


def test_two_clients_do_not_share_a_port(relay: Running) -> None:
    """REQ-3."""
    with UdpPort() as target, UdpClient(relay.port) as first, UdpClient(relay.port) as second:
        assert first.check_echo(target) != second.check_echo(target)


def test_symmetric_mapping_has_one_port_for_each_target(level: str) -> None:
    with running(LISTENER % "mapping: symmetric" + level) as relay, UdpClient(relay.port) as client:
        with UdpPort() as first, UdpPort() as port, UdpPort("127.0.0.7") as host:
            seen = [client.check_echo(target) for target in (first, port, host)]
            assert len({address.port for address in seen}) == 3
            # The mapping stays.
            assert [client.check_echo(target) for target in (first, port, host)] == seen
            assert relay.state() == {"associations": 1, "sessions": 3, "entries": 3}
            client.leave()
            eventually(relay.idle, 1.0)


def test_mapping_stays_when_another_target_goes_idle_or_refuses(relay: Running) -> None:
    """REQ-11: other targets do not change the mapping."""
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        with UdpPort("127.0.0.5") as gone:
            client.check_echo(gone)
        client.to(gone.address, b"into the void")
        for at in range(300):
            client.to(Address(f"127.7.1.{at % 250 + 1}", 9000 + at), b"")
        assert client.check_echo(target) == seen


# -- filtering


@pytest.mark.parametrize("mapping", ["endpoint-independent", "symmetric"])
@pytest.mark.parametrize(
    "filtering, port_passes, host_passes",
    [
        ("endpoint-independent", True, True),
        ("address-dependent", True, False),
        ("address-and-port-dependent", False, False),
    ],
)
def test_filtering_decides_which_sources_may_reply(
    level: str, mapping: str, filtering: str, port_passes: bool, host_passes: bool
) -> None:
    """REQ-8, hazard 30.  From another port or host, single datagrams and trains."""
    text = LISTENER % f"filtering: {filtering}, mapping: {mapping}"
    with running(text + level) as relay, UdpClient(relay.port) as client, UdpPort() as target:
        with UdpPort() as port, UdpPort("127.0.0.3") as host:
            seen = client.check_echo(target)
            filtered = 0
            for other, passes in ((port, port_passes), (host, host_passes)):
                other.send(b"unasked", seen)
                put_on(other.socket, b"12345" * 4, 5, seen)
                if passes:
                    assert [client.receive() for _ in range(5)] == [(b"unasked", other.address)] + [
                        (b"12345", other.address)
                    ] * 4
                # Nothing else came before the echo.
                client.check_echo(target)
                filtered += 0 if passes else 5
            assert relay.count("drops", "filtered") == filtered, "each datagram is counted"


def test_target_may_reply_once_it_has_been_sent_to(level: str) -> None:
    with (
        running(LISTENER % "filtering: address-and-port-dependent" + level) as relay,
        UdpClient(relay.port) as client,
    ):
        with UdpPort() as target, UdpPort("127.0.0.3") as late:
            seen = client.check_echo(target)
            late.send(b"too early", seen)
            eventually(lambda: relay.count("drops", "filtered"))
            assert client.check_echo(late) == seen
            late.send(b"now", seen)
            assert client.receive() == (b"now", late.address)


def test_filtered_datagrams_between_replies_are_left_out(level: str) -> None:
    with (
        running(LISTENER % "filtering: address-dependent" + level) as relay,
        UdpClient(relay.port) as client,
    ):
        with UdpPort() as target, UdpPort("127.0.0.3") as other_host:
            seen = client.check_echo(target)
            for at in range(100):
                target.send(b"%d" % at, seen)
                other_host.send(b"%d" % at, seen)
            assert [client.receive() for _ in range(100)] == [
                (b"%d" % at, target.address) for at in range(100)
            ]
            client.check_echo(target)
            assert relay.drops() == {"filtered": 100}


# -- hairpinning


def test_two_clients_of_one_relay_reach_each_other(relay: Running) -> None:
    """REQ-9, hazard 37.  Through the ports that targets see, in both directions."""
    with UdpClient(relay.port) as first, UdpClient(relay.port) as second, UdpPort() as target:
        at = [Address(LOCALHOST, client.check_echo(target).port) for client in (first, second)]
        for sender, receiver, to, source in (
            (first, second, at[1], at[0]),
            (second, first, at[0], at[1]),
        ):
            for number in range(200):
                sender.to(to, b"%d" % number)
                assert receiver.receive() == (b"%d" % number, source)
        assert relay.state() == {"associations": 2, "sessions": 2, "entries": 4}


def test_client_reaches_itself_through_its_mapping(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        own = Address(LOCALHOST, client.check_echo(target).port)
        client.to(own, b"myself")
        assert client.receive() == (b"myself", own)


# -- ICMP


@pytest.mark.parametrize("host", [LOCALHOST, "::1"])
def test_closed_port_does_not_affect_other_targets(relay: Running, host: str) -> None:
    """REQ-12, hazards 29 and 30.  The session lives, and datagrams to other targets arrive."""
    with UdpClient(relay.port) as client, UdpPort() as target, UdpPort("::1") as sixth:
        seen = client.check_echo(target)
        with UdpPort(host) as gone:
            client.check_echo(gone)
        for number in range(50):
            client.to(gone.address, b"into the void")
            client.to(target.address, b"%d" % number)
            assert target.expect(b"%d" % number) == seen
            client.to(gone.address, b"into the void")
            client.to(sixth.address, b"%d" % number)
            sixth.expect(b"%d" % number)
        eventually(lambda: relay.count(*REFUSED) or client.to(gone.address, b"into the void"))
        assert not relay.drops()
        assert client.check_echo(target) == seen
        assert relay.state() == {"associations": 1, "sessions": 1, "entries": 3}


def test_refusals_are_each_counted(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        with UdpPort() as gone:
            address = gone.address
        for number in range(1, 20):
            time.sleep(ICMP_PACE)
            client.to(address, b"into the void")
            relay.wait_for_count(*REFUSED, number)
        client.check_echo(target)
        assert not relay.drops()


def test_train_to_a_closed_port_does_not_affect_other_targets(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        with UdpPort() as gone:
            client.check_echo(gone)
        void, header = encode_header(gone.address), encode_header(target.address)
        for _ in range(20):
            put_on(
                client.socket,
                b"".join((void, header)[at % 2] + b"%04d" % at for at in range(20)),
                14,
                client.bound,
            )
            for at in range(1, 20, 2):
                target.expect(b"%04d" % at)
        # So many at once reach the kernel's limit for ICMP errors: send until it reports again.
        eventually(lambda: relay.count(*REFUSED) or client.to(gone.address, b"into the void"))
        client.check_echo(target)
        assert not relay.drops()


def test_client_that_has_gone_does_not_affect_other_clients(relay: Running) -> None:
    """Its port is closed and its association lives: the relay's own port gets ICMP errors."""
    with UdpPort() as target, UdpClient(relay.port) as stays, UdpClient(relay.port) as leaves:
        first, second = stays.check_echo(target), leaves.check_echo(target)
        leaves.socket.close()
        for number in range(50):
            target.send(b"nobody there", second)
            target.send(b"%d" % number, first)
            assert stays.receive()[0] == b"%d" % number
        stays.check_echo(target)
        assert not relay.drops()
