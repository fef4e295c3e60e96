"""Groups of ways out: whom each balance asks, what becomes of a dial that fails, and what is counted.

The ways are doubles and the clock stands still unless a test moves it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter as Tally
from typing import Any, Callable, Sequence

import pytest

from netproxy.dialer import group as group_module
from netproxy.dialer.group import REST_LIMIT, REST_SECONDS, TRIES, GroupDialer, Member
from netproxy.dialer.hop import Hop
from netproxy.dialer.http import HttpDialer
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import Stream
from tests.support.doubles import Counts
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import Task
from tests.support.upstreams import FakeConn

TARGET = Address("198.51.100.7", 443)
TCP, UDP = tcp_to(TARGET), udp_to(TARGET)
BALANCES = (
    "round-robin",
    "weighted",
    "least-connections",
    "least-latency",
    "hash-client",
    "hash-target",
    "failover",
)
HASHES = ("hash-client", "hash-target")


class Clock:
    """In the place of the module `time`: stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(group_module, "time", one)
    return one


class NoSocket:
    """What a Stream closes, and no descriptor."""

    def detach(self) -> int:
        return -1

    close = detach


class Conn(FakeConn):
    """A PacketConn; counts how often it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closes = 0

    def close(self) -> None:
        self.closes += 1
        super().close()


class Way:
    """A Dialer of streams and packet connections without sockets; `fails` makes the error of each dial while it is set."""

    refusal = Reason.UNSUPPORTED
    resolves_names = True

    def __init__(
        self,
        name: str = "way",
        asked: list[str] | None = None,
        carries: Sequence[str] = ("tcp", "udp", "bind"),
        symmetric: bool = False,
    ) -> None:
        self.name = name
        self.asked = [] if asked is None else asked
        self.carries = frozenset(carries)
        self.symmetric = symmetric
        self.fails: Callable[[], BaseException] | None = None
        self.meanwhile: Callable[[], None] = lambda: None  # what happens during a dial
        self.flows: list[Flow] = []

    def dial(self, flow: Flow) -> Stream:
        self._ask(flow)
        return Stream(NoSocket())  # type: ignore[arg-type]

    def dial_packet(self, flow: Flow) -> Conn:
        self._ask(flow)
        return Conn()

    def _ask(self, flow: Flow) -> None:
        self.asked.append(self.name)
        self.flows.append(flow)
        self.meanwhile()
        if self.fails:
            raise self.fails()


def fault(
    reason: Reason = Reason.TIMEOUT, hop: str = "", said: str = ""
) -> Callable[[], DialError]:
    """The proxy's own."""

    def make() -> DialError:
        error = DialError(reason, said=said)
        error.hop, error.upstream = hop, True
        return error

    return make


def refusal(reason: Reason = Reason.REFUSED) -> Callable[[], DialError]:
    """The target's."""
    return lambda: DialError(reason, str(TARGET))


class Pool:
    """A group of ways; `asked` are their names in the order in which they were."""

    def __init__(
        self, balance: str, names: str = "abc", weights: Sequence[int] = (), only_tcp: str = ""
    ) -> None:
        self.asked: list[str] = []
        self.ways = {
            name: Way(name, self.asked, ("tcp",) if name in only_tcp else ("tcp", "udp", "bind"))
            for name in names
        }
        self.members = {
            name: Member(name, way, weight)
            for (name, way), weight in zip(self.ways.items(), weights or [1] * len(names))
        }
        self.group = GroupDialer("pool", list(self.members.values()), balance, 10.0)

    def whom(self, flow: Flow = TCP) -> str:
        """Who is asked by one dial, in order; what it gives is closed again."""
        before = len(self.asked)
        try:
            made: Any = (
                self.group.dial(flow) if flow.network == "tcp" else self.group.dial_packet(flow)
            )
        except DialError:
            pass
        else:
            made.close()
        return "".join(self.asked[before:])

    def each(self, count: int, flow: Flow = TCP) -> str:
        """Those that `count` dials ask."""
        return "".join(self.whom(flow) for _ in range(count))

    def fail(self, names: str, make: Callable[[], BaseException] = fault()) -> None:
        for name in names:
            self.ways[name].fails = make

    def mend(self, names: str) -> None:
        for name in names:
            self.ways[name].fails = None

    def takes(self, clock: Clock, **seconds: float) -> None:
        def passing(time: float) -> Callable[[], None]:
            def traffic() -> None:
                clock.now += time

            return traffic

        for name, time in seconds.items():
            self.ways[name].meanwhile = passing(time)

    def failure(self, flow: Flow = TCP) -> DialError:
        with pytest.raises(DialError) as caught:
            self.group.dial(flow) if flow.network == "tcp" else self.group.dial_packet(flow)
        return caught.value

    def live(self) -> dict[str, int]:
        return {name: member.live for name, member in self.members.items()}


def in_turn(asked: str, names: str) -> bool:
    """Whether they are asked in the order they are written in, whoever is the first."""
    start = names.index(asked[0])
    return asked == ((names[start:] + names[:start]) * len(asked))[: len(asked)]


def keys(count: int) -> list[Address]:
    return [Address(f"10.0.{number // 250}.{number % 250}", 5) for number in range(count)]


def keyed(balance: str, key: Address) -> Flow:
    return TCP._replace(client=key) if balance == "hash-client" else TCP._replace(target=key)


@pytest.mark.usefixtures("clock")
class TestRoundRobin:
    def test_asks_one_after_the_other(self) -> None:
        assert in_turn(Pool("round-robin").each(30), "abc")

    def test_counts_datagrams_and_streams_together(self) -> None:
        pool = Pool("round-robin")
        assert in_turn(
            "".join(pool.whom(flow) for flow in [TCP, TCP, UDP, UDP, TCP, UDP] * 3), "abc"
        )

    def test_leaves_out_who_rests(self) -> None:
        pool = Pool("round-robin")
        pool.members["b"].note_failure(fault()())
        assert in_turn(pool.each(10), "ac")

    def test_the_next_in_turn_is_asked_where_one_fails(self) -> None:
        pool = Pool("round-robin")
        pool.fail("abc", refusal(Reason.NAME))
        assert sorted(pool.whom() for _ in range(3)) == ["abc", "bca", "cab"]

    def test_of_one_alone(self) -> None:
        assert Pool("round-robin", "a").each(3) == "aaa"


@pytest.mark.usefixtures("clock")
class TestWeighted:
    @pytest.mark.parametrize(
        "weights, round_",
        [
            ((3, 1), "aaba"),
            ((1, 1), "ab"),
            ((2, 1), "aba"),
            ((5, 1, 1), "aabacaa"),
            ((1, 2, 3), "cbacbc"),
        ],
    )
    def test_is_smooth(self, weights: tuple, round_: str) -> None:
        """Each round gives everybody its weight in turns, and nobody all of them at once."""
        pool = Pool("weighted", "abc"[: len(weights)], weights)
        assert pool.each(len(round_) * 5) == round_ * 5

    def test_the_richest_of_the_rest_is_asked_where_one_fails(self) -> None:
        pool = Pool("weighted", "abc", (1, 2, 3))
        pool.fail("abc", refusal(Reason.NAME))
        assert pool.whom() == "cba"

    def test_who_rests_leaves_its_turns_to_the_others(self, clock: Clock) -> None:
        pool = Pool("weighted", "abc", (3, 1, 4))
        pool.members["c"].note_failure(fault()())
        assert pool.each(8) == "aabaaaba"[:8]
        clock.now += REST_SECONDS
        assert Tally(pool.each(8)) == {"a": 3, "b": 1, "c": 4}


@pytest.mark.usefixtures("clock")
class TestLeastConnections:
    def test_asks_who_has_the_fewest(self) -> None:
        pool = Pool("least-connections")
        streams = [pool.group.dial(TCP) for _ in range(6)]
        assert pool.live() == {"a": 2, "b": 2, "c": 2}
        busy = [stream for stream, name in zip(streams, pool.asked) if name != "b"]
        for stream in streams:
            if stream not in busy:
                stream.close()
        assert pool.live() == {"a": 2, "b": 0, "c": 2}
        assert [pool.group.dial(TCP) and pool.asked[-1] for _ in range(2)] == ["b", "b"]

    def test_datagrams_count_as_well(self) -> None:
        pool = Pool("least-connections", "ab")
        pool.group.dial_packet(UDP)
        first = pool.asked[-1]
        assert first not in pool.each(4)
        assert pool.live()[first] == 1

    def test_those_that_have_as_few_take_turns(self) -> None:
        assert in_turn(Pool("least-connections").each(9), "abc")


class TestLive:
    def test_a_stream_is_until_it_is_closed(self, clock: Clock) -> None:
        pool = Pool("failover", "a")
        stream = pool.group.dial(TCP)
        assert pool.live() == {"a": 1}
        stream.close()
        stream.close()
        assert pool.live() == {"a": 0}

    @pytest.mark.parametrize("end", [Stream.close, Stream.reset])
    def test_however_it_is_closed(self, end: Callable[[Stream], None], clock: Clock) -> None:
        pool = Pool("failover", "a")
        stream = pool.group.dial(TCP)
        stream.socket.setsockopt = lambda *_: None  # type: ignore[method-assign]
        end(stream)
        assert pool.live() == {"a": 0}

    def test_datagrams_are_until_closed_and_leave_once(self, clock: Clock) -> None:
        pool = Pool("failover", "a")
        conn: Any = pool.group.dial_packet(UDP)
        assert pool.live() == {"a": 1}
        conn.shutdown()
        assert pool.live() == {"a": 1}
        conn.close()
        conn.close()
        assert pool.live() == {"a": 0}
        assert conn.closes == 2

    def test_datagrams_leave_once_though_whoever_closes_has_kept_close(self, clock: Clock) -> None:
        """As a connection around it does: self.close = conn.close."""
        pool = Pool("failover", "a")
        close = pool.group.dial_packet(UDP).close
        close()
        close()
        assert pool.live() == {"a": 0}

    def test_what_failed_is_not(self, clock: Clock) -> None:
        pool = Pool("failover", "ab")
        pool.fail("ab", RuntimeError)
        for flow in (TCP, UDP):
            with pytest.raises(RuntimeError):
                pool.whom(flow)
        assert pool.live() == {"a": 0, "b": 0}
        assert pool.asked == ["a", "a"]  # a fault of ours is no reason to ask another

    def test_a_dial_is_counted_whatever_comes_of_it(self, clock: Clock) -> None:
        pool = Pool("failover", "a")
        pool.each(3)
        pool.fail("a", refusal())
        pool.each(2)
        pool.fail("a", fault(said="gone"))
        pool.whom()
        member = pool.members["a"]
        assert (member.dialled, member.failed, member.live, member.error) == (6, 1, 0, "gone")


class TestLeastLatency:
    def test_who_is_not_known_is_asked_once_and_then_the_nearest(self, clock: Clock) -> None:
        pool = Pool("least-latency")
        pool.takes(clock, a=0.3, b=0.1, c=0.2)
        assert sorted(pool.each(3)) == ["a", "b", "c"]
        assert pool.each(5) == "bbbbb"

    def test_it_is_an_average(self, clock: Clock) -> None:
        """One slow dial is a fifth of it."""
        pool = Pool("least-latency", "ab")
        pool.takes(clock, a=0.1, b=0.25)
        pool.each(2)
        pool.takes(clock, a=0.6)
        assert pool.each(1) == "a"
        assert pool.members["a"].latency == pytest.approx(0.2)
        assert pool.each(1) == "a"
        assert pool.members["a"].latency == pytest.approx(0.28)
        assert pool.each(3) == "bbb"

    def test_failures_do_not_count(self, clock: Clock) -> None:
        """A proxy that refuses at once is not near."""
        pool = Pool("least-latency", "ab")
        pool.takes(clock, a=0.2, b=0.3)
        pool.each(2)
        pool.takes(clock, a=0.0)
        pool.fail("a", refusal())
        pool.each(5)
        assert pool.members["a"].latency == pytest.approx(0.2)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("balance", HASHES)
class TestHash:
    def test_the_same_key_has_the_same_member(self, balance: str) -> None:
        pool = Pool(balance, "abcd")
        for key in keys(50):
            assert len(set(pool.each(3, keyed(balance, key)))) == 1

    def test_ports_and_networks_are_no_part_of_the_key(self, balance: str) -> None:
        pool = Pool(balance, "abcd")
        for key in keys(20):
            flows = [
                keyed(balance, key._replace(port=port))._replace(network=network)
                for port in (1, 2)
                for network in ("tcp", "udp")
            ]
            assert len({pool.whom(flow) for flow in flows}) == 1

    def test_the_rest_of_the_flow_is_no_part_of_the_key(self, balance: str) -> None:
        """Nor is the other of client and target."""
        pool = Pool(balance, "abcd")
        flow, field = (
            keyed(balance, Address("192.0.2.9", 1)),
            "target" if balance == "hash-client" else "client",
        )
        others = [
            flow._replace(**{field: key}, listener=key.host, user=key.host) for key in keys(20)
        ]
        assert len({pool.whom(other) for other in others}) == 1

    def test_keys_are_spread_evenly(self, balance: str) -> None:
        pool = Pool(balance, "abcd")
        spread = Tally(pool.whom(keyed(balance, key)) for key in keys(1000))
        assert set(spread) == set("abcd")
        assert all(abs(count - 250) <= 0.15 * 250 for count in spread.values()), spread

    def test_names_are_spread_evenly(self, balance: str) -> None:
        pool = Pool(balance, "abcd")
        spread = Tally(
            pool.whom(keyed(balance, Address(f"www{number}.example", 443)))
            for number in range(1000)
        )
        assert all(abs(count - 250) <= 0.15 * 250 for count in spread.values()), spread

    @pytest.mark.parametrize("gone", "abcd")
    def test_without_a_member_its_keys_alone_move(self, balance: str, gone: str) -> None:
        before, after = Pool(balance, "abcd"), Pool(balance, "abcd".replace(gone, ""))
        traffic = Tally[str]()
        for key in keys(1000):
            was, is_ = before.whom(keyed(balance, key)), after.whom(keyed(balance, key))
            if was == gone:
                traffic[is_] += 1
            else:
                assert is_ == was
        assert len(traffic) == 3 and min(traffic.values()) > 50  # to all that are left

    def test_the_order_in_the_file_is_no_part_of_the_key(self, balance: str) -> None:
        one, other = Pool(balance, "abcd"), Pool(balance, "dbca")
        assert all(
            one.whom(keyed(balance, key)) == other.whom(keyed(balance, key)) for key in keys(100)
        )

    def test_who_rests_leaves_its_keys_for_as_long(self, balance: str, clock: Clock) -> None:
        pool = Pool(balance, "abcd")
        before = {key: pool.whom(keyed(balance, key)) for key in keys(100)}
        pool.members["b"].note_failure(fault()())
        resting = {key: pool.whom(keyed(balance, key)) for key in keys(100)}
        assert all(
            resting[key] == was if was != "b" else resting[key] in "acd"
            for key, was in before.items()
        )
        clock.now += REST_SECONDS
        assert {key: pool.whom(keyed(balance, key)) for key in keys(100)} == before


def test_hashes_are_the_same_in_every_process() -> None:
    """Not those of str, which each process salts: a restart leaves clients where they are."""
    program = (
        "from netproxy.dialer.group import _by_hash\nfrom types import SimpleNamespace as N\n"
        "members = [N(name=name) for name in 'abcd']\n"
        "print(''.join(_by_hash(members, f'10.0.0.{key}')[0].name for key in range(200)))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] and len(said[0]) == 201


@pytest.mark.usefixtures("clock")
class TestFailover:
    def test_asks_the_first_while_it_works(self) -> None:
        assert Pool("failover").each(5) == "aaaaa"

    def test_goes_back_to_the_first(self, clock: Clock) -> None:
        pool = Pool("failover")
        pool.fail("a")
        assert [pool.whom() for _ in range(3)] == ["ab", "b", "b"]
        pool.mend("a")
        clock.now += REST_SECONDS
        assert pool.each(2) == "aa"


@pytest.mark.usefixtures("clock")
class TestFailing:
    @pytest.mark.parametrize("flow", [TCP, UDP])
    @pytest.mark.parametrize("reason", list(Reason))
    def test_the_next_is_asked_where_a_proxy_is_at_fault(self, reason: Reason, flow: Flow) -> None:
        pool = Pool("failover")
        pool.fail("a", fault(reason))
        assert pool.whom(flow) == "ab"
        assert (pool.members["a"].failed, pool.members["b"].failed) == (1, 0)
        assert pool.ways["b"].flows == [flow]

    @pytest.mark.parametrize("reason", [Reason.REFUSED, Reason.DENIED, Reason.LOOP])
    def test_what_the_target_answers_is_passed_on_at_once(self, reason: Reason) -> None:
        pool = Pool("failover")
        error = refusal(reason)()
        pool.fail("a", lambda: error)
        assert pool.failure() is error
        assert pool.asked == ["a"]
        member = pool.members["a"]
        assert (member.failed, member.error, member.state, pool.whom()) == (0, "", "up", "a")

    @pytest.mark.parametrize(
        "reason",
        [
            Reason.NAME,
            Reason.HOST_UNREACHABLE,
            Reason.NETWORK_UNREACHABLE,
            Reason.TIMEOUT,
            Reason.GENERAL,
        ],
    )
    def test_where_the_target_is_not_reached_another_is_asked_and_nobody_rests(
        self, reason: Reason
    ) -> None:
        pool = Pool("failover")
        pool.fail("ab", refusal(reason))
        assert [pool.whom() for _ in range(3)] == ["abc"] * 3
        assert [member.failed for member in pool.members.values()] == [0, 0, 0]

    def test_what_one_way_does_not_carry_another_may(self) -> None:
        """A SOCKS4 proxy and an IPv6 target, a proxy without ASSOCIATE: it says nothing of the target."""
        pool = Pool("failover")
        pool.fail("a", refusal(Reason.UNSUPPORTED))
        assert pool.whom(UDP) == "ab"

    def test_no_more_than_a_few_are_asked(self) -> None:
        pool = Pool("failover", "abcdef")
        pool.fail("abcdef")
        assert (
            str(pool.failure())
            == "group 'pool': no member could: a: timed out; b: timed out; c: timed out"
        )
        assert len(pool.asked) == TRIES == 3

    @pytest.mark.parametrize(
        "seconds, asked",
        [(3.0, "abc"), (7.5, "abc"), (7.6, "ab"), (15.0, "ab"), (15.1, "a"), (100.0, "a")],
    )
    def test_none_is_asked_once_the_time_is_over(
        self, clock: Clock, seconds: float, asked: str
    ) -> None:
        """1.5 times what a dial may take, here 10 s."""
        pool = Pool("failover")
        pool.takes(clock, a=seconds, b=seconds, c=seconds)
        pool.fail("abc")
        assert pool.whom() == asked

    def test_all_that_failed_are_told_of(self) -> None:
        pool = Pool("failover", "ab")
        pool.fail("a", fault(Reason.TIMEOUT, "'a' (socks5://10.0.0.1:1080)"))
        pool.fail(
            "b",
            fault(
                Reason.AUTHENTICATION,
                "'b' (http://10.0.0.2:3128)",
                "407 proxy authentication required",
            ),
        )
        error = pool.failure()
        assert str(error) == (
            "group 'pool': no member could: a: 'a' (socks5://10.0.0.1:1080): timed out; "
            "b: 'b' (http://10.0.0.2:3128): 407 proxy authentication required"
        )
        assert (error.hop, error.reason, error.upstream) == (
            "group 'pool'",
            Reason.AUTHENTICATION,
            True,
        )

    def test_what_the_target_answers_the_second_is_passed_on(self) -> None:
        pool = Pool("failover")
        pool.fail("a")
        pool.fail("b", refusal())
        error = pool.failure()
        assert (error.reason, str(error), error.upstream) == (
            Reason.REFUSED,
            f"{TARGET}: connection refused",
            False,
        )
        assert pool.asked == ["a", "b"]


@pytest.mark.usefixtures("clock")
class TestRest:
    def test_doubles_with_each_failure_in_a_row_up_to_a_limit(self, clock: Clock) -> None:
        pool = Pool("failover", "ab")
        pool.fail("a")
        for seconds in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
            assert pool.whom() == "ab"
            clock.now += seconds - 0.001
            assert pool.whom() == "b"
            clock.now += 0.001
        assert (REST_SECONDS, REST_LIMIT) == (1.0, 60.0)

    def test_is_limited_after_ever_so_many_failures(self, clock: Clock) -> None:
        member = Member("a", Way(), 1)
        for _ in range(5000):
            member.note_failure(fault()())
        assert member.rests(clock.now + REST_LIMIT - 0.001) and not member.rests(
            clock.now + REST_LIMIT
        )

    def test_a_success_forgets_the_failures(self, clock: Clock) -> None:
        pool = Pool("failover", "ab")
        pool.fail("a")
        for seconds in (1.0, 2.0, 4.0):
            pool.whom()
            clock.now += seconds
        pool.mend("a")
        assert pool.whom() == "a"
        pool.fail("a")
        assert pool.whom() == "ab"
        clock.now += REST_SECONDS
        assert pool.whom() == "ab"

    def test_a_refusal_of_the_targets_forgets_nothing(self, clock: Clock) -> None:
        pool = Pool("failover", "ab")
        pool.fail("a")
        pool.whom()
        clock.now += REST_SECONDS
        pool.fail("a", refusal())
        assert pool.whom() == "a"
        pool.fail("a")
        pool.whom()
        clock.now += 1.5 * REST_SECONDS
        assert pool.whom() == "b"

    @pytest.mark.parametrize("balance", BALANCES)
    def test_who_rests_is_asked_last(self, balance: str) -> None:
        pool = Pool(balance)
        for name in "ab":
            pool.members[name].note_failure(fault()())
        assert pool.each(5) == "ccccc"
        pool.fail("c", refusal(Reason.NAME))
        assert pool.whom() == "ca"

    @pytest.mark.parametrize("balance", BALANCES)
    def test_where_all_rest_they_are_asked_all_the_same(self, balance: str) -> None:
        pool = Pool(balance)
        for member in pool.members.values():
            member.note_failure(fault()())
        assert pool.whom() == "a"
        assert pool.whom() == "a"  # and it rests no more

    def test_those_that_fail_together_fail_once(self, clock: Clock) -> None:
        """Eight clients meet one outage of a moment: that is not eight failures in a row, and no rest of a minute."""
        pool = Pool("failover", "ab")
        pool.fail("a")
        meeting = threading.Barrier(8)
        pool.ways["a"].meanwhile = lambda: meeting.wait(5) and None
        for task in [Task(pool.group.dial, TCP) for _ in range(8)]:
            task.result().close()
        pool.mend("a")
        pool.ways["a"].meanwhile = lambda: None
        clock.now += 2 * REST_SECONDS
        assert pool.whom() == "a"


@pytest.mark.usefixtures("clock")
class TestDown:
    @pytest.mark.parametrize("balance", BALANCES)
    def test_who_is_down_is_never_asked(self, balance: str) -> None:
        pool = Pool(balance)
        pool.members["b"].note_check("connection refused")
        assert "b" not in pool.each(9)
        pool.fail("ac")
        assert sorted(pool.whom()) == ["a", "c"]
        assert sorted(pool.whom()) == ["a", "c"]  # they rest, and still it is not its turn

    def test_with_all_down_nobody_is_asked(self) -> None:
        pool = Pool("failover", "ab")
        pool.members["a"].note_check("10.0.0.1:1080: connection refused")
        pool.members["b"].note_check("timed out")
        error = pool.failure()
        assert (
            str(error)
            == "group 'pool': no live member: a: 10.0.0.1:1080: connection refused; b: timed out"
        )
        assert (error.reason, error.upstream, pool.asked) == (Reason.GENERAL, True, [])

    def test_a_check_is_news_where_it_changes_something(self) -> None:
        member = Member("a", Way(), 1)
        said = [member.note_check(error) for error in ("", "", "refused", "timed out", "", "")]
        assert said == [False, False, True, False, True, False]
        assert (member.up, member.error) == (True, "timed out")

    def test_a_check_that_goes_well_ends_a_rest(self, clock: Clock) -> None:
        member = Member("a", Way(), 1)
        for _ in range(5):
            member.note_failure(fault()())
        member.note_check("")
        assert not member.rests(clock.now)
        member.note_failure(fault()())
        assert not member.rests(clock.now + REST_SECONDS)

    def test_its_state_in_a_word(self) -> None:
        member = Member("a", Way(), 1)
        said = [member.state]
        member.dial(TCP)
        said.append(member.state)
        member.note_failure(refusal()())
        said.append(member.state)
        member.note_failure(fault()())
        said.append(member.state)
        member.note_check("refused")
        said.append(member.state)
        member.note_check("")
        said.append(member.state)
        assert said == ["unused", "up", "up", "failing", "down", "up"]


@pytest.mark.usefixtures("clock")
class TestCarrying:
    def test_a_group_carries_what_any_member_does_but_no_bind(self) -> None:
        ways = [Way("a", carries=("tcp", "bind")), Way("b", carries=("tcp", "udp"), symmetric=True)]
        group = GroupDialer("pool", [Member(way.name, way, 1) for way in ways], "failover", 1.0)
        assert (group.carries, group.symmetric, group.name) == ({"tcp", "udp"}, True, "pool")
        alone = GroupDialer("pool", [Member("a", ways[0], 1)], "failover", 1.0)
        assert (alone.carries, alone.symmetric) == ({"tcp"}, False)

    @pytest.mark.parametrize("balance", BALANCES)
    def test_only_who_carries_datagrams_is_asked_for_them(self, balance: str) -> None:
        pool = Pool(balance, only_tcp="ac")
        assert pool.each(5, UDP) == "bbbbb"

    def test_where_none_carries_datagrams_that_is_said(self) -> None:
        pool = Pool("failover", "ab", only_tcp="ab")
        error = pool.failure(UDP)
        assert (str(error), error.reason) == (
            "group 'pool': no member carries UDP",
            Reason.UNSUPPORTED,
        )

    def test_of_those_that_are_down_only_who_would_carry_it_is_told(self) -> None:
        pool = Pool("failover", "ab", only_tcp="a")
        for member in pool.members.values():
            member.note_check("refused")
        assert str(pool.failure(UDP)) == "group 'pool': no live member: b: refused"


@pytest.mark.usefixtures("clock")
class TestWithin:
    """A group as a member of another: `inner` is the first of `outer`, which has a way `z` besides."""

    @staticmethod
    def nested() -> tuple[Pool, Pool]:
        inner, outer = Pool("failover", "ab"), Pool("failover", "z")
        inner.group.name = "inner"
        group: Any = inner.group
        outer.members = {"inner": Member("inner", group, 1, [group]), **outer.members}
        outer.group = GroupDialer("outer", list(outer.members.values()), "failover", 10.0)
        outer.asked = inner.asked
        outer.ways["z"].asked = inner.asked
        return inner, outer

    def test_the_inner_asks_all_of_its_own_first(self) -> None:
        inner, outer = self.nested()
        inner.fail("a")
        assert outer.whom() == "ab"
        assert (outer.members["inner"].state, inner.members["a"].state) == ("up", "failing")

    def test_then_the_outer_asks_the_next(self, clock: Clock) -> None:
        inner, outer = self.nested()
        inner.fail("ab")
        assert outer.whom() == "abz"
        assert (
            outer.members["inner"].error
            == "group 'inner': no member could: a: timed out; b: timed out"
        )
        assert outer.whom() == "z"  # the inner one rests as a whole
        clock.now += REST_SECONDS
        assert outer.whom() == "abz"

    def test_all_are_told_of(self) -> None:
        inner, outer = self.nested()
        inner.fail("ab")
        outer.fail("z")
        assert str(outer.failure()) == (
            "group 'outer': no member could: inner: group 'inner': no member could: "
            "a: timed out; b: timed out; z: timed out"
        )

    def test_the_target_is_passed_on_at_once_through_both(self) -> None:
        inner, outer = self.nested()
        inner.fail("a", refusal())
        assert outer.whom() == "a"
        assert outer.members["inner"].failed == 0

    def test_a_target_that_nobody_reaches_is_no_fault_of_the_inner(self) -> None:
        """A mistyped name must not put a whole group to rest."""
        inner, outer = self.nested()
        inner.fail("ab", refusal(Reason.NAME))
        assert [outer.whom() for _ in range(2)] == ["abz", "abz"]
        assert outer.members["inner"].failed == 0

    def test_a_stream_counts_in_both_until_it_is_closed(self) -> None:
        inner, outer = self.nested()
        stream = outer.group.dial(TCP)
        assert (inner.live(), outer.live()) == ({"a": 1, "b": 0}, {"inner": 1, "z": 0})
        stream.close()
        assert (inner.live(), outer.live()) == ({"a": 0, "b": 0}, {"inner": 0, "z": 0})

    def test_datagrams_count_in_both_until_closed(self) -> None:
        inner, outer = self.nested()
        conn = outer.group.dial_packet(UDP)
        assert (inner.live(), outer.live()) == ({"a": 1, "b": 0}, {"inner": 1, "z": 0})
        conn.close()
        conn.close()
        assert (inner.live(), outer.live()) == ({"a": 0, "b": 0}, {"inner": 0, "z": 0})

    def test_a_stream_counts_in_the_group_that_a_members_chain_leads_through(self) -> None:
        """Chain of a group and a proxy, itself a member of another group; and a handshake that fails leaves as well."""
        inner = Pool("failover", "a")
        through: Any = Through(inner.group)
        outer = GroupDialer("outer", [Member("through", through, 1)], "failover", 10.0)
        outer.dial(TCP).close()
        assert (inner.live(), outer.members[0].live) == ({"a": 0}, 0)

    def test_a_handshake_that_fails_behind_a_group_leaves_it(self) -> None:
        inner = Pool("failover", "a")

        def refuse(stream: Stream) -> None:
            raise DialError(Reason.AUTHENTICATION)

        via: Any = inner.group
        hop = Hop(
            "x", "hop 2 (http://192.0.2.1:1)", Address("192.0.2.1", 1), via, 1.0, secure=refuse
        )
        with pytest.raises(
            DialError, match=r"hop 2 \(http://192.0.2.1:1\): the upstream refused the credentials"
        ):
            HttpDialer(hop, Counts()).dial(TCP)
        assert inner.live() == {"a": 0}


class Through(Way):
    """A way behind another: gives the very stream that it has from there."""

    def __init__(self, via: Any) -> None:
        super().__init__("through")
        self._via = via

    def dial(self, flow: Flow) -> Stream:
        return self._via.dial(flow)


@pytest.mark.parametrize("balance", BALANCES)
def test_many_threads_leave_the_figures_right(balance: str) -> None:
    """With failures among them: each ninth dial of `c` is one of its proxy's."""
    pool = Pool(balance, "abcd", (1, 2, 3, 4))
    calls = iter(range(1, 1 << 30))

    def sometimes() -> None:
        if next(calls) % 9 == 0:
            raise fault()()

    pool.ways["c"].meanwhile = sometimes

    def work(flow: Flow) -> None:
        held: list[Any] = []
        for number in range(200):
            held.append(
                pool.group.dial(flow) if flow.network == "tcp" else pool.group.dial_packet(flow)
            )
            if number % 3:
                held.pop(0).close()
        for made in held:
            made.close()
            made.close()

    flows = [
        keyed("hash-client", key)._replace(target=key, network="udp" if number % 2 else "tcp")
        for number, key in enumerate(keys(8))
    ]
    for task in [Task(work, flow) for flow in flows]:
        task.result(30.0)
    members = pool.members.values()
    assert [member.live for member in members] == [0, 0, 0, 0]
    assert sum(member.dialled for member in members) == len(pool.asked)
    assert sum(member.dialled - member.failed for member in members) == 8 * 200
    if balance == "weighted":
        assert sum(member.credit for member in members) == 0
