"""Datagrams arrive as they were sent: 0 to 60,000 bytes, in trains, with several headers."""

from __future__ import annotations

import random
from typing import Any

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.socks5 import encode_header
from tests.support.handlers import eventually
from tests.support.relays import Running, UdpClient, UdpPort
from tests.support.sockets import SECONDS
from tests.udp.flows import NOISE, held_down, put_on, settled

AT_ONCE = 100_000
"""Bytes under way at the same time, which even a small receive buffer holds."""
HEADER = 10
"""Bytes of the header for an IPv4 target."""
LONGEST = 65_507


def payload(number: int, size: int) -> bytes:
    """Return a payload that differs from those with other numbers."""
    start = number * 131 % (len(NOISE) - size)
    return (bytes((number & 0xFF,)) + NOISE[start : start + size])[:size]


def windows(sizes: list[int]) -> list[list[bytes]]:
    """Return payloads of these sizes in groups that fit into a receive buffer."""
    groups: list[list[bytes]] = [[]]
    room = AT_ONCE
    for number, size in enumerate(sizes):
        room -= size + 800
        if room < 0:
            groups.append([])
            room = AT_ONCE - size - 800
        groups[-1].append(payload(number, size))
    return groups


def mixture() -> list[int]:
    chance = random.Random(7)
    return [
        chance.choice(
            (
                0,
                0,
                1,
                2,
                63,
                512,
                1200,
                1200,
                1200,
                1400,
                1472,
                4000,
                9000,
                30_000,
                60_000,
                chance.randrange(60_001),
            )
        )
        for _ in range(400)
    ]


def test_mixed_sizes_arrive_at_the_target(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        settled(relay)
        for window in windows(mixture()):
            for data in window:
                client.to(target.address, data)
            assert [target.receive()[0] for _ in window] == window
    assert not relay.drops()


def test_mixed_sizes_arrive_at_the_client(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        for window in windows(mixture()):
            for data in window:
                target.send(data, seen)
            assert [client.receive() for _ in window] == [(data, target.address) for data in window]
    assert not relay.drops()


# Batches: what the relay joins to runs, and what it must not join.
BATCHES: dict[str, list[tuple[int, ...]]] = {
    "a train as long as the single before it": [(1200,), (595, 595)],
    "a single as long as the train before it": [(595, 595), (1200,)],
    "trains between singles of their length": [(100,), (100,), (45, 45), (100,), (100,)],
    "trains of one length": [(500,) * 5, (500,) * 7],
    "trains of several lengths": [(500,) * 5, (300,) * 5, (1200,) * 3],
    "trains whose last is shorter": [(500, 500, 20), (500, 500, 1), (500, 500)],
    "a train whose last is empty": [(500, 500, 0), (7,)],
    "singles that grow": [(1,), (2,), (3,), (4,)],
    "singles that shrink": [(4,), (3,), (2,), (1,), (0,)],
    "empty ones between": [(7,), (0,), (7,), (0,), (0,), (9,)],
    "a train, and more of its length": [(1200,) * 4, (1200,), (1200,), (1100,), (1200,)],
    "the most segments of a send": [(100,) * 64, (100,) * 64, (100,)],
    "the most bytes of a send": [(1200,) * 54, (1200,) * 53],
    "long ones": [(30_000,), (30_000,), (29_999,)],
}


@pytest.mark.parametrize("batch", BATCHES)
def test_batch_arrives_in_order_at_the_target(relay: Running, batch: str) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        settled(relay)
        header = encode_header(target.address)
        with relay.held():
            sent = send_all(client.socket, client.bound, BATCHES[batch], header)
        assert [target.receive()[0] for _ in sent] == sent
        client.check_echo(target, b"and nothing behind it")


@pytest.mark.parametrize("batch", BATCHES)
def test_batch_arrives_in_order_at_the_client(
    relay: Running, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        with held_down(monkeypatch) as busy:
            target.send(b"hold", seen)
            assert busy.wait(SECONDS)
            # As long as on the other side, where they have headers; empty ones stay empty.
            batch_down = [
                tuple(size and size + HEADER for size in sizes) for sizes in BATCHES[batch]
            ]
            sent = send_all(target.socket, seen, batch_down, b"")
        assert [client.receive()[0] for _ in range(len(sent) + 1)] == [b"hold", *sent]
        client.check_echo(target, b"and nothing behind it")


def send_all(sock: Any, to: Address, batch: list[tuple[int, ...]], header: bytes) -> list[bytes]:
    """Send a batch, each tuple of sizes as a train; return the payloads."""
    sent: list[bytes] = []
    for sizes in batch:
        # A train cannot end with an empty datagram.  It follows the train.
        parts = [payload(len(sent) + at, size) for at, size in enumerate(sizes)]
        lonely = [] if header or len(parts) == 1 or parts[-1] else [parts[-1]]
        joined = [header + part for part in parts[: len(parts) - len(lonely)]]
        put_on(sock, b"".join(joined), len(joined[0]) if len(joined) > 1 else 0, to)
        for part in lonely:
            sock.sendto(part, to)
        sent += parts
    return sent


# -- trains whose datagrams have headers of their own


def test_train_to_targets_that_take_turns_arrives_in_order(relay: Running) -> None:
    with (
        UdpClient(relay.port) as client,
        UdpPort("127.0.0.1") as first,
        UdpPort("127.0.0.2") as second,
    ):
        client.check_echo(first)
        client.check_echo(second)
        settled(relay)
        for turn in range(20):
            targets = [(first, second)[at % 2 if turn % 2 else at * 2 // 40] for at in range(40)]
            sent = [payload(at, 600 + turn) for at in range(40)]
            joined = b"".join(
                encode_header(target.address) + data
                for target, data in zip(targets, sent, strict=True)
            )
            put_on(client.socket, joined, HEADER + 600 + turn, client.bound)
            for target in (first, second):
                expected = [data for to, data in zip(targets, sent, strict=True) if to is target]
                assert [target.receive()[0] for _ in expected] == expected
    assert not relay.drops()


def test_train_with_headers_of_several_lengths_arrives_in_order(relay: Running) -> None:
    """To IPv4, IPv6 and a name.  With headers all have one length; the payloads differ."""
    with UdpClient(relay.port) as client, UdpPort("::") as target:
        port = target.address.port
        addresses = [Address("127.0.0.1", port), Address("::1", port), Address("localhost", port)]
        for address in addresses:
            client.to(address, b"open")
            target.expect(b"open")
        settled(relay)
        headers = [encode_header(address) for address in addresses]
        sent = [payload(at, 300 - len(headers[at % 3])) for at in range(30)]
        put_on(
            client.socket,
            b"".join(headers[at % 3] + data for at, data in enumerate(sent)),
            300,
            client.bound,
        )
        # Order holds within each of the three flows, whose lengths differ.
        got = [target.receive()[0] for _ in sent]
        for kind in range(3):
            size = 300 - len(headers[kind])
            assert [data for data in got if len(data) == size] == sent[kind::3]


def test_bad_datagrams_of_a_train_do_not_affect_the_others(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        settled(relay)
        header = encode_header(target.address)
        bad = {
            3: b"\0\0\1" + header[3:],
            5: b"\0\0\0\7" + header[4:],
            11: header[:8] + b"\0\0",
            12: b"\0\0\0\3\xff" + header[5:],
        }
        sent = [payload(at, 200) for at in range(20)]
        put_on(
            client.socket,
            b"".join(bad.get(at, header) + data for at, data in enumerate(sent)),
            210,
            client.bound,
        )
        expected = [data for at, data in enumerate(sent) if at not in bad]
        assert [target.receive()[0] for _ in expected] == expected
        client.check_echo(target)
        # Datagram 12 claims a name of 255 bytes, and has only 210.
        assert relay.drops() == {"fragment": 1, "malformed": 2, "bad target": 1}


@pytest.mark.parametrize("tail", [1, 4, 9, HEADER, HEADER + 1])
def test_train_whose_last_datagram_is_shorter_than_a_header_loses_that_one_only(
    relay: Running, tail: int
) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        settled(relay)
        header = encode_header(target.address)
        last = (header + b"x")[:tail]
        put_on(
            client.socket,
            b"".join(header + payload(at, 90) for at in range(6)) + last,
            100,
            client.bound,
        )
        for at in range(6):
            target.expect(payload(at, 90))
        if tail >= HEADER:
            target.expect(last[HEADER:])
        client.check_echo(target)
        assert relay.drops() == ({"malformed": 1} if tail < HEADER else {})


def test_longest_reply_is_dropped_whole_and_later_ones_pass(relay: Running) -> None:
    """Hazard 28.  With the header it is longer than a datagram can be."""
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        target.send(payload(1, LONGEST), seen)
        eventually(lambda: relay.drops() == {"too big": 1})
        for size in (LONGEST - HEADER, 10):
            target.send(payload(2, size), seen)
            assert client.receive()[0] == payload(2, size)
