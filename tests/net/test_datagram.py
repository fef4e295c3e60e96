"""Batches of datagrams over loopback, on every level of batching: receiving, replies, ends."""

from __future__ import annotations

import socket

import pytest

from netproxy.errors import ListenError
from netproxy.net import datagram
from netproxy.net.datagram import Arena, ArenaPool, PinnedHeader
from netproxy.net.mmsg_arena import CONTROLS_LIMIT
from netproxy.net.udp_sockets import UdpSocketFactory
from tests.support.batches import BatchRig as Rig, cut, train
from tests.support.doubles import Counts, Lines
from tests.support.sockets import HAS_IPV6, Task, address_of, datagrams, udp

needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 on this machine")
HEADER = b"\0\0\0\1\x7f\0\0\1\0\x50"


def test_default_level_of_batching_is_the_best_there_is() -> None:
    assert UdpSocketFactory(Counts(), Lines()).level == "mmsg"


class TestReceiving:
    def test_waiting_datagrams_are_one_batch_in_order_of_arrival(self, rig: Rig) -> None:
        local = rig.listen()
        with udp() as client:
            sent = [b"%d" % number * number for number in range(1, 9)]
            for data in sent:
                client.sendto(data, (*local.address,))
            Task(local.wait).result()
            batch = local.receive(rig.arena)
            assert [data for data, _ in cut(batch)] == sent
            assert {local.peer(key) for _, key in cut(batch)} == {client.getsockname()}

    def test_receive_waiting_returns_the_datagram_that_arrives(self, rig: Rig) -> None:
        local = rig.listen()
        with udp() as client:
            for sent in (b"one", b"", b"two"):
                waiting = Task(local.receive_waiting, rig.arena)
                client.sendto(sent, (*local.address,))
                assert [data for data, _ in cut(waiting.result())] == [sent]

    def test_batch_is_bounded_and_the_next_has_the_rest(self, rig: Rig) -> None:
        local = rig.listen()
        with udp() as client:
            for number in range(datagram.SLOTS + 3):
                client.sendto(bytes(number), (*local.address,))
            assert len(local.receive(rig.arena).spans) == datagram.SLOTS
            assert [len(data) for data, _ in cut(local.receive(rig.arena))] == list(
                range(datagram.SLOTS, datagram.SLOTS + 3)
            )

    def test_equal_datagrams_of_one_peer_are_one_span_with_mmsg(self, rig: Rig) -> None:
        local = rig.listen()
        with udp() as client:
            for fill in b"abc":
                client.sendto(bytes((fill,)) * 50, (*local.address,))
            batch = local.receive(rig.arena)
        assert [len(offsets) for offsets, *_ in batch.spans] == (
            [3] if rig.datagrams.level == "mmsg" else [1, 1, 1]
        )
        assert [data for data, _ in cut(batch)] == [b"a" * 50, b"b" * 50, b"c" * 50]

    def test_batch_is_empty_if_nothing_waits(self, rig: Rig) -> None:
        assert not rig.listen().receive(rig.arena).spans

    def test_train_is_received_as_one_span(self, rig: Rig) -> None:
        local = rig.listen()
        if rig.datagrams.level == "single":
            pytest.skip("no trains on this level")
        with udp() as client:
            train(client, [b"a" * 100, b"b" * 100, b"c" * 60], local)
            batch = local.receive(rig.arena)
        ((offsets, length, last, _),) = batch.spans
        assert (len(offsets), length, last) == (3, 100, 60)
        assert [data for data, _ in cut(batch)] == [b"a" * 100, b"b" * 100, b"c" * 60]

    def test_train_is_received_whole_on_every_level(self, rig: Rig) -> None:
        local = rig.listen()
        sent = [bytes((number,)) * 100 for number in range(20)] + [b"end"]
        with udp() as client:
            train(client, sent, local)
            assert [data for data, _ in rig.receive(local, 21)] == sent

    def test_empty_datagrams_are_received(self, rig: Rig) -> None:
        local = rig.listen()
        with udp() as client:
            for data in (b"", b"x", b""):
                client.sendto(data, (*local.address,))
            assert [data for data, _ in rig.receive(local, 3)] == [b"", b"x", b""]

    def test_largest_datagram_is_received(self, rig: Rig) -> None:
        local = rig.listen()
        data = bytes(range(256)) * 255 + bytes(227)
        assert len(data) == 65507
        with udp() as client:
            client.sendto(data, (*local.address,))
            assert rig.receive(local, 1)[0][0] == data

    def test_each_client_has_a_key_of_its_own(self, rig: Rig) -> None:
        local = rig.listen()
        with udp() as first, udp() as second:
            for client in (first, second, first):
                client.sendto(b"x", (*local.address,))
            keys = [key for _, key in rig.receive(local, 3)]
            assert keys[0] == keys[2] != keys[1]
            assert hash(keys[0]) == hash(keys[2])
            assert local.peer(keys[1]) == second.getsockname()

    def test_tag_is_part_of_the_key(self, rig: Rig) -> None:
        tagged = [rig.listen(tag=b"1"), rig.listen(tag=b"2")]
        with udp() as client:
            for local in tagged:
                client.sendto(b"x", (*local.address,))
            (_, first), (_, second) = rig.receive(tagged[0], 1) + rig.receive(tagged[1], 1)
            assert first != second
            assert tagged[0].peer(first) == tagged[1].peer(second) == client.getsockname()
            tagged[1].send(rig.arena, rig.put(b"back"), tagged[1].reply_destination(second))
            assert client.recvfrom(100) == (b"back", (*tagged[1].address,))

    def test_icmp_error_is_counted_and_the_next_datagram_received(self, rig: Rig) -> None:
        """Hazard 29, RFC 4787 REQ-12: the error must not end the reader."""
        local = rig.outgoing()
        with udp() as gone:
            address = address_of(gone)
        with udp() as client:
            local.send(rig.arena, rig.put(b"x"), local.destination(address))
            client.sendto(b"behind it", ("127.0.0.1", local.address.port))
            assert rig.receive(local, 1)[0][0] == b"behind it"
            assert rig.counts.of("icmp", "refused") == 1
            assert rig.log.of("debug") == [f"{address} answered by ICMP: refused"]

    def test_datagram_after_an_icmp_error_is_sent(self, rig: Rig) -> None:
        """Hazard 29: the pending error fails one send, which is made again."""
        local = rig.outgoing()
        with udp() as gone:
            address = address_of(gone)
        with udp() as target:
            local.send(rig.arena, rig.put(b"x"), local.destination(address))
            local.send(rig.arena, rig.put(b"one"), local.destination(address_of(target)))
            local.send(rig.arena, rig.put(b"y"), local.destination(address))
            local.send(rig.arena, rig.put(b"two", b"2"), local.destination(address_of(target)))
            assert datagrams(target, 3) == [b"one", b"two", b"2"]
        assert not rig.counts.of("drops", "refused")


class TestReplies:
    @pytest.mark.parametrize(
        "bound, used",
        [
            ("127.0.0.1", "127.0.0.1"),
            ("0.0.0.0", "127.0.0.2"),
            ("0.0.0.0", "127.0.0.1"),
            pytest.param("::", "127.0.0.2", marks=needs_ipv6),
            pytest.param("::", "::1", marks=needs_ipv6),
            pytest.param("::1", "::1", marks=needs_ipv6),
        ],
    )
    def test_reply_leaves_from_the_address_that_the_client_used(
        self, rig: Rig, bound: str, used: str
    ) -> None:
        """Hazard 42."""
        local = rig.listen(bound)
        with udp(used.replace("127.0.0.2", "127.0.0.1")) as client:
            client.sendto(b"hello", (used, local.address.port))
            ((_, key),) = rig.receive(local, 1)
            assert datagram.reached_address(local, key) == local.address._replace(host=used)
            run = rig.put(b"one", b"two", b"3")
            run.header = PinnedHeader(HEADER)
            local.send(rig.arena, run, local.reply_destination(key))
            for expected in (b"one", b"two", b"3"):
                data, source = client.recvfrom(100)
                assert (data, source[:2]) == (HEADER + expected, (used, local.address.port))

    def test_client_that_uses_two_local_addresses_has_two_keys(self, rig: Rig) -> None:
        """Each reply leaves from the address that its datagram came to."""
        local = rig.listen("0.0.0.0")
        with udp() as client:
            for used in ("127.0.0.2", "127.0.0.3"):
                client.sendto(used.encode(), (used, local.address.port))
            received = rig.receive(local, 2)
            assert received[0][1] != received[1][1]
            for data, key in received:
                local.send(rig.arena, rig.put(data), local.reply_destination(key))
            assert {client.recvfrom(100) for _ in range(2)} == {
                (used.encode(), (used, local.address.port)) for used in ("127.0.0.2", "127.0.0.3")
            }

    def test_equal_datagrams_to_one_local_address_are_one_span_with_mmsg(self, rig: Rig) -> None:
        local = rig.listen("0.0.0.0")
        hosts = ("127.0.0.1",) * 3 + ("127.0.0.2", "127.0.0.1", "127.0.0.2")
        with udp() as client:
            for host in hosts[:3]:
                client.sendto(bytes(50), (host, local.address.port))
            alike = local.receive(rig.arena)
            lengths = [len(offsets) for offsets, *_ in alike.spans]
            ((_, key), *_) = cut(alike)
            for host in hosts[3:]:
                client.sendto(bytes(50), (host, local.address.port))
            others = [other for _, other in cut(local.receive(rig.arena))]
        assert lengths == ([3] if rig.datagrams.level == "mmsg" else [1, 1, 1])
        assert others[1] == key != others[0] == others[2]

    def test_trains_to_one_local_address_are_cut_each(self, rig: Rig) -> None:
        local = rig.listen("0.0.0.0")
        sent = [bytes((fill,)) * 100 for fill in b"abcdef"]
        with udp() as client:
            for first in (0, 3):
                train(client, sent[first : first + 3], local)
            received = rig.receive(local, 6)
        assert [data for data, _ in received] == sent
        assert len({key for _, key in received}) == 1

    def test_more_local_addresses_than_are_remembered_have_a_key_each(self, rig: Rig) -> None:
        local = rig.listen("0.0.0.0")
        count = CONTROLS_LIMIT + 10
        hosts = [f"127.0.{number >> 8}.{number & 255}" for number in range(1, count + 1)]
        with udp() as client:
            seen = []
            for host in (*hosts, hosts[0]):
                client.sendto(b"x", (host, local.address.port))
                ((_, key),) = rig.receive(local, 1)
                seen.append(datagram.reached_address(local, key).host)
        assert seen == [*hosts, hosts[0]]


class TestEnding:
    def test_shutdown_ends_wait(self, rig: Rig) -> None:
        local = rig.listen()
        waiting = Task(local.wait)
        local.shutdown()
        assert waiting.result() is False
        assert local.wait() is False

    def test_shutdown_ends_receive_waiting(self, rig: Rig) -> None:
        local = rig.listen()
        waiting = Task(local.receive_waiting, rig.arena)
        local.shutdown()
        assert not waiting.result().spans
        assert not local.receive_waiting(rig.arena).spans

    def test_shutdown_ends_wait_of_an_outgoing_socket(self, rig: Rig) -> None:
        local = rig.outgoing()
        waiting = Task(local.wait)
        local.shutdown()
        assert waiting.result() is False

    def test_nothing_is_received_after_shutdown(self, rig: Rig) -> None:
        local = rig.listen()
        local.shutdown()
        assert not local.receive(rig.arena).spans

    def test_closed_socket_can_be_shut_down_and_closed_again(self, rig: Rig) -> None:
        local = rig.listen()
        local.close()
        local.shutdown()
        local.close()
        assert local.wait() is False
        assert not local.receive(rig.arena).spans


def test_error_names_an_address_in_use(rig: Rig) -> None:
    local = rig.listen()
    with pytest.raises(
        ListenError, match=rf"udp 127\.0\.0\.1:{local.address.port}: Address already in use"
    ):
        rig.datagrams.listen(local.address)


def test_datagrams_beyond_the_receive_buffer_are_counted(rig: Rig) -> None:
    local = rig.listen()
    local.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with udp() as client:
        for _ in range(64):
            client.sendto(bytes(1000), (*local.address,))
        got = len(rig.receive(local, 1))
        local.count_overflow()
        # A second call counts only what is new.
        local.count_overflow()
    assert got + rig.counts.of("drops", "receive buffer full") == 64


def test_arena_pool_reuses_arenas_and_keeps_a_bounded_number() -> None:
    pool = ArenaPool(Arena)
    first = pool.take()
    pool.give(first)
    assert pool.take() is first
    for _ in range(datagram.ARENAS_KEPT + 3):
        pool.give(first)
    assert len(pool._spare) == datagram.ARENAS_KEPT


def test_arena_pool_lets_its_spare_arenas_go() -> None:
    """Hazard 189."""
    pool = ArenaPool(Arena)
    first = pool.take()
    pool.give(first)
    pool.release()
    assert pool.take() is not first
