"""Groups: what happens after a failed dial, which members are left out, and what is counted.

The dialers are doubles, and the clock stands still unless a test moves it.
"""

from __future__ import annotations

import threading
from typing import Any, Callable

import pytest

from netproxy.dialer.group import MEMBER_TRIES, GroupDialer
from netproxy.dialer.hop import Hop
from netproxy.dialer.web.http import HttpDialer
from netproxy.dialer.member import BACK_OFF_LIMIT, BACK_OFF_SECONDS, Member
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import Stream
from tests.dialer.doubles import (
    BALANCES,
    TARGET,
    TCP,
    UDP,
    Clock,
    StubDialer,
    StubGroup,
    fault,
    refusal,
)
from tests.support.doubles import Counts
from tests.support.sockets import SECONDS, Task


class TestLiveFlows:
    def test_stream_is_live_until_it_is_closed(self, clock: Clock) -> None:
        group = StubGroup("failover", "a")
        stream = group.group.dial(TCP)
        assert group.live() == {"a": 1}
        stream.close()
        stream.close()
        assert group.live() == {"a": 0}

    @pytest.mark.parametrize("end", [Stream.close, Stream.reset])
    def test_stream_leaves_its_member_on_close_and_on_reset(
        self, end: Callable[[Stream], None], clock: Clock
    ) -> None:
        group = StubGroup("failover", "a")
        stream = group.group.dial(TCP)
        stream.socket.setsockopt = lambda *_: None  # type: ignore[method-assign]  # a double
        end(stream)
        assert group.live() == {"a": 0}

    def test_packet_connection_is_live_until_its_first_close(self, clock: Clock) -> None:
        group = StubGroup("failover", "a")
        conn = group.group.dial_packet(UDP)
        assert group.live() == {"a": 1}
        conn.shutdown()
        assert group.live() == {"a": 1}
        conn.close()
        conn.close()
        assert group.live() == {"a": 0}
        assert group.dialers["a"].conns[0].closes == 2

    def test_bound_close_of_a_packet_connection_leaves_the_member_once(self, clock: Clock) -> None:
        """A connection that wraps another one may keep its bound method."""
        group = StubGroup("failover", "a")
        close = group.group.dial_packet(UDP).close
        close()
        close()
        assert group.live() == {"a": 0}

    def test_unexpected_exception_leaves_nothing_live_and_asks_no_other_member(
        self, clock: Clock
    ) -> None:
        group = StubGroup("failover", "ab")
        group.fail("ab", RuntimeError)
        for flow in (TCP, UDP):
            with pytest.raises(RuntimeError):
                group.dial(flow)
        assert group.live() == {"a": 0, "b": 0}
        assert group.asked == ["a", "a"]

    def test_every_dial_is_counted_and_only_faults_as_failures(self, clock: Clock) -> None:
        group = StubGroup("failover", "a")
        group.dial_times(3)
        group.fail("a", refusal())
        group.dial_times(2)
        group.fail("a", fault(said="gone"))
        group.dial_once()
        member = group.members["a"]
        assert (member.dialled, member.failed, member.live, member.error) == (6, 1, 0, "gone")


@pytest.mark.usefixtures("clock")
class TestFailedDials:
    @pytest.mark.parametrize("flow", [TCP, UDP])
    @pytest.mark.parametrize("reason", list(Reason))
    def test_fault_of_a_member_makes_the_group_ask_the_next(
        self, reason: Reason, flow: Flow
    ) -> None:
        group = StubGroup("failover")
        group.fail("a", fault(reason))
        assert group.dial_once(flow) == "ab"
        assert (group.members["a"].failed, group.members["b"].failed) == (1, 0)
        assert group.dialers["b"].flows == [flow]

    @pytest.mark.parametrize("reason", [Reason.REFUSED, Reason.DENIED, Reason.LOOP])
    def test_final_answer_about_the_target_is_raised_at_once(self, reason: Reason) -> None:
        group = StubGroup("failover")
        error = refusal(reason)()
        group.fail("a", lambda: error)
        assert group.failure() is error
        assert group.asked == ["a"]
        member = group.members["a"]
        assert (member.failed, member.error, member.state) == (0, "", "up")
        assert group.dial_once() == "a"

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
    def test_unreachable_target_makes_the_group_ask_the_next_and_no_member_back_off(
        self, reason: Reason
    ) -> None:
        group = StubGroup("failover")
        group.fail("ab", refusal(reason))
        assert [group.dial_once() for _ in range(3)] == ["abc"] * 3
        assert [member.failed for member in group.members.values()] == [0, 0, 0]

    def test_unsupported_flow_makes_the_group_ask_the_next(self) -> None:
        """A SOCKS4 proxy and an IPv6 target, a proxy without ASSOCIATE: not about the target."""
        group = StubGroup("failover")
        group.fail("a", refusal(Reason.UNSUPPORTED))
        assert group.dial_once(UDP) == "ab"

    def test_group_asks_at_most_three_members(self) -> None:
        group = StubGroup("failover", "abcdef")
        group.fail("abcdef")
        assert str(group.failure()) == (
            "group 'pool': no member could connect: a: timed out; b: timed out; c: timed out"
        )
        assert len(group.asked) == MEMBER_TRIES == 3

    @pytest.mark.parametrize(
        "seconds, asked",
        [(3.0, "abc"), (7.5, "abc"), (7.6, "ab"), (15.0, "ab"), (15.1, "a"), (100.0, "a")],
    )
    def test_group_asks_no_other_member_after_its_time_limit(
        self, clock: Clock, seconds: float, asked: str
    ) -> None:
        """The limit is 1.5 times that of a dial, here 10 s."""
        group = StubGroup("failover")
        group.takes(clock, a=seconds, b=seconds, c=seconds)
        group.fail("abc")
        assert group.dial_once() == asked

    def test_error_of_a_group_names_all_failures(self) -> None:
        group = StubGroup("failover", "ab")
        group.fail("a", fault(Reason.TIMEOUT, "'a' (socks5://10.0.0.1:1080)"))
        group.fail(
            "b",
            fault(
                Reason.AUTHENTICATION,
                "'b' (http://10.0.0.2:3128)",
                "407 proxy authentication required",
            ),
        )
        error = group.failure()
        assert str(error) == (
            "group 'pool': no member could connect: "
            "a: 'a' (socks5://10.0.0.1:1080): timed out; "
            "b: 'b' (http://10.0.0.2:3128): 407 proxy authentication required"
        )
        assert (error.hop, error.reason, error.upstream) == (
            "group 'pool'",
            Reason.AUTHENTICATION,
            True,
        )

    def test_final_answer_from_the_second_member_is_raised(self) -> None:
        group = StubGroup("failover")
        group.fail("a")
        group.fail("b", refusal())
        error = group.failure()
        assert (error.reason, str(error), error.upstream) == (
            Reason.REFUSED,
            f"{TARGET}: connection refused",
            False,
        )
        assert group.asked == ["a", "b"]


@pytest.mark.usefixtures("clock")
class TestBackOff:
    def test_back_off_doubles_with_each_failure_in_a_row_up_to_a_limit(self, clock: Clock) -> None:
        group = StubGroup("failover", "ab")
        group.fail("a")
        for seconds in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
            assert group.dial_once() == "ab"
            clock.now += seconds - 0.001
            assert group.dial_once() == "b"
            clock.now += 0.001
        assert (BACK_OFF_SECONDS, BACK_OFF_LIMIT) == (1.0, 60.0)

    def test_back_off_keeps_its_limit_after_thousands_of_failures(self, clock: Clock) -> None:
        member = Member("a", StubDialer(), 1)
        for _ in range(5000):
            member.note_failure(fault()())
        assert member.backs_off(clock.now + BACK_OFF_LIMIT - 0.001)
        assert not member.backs_off(clock.now + BACK_OFF_LIMIT)

    def test_successful_dial_resets_the_back_off(self, clock: Clock) -> None:
        group = StubGroup("failover", "ab")
        group.fail("a")
        for seconds in (1.0, 2.0, 4.0):
            group.dial_once()
            clock.now += seconds
        group.mend("a")
        assert group.dial_once() == "a"
        group.fail("a")
        assert group.dial_once() == "ab"
        clock.now += BACK_OFF_SECONDS
        assert group.dial_once() == "ab"

    def test_refusal_by_the_target_does_not_reset_the_back_off(self, clock: Clock) -> None:
        group = StubGroup("failover", "ab")
        group.fail("a")
        group.dial_once()
        clock.now += BACK_OFF_SECONDS
        group.fail("a", refusal())
        assert group.dial_once() == "a"
        group.fail("a")
        group.dial_once()
        clock.now += 1.5 * BACK_OFF_SECONDS
        assert group.dial_once() == "b"

    @pytest.mark.parametrize("balance", BALANCES)
    def test_members_that_back_off_are_asked_last(self, balance: str) -> None:
        group = StubGroup(balance)
        for name in "ab":
            group.members[name].note_failure(fault()())
        assert group.dial_times(5) == "ccccc"
        group.fail("c", refusal(Reason.NAME))
        assert group.dial_once() == "ca"

    @pytest.mark.parametrize("balance", BALANCES)
    def test_members_are_asked_although_all_back_off(self, balance: str) -> None:
        """The first success ends the back-off of its member."""
        group = StubGroup(balance)
        for member in group.members.values():
            member.note_failure(fault()())
        assert group.dial_once() == "a"
        assert group.dial_once() == "a"

    def test_simultaneous_failures_count_as_one(self, clock: Clock) -> None:
        """Eight clients that meet one short outage must not make the member back off a minute."""
        group = StubGroup("failover", "ab")
        group.fail("a")
        barrier = threading.Barrier(8)
        group.dialers["a"].meanwhile = lambda: barrier.wait(SECONDS) and None
        for task in [Task(group.group.dial, TCP) for _ in range(8)]:
            task.result().close()
        group.mend("a")
        group.dialers["a"].meanwhile = lambda: None
        clock.now += 2 * BACK_OFF_SECONDS
        assert group.dial_once() == "a"


@pytest.mark.usefixtures("clock")
class TestDownMembers:
    @pytest.mark.parametrize("balance", BALANCES)
    def test_down_member_is_never_asked(self, balance: str) -> None:
        """Not even while all others back off."""
        group = StubGroup(balance)
        group.members["b"].note_check("connection refused")
        assert "b" not in group.dial_times(9)
        group.fail("ac")
        assert sorted(group.dial_once()) == ["a", "c"]
        assert sorted(group.dial_once()) == ["a", "c"]

    def test_dial_fails_without_asking_if_all_members_are_down(self) -> None:
        group = StubGroup("failover", "ab")
        group.members["a"].note_check("10.0.0.1:1080: connection refused")
        group.members["b"].note_check("timed out")
        error = group.failure()
        assert str(error) == (
            "group 'pool': all members are down: a: 10.0.0.1:1080: connection refused; b: timed out"
        )
        assert (error.reason, error.upstream, group.asked) == (Reason.GENERAL, True, [])

    def test_note_check_returns_whether_the_state_changed(self) -> None:
        member = Member("a", StubDialer(), 1)
        changes = [member.note_check(error) for error in ("", "", "refused", "timed out", "", "")]
        assert changes == [False, False, True, False, True, False]
        assert (member.up, member.error) == (True, "timed out")

    def test_successful_check_resets_the_back_off(self, clock: Clock) -> None:
        member = Member("a", StubDialer(), 1)
        for _ in range(5):
            member.note_failure(fault()())
        member.note_check("")
        assert not member.backs_off(clock.now)
        member.note_failure(fault()())
        assert not member.backs_off(clock.now + BACK_OFF_SECONDS)

    def test_state_of_a_member_in_a_word(self) -> None:
        member = Member("a", StubDialer(), 1)
        states = [member.state]
        member.dial(TCP)
        states.append(member.state)
        member.note_failure(refusal()())
        states.append(member.state)
        member.note_failure(fault()())
        states.append(member.state)
        member.note_check("refused")
        states.append(member.state)
        member.note_check("")
        states.append(member.state)
        assert states == ["unused", "up", "up", "failing", "down", "up"]


@pytest.mark.usefixtures("clock")
class TestCapabilities:
    def test_group_carries_what_any_member_carries_except_bind(self) -> None:
        dialers = [
            StubDialer("a", carries=("tcp", "bind")),
            StubDialer("b", carries=("tcp", "udp"), symmetric=True),
        ]
        members = [Member(dialer.name, dialer, 1) for dialer in dialers]
        group = GroupDialer("pool", members, "failover", 1.0)
        assert (group.carries, group.symmetric, group.name) == ({"tcp", "udp"}, True, "pool")
        single = GroupDialer("pool", [Member("a", dialers[0], 1)], "failover", 1.0)
        assert (single.carries, single.symmetric) == ({"tcp"}, False)

    @pytest.mark.parametrize("balance", BALANCES)
    def test_only_members_that_carry_udp_are_asked_for_it(self, balance: str) -> None:
        group = StubGroup(balance, only_tcp="ac")
        assert group.dial_times(5, UDP) == "bbbbb"

    def test_error_says_that_no_member_carries_udp(self) -> None:
        group = StubGroup("failover", "ab", only_tcp="ab")
        error = group.failure(UDP)
        assert (str(error), error.reason) == (
            "group 'pool': no member carries UDP",
            Reason.UNSUPPORTED,
        )

    def test_error_of_down_members_names_only_those_that_carry_the_network(self) -> None:
        group = StubGroup("failover", "ab", only_tcp="a")
        for member in group.members.values():
            member.note_check("refused")
        assert str(group.failure(UDP)) == "group 'pool': all members are down: b: refused"


@pytest.mark.usefixtures("clock")
class TestNestedGroups:
    """`inner` is the first member of `outer`, whose second member is `z`."""

    @staticmethod
    def nested() -> tuple[StubGroup, StubGroup]:
        inner, outer = StubGroup("failover", "ab"), StubGroup("failover", "z")
        inner.group.name = "inner"
        group: Any = inner.group
        outer.members = {"inner": Member("inner", group, 1, [group]), **outer.members}
        outer.group = GroupDialer("outer", list(outer.members.values()), "failover", 10.0)
        outer.asked = inner.asked
        outer.dialers["z"].asked = inner.asked
        return inner, outer

    def test_inner_group_asks_all_its_members_first(self) -> None:
        inner, outer = self.nested()
        inner.fail("a")
        assert outer.dial_once() == "ab"
        assert (outer.members["inner"].state, inner.members["a"].state) == ("up", "failing")

    def test_outer_group_asks_the_next_member_after_the_inner_group(self, clock: Clock) -> None:
        """The inner group then backs off as a whole."""
        inner, outer = self.nested()
        inner.fail("ab")
        assert outer.dial_once() == "abz"
        assert outer.members["inner"].error == (
            "group 'inner': no member could connect: a: timed out; b: timed out"
        )
        assert outer.dial_once() == "z"
        clock.now += BACK_OFF_SECONDS
        assert outer.dial_once() == "abz"

    def test_error_of_the_outer_group_contains_those_of_the_inner(self) -> None:
        inner, outer = self.nested()
        inner.fail("ab")
        outer.fail("z")
        assert str(outer.failure()) == (
            "group 'outer': no member could connect: inner: group 'inner': "
            "no member could connect: a: timed out; b: timed out; z: timed out"
        )

    def test_final_answer_passes_through_both_groups_at_once(self) -> None:
        inner, outer = self.nested()
        inner.fail("a", refusal())
        assert outer.dial_once() == "a"
        assert outer.members["inner"].failed == 0

    def test_unreachable_target_is_not_a_fault_of_the_inner_group(self) -> None:
        """A mistyped name must not make a whole group back off."""
        inner, outer = self.nested()
        inner.fail("ab", refusal(Reason.NAME))
        assert [outer.dial_once() for _ in range(2)] == ["abz", "abz"]
        assert outer.members["inner"].failed == 0

    def test_stream_is_live_in_both_groups_until_it_is_closed(self) -> None:
        inner, outer = self.nested()
        stream = outer.group.dial(TCP)
        assert (inner.live(), outer.live()) == ({"a": 1, "b": 0}, {"inner": 1, "z": 0})
        stream.close()
        assert (inner.live(), outer.live()) == ({"a": 0, "b": 0}, {"inner": 0, "z": 0})

    def test_packet_connection_is_live_in_both_groups_until_it_is_closed(self) -> None:
        inner, outer = self.nested()
        conn = outer.group.dial_packet(UDP)
        assert (inner.live(), outer.live()) == ({"a": 1, "b": 0}, {"inner": 1, "z": 0})
        conn.close()
        conn.close()
        assert (inner.live(), outer.live()) == ({"a": 0, "b": 0}, {"inner": 0, "z": 0})

    def test_stream_leaves_a_group_that_is_a_hop_of_a_members_chain(self) -> None:
        """The chain's dialer returns the very stream that the inner group has dialled."""
        inner = StubGroup("failover", "a")
        through: Any = Through(inner.group)
        outer = GroupDialer("outer", [Member("through", through, 1)], "failover", 10.0)
        outer.dial(TCP).close()
        assert (inner.live(), outer.members[0].live) == ({"a": 0}, 0)

    def test_failed_handshake_behind_a_group_leaves_the_group(self) -> None:
        inner = StubGroup("failover", "a")

        def refuse(stream: Stream) -> None:
            raise DialError(Reason.AUTHENTICATION)

        label = "hop 2 (http://192.0.2.1:1)"
        hop = Hop("x", label, Address("192.0.2.1", 1), inner.group, 1.0, secure=refuse)
        with pytest.raises(DialError) as caught:
            HttpDialer(hop, Counts()).dial(TCP)
        assert str(caught.value) == f"{label}: the upstream refused the credentials"
        assert inner.live() == {"a": 0}


class Through(StubDialer):
    """A dialer behind another one that returns the other's stream."""

    def __init__(self, via: Any) -> None:
        super().__init__("through")
        self._via = via

    def dial(self, flow: Flow) -> Stream:
        stream: Stream = self._via.dial(flow)
        return stream


@pytest.mark.parametrize("balance", BALANCES)
def test_statistics_are_right_after_dials_on_many_threads(balance: str) -> None:
    """Each ninth dial of `c` fails by a fault of its proxy."""
    group = StubGroup(balance, "abcd", (1, 2, 3, 4))
    calls = iter(range(1, 1 << 30))

    def fail_each_ninth() -> None:
        if next(calls) % 9 == 0:
            raise fault()()

    group.dialers["c"].meanwhile = fail_each_ninth

    def work(flow: Flow) -> None:
        held: list[Any] = []
        for number in range(200):
            held.append(group.dial(flow))
            if number % 3:
                held.pop(0).close()
        for connection in held:
            connection.close()
            connection.close()

    flows = [
        TCP._replace(
            client=Address(f"10.0.0.{number}", 5),
            target=Address(f"10.0.0.{number}", 5),
            network="udp" if number % 2 else "tcp",
        )
        for number in range(8)
    ]
    for task in [Task(work, flow) for flow in flows]:
        task.result()
    members = group.members.values()
    assert [member.live for member in members] == [0, 0, 0, 0]
    assert sum(member.dialled for member in members) == len(group.asked)
    assert sum(member.dialled - member.failed for member in members) == 8 * 200
    if balance == "weighted":
        assert sum(member.credit for member in members) == 0
