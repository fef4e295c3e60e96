"""The relay as a NAT (RFC 4787): mapping, filtering, hairpinning; ICMP errors cost nobody but their own target."""

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


def test_endpoint_independent_mapping_is_one_port_for_all_targets(relay: Running) -> None:
    """REQ-1; and the families share it."""
    with (
        UdpClient(relay.port) as client,
        UdpPort() as one,
        UdpPort() as port,
        UdpPort("127.0.0.7") as host,
        UdpPort("::1") as v6,
    ):
        seen = [client.check_echo(target).port for target in (one, port, host, v6, one)]
        assert len(set(seen)) == 1
        assert (
            relay.state() == {"associations": 1, "sessions": 1, "entries": 4}
            and sessions_threads() == 1
        )


def test_no_two_clients_share_a_port(relay: Running) -> None:
    """REQ-3."""
    with UdpPort() as target, UdpClient(relay.port) as one, UdpClient(relay.port) as other:
        assert one.check_echo(target) != other.check_echo(target)


def test_symmetric_mapping_is_a_port_for_each_target(level: str) -> None:
    with running(LISTENER % "mapping: symmetric" + level) as relay, UdpClient(relay.port) as client:
        with UdpPort() as one, UdpPort() as port, UdpPort("127.0.0.7") as host:
            seen = [client.check_echo(target) for target in (one, port, host)]
            assert len({address.port for address in seen}) == 3
            assert [
                client.check_echo(target) for target in (one, port, host)
            ] == seen  # and it stays
            assert relay.state() == {"associations": 1, "sessions": 3, "entries": 3}
            client.leave()
            eventually(relay.idle, 1.0)


def test_the_mapping_stays_when_another_target_goes_idle_or_refuses(relay: Running) -> None:
    """REQ-11: what goes on elsewhere does not change it."""
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
def test_who_may_answer(
    level: str, mapping: str, filtering: str, port_passes: bool, host_passes: bool
) -> None:
    """REQ-8, hazard 30: from another port of the target, from another host; singly and as a train."""
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
                client.check_echo(target)  # and nothing else came before it
                filtered += 0 if passes else 5
            assert relay.count("drops", "filtered") == filtered, "each datagram is counted"


def test_a_target_may_answer_from_when_it_has_been_sent_to(level: str) -> None:
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


def test_a_filtered_stranger_between_answers_is_taken_out(level: str) -> None:
    with (
        running(LISTENER % "filtering: address-dependent" + level) as relay,
        UdpClient(relay.port) as client,
    ):
        with UdpPort() as target, UdpPort("127.0.0.3") as stranger:
            seen = client.check_echo(target)
            for at in range(100):
                target.send(b"%d" % at, seen)
                stranger.send(b"%d" % at, seen)
            assert [client.receive() for _ in range(100)] == [
                (b"%d" % at, target.address) for at in range(100)
            ]
            client.check_echo(target)
            assert relay.drops() == {"filtered": 100}


# -- hairpinning


def test_two_clients_of_one_proxy_reach_each_other(relay: Running) -> None:
    """REQ-9, hazard 37: by the ports that targets see, both ways, many at a time."""
    with UdpClient(relay.port) as one, UdpClient(relay.port) as other, UdpPort() as target:
        at = [Address(LOCALHOST, client.check_echo(target).port) for client in (one, other)]
        for sender, receiver, to, source in (
            (one, other, at[1], at[0]),
            (other, one, at[0], at[1]),
        ):
            for number in range(200):
                sender.to(to, b"%d" % number)
                assert receiver.receive() == (b"%d" % number, source)
        assert relay.state() == {"associations": 2, "sessions": 2, "entries": 4}


def test_a_client_reaches_itself(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        own = Address(LOCALHOST, client.check_echo(target).port)
        client.to(own, b"myself")
        assert client.receive() == (b"myself", own)


# -- ICMP


@pytest.mark.parametrize("host", [LOCALHOST, "::1"])
def test_a_closed_port_disturbs_no_other_target(relay: Running, host: str) -> None:
    """REQ-12, hazards 29 and 30: the session lives, and the next datagram to another target arrives."""
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


def test_each_refusal_is_counted(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        with UdpPort() as gone:
            address = gone.address
        for number in range(1, 20):
            time.sleep(ICMP_PACE)
            client.to(address, b"into the void")
            eventually(lambda: relay.count(*REFUSED) == number)
        client.check_echo(target)
        assert not relay.drops()


def test_a_train_to_a_closed_port_disturbs_no_other_target(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        with UdpPort() as gone:
            client.check_echo(gone)
        void, header = encode_header(gone.address), encode_header(target.address)
        for turn in range(20):
            put_on(
                client.socket,
                b"".join((void, header)[at % 2] + b"%04d" % at for at in range(20)),
                14,
                client.bound,
            )
            for at in range(1, 20, 2):
                target.expect(b"%04d" % at)
        # so many at once use up what the kernel may tell: it is asked until it may again
        eventually(lambda: relay.count(*REFUSED) or client.to(gone.address, b"into the void"))
        client.check_echo(target)
        assert not relay.drops()


def test_a_client_that_has_gone_disturbs_no_other_client(relay: Running) -> None:
    """Its port is closed, its association lives: replies to it are refused on the relay's own port."""
    with UdpPort() as target, UdpClient(relay.port) as stays, UdpClient(relay.port) as leaves:
        first, second = stays.check_echo(target), leaves.check_echo(target)
        leaves.socket.close()
        for number in range(50):
            target.send(b"nobody there", second)
            target.send(b"%d" % number, first)
            assert stays.receive()[0] == b"%d" % number
        stays.check_echo(target)
        assert not relay.drops()
