"""When sessions end, and which are refused: port 53, limits, forged sources.

The janitor's thread is stopped; the test tells it the time.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.observe.refusals import RECORDS_PER_SECOND
from netproxy.protocol.socks5 import encode_header
from tests.e2e.peers import Association
from tests.support.handlers import LOCALHOST, descriptors, eventually
from tests.support.relays import Running, UdpClient, UdpPort, running, sessions_threads

FORGED = 10_000
NAME_SERVER = "127.53.1.1"
LIMITED = "listeners: [{listen: '127.0.0.1:0', udp: {%s}}]"


@contextmanager
def still(text: str) -> Iterator[Running]:
    """Run a relay whose janitor sweeps only when told to."""
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


def make_idle(relay: Running, seconds: float) -> None:
    """Let all sessions that were active until now have been so `seconds` ago."""
    relay.daemon._runtime.janitor.sweep(time.monotonic() - seconds)


def counted(relay: Running, sent: int, received: int) -> None:
    """Wait until the only session has counted its datagrams.  It counts replies after sending."""

    def known() -> bool:
        table = next(iter(relay.daemon._plan.relays.states.values())).table
        return [
            (session.datagrams_sent, session.datagrams_received) for session in table._mappings
        ] == [(sent, received)]

    eventually(known)


# -- port 53


def test_dns_session_ends_with_its_last_reply(relay: Running, dns: UdpPort) -> None:
    with UdpClient(relay.port) as client:
        client.to(dns.address, b"first query")
        seen = dns.expect(b"first query")
        client.to(dns.address, b"second query")
        dns.expect(b"second query")
        dns.send(b"first answer", seen)
        client.receive()
        counted(relay, 2, 1)
        relay.sweep(9)
        # One reply is missing.
        assert relay.state()["sessions"] == 1
        dns.send(b"second answer", seen)
        client.receive()
        counted(relay, 2, 2)
        relay.sweep(0)
        assert relay.state() == {"associations": 1, "sessions": 0, "entries": 0}
        eventually(lambda: not sessions_threads())
        # The next query makes a new session.
        client.check_echo(dns)


def test_dns_session_without_reply_ends_after_ten_seconds(relay: Running, dns: UdpPort) -> None:
    with UdpClient(relay.port) as client:
        client.to(dns.address, b"query")
        dns.expect(b"query")
        counted(relay, 1, 0)
        relay.sweep(9)
        assert relay.state()["sessions"] == 1
        relay.sweep(10)
        assert relay.state()["sessions"] == 0


def test_session_to_a_name_server_and_another_target_has_the_full_idle_time(
    relay: Running, dns: UdpPort
) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(dns)
        client.check_echo(target)
        counted(relay, 2, 2)
        relay.sweep(150)
        assert relay.state()["sessions"] == 1
        client.check_echo(dns)
        counted(relay, 3, 3)
        relay.sweep(300)
        assert relay.state()["sessions"] == 0


def test_session_without_reply_ends_after_a_minute(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.to(target.address, b"hello?")
        target.expect(b"hello?")
        counted(relay, 1, 0)
        relay.sweep(30)
        assert relay.state()["sessions"] == 1
        relay.sweep(60)
        assert relay.state()["sessions"] == 0


# -- which association a datagram belongs to


def test_late_datagram_of_a_client_that_has_left_takes_no_association(relay: Running) -> None:
    """It comes while another association waits, whose request named another port.

    The port in the request decides.
    """
    with UdpPort() as target, UdpClient(relay.port) as old:
        old.check_echo(target)
        old.leave()
        eventually(relay.idle)
        with UdpClient(relay.port) as new:
            old.to(target.address, b"late")
            eventually(lambda: relay.drops() or relay.state()["sessions"])
            if relay.state()["sessions"]:
                # A guess may be wrong, but it must not stay so.
                target.expect(b"late")
            new.check_echo(target)
            new.leave()
            eventually(relay.idle, 1.0)


# -- limits


@pytest.mark.parametrize("limit", ["max_sessions: 3", "max_sessions_per_client: 3"])
def test_session_limit_refuses_new_sessions_and_old_ones_keep_working(
    level: str, limit: str
) -> None:
    with still(LIMITED % limit + level) as relay, UdpPort() as target, ExitStack() as stack:
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


def test_session_limit_of_a_client_counts_each_address(level: str) -> None:
    with (
        still(LIMITED % "max_sessions_per_client: 2" + level) as relay,
        UdpPort() as target,
        ExitStack() as stack,
    ):
        for source in ("127.0.0.2", "127.0.0.3"):
            clients = [stack.enter_context(UdpClient(relay.port, source=source)) for _ in range(3)]
            for client in clients[:2]:
                client.check_echo(target)
            before = relay.count("drops", "session limit")
            clients[2].to(target.address, b"one too many")
            relay.wait_for_count("drops", "session limit", before + 1)
        assert relay.state()["sessions"] == 4 and target.silent()


def test_session_idle_longest_is_evicted_for_a_new_one(level: str) -> None:
    with (
        still(LIMITED % "max_sessions: 3" + level) as relay,
        UdpPort() as target,
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(UdpClient(relay.port)) for _ in range(3)]
        seen = []
        for client, idle in zip(clients, (20, 40, 30), strict=True):
            seen.append(client.check_echo(target))
            make_idle(relay, idle)
        stack.enter_context(UdpClient(relay.port)).check_echo(target)
        assert relay.count("sessions_evicted", "evicted") == 1
        assert clients[0].check_echo(target) == seen[0] and clients[2].check_echo(target) == seen[2]
        assert relay.state()["sessions"] == 3 and not relay.drops()
        # All others have just sent.
        clients[1].to(target.address, b"too late")
        eventually(lambda: relay.drops() == {"session limit": 1})
        make_idle(relay, 11)
        clients[1].check_echo(target)
        assert relay.count("sessions_evicted", "evicted") == 2


def test_session_limit_of_a_user_counts_all_addresses(level: str) -> None:
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
        make_idle(relay, 30)
        # A session of alice is evicted, though those of bob are older.
        third.send(target.address, b"now")
        target.expect(b"now")
        make_idle(relay, 30)
        stack.enter_context(Association(server, ("bob", "b"))).send(target.address, b"bob")
        target.expect(b"bob")
        assert relay.state()["sessions"] == 6 and relay.count("sessions_evicted", "evicted") == 1


# -- forged sources


def forge(data: bytes, to: Address, count: int = FORGED) -> Iterator[int]:
    """Send a datagram from each of `count` addresses.

    Yields the number so far after every hundred, so that the caller can wait.
    """
    for at in range(count):
        with UdpPort(f"127.{2 + (at >> 14)}.{at >> 6 & 255}.{at & 63}") as forged:
            forged.send(data, to)
        if at % 100 == 99:
            yield at + 1


def test_forged_sources_leave_no_state(relay: Running) -> None:
    """Hazard 32."""
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen, began = client.check_echo(target), time.monotonic()
        before, state, lines = descriptors(), relay.state(), len(relay.log.lines)
        for number in forge(encode_header(target.address) + b"forged", client.bound):
            relay.wait_for_count("drops", "unknown sender", number)
        assert (descriptors(), relay.state()) == (before, state)
        seconds = 2 + int(time.monotonic() - began)
        assert len(relay.log.lines) <= lines + seconds * RECORDS_PER_SECOND
        assert sessions_threads() == 1
        assert relay.drops() == {"unknown sender": FORGED}
        assert client.check_echo(target) == seen and target.silent()


def test_forged_clients_of_a_limited_forward_do_not_fill_the_log(level: str) -> None:
    """Without `clients` anyone may use a forward: forged sources fill it to its limit, no more."""
    with UdpPort() as target:
        text = (
            "listeners: [{protocol: udp, listen: '127.0.0.1:0', "
            f"target: '{target.address}', udp: {{max_sessions: 4}}}}]"
        )
        with still(text + level) as relay:
            for number in forge(b"forged", Address(LOCALHOST, relay.port), 1000):
                relay.wait_for_count("drops", "session limit", number - 4)
            assert relay.state() == {"associations": 0, "sessions": 4, "entries": 4}
            table = next(iter(relay.daemon._plan.relays.states.values())).table
            assert len(table.clients) == 4
            assert len(relay.log.limited_keys) < 10, (
                "a minute's log has a line for each forged address"
            )
