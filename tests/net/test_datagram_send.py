"""Runs of datagrams over loopback, sent on every level of batching."""

from __future__ import annotations

import errno
import socket

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Run
from netproxy.net.datagram import PinnedHeader
from netproxy.relay.coalesce import Runs
from tests.support.batches import BatchRig as Rig, without_trains
from tests.support.sockets import HAS_IPV6, address_of, datagrams, nothing_comes, udp

needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 on this machine")
HEADER = b"\0\0\0\1\x7f\0\0\1\0\x50"


class TestSending:
    @pytest.mark.parametrize("header", [None, HEADER], ids=["bare", "headed"])
    @pytest.mark.parametrize(
        "lengths",
        [
            [100],
            [100] * 2,
            [100] * 5,
            [100, 100, 40],
            [1, 1, 1],
            [1200] * 32,
            [1] * 64,
            [1] * 65,
            [700] * 200,
            [1400] * 129 + [3],
            [30000] * 4,
            [40000, 40000],
            [0],
            [0, 0, 0],
        ],
        ids=lambda lengths: (
            f"{len(lengths)}x{lengths[0]}"
            + (f"+{lengths[-1]}" if lengths[-1] != lengths[0] else "")
        ),
    )
    def test_run_arrives_datagram_by_datagram(
        self, rig: Rig, lengths: list[int], header: bytes | None
    ) -> None:
        local = rig.outgoing()
        payloads = [bytes((33 + number % 90,)) * length for number, length in enumerate(lengths)]
        run = rig.put(*payloads)
        run.header = PinnedHeader(header) if header else None
        with udp() as target:
            target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            local.send(rig.arena, run, local.destination(address_of(target)))
            assert datagrams(target, len(payloads)) == [
                (header or b"") + payload for payload in payloads
            ]
            assert nothing_comes(target, 0.01)
        assert not rig.counts.counts

    @pytest.mark.parametrize("header", [None, HEADER], ids=["bare", "headed"])
    @pytest.mark.parametrize(
        "payloads",
        [[b"one", b"two", b""], [b"one", b""], [b"", b"one"], [b"one", b"", b"two", b"", b""]],
    )
    def test_empty_datagrams_of_a_flow_are_sent(
        self, rig: Rig, payloads: list[bytes], header: bytes | None
    ) -> None:
        """Hazard 27: an empty payload is forwarded."""
        local = rig.outgoing()
        pinned = PinnedHeader(header) if header else None
        with udp() as target:
            target.settimeout(0.5)
            to = local.destination(address_of(target))

            def send(_: object, run: Run) -> None:
                run.header = pinned
                local.send(rig.arena, run, to)

            runs = Runs(send)
            for at, payload in zip(rig.put(*payloads).offsets, payloads, strict=True):
                runs.add("flow", (at,), len(payload), len(payload))
            runs.flush()
            assert datagrams(target, len(payloads)) == [
                (header or b"") + payload for payload in payloads
            ]

    @pytest.mark.parametrize("count", [2, 33, 64, 150])
    def test_received_train_is_sent_from_where_it_is(self, rig: Rig, count: int) -> None:
        local = rig.outgoing()
        data = bytes(33 + number % 90 for number in range(20 * count + 7))
        rig.arena.view[500 : 500 + len(data)] = data
        # Of each twenty bytes the last ten.
        offsets = range(510, 500 + len(data), 20)[:count]
        with udp() as target:
            to = local.destination(address_of(target))
            local.send(rig.arena, Run(offsets, 10, 10), to)
            assert datagrams(target, count) == [data[at - 500 : at - 490] for at in offsets]

    def test_alternating_headers_precede_their_own_datagrams(self, rig: Rig) -> None:
        local = rig.outgoing()
        headers = [PinnedHeader(b"first:"), PinnedHeader(b"2nd:")]
        expected = []
        with udp() as target:
            to = local.destination(address_of(target))
            for number, payloads in enumerate(
                [
                    [b"aa", b"bb"],
                    [b"cc", b"dd", b"e"],
                    [b"f"],
                    [b"gg", b"hh"],
                    [b"iii"],
                    [b"jj", b"kk"],
                ]
            ):
                run = rig.put(*payloads)
                run.header = headers[number % 2]
                local.send(rig.arena, run, to)
                bare = rig.put(*payloads)
                local.send(rig.arena, bare, to)
                expected += [run.header.data + payload for payload in payloads] + payloads
            assert datagrams(target, len(expected)) == expected

    def test_run_is_sent_singly_if_the_kernel_cannot_cut_trains(self, rig: Rig) -> None:
        local = rig.outgoing()
        without_trains(local)
        run = rig.put(b"a" * 50, b"b" * 50, b"c")
        run.header = PinnedHeader(HEADER)
        with udp() as target:
            local.send(rig.arena, run, local.destination(address_of(target)))
            assert datagrams(target, 3) == [HEADER + b"a" * 50, HEADER + b"b" * 50, HEADER + b"c"]

    def test_datagrams_longer_than_the_path_takes_are_sent_singly_from_then_on(
        self, rig: Rig
    ) -> None:
        """The kernel refuses a train above the MTU: EINVAL.

        The MTU of loopback is 65,536, so that the error is simulated.
        """
        if rig.datagrams.level == "single":
            pytest.skip("no trains on this level")
        local = rig.outgoing()
        with udp() as target:
            to = local.destination(address_of(target))
            run = rig.put(b"a" * 500, b"b" * 500)
            local._train_failed(rig.arena, run, run.offsets, errno.EINVAL, to)
            # Only the limit of that path is lowered.
            assert to.segment_limit == 499 and local._segment_limit > 499
            local.send(rig.arena, run, to)
            assert datagrams(target, 4) == [b"a" * 500, b"b" * 500] * 2
            local._train_failed(rig.arena, run, run.offsets, errno.EIO, to)
            assert local._segment_limit == 0
            assert datagrams(target, 2) == [b"a" * 500, b"b" * 500]
        assert not rig.counts.counts

    def test_datagram_that_is_too_big_is_counted_and_costs_no_other(self, rig: Rig) -> None:
        """Hazard 28: reply and header are longer than 65,507 bytes."""
        local = rig.outgoing()
        run = rig.put(b"x" * 65500)
        run.header = PinnedHeader(HEADER)
        with udp() as target:
            to = local.destination(address_of(target))
            local.send(rig.arena, run, to)
            local.send(rig.arena, rig.put(b"next"), to)
            assert target.recv(65536) == b"next"
        assert rig.counts.counts == {("drops", "too big"): 1}

    def test_datagrams_to_an_unreachable_target_are_counted(self, rig: Rig) -> None:
        # Bound to 127.0.0.1, the socket reaches nothing else.
        local = rig.listen()
        local.send(rig.arena, rig.put(b"x", b"y"), local.destination(Address("192.0.2.77", 9)))
        assert sum(rig.counts.counts.values()) == 2
        assert {name for name, _ in rig.counts.counts} == {"drops"}

    def test_datagrams_of_a_closed_socket_are_counted(self, rig: Rig) -> None:
        local = rig.outgoing()
        to = local.destination(Address("127.0.0.1", 9))
        local.close()
        local.send(rig.arena, rig.put(b"x", b"y"), to)
        local.send(rig.arena, rig.put(b"z"), to)
        assert rig.counts.counts == {("drops", "closed"): 3}

    def test_all_targets_see_the_same_source_port(self, rig: Rig) -> None:
        """RFC 4787 REQ-1: the mapping is endpoint-independent."""
        local = rig.outgoing()
        with udp() as first, udp("127.0.0.2") as second:
            for target in (first, second):
                local.send(rig.arena, rig.put(b"x"), local.destination(address_of(target)))
            assert first.recvfrom(9)[1][1] == second.recvfrom(9)[1][1] == local.address.port

    @needs_ipv6
    def test_ipv4_and_ipv6_targets_see_the_same_source_port(self, rig: Rig) -> None:
        local = rig.outgoing()
        with udp() as first, udp("::1") as second:
            for target in (first, second):
                local.send(rig.arena, rig.put(b"x"), local.destination(address_of(target)))
            assert first.recvfrom(9)[1][1] == second.recvfrom(9)[1][1] == local.address.port
            for target in (first, second):
                target.sendto(b"back", (target.getsockname()[0], local.address.port))
            sources = {local.peer(key)[:2] for _, key in rig.receive(local, 2)}
            assert sources == {
                ("::ffff:127.0.0.1", address_of(first).port),
                ("::1", address_of(second).port),
            }

    def test_name_is_not_a_destination(self, rig: Rig) -> None:
        with pytest.raises(ValueError):
            rig.outgoing().destination(Address("example.com", 9))
