"""Building and binding: a question changes nothing, and what was bound can be undone."""

from __future__ import annotations

import socket
import threading
from typing import Any, Iterator

import pytest

from netproxy.access.accounts import usage
from netproxy.daemon.build import build, build_for_questions
from netproxy.daemon.questions import PlanQuestions
from netproxy.daemon.runtime import Runtime
from netproxy.errors import ConfigError, DialError, ListenError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from tests.support.certificates import certificates
from tests.support.handlers import RecordingLog
from tests.support.relays import Running, UdpClient, UdpPort, configuration, running
from tests.support.sockets import SECONDS, address_of, listen, read_exactly, read_to_end
from tests.support.tunnels import TOKEN

pytest.importorskip("yaml")
PLAIN = "listeners: [{listen: '127.0.0.1:0', name: main}]\n"
RUNNING = """
listeners: [{listen: '127.0.0.1:0', name: main, limits: {connections: 10}}]
dns: {hosts: {known.test: 198.51.100.1}}
destinations: {deny: [203.0.113.0/24]}
auto: {remember: 1h, entries: 100}
upstreams: {group: {members: ['socks5://192.0.2.1:1', 'socks5://192.0.2.2:1']}}
"""
OTHER = (
    """
listeners:
- {listen: '127.0.0.1:21080', name: main, limits: {connections: 7}}
- {listen: '127.0.0.1:21090', name: more}
metrics: 127.0.0.1:21081
dns: {hosts: {known.test: 203.0.113.1}, servers: [192.0.2.53]}
destinations: {deny: [198.51.100.0/24]}
auto: {remember: 2h, entries: 200}
upstreams:
  there: socks5h://192.0.2.1:1
  home: tunnel://home
  checked: {members: ['socks5://192.0.2.1:1', 'socks5://192.0.2.2:1'], health_check: {interval: 1h}}
rules: [{domain: .there.test, via: auto, upstream: there}, {port: 22, via: checked}]
tunnel:
  bridge: {listen: 'tcp://127.0.0.1:21091', agents: {home: {token: %s, ports: [8022]}}}
"""
    % TOKEN
)


@pytest.fixture
def relay() -> Iterator[Running]:
    with running(RUNNING) as relay:
        yield relay


@pytest.fixture
def parts() -> Iterator[Runtime]:
    """A runtime that never starts."""
    runtime = Runtime(RecordingLog())  # type: ignore[arg-type]
    yield runtime
    runtime.stop()


def permits(runtime: Runtime, host: str) -> bool:
    """Return whether clients of the listener "main" may reach an address."""
    target = Address(host, 80)
    flow = Flow("tcp", Address("127.0.0.1", 1), target, "main", "")
    try:
        return bool(runtime.reachability.destinations.permitted(flow, (target,)))
    except DialError:
        return False


def state_of(runtime: Runtime) -> dict[str, Any]:
    """Return everything of a runtime that a configuration may change."""
    own = [Address("127.0.0.1", port) for port in (21080, 21081, 21090, 21091)]
    return {
        "hosts": runtime.resolver.known(Address("known.test", 1)),
        "destinations": [permits(runtime, host) for host in ("198.51.100.7", "203.0.113.7")],
        "own": [runtime.own.holds("tcp", address) for address in own],
        "janitor": list(runtime.janitor._tables),
        "checks": list(runtime.health_checks),
        "threads": runtime.connections.limit,
        "auto": (
            runtime.verdicts._seconds,
            runtime.verdicts._verdicts.limit,
            list(runtime.verdicts.items()),
        ),
        "counters": sorted(runtime.counters.items()),
        "flows": len(runtime.flows),
    }


class TestQuestions:
    def test_describing_another_configuration_changes_nothing(self, relay: Running) -> None:
        daemon = relay.daemon
        before, listeners = state_of(daemon._runtime), daemon.summary()
        plan = daemon._plan
        other = build(configuration(OTHER), daemon._runtime, None)
        lines = PlanQuestions(other).describe()
        assert any(line.startswith("listen 127.0.0.1:21080 ") for line in lines)
        assert state_of(daemon._runtime) == before
        assert (daemon.summary(), daemon._plan) == (listeners, plan)

    def test_explaining_with_another_configuration_changes_nothing(self, relay: Running) -> None:
        daemon = relay.daemon
        before, listeners = state_of(daemon._runtime), daemon.summary()
        threads = threading.enumerate()
        plan = build_for_questions(configuration(OTHER), daemon._runtime)
        assert "addresses: 203.0.113.1" in PlanQuestions(plan).explain("-> known.test:80 on main")
        assert PlanQuestions(plan).explain("-> 127.0.0.1:21080 on main")[-1].startswith("refused: ")
        assert PlanQuestions(plan).explain("-> 198.51.100.7:80 on main")[-1].startswith("refused: ")
        PlanQuestions(plan).explain("-> a.there.test:80 on more")
        plan.close()
        assert state_of(daemon._runtime) == before
        assert daemon.summary() == listeners
        assert threading.enumerate() == threads

    def test_running_daemon_explains_its_own_configuration(self, relay: Running) -> None:
        assert "addresses: 198.51.100.1" in relay.daemon.explain("-> known.test:80 on main")
        lines = relay.daemon.explain("-> 203.0.113.7:80 on main")
        assert lines[-1].startswith("refused: ") and "(decided: destinations." in lines[-1]

    @pytest.mark.parametrize(
        "text",
        [
            PLAIN + "users: {alice: {password: 'scrypt$x'}}",
            PLAIN + "upstreams: {unused: 'https://192.0.2.1:1?tls.ca=/nonexistent'}",
            "listeners: [{listen: '127.0.0.1:0', tls: {certificate: /nonexistent}}]",
            PLAIN + "rules: [{domain_file: /nonexistent, via: direct}]",
            "listeners: []\ntunnel: {agent: {bridge: 'tls://192.0.2.1:1', tls: {ca: /nonexistent}, "
            f"name: home, token: {TOKEN}, exit: true}}}}",
        ],
    )
    def test_check_finds_what_would_keep_the_daemon_from_starting(
        self, parts: Runtime, text: str
    ) -> None:
        config = configuration(text)
        with pytest.raises(ConfigError):
            build(config, parts, None)


class TestBinding:
    def test_discarded_plan_leaves_the_daemon_as_it_was(self, relay: Running) -> None:
        daemon = relay.daemon
        before, listeners = state_of(daemon._runtime), daemon.summary()
        text = (
            "listeners:\n"
            "- {listen: '127.0.0.1:0', name: main, limits: {connections: 2000}}\n"
            "- {listen: '127.0.0.1:0', name: more}\n"
            "metrics: 127.0.0.1:0\n"
            "tunnel: {agent: {bridge: 'tcp://127.0.0.1:1', name: home, "
            f"token: {TOKEN}, exit: true}}}}\n"
        )
        plan = build(configuration(text), daemon._runtime, daemon._plan)
        bound = plan.bind(daemon._manager, daemon._admin)
        assert daemon._runtime.connections.limit > before["threads"]
        bound.discard()
        assert state_of(daemon._runtime) == before
        assert daemon.summary() == listeners
        assert not daemon._admin.threads
        with UdpPort() as target, UdpClient(relay.port) as client:
            client.check_echo(target)

    def test_new_sockets_are_own_before_they_accept(
        self, relay: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 77.  They are no longer if the configuration fails."""
        daemon = relay.daemon
        before, own = state_of(daemon._runtime), Address("127.0.0.1", 21080)
        observed = []

        def bind(specs: object) -> None:
            observed.append(daemon._runtime.own.holds("tcp", own))
            raise ListenError("no socket")

        text = "listeners: [{listen: '127.0.0.1:21080', name: main}]"
        plan = build(configuration(text), daemon._runtime, daemon._plan)
        monkeypatch.setattr(daemon._manager, "bind", bind)
        with pytest.raises(ListenError):
            plan.bind(daemon._manager, daemon._admin)
        assert observed == [True]
        assert state_of(daemon._runtime) == before

    def test_plan_that_failed_can_be_bound_later(self, relay: Running) -> None:
        daemon = relay.daemon
        with listen() as taken:
            text = PLAIN + f"metrics: '{address_of(taken)}'"
            plan = build(configuration(text), daemon._runtime, daemon._plan)
            with pytest.raises(ListenError):
                plan.bind(daemon._manager, daemon._admin)
        daemon.reload(configuration(text))
        assert len(daemon._admin.threads) == 1

    def test_new_listener_serves_nobody_before_the_commit(self, relay: Running) -> None:
        """The running listener of the same name keeps the old limits."""
        daemon = relay.daemon
        text = "listeners: [{listen: '127.0.0.2:0', name: main, clients: [192.0.2.0/24]}]"
        plan = build(configuration(text), daemon._runtime, daemon._plan)
        bound = plan.bind(daemon._manager, daemon._admin)
        try:
            fresh = bound._listeners.fresh
            (address,) = [listener.address for listener in fresh if listener.network == "tcp"]
            waiting = socket.create_connection(address, SECONDS)
            waiting.sendall(b"\5\1\0")
            with socket.create_connection(("127.0.0.1", relay.port), SECONDS) as admitted:
                admitted.sendall(b"\5\1\0")
                assert read_exactly(admitted, 2) == b"\5\0"
        finally:
            bound.discard()
        with waiting, pytest.raises(ConnectionResetError):
            waiting.recv(1)

    def test_connections_count_on_over_a_reload(self, relay: Running) -> None:
        with socket.create_connection(("127.0.0.1", relay.port), SECONDS) as first:
            first.sendall(b"\5\1\0")
            assert read_exactly(first, 2) == b"\5\0"
            relay.reload(PLAIN.replace("name: main", "name: main, limits: {connections: 1}"))
            with socket.create_connection(("127.0.0.1", relay.port), SECONDS) as second:
                assert read_to_end(second) == b""

    def test_users_of_a_reload_count_when_other_names_have_taken_the_room(
        self, relay: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(usage, "USERS_LIMIT", 0)
        relay.reload(PLAIN + "users: {alice: {password: secret}}")
        for user in ("alice", "bob"):
            relay.daemon.usage.moved(user, 3, 4)
        totals = [relay.daemon.usage.of(user)[2] for user in ("alice", "bob")]
        assert totals == [(3, 4), (0, 0)]


def test_building_reads_files_and_opens_nothing(parts: Runtime) -> None:
    """The fixture of all tests counts descriptors and threads."""
    tls = f"{{listen: '127.0.0.1:21070', tls: {certificates().listener()}}}"
    text = OTHER.replace("listeners:\n", f"listeners:\n- {tls}\n")
    plan = build(configuration(text), parts, None)
    assert ("tcp", Address("127.0.0.1", 21070)) in [
        (spec.network, spec.address) for spec in plan.specs
    ]


MISTAKEN = """
listeners:
- {listen: '127.0.0.1:21080', name: a, tls: {certificate: /none/a.pem, key: /none/a.key}}
- {listen: '127.0.0.1:21081', name: b, tls: {certificate: /none/b.pem, key: /none/b.key}}
- {listen: '127.0.0.1:21082', protocol: sni, name: c, routes: [
    {sni: '**', target: '192.0.2.1:1'}, {sni: 'x*y', target: '192.0.2.1:1'}]}
upstreams:
  first: {url: 'https://192.0.2.1:1', tls: {ca: /none/1.pem}}
  second: {url: 'https://192.0.2.2:1', tls: {ca: /none/2.pem}}
users: {alice: {password: 'scrypt$1'}, bob: {password: 'scrypt$2'}}
destinations: {deny: [nowhere, loopback], allow: [elsewhere]}
dns:
  servers: 192.0.2.53
  rules: [{domain: 'r*s', block: true}, {domain: 't*u', block: true}]
rules:
- {domain: 'v*w', via: direct}
- {ip: 10.0.0.1/8, via: direct}
- {domain_file: /none/list.txt, via: direct}
"""


def test_all_mistakes_are_told_at_once(parts: Runtime) -> None:
    with pytest.raises(ConfigError) as caught:
        build(configuration(MISTAKEN), parts, None)
    told = str(caught.value)
    for word in (
        *("/none/a.pem", "/none/b.pem", "routes[0].sni", "routes[1].sni", "/none/1.pem"),
        *("/none/2.pem", "users.alice.password", "users.bob.password", "'nowhere'", "'elsewhere'"),
        *("'r*s'", "'t*u'", "'v*w'", "10.0.0.1/8", "/none/list.txt"),
    ):
        assert told.count(word) == 1, (word, told)
