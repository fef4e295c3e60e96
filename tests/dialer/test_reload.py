"""Upstreams over a reload: what is kept, what is forgotten, and the checks of a configuration."""

from __future__ import annotations

import time

import pytest

from netproxy.dialer.direct import DirectDialer
from netproxy.dialer.factory import DialerFactory
from netproxy.dialer.health import Check, HealthChecks
from netproxy.errors import ConfigError
from netproxy.interfaces.addresses import Address
from netproxy.net.socket_options import SocketOptions
from tests.dialer.configured import TARGET, default_of, granting, group_of, members_of, upstreams_of
from tests.dialer.doubles import fault
from tests.support.doubles import Lines
from tests.support.flows import tcp_to
from tests.support.sockets import Task, read_to_end, refusing, server
from tests.support.upstreams import FakePool

pytest.importorskip("yaml")

POOL = "a: 'http://h:1', b: 'http://h:2', c: 'socks5://h:3'"


class TestReload:
    def test_same_configuration_has_the_same_dialer(self, factory: DialerFactory) -> None:
        text = (
            f"{POOL}, p: {{members: [a, b], balance: failover}}, q: [p, c], "
            "r: {members: [p, c], health_check: }"
        )
        first, second = upstreams_of(text), upstreams_of(text)
        assert first == second
        for name in first:
            assert factory.dialer(first[name]) is factory.dialer(second[name])

    @pytest.mark.parametrize(
        "change",
        [
            "http://h:2",
            "http://u:p@h:1",
            "https://h:1",
            "http://h:1?udp=none",
            "http://h:1?timeout=1s",
            "http://h:1?bind=eth0",
            "http://h:1?mark=1",
            "http://h:1?keepalive=0",
        ],
    )
    def test_changed_configuration_has_another_dialer(
        self, factory: DialerFactory, change: str
    ) -> None:
        before, after = default_of("'http://h:1'"), default_of(f"'{change}'")
        assert factory.dialer(before) is not factory.dialer(after)

    @pytest.mark.parametrize(
        "before, after",
        [
            (
                "members: [{via: a}, {via: b}], balance: weighted",
                "members: [{via: a}, {via: b, weight: 5}], balance: weighted",
            ),
            ("members: [a, b]", "members: [c, a, b]"),
            ("members: [a, b]", "members: [b, a]"),
            ("members: [a, b]", "members: [a]"),
            ("members: [a, b]", "members: [a, b], balance: failover"),
            ("members: [a, b]", "members: [a, b], health_check: {interval: 1s}"),
            ("members: [a, b]", "members: [a, 'http://h:9']"),
        ],
    )
    def test_member_keeps_its_statistics_while_its_group_changes(
        self, factory: DialerFactory, before: str, after: str
    ) -> None:
        old = upstreams_of(f"{POOL}, p: {{{before}}}")
        member = members_of(factory.dialer(old["p"]))["a"]
        member.note_failure(fault(said="gone")())
        new = upstreams_of(f"{POOL}, p: {{{after}}}")
        group = factory.dialer(new["p"])
        assert group is not factory.dialer(old["p"])
        factory.retain(new.values())
        kept = members_of(group)["a"]
        assert kept is member
        assert (kept.dialled, kept.failed, kept.error) == (1, 1, "gone")
        assert kept.backs_off(time.monotonic())

    def test_member_behind_an_unchanged_hop_is_kept(self, factory: DialerFactory) -> None:
        old = upstreams_of(f"{POOL}, p: {{members: [a, b]}}, chain: [c, p]")
        member = members_of(factory.dialer(old["chain"]))["a"]
        new = upstreams_of(f"{POOL}, p: {{members: [a, b], balance: failover}}, chain: [c, p]")
        assert members_of(factory.dialer(new["chain"]))["a"] is member

    def test_member_of_an_inner_group_is_kept(self, factory: DialerFactory) -> None:
        outer = "out: {members: [p, c]}"
        old = upstreams_of(f"{POOL}, p: {{members: [a, b]}}, {outer}")
        member = members_of(members_of(factory.dialer(old["out"]))["p"].dialer)["a"]
        new = upstreams_of(f"{POOL}, p: {{members: [a, b], balance: failover}}, {outer}")
        assert members_of(members_of(factory.dialer(new["out"]))["p"].dialer)["a"] is member

    def test_changed_member_is_a_new_one(self, factory: DialerFactory) -> None:
        old = upstreams_of("a: 'http://h:1', p: {members: [a]}")
        new = upstreams_of("a: 'http://h:1?timeout=1s', p: {members: [a]}")
        member = members_of(factory.dialer(old["p"]))["a"]
        assert members_of(factory.dialer(new["p"]))["a"] is not member

    def test_groups_do_not_share_members(self, factory: DialerFactory) -> None:
        """The checks of one group must not mark a member of another group down."""
        both = upstreams_of(f"{POOL}, p: {{members: [a]}}, q: {{members: [a]}}")
        member = members_of(factory.dialer(both["p"]))["a"]
        assert members_of(factory.dialer(both["q"]))["a"] is not member

    def test_stream_from_before_a_reload_leaves_its_member(self, factory: DialerFactory) -> None:
        with server(granting(TARGET)) as address:
            old = upstreams_of(f"s: 'socks5h://{address}', p: {{members: [s]}}")
            stream = factory.dialer(old["p"]).dial(tcp_to(TARGET))
            new = upstreams_of(f"s: 'socks5h://{address}', p: {{members: [s], balance: failover}}")
            kept = members_of(factory.dialer(new["p"]))["s"]
            factory.retain(new.values())
            assert kept.live == 1
            stream.close()
            assert kept.live == 0

    def test_down_member_is_up_again_in_a_group_without_checks(
        self, factory: DialerFactory
    ) -> None:
        old = upstreams_of("a: 'http://h:1', p: {members: [a], health_check: }")
        members_of(factory.dialer(old["p"]))["a"].note_check("refused")
        new = upstreams_of("a: 'http://h:1', p: {members: [a]}")
        group = factory.dialer(new["p"])
        factory.retain(new.values())
        assert not group_of(group).checks
        assert members_of(group)["a"].up


class TestRetain:
    def test_retain_forgets_all_other_upstreams(self, factory: DialerFactory) -> None:
        kept, removed = default_of("'http://h:1'"), default_of("'http://h:2'")
        before = factory.dialer(kept), factory.dialer(removed)
        factory.retain([kept])
        assert factory.dialer(kept) is before[0]
        assert factory.dialer(removed) is not before[1]

    def test_retain_forgets_the_members_of_removed_groups(self, factory: DialerFactory) -> None:
        config = upstreams_of(f"{POOL}, p: {{members: [a, b]}}")["p"]
        before = members_of(factory.dialer(config))["a"]
        factory.retain([])
        assert factory.groups() == []
        assert members_of(factory.dialer(config))["a"] is not before

    def test_retain_forgets_members_removed_from_a_group(self, factory: DialerFactory) -> None:
        old = upstreams_of(f"{POOL}, p: {{members: [a, b]}}")
        new = upstreams_of(f"{POOL}, p: {{members: [a]}}")
        before = members_of(factory.dialer(old["p"]))
        factory.dialer(new["p"])
        factory.retain(new.values())
        again = members_of(factory.dialer(old["p"]))
        assert again["a"] is before["a"] and again["b"] is not before["b"]

    def test_retain_keeps_members_of_inner_groups(self, factory: DialerFactory) -> None:
        configs = upstreams_of(f"{POOL}, p: {{members: [a, b]}}, out: {{members: [p, c]}}")
        inner = members_of(members_of(factory.dialer(configs["out"]))["p"].dialer)["a"]
        factory.retain([configs["out"]])
        assert members_of(factory.dialer(configs["p"]))["a"] is inner

    def test_factory_does_not_grow_over_reloads(self, factory: DialerFactory) -> None:
        for number in range(50):
            configs = upstreams_of(
                f"a: 'http://h:{number + 1}', p: {{members: [a, direct]}}, q: [p, a]"
            )
            for config in configs.values():
                factory.dialer(config)
            factory.retain(configs.values())
        assert len(factory._upstreams) == 3
        assert len(factory._members) == 2
        assert len({member.name for member in factory._members.values()}) == 2


class TestGroups:
    @pytest.mark.parametrize(
        "text, names",
        [
            ("a: 'http://h:1'", []),
            ("p: {members: [direct]}", ["p"]),
            ("p: ['http://h:1', {members: [direct]}, {members: [direct]}]", ["p[1]", "p[2]"]),
            (
                "p: {members: [{members: [{members: [direct]}]}]}",
                ["p", "p.members[0]", "p.members[0].members[0]"],
            ),
            ("p: {members: [['http://h:1', {members: [direct]}]]}", ["p", "p.members[0][1]"]),
        ],
    )
    def test_groups_within_chains_and_groups_are_listed(
        self, factory: DialerFactory, text: str, names: list[str]
    ) -> None:
        factory.dialer(next(iter(upstreams_of(text).values())))
        assert sorted(group.name for group in factory.groups()) == names

    def test_exponentially_nested_groups_are_refused(self, factory: DialerFactory) -> None:
        """Hazard 113: a few names, each of which contains the one before it twice."""
        names = ["g0: 'http://h:1'", "b0: g0"]
        for at in range(1, 21):
            names += [f"g{at}: {{members: [g{at - 1}, b{at - 1}]}}", f"b{at}: g{at}"]
        with pytest.raises(ConfigError, match="more than 1024 "):
            upstreams_of(", ".join(names))

    def test_group_used_twice_is_listed_once(self, factory: DialerFactory) -> None:
        configs = upstreams_of("p: {members: ['http://h:1']}, q: {members: [p, direct]}")
        for config in configs.values():
            factory.dialer(config)
        groups = factory.groups()
        assert len(groups) == len({id(group) for group in groups})


class TestHealthChecks:
    """What the factory makes of `health_check`."""

    def checks(self, factory: DialerFactory, text: str, name: str = "p") -> list[Check]:
        """Return the checks of an upstream."""
        factory.dialer(upstreams_of(text)[name])
        return [check for group in factory.groups() for check in group.checks]

    def test_group_without_health_check_has_no_checks(self, factory: DialerFactory) -> None:
        assert self.checks(factory, "p: {members: ['http://h:1']}") == []

    def test_check_without_a_target_connects_to_the_members_server(
        self, factory: DialerFactory
    ) -> None:
        (check,) = self.checks(
            factory, "p: {members: ['http://h:1'], health_check: {interval: 7s, timeout: 3s}}"
        )
        assert (check.group, check.member.name) == ("p", "http://h:1")
        assert (check.target, check.path) == (Address("h", 1), b"")
        assert (check.interval, check.timeout) == (7.0, 3.0)
        assert isinstance(check.dialer, DirectDialer) and check.dialer._seconds == 3.0

    def test_check_of_the_server_has_the_members_socket_options(
        self, factory: DialerFactory
    ) -> None:
        (check,) = self.checks(
            factory,
            "p: {members: ['http://h:1?bind=127.0.0.2&mark=7&keepalive=0'], health_check: }",
        )
        assert isinstance(check.dialer, DirectDialer)
        outgoing = check.dialer._outgoing
        assert outgoing == SocketOptions("127.0.0.2", "", 7, 0.0, label="bind: 127.0.0.2")

    def test_check_of_a_chain_connects_to_its_first_hop(self, factory: DialerFactory) -> None:
        (check,) = self.checks(
            factory, "p: {members: [['http://h:1', 'http://h:2']], health_check: }"
        )
        assert (check.target, type(check.dialer)) == (Address("h", 1), DirectDialer)

    def test_check_of_a_group_behind_a_hop_goes_through_the_hop(
        self, factory: DialerFactory
    ) -> None:
        (check,) = self.checks(
            factory, "p: ['socks5://h:1', {members: ['http://h:2'], health_check: }]"
        )
        assert (check.target, check.dialer.name) == (Address("h", 2), "socks5://h:1")

    def test_check_of_a_target_goes_through_the_member(self, factory: DialerFactory) -> None:
        (check,) = self.checks(
            factory,
            "p: {members: ['http://h:1'], health_check: {target: 'www.example:80', path: /up}}",
        )
        assert (check.target, check.path) == (Address("www.example", 80), b"/up")
        assert check.dialer.name == "http://h:1"

    def test_group_within_a_group_has_its_own_checks(self, factory: DialerFactory) -> None:
        text = (
            "in: {members: ['http://h:1'], health_check: }, "
            "p: {members: [in, 'http://h:2'], health_check: }"
        )
        checks = sorted((check.group, check.target.port) for check in self.checks(factory, text))
        assert checks == [("in", 1), ("p", 2)]

    def test_check_of_a_target_goes_through_a_group_within_a_group(
        self, factory: DialerFactory
    ) -> None:
        text = (
            "in: {members: ['http://h:1']}, "
            "p: {members: [in], health_check: {target: '192.0.2.1:80'}}"
        )
        (check,) = self.checks(factory, text)
        assert (check.dialer.name, check.target) == ("in", Address("192.0.2.1", 80))

    def test_direct_member_without_a_target_stays_up(self, factory: DialerFactory) -> None:
        """`direct` as the last member of a failover has no server that a check could reach."""
        health = HealthChecks(FakePool().submit, Lines())
        with refusing() as address:
            text = (
                f"p: {{members: ['http://{address}', direct], balance: failover, health_check: }}"
            )
            health.checks = self.checks(factory, text)
            for begin in health.expire(5000.0):
                begin()
        (group,) = factory.groups()
        assert {member.name: member.up for member in group.members} == {
            f"http://{address}": False,
            "direct": True,
        }

    def test_timeout_of_a_check_limits_its_dial(self, factory: DialerFactory) -> None:
        """Although dials of the factory may take much longer."""
        health = HealthChecks(FakePool().submit, Lines())
        with server(read_to_end) as address:
            text = (
                f"p: {{members: ['socks5h://{address}'], "
                "health_check: {target: '192.0.2.1:80', timeout: 100ms}}"
            )
            health.checks = self.checks(factory, text)
            for begin in health.expire(5000.0):
                begin()
        (group,) = factory.groups()
        assert not group.members[0].up

    def test_members_of_a_group_with_two_names_are_checked_once(
        self, factory: DialerFactory
    ) -> None:
        pool = FakePool(eager=False)
        health = HealthChecks(pool.submit, Lines())
        configs = upstreams_of(
            "p: {members: ['http://192.0.2.1:1'], health_check: }, "
            "alias: p, chain: [p, 'http://h:2']"
        )
        for config in configs.values():
            factory.dialer(config)
        health.checks = [check for group in factory.groups() for check in group.checks]
        for begin in health.expire(5000.0):
            begin()
        assert len(pool.tasks) == 1


def test_many_threads_share_a_configured_group(factory: DialerFactory) -> None:
    """With real sockets: at the end no flow is live and each dial is counted."""
    with server(granting(TARGET)) as one, server(granting(TARGET)) as two, refusing() as three:
        members = f"'socks5h://{one}', 'socks5h://{two}', 'socks5h://{three}'"
        configs = upstreams_of(f"p: {{members: [{members}], balance: least-connections}}")
        dialer = factory.dialer(configs["p"])

        def work() -> None:
            for _ in range(25):
                dialer.dial(tcp_to(TARGET)).close()

        for task in [Task(work) for _ in range(4)]:
            task.result()
    by_name = members_of(dialer)
    assert [member.live for member in by_name.values()] == [0, 0, 0]
    assert sum(member.dialled - member.failed for member in by_name.values()) == 100
    refused = by_name[f"socks5h://{three}"]
    assert refused.failed == refused.dialled >= 1
