"""When sessions end and who gets none: port 53, caps by client, user and in total, forged sources.

The janitor's own clock is stopped; the test tells it the time.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.socks5 import encode_header
from tests.e2e.peers import Association
from tests.support.handlers import LOCALHOST, descriptors, eventually
from tests.support.relays import Running, UdpClient, UdpPort, running, sessions_threads

FORGED = 10_000
NAME_SERVER = "127.53.1.1"
CAPPED = "listeners: [{listen: '127.0.0.1:0', udp: {%s}}]"


@contextmanager
def still(text: str) -> Iterator[Running]:
    """A relay whose clock stands still."""
    with running(text) as relay:
        relay.daemon._runtime.janitor.stop()
        yield relay


@pytest.fixture
def relay(level: str) -> Iterator[Running]:
    with still("listeners: [{listen: '127.0.0.1:0'}]" + level) as relay:
        yield relay


@pytest.fixture
def dns() -> Iterator[UdpPort]:
    try:
        server = UdpPort(NAME_SERVER, 53)
    except OSError as error:
        pytest.skip(f"port 53: {error.strerror}")
    with server:
        yield server


def went_idle(relay: Running, seconds: float) -> None:
    """Whoever has sent until now did so `seconds` ago."""
    relay.daemon._runtime.janitor.sweep(time.monotonic() - seconds)


def counted(relay: Running, sent: int, received: int) -> None:
    """Waits until the only session knows of so many datagrams: it counts behind its sends."""

    def known() -> bool:
        table = next(iter(relay.daemon._udp_relays._states.values())).table
        return [
            (session.datagrams_sent, session.datagrams_received) for session in table._mappings
        ] == [(sent, received)]

    eventually(known)


# -- port 53


def test_a_name_servers_session_ends_with_its_last_answer(relay: Running, dns: UdpPort) -> None:
    with UdpClient(relay.port) as client:
        client.to(dns.address, b"first query")
        seen = dns.expect(b"first query")
        client.to(dns.address, b"second query")
        dns.expect(b"second query")
        dns.send(b"first answer", seen)
        client.receive()
        counted(relay, 2, 1)
        relay.sweep(9)
        assert relay.state()["sessions"] == 1  # one answer is awaited
        dns.send(b"second answer", seen)
        client.receive()
        counted(relay, 2, 2)
        relay.sweep(0)
        assert relay.state() == {"associations": 1, "sessions": 0, "entries": 0}
        eventually(lambda: not sessions_threads())
        client.check_echo(dns)  # and the next query makes a new one


def test_a_name_servers_session_waits_ten_seconds_for_an_answer(
    relay: Running, dns: UdpPort
) -> None:
    with UdpClient(relay.port) as client:
        client.to(dns.address, b"query")
        dns.expect(b"query")
        counted(relay, 1, 0)
        relay.sweep(
            9
        )  # in a process with much in it a look for garbage takes some of the last second
        assert relay.state()["sessions"] == 1
        relay.sweep(10)
        assert relay.state()["sessions"] == 0


def test_a_session_that_speaks_to_others_as_well_lives_on(relay: Running, dns: UdpPort) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(dns)
        client.check_echo(target)
        counted(relay, 2, 2)
        relay.sweep(299)
        assert relay.state()["sessions"] == 1
        client.check_echo(dns)
        counted(relay, 3, 3)
        relay.sweep(300)
        assert relay.state()["sessions"] == 0


def test_a_session_that_nobody_answers_ends_after_a_minute(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.to(target.address, b"hello?")
        target.expect(b"hello?")
        counted(relay, 1, 0)
        relay.sweep(59)
        assert relay.state()["sessions"] == 1
        relay.sweep(60)
        assert relay.state()["sessions"] == 0


# -- whose a datagram is


def test_a_late_datagram_of_one_that_has_left_takes_nobodys_place(relay: Running) -> None:
    """It comes when another client's association waits, whose request named another port: that one's port decides."""
    with UdpPort() as target, UdpClient(relay.port) as old:
        old.check_echo(target)
        old.leave()
        eventually(relay.idle)
        with UdpClient(relay.port) as new:
            old.to(target.address, b"late")
            eventually(lambda: relay.drops() or relay.state()["sessions"])
            if relay.state()["sessions"]:
                target.expect(b"late")  # a guess may be wrong, but it must not stay so
            new.check_echo(target)
            new.leave()
            eventually(relay.idle, 1.0)


# -- caps


@pytest.mark.parametrize("cap", ["max_sessions: 3", "max_sessions_per_client: 3"])
def test_at_a_cap_the_new_one_is_refused_and_the_old_keep_working(level: str, cap: str) -> None:
    with still(CAPPED % cap + level) as relay, UdpPort() as target, ExitStack() as stack:
        clients = [stack.enter_context(UdpClient(relay.port)) for _ in range(3)]
        seen = [client.check_echo(target) for client in clients]
        fourth = stack.enter_context(UdpClient(relay.port))
        for _ in range(5):
            fourth.to(target.address, b"one too many")
        eventually(lambda: relay.drops() == {"session limit": 5})
        assert [client.check_echo(target) for client in clients] == seen
        assert relay.state()["sessions"] == sessions_threads() == 3
        clients[0].leave()
        eventually(lambda: relay.state()["sessions"] == 2)
        fourth.check_echo(target)


def test_a_cap_by_client_is_for_each_address(level: str) -> None:
    with (
        still(CAPPED % "max_sessions_per_client: 2" + level) as relay,
        UdpPort() as target,
        ExitStack() as stack,
    ):
        for source in ("127.0.0.2", "127.0.0.3"):
            clients = [stack.enter_context(UdpClient(relay.port, source=source)) for _ in range(3)]
            for client in clients[:2]:
                client.check_echo(target)
            before = relay.count("drops", "session limit")
            clients[2].to(target.address, b"one too many")
            eventually(lambda: relay.count("drops", "session limit") == before + 1)
        assert relay.state()["sessions"] == 4 and target.silent()


def test_the_session_idle_longest_yields_to_a_new_one(level: str) -> None:
    with (
        still(CAPPED % "max_sessions: 3" + level) as relay,
        UdpPort() as target,
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(UdpClient(relay.port)) for _ in range(3)]
        seen = []
        for client, idle in zip(clients, (20, 40, 30)):
            seen.append(client.check_echo(target))
            went_idle(relay, idle)
        stack.enter_context(UdpClient(relay.port)).check_echo(target)
        assert relay.count("sessions_evicted", "evicted") == 1
        assert clients[0].check_echo(target) == seen[0] and clients[2].check_echo(target) == seen[2]
        assert relay.state()["sessions"] == 3 and not relay.drops()
        clients[1].to(target.address, b"too late")  # all others have just sent
        eventually(lambda: relay.drops() == {"session limit": 1})
        went_idle(relay, 11)
        clients[1].check_echo(target)
        assert relay.count("sessions_evicted", "evicted") == 2


def test_a_user_has_a_cap_over_all_addresses(level: str) -> None:
    text = (
        """
listeners: [{listen: '127.0.0.1:0'}]
users:
  alice: {password: a, limits: {sessions: 2}}
  bob: {password: b}
"""
        + level
    )
    with still(text) as relay, UdpPort() as target, ExitStack() as stack:
        server = LOCALHOST, relay.port

        def association(user: str) -> Association:
            client = stack.enter_context(Association(server, (user, user[0])))
            client.send(target.address, user.encode())
            return client

        for user in ("alice", "alice", "bob", "bob", "bob"):
            association(user)
            target.expect(user.encode())
        third = association("alice")
        eventually(lambda: relay.drops() == {"session limit": 1})
        assert target.silent() and relay.state()["sessions"] == 5
        went_idle(relay, 30)
        third.send(target.address, b"now")  # one of alice's own yields, though bob's are older
        target.expect(b"now")
        went_idle(relay, 30)
        stack.enter_context(Association(server, ("bob", "b"))).send(target.address, b"bob")
        target.expect(b"bob")
        assert relay.state()["sessions"] == 6 and relay.count("sessions_evicted", "evicted") == 1


# -- forged sources


def forge(data: bytes, to: Address, count: int = FORGED) -> Iterator[int]:
    """A datagram from each of so many addresses; now and then their number, for the caller to wait."""
    for at in range(count):
        with UdpPort(f"127.{2 + (at >> 14)}.{at >> 6 & 255}.{at & 63}") as forged:
            forged.send(data, to)
        if at % 100 == 99:
            yield at + 1


def test_forged_sources_make_no_state(relay: Running) -> None:
    """Hazard 32."""
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        before, state, lines = descriptors(), relay.state(), len(relay.log.lines)
        for number in forge(encode_header(target.address) + b"forged", client.bound):
            eventually(lambda: relay.count("drops", "unknown sender") == number)
        assert (descriptors(), relay.state()) == (before, state)
        assert sessions_threads() == 1 and len(relay.log.lines) <= lines + 1
        assert relay.drops() == {"unknown sender": FORGED}
        assert client.check_echo(target) == seen and target.silent()


def test_clients_of_a_capped_forward_are_refused_in_few_words(level: str) -> None:
    """Without `clients` anybody may use a forward; forged sources fill it to its cap, and the log with nothing."""
    with UdpPort() as target:
        text = (
            "listeners: [{protocol: udp, listen: '127.0.0.1:0', target: '%s', udp: {max_sessions: 4}}]"
            % (target.address,)
        )
        with still(text + level) as relay:
            for number in forge(b"forged", Address(LOCALHOST, relay.port), 1000):
                eventually(lambda: relay.count("drops", "session limit") == number - 4)
            assert relay.state() == {"associations": 0, "sessions": 4, "entries": 4}
            table = next(iter(relay.daemon._udp_relays._states.values())).table
            assert len(table.clients) == 4
            assert len(relay.log.limited_keys) < 10, (
                "a minute's log has a line for each forged address"
            )
