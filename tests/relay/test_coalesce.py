"""Runs: datagrams of one flow and length leave together, in the order of arrival."""

from __future__ import annotations

from typing import Iterator

import pytest

from netproxy.interfaces.datagrams import Run
from netproxy.net.datagram import span
from netproxy.relay.coalesce import Runs

STRIDE = 100


class Sent:
    """Keeps what was sent, as (key, payloads) in order.  Each byte of `arena` tells its place."""

    def __init__(self) -> None:
        self.arena = bytes(number % 251 for number in range(20000))
        self.sent: list[tuple[str, list[bytes]]] = []

    def __call__(self, key: str, run: Run) -> None:
        self.sent.append((key, list(self.payloads(run))))

    def payloads(self, run: Run) -> Iterator[bytes]:
        for at in run.offsets:
            length = run.last if at == run.offsets[-1] else run.length
            yield self.arena[at : at + length]

    def cut(self, offset: int, length: int, stride: int, skip: int = 0) -> list[bytes]:
        """Return the datagrams of a span, cut byte by byte."""
        return [
            self.arena[at + skip : min(at + stride, offset + length)]
            for at in range(offset, offset + length, stride or 1)
        ] or [b""]


def add(runs: Runs[str], key: str, offset: int, length: int, stride: int, skip: int = 0) -> None:
    """Add the datagrams of one receive."""
    offsets, size, last, _ = span((offset,), length, stride, key)
    runs.add(key, offsets, size, last, skip)


@pytest.fixture
def sent() -> Sent:
    return Sent()


def lengths(sent: Sent) -> list[tuple[str, list[int]]]:
    return [(key, [len(payload) for payload in payloads]) for key, payloads in sent.sent]


def test_neighbours_of_one_length_leave_as_one_run(sent: Sent) -> None:
    runs: Runs[str] = Runs(sent)
    for at in (0, 1000, 2000):
        add(runs, "a", at, 50, 50)
    assert not sent.sent
    runs.flush()
    assert sent.sent == [("a", [sent.arena[at : at + 50] for at in (0, 1000, 2000)])]


def test_shorter_datagram_ends_a_run(sent: Sent) -> None:
    runs: Runs[str] = Runs(sent)
    for at, length in ((0, 50), (1000, 50), (2000, 20), (3000, 50)):
        add(runs, "a", at, length, length)
    runs.flush()
    assert lengths(sent) == [("a", [50, 50, 20]), ("a", [50])]


def test_longer_datagram_begins_a_new_run(sent: Sent) -> None:
    runs: Runs[str] = Runs(sent)
    for at, length in ((0, 50), (1000, 60), (2000, 60)):
        add(runs, "a", at, length, length)
    runs.flush()
    assert lengths(sent) == [("a", [50]), ("a", [60, 60])]


def test_flows_that_take_turns_have_separate_runs(sent: Sent) -> None:
    runs: Runs[str] = Runs(sent)
    for number in range(6):
        add(runs, "ab"[number % 2], number * 1000, 50, 50)
    runs.flush()
    assert lengths(sent) == [("a", [50] * 3), ("b", [50] * 3)]
    assert sent.sent[1][1] == [sent.arena[at : at + 50] for at in (1000, 3000, 5000)]


def test_skipped_header_is_left_out(sent: Sent) -> None:
    runs: Runs[str] = Runs(sent)
    add(runs, "a", 0, 60, 60, 10)
    add(runs, "a", 1000, 60, 60, 10)
    runs.flush()
    assert sent.sent == [("a", [sent.arena[10:60], sent.arena[1010:1060]])]


@pytest.mark.parametrize("length", [200, 300, 250, 201, 350])
@pytest.mark.parametrize("skip", [0, 10])
def test_train_is_a_run_of_its_datagrams(sent: Sent, length: int, skip: int) -> None:
    if length % STRIDE and length % STRIDE <= skip:
        pytest.skip("the last datagram is shorter than the header")
    runs: Runs[str] = Runs(sent)
    add(runs, "a", 500, length, STRIDE, skip)
    runs.flush()
    assert sent.sent == [("a", sent.cut(500, length, STRIDE, skip))]


def test_train_whose_last_datagram_is_a_header_alone(sent: Sent) -> None:
    """Hazard 27.  An empty payload is forwarded, and its header joins no other payload."""
    runs: Runs[str] = Runs(sent)
    add(runs, "a", 500, 210, STRIDE, 10)
    runs.flush()
    assert [payload for _, payloads in sent.sent for payload in payloads] == [
        sent.arena[510:600],
        sent.arena[610:700],
        b"",
    ]


def test_short_trains_join_up_to_the_limit_of_a_send(sent: Sent) -> None:
    runs: Runs[str] = Runs(sent)
    for at in range(0, 15 * 500, 500):
        add(runs, "a", at, 500, STRIDE)
    add(runs, "a", 8000, 230, STRIDE)
    add(runs, "a", 9000, 100, STRIDE)
    runs.flush()
    assert [len(sizes) for _, sizes in lengths(sent)] == [60, 18, 1]
    assert [payload for _, payloads in sent.sent for payload in payloads] == [
        payload for at in range(0, 15 * 500, 500) for payload in sent.cut(at, 500, STRIDE)
    ] + (sent.cut(8000, 230, STRIDE) + sent.cut(9000, 100, STRIDE))


def test_train_behind_a_single_datagram(sent: Sent) -> None:
    runs: Runs[str] = Runs(sent)
    add(runs, "a", 0, 100, 100)
    add(runs, "a", 1000, 250, 100)
    add(runs, "a", 2000, 50, 50)
    runs.flush()
    assert [payload for _, payloads in sent.sent for payload in payloads] == (
        sent.cut(0, 100, 100) + sent.cut(1000, 250, 100) + sent.cut(2000, 50, 50)
    )


@pytest.mark.parametrize("stride", [100, 150])
def test_train_of_the_length_of_the_datagram_before_it(sent: Sent, stride: int) -> None:
    runs: Runs[str] = Runs(sent)
    add(runs, "a", 0, 200, 200, 10)
    add(runs, "a", 1000, 200, stride, 10)
    add(runs, "a", 2000, 200, 200, 10)
    runs.flush()
    assert [payload for _, payloads in sent.sent for payload in payloads] == (
        sent.cut(0, 200, 200, 10) + sent.cut(1000, 200, stride, 10) + sent.cut(2000, 200, 200, 10)
    )


def test_train_does_not_join_behind_a_shorter_datagram(sent: Sent) -> None:
    runs: Runs[str] = Runs(sent)
    add(runs, "a", 0, 250, 100)
    add(runs, "a", 1000, 200, 100)
    runs.flush()
    assert lengths(sent) == [("a", [100, 100, 50]), ("a", [100, 100])]


def test_train_of_shorter_datagrams_does_not_join(sent: Sent) -> None:
    runs: Runs[str] = Runs(sent)
    add(runs, "a", 0, 100, 100)
    add(runs, "a", 1000, 80, 40)
    runs.flush()
    assert lengths(sent) == [("a", [100]), ("a", [40, 40])]


def test_empty_datagrams_keep_their_places(sent: Sent) -> None:
    runs: Runs[str] = Runs(sent)
    for at, length in ((0, 0), (1000, 0), (2000, 5), (3000, 0), (4000, 0)):
        add(runs, "a", at, length, length)
    runs.flush()
    assert [size for _, sizes in lengths(sent) for size in sizes] == [0, 0, 5, 0, 0]


def test_flush_leaves_nothing_behind(sent: Sent) -> None:
    runs: Runs[str] = Runs(sent)
    add(runs, "a", 0, 50, 50)
    runs.flush()
    runs.flush()
    assert len(sent.sent) == 1
    add(runs, "a", 1000, 50, 50)
    runs.flush()
    assert sent.sent == [("a", [sent.arena[0:50]]), ("a", [sent.arena[1000:1050]])]


def test_order_within_a_flow_is_kept_and_nothing_is_lost(sent: Sent) -> None:
    runs: Runs[str] = Runs(sent)
    expected: dict[str, list[bytes]] = {"a": [], "b": [], "c": []}
    number = 7
    for _ in range(400):
        # Any order will do, but the same in each run.
        number = number * 1103515245 + 12345 & 0x7FFFFFFF
        key, offset = "abc"[number // 97 % 3], number // 1009 % 15000
        stride = (40, 40, 60, 80)[number // 13 % 4]
        length = stride * (1, 1, 2, 4)[number // 7 % 4] - (0, 15)[number // 5 % 2]
        stride = min(stride, length)
        add(runs, key, offset, length, stride, 10)
        expected[key] += sent.cut(offset, length, stride, 10)
    runs.flush()
    assert {
        key: [data for sent_to, payloads in sent.sent if sent_to == key for data in payloads]
        for key in expected
    } == expected
    for _, sizes in lengths(sent):
        assert len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
