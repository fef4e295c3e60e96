"""Balances: in which order a group asks its members.

The dialers are doubles, and the clock stands still unless a test moves it.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter as Tally

import pytest

from netproxy.dialer.member import BACK_OFF_SECONDS
from netproxy.errors import Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from tests.dialer.doubles import TCP, UDP, Clock, StubGroup, fault, refusal


def is_round_robin(asked: str, names: str) -> bool:
    """Return whether members were asked in the order of `names`, whichever was the first."""
    start = names.index(asked[0])
    return asked == ((names[start:] + names[:start]) * len(asked))[: len(asked)]


def keys(count: int) -> list[Address]:
    """Return so many addresses to hash."""
    return [Address(f"10.0.{number // 250}.{number % 250}", 5) for number in range(count)]


def keyed(balance: str, key: Address) -> Flow:
    """Return a flow with the address that the balance hashes."""
    return TCP._replace(client=key) if balance == "hash-client" else TCP._replace(target=key)


@pytest.mark.usefixtures("clock")
class TestRoundRobin:
    def test_round_robin_asks_members_in_turn(self) -> None:
        assert is_round_robin(StubGroup("round-robin").dial_times(30), "abc")

    def test_round_robin_counts_datagrams_and_streams_together(self) -> None:
        group = StubGroup("round-robin")
        flows = [TCP, TCP, UDP, UDP, TCP, UDP] * 3
        assert is_round_robin("".join(group.dial_once(flow) for flow in flows), "abc")

    def test_round_robin_skips_members_that_back_off(self) -> None:
        group = StubGroup("round-robin")
        group.members["b"].note_failure(fault()())
        assert is_round_robin(group.dial_times(10), "ac")

    def test_round_robin_asks_the_next_in_turn_after_a_failure(self) -> None:
        group = StubGroup("round-robin")
        group.fail("abc", refusal(Reason.NAME))
        assert sorted(group.dial_once() for _ in range(3)) == ["abc", "bca", "cab"]

    def test_round_robin_of_a_single_member(self) -> None:
        assert StubGroup("round-robin", "a").dial_times(3) == "aaa"


@pytest.mark.usefixtures("clock")
class TestWeighted:
    @pytest.mark.parametrize(
        "weights, turns",
        [
            ((3, 1), "aaba"),
            ((1, 1), "ab"),
            ((2, 1), "aba"),
            ((5, 1, 1), "aabacaa"),
            ((1, 2, 3), "cbacbc"),
        ],
    )
    def test_weighted_balance_is_smooth(self, weights: tuple[int, ...], turns: str) -> None:
        """Each round gives each member as many turns as its weight, not all in a row."""
        group = StubGroup("weighted", "abc"[: len(weights)], weights)
        assert group.dial_times(len(turns) * 5) == turns * 5

    def test_weighted_balance_asks_the_next_highest_credit_after_a_failure(self) -> None:
        group = StubGroup("weighted", "abc", (1, 2, 3))
        group.fail("abc", refusal(Reason.NAME))
        assert group.dial_once() == "cba"

    def test_weighted_balance_gives_turns_of_a_member_that_backs_off_to_the_others(
        self, clock: Clock
    ) -> None:
        group = StubGroup("weighted", "abc", (3, 1, 4))
        group.members["c"].note_failure(fault()())
        assert group.dial_times(8) == "aabaaaba"
        clock.now += BACK_OFF_SECONDS
        assert Tally(group.dial_times(8)) == {"a": 3, "b": 1, "c": 4}


@pytest.mark.usefixtures("clock")
class TestLeastConnections:
    def test_least_connections_asks_the_member_with_the_fewest_live_flows(self) -> None:
        group = StubGroup("least-connections")
        streams = [group.group.dial(TCP) for _ in range(6)]
        assert group.live() == {"a": 2, "b": 2, "c": 2}
        for stream, name in zip(streams, group.asked, strict=True):
            if name == "b":
                stream.close()
        assert group.live() == {"a": 2, "b": 0, "c": 2}
        assert [group.group.dial(TCP) and group.asked[-1] for _ in range(2)] == ["b", "b"]

    def test_least_connections_counts_packet_connections(self) -> None:
        group = StubGroup("least-connections", "ab")
        group.group.dial_packet(UDP)
        first = group.asked[-1]
        assert first not in group.dial_times(4)
        assert group.live()[first] == 1

    def test_least_connections_takes_turns_among_equals(self) -> None:
        assert is_round_robin(StubGroup("least-connections").dial_times(9), "abc")


class TestLeastLatency:
    def test_least_latency_asks_unknown_members_once_and_then_the_fastest(
        self, clock: Clock
    ) -> None:
        group = StubGroup("least-latency")
        group.takes(clock, a=0.3, b=0.1, c=0.2)
        assert sorted(group.dial_times(3)) == ["a", "b", "c"]
        assert group.dial_times(5) == "bbbbb"

    def test_latency_is_a_moving_average(self, clock: Clock) -> None:
        """The newest dial counts for a fifth."""
        group = StubGroup("least-latency", "ab")
        group.takes(clock, a=0.1, b=0.25)
        group.dial_times(2)
        group.takes(clock, a=0.6)
        assert group.dial_times(1) == "a"
        assert group.members["a"].latency == pytest.approx(0.2)
        assert group.dial_times(1) == "a"
        assert group.members["a"].latency == pytest.approx(0.28)
        assert group.dial_times(3) == "bbb"

    def test_failed_dials_do_not_change_the_latency(self, clock: Clock) -> None:
        """A proxy that refuses at once is not a fast one."""
        group = StubGroup("least-latency", "ab")
        group.takes(clock, a=0.2, b=0.3)
        group.dial_times(2)
        group.takes(clock, a=0.0)
        group.fail("a", refusal())
        group.dial_times(5)
        assert group.members["a"].latency == pytest.approx(0.2)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("balance", ["hash-client", "hash-target"])
class TestHash:
    def test_hash_sends_one_key_to_one_member(self, balance: str) -> None:
        group = StubGroup(balance, "abcd")
        for key in keys(50):
            assert len(set(group.dial_times(3, keyed(balance, key)))) == 1

    def test_hash_ignores_port_and_network(self, balance: str) -> None:
        group = StubGroup(balance, "abcd")
        for key in keys(20):
            flows = [
                keyed(balance, key._replace(port=port))._replace(network=network)
                for port in (1, 2)
                for network in ("tcp", "udp")
            ]
            assert len({group.dial_once(flow) for flow in flows}) == 1

    def test_hash_ignores_the_rest_of_the_flow(self, balance: str) -> None:
        """The other address of client and target included."""
        group = StubGroup(balance, "abcd")
        flow = keyed(balance, Address("192.0.2.9", 1))
        field = "target" if balance == "hash-client" else "client"
        others = [
            flow._replace(**{field: key}, listener=key.host, user=key.host) for key in keys(20)
        ]
        assert len({group.dial_once(other) for other in others}) == 1

    def test_hash_spreads_addresses_evenly(self, balance: str) -> None:
        group = StubGroup(balance, "abcd")
        spread = Tally(group.dial_once(keyed(balance, key)) for key in keys(1000))
        assert set(spread) == set("abcd")
        assert all(abs(count - 250) <= 0.15 * 250 for count in spread.values()), spread

    def test_hash_spreads_names_evenly(self, balance: str) -> None:
        group = StubGroup(balance, "abcd")
        spread = Tally(
            group.dial_once(keyed(balance, Address(f"www{number}.example", 443)))
            for number in range(1000)
        )
        assert all(abs(count - 250) <= 0.15 * 250 for count in spread.values()), spread

    @pytest.mark.parametrize("removed", "abcd")
    def test_hash_moves_only_the_keys_of_a_removed_member(self, balance: str, removed: str) -> None:
        """They are spread over all that are left."""
        before = StubGroup(balance, "abcd")
        after = StubGroup(balance, "abcd".replace(removed, ""))
        moved = Tally[str]()
        for key in keys(1000):
            old = before.dial_once(keyed(balance, key))
            new = after.dial_once(keyed(balance, key))
            if old == removed:
                moved[new] += 1
            else:
                assert new == old
        assert len(moved) == 3 and min(moved.values()) > 50

    def test_hash_ignores_the_order_of_the_members(self, balance: str) -> None:
        group, reordered = StubGroup(balance, "abcd"), StubGroup(balance, "dbca")
        for key in keys(100):
            flow = keyed(balance, key)
            assert group.dial_once(flow) == reordered.dial_once(flow)

    def test_hash_moves_keys_only_while_their_member_backs_off(
        self, balance: str, clock: Clock
    ) -> None:
        group = StubGroup(balance, "abcd")
        before = {key: group.dial_once(keyed(balance, key)) for key in keys(100)}
        group.members["b"].note_failure(fault()())
        during = {key: group.dial_once(keyed(balance, key)) for key in keys(100)}
        for key, name in before.items():
            assert during[key] in ("acd" if name == "b" else name)
        clock.now += BACK_OFF_SECONDS
        assert {key: group.dial_once(keyed(balance, key)) for key in keys(100)} == before


def test_hashes_are_the_same_in_every_process() -> None:
    """str.__hash__ is salted for each process; a restart must leave clients where they are."""
    program = (
        "from netproxy.dialer.group import _by_hash\nfrom types import SimpleNamespace as N\n"
        "members = [N(name=name) for name in 'abcd']\n"
        "print(''.join(_by_hash(members, f'10.0.0.{key}')[0].name for key in range(200)))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] and len(outputs[0]) == 201


@pytest.mark.usefixtures("clock")
class TestFailover:
    def test_failover_asks_the_first_member_while_it_works(self) -> None:
        assert StubGroup("failover").dial_times(5) == "aaaaa"

    def test_failover_returns_to_the_first_member_after_its_back_off(self, clock: Clock) -> None:
        group = StubGroup("failover")
        group.fail("a")
        assert [group.dial_once() for _ in range(3)] == ["ab", "b", "b"]
        group.mend("a")
        clock.now += BACK_OFF_SECONDS
        assert group.dial_times(2) == "aa"
