"""The UDP relay under load: many targets, forged sources, session limits, many clients."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.socks5 import encode_header
from tests.support.handlers import LOCALHOST, descriptors, eventually
from tests.support.relays import Running, UdpClient, UdpPort, running, sessions_threads


@pytest.fixture
def relay() -> Iterator[Running]:
    with running() as relay:
        yield relay


@pytest.fixture
def quick_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let idle threads of a pool end after a moment instead of ten seconds."""
    monkeypatch.setattr("netproxy.listener.pool.IDLE_SECONDS", 0.05)


def test_10000_targets_of_one_client_share_one_session(relay: Running) -> None:
    """Hazard 31."""
    with UdpClient(relay.port) as client, ExitStack() as stack:
        sinks = [stack.enter_context(UdpPort("0.0.0.0")) for _ in range(4)]
        seen = {client.check_echo(stack.enter_context(UdpPort()))}
        before, memory = descriptors(), resident()
        for turn in range(50):
            for at in range(turn * 200, turn * 200 + 200):
                client.to(
                    Address(f"127.1.{at >> 8}.{at & 255}", sinks[at % 4].address.port), b"%d" % at
                )
            for at in range(turn * 200, turn * 200 + 200):
                seen.add(sinks[at % 4].expect(b"%d" % at))
        assert len(seen) == 1
        assert descriptors() == before
        assert relay.state()["sessions"] == 1
        assert relay.state()["entries"] <= 4096
        assert resident() - memory < 20 << 20
        assert not relay.drops()


def test_2000_forged_sources_leave_no_state(relay: Running) -> None:
    """Hazard 32."""
    bound = Address(LOCALHOST, relay.port)
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.check_echo(target)
        before, state, reasons = descriptors(), relay.state(), len(relay.daemon.counters.items())
        data = encode_header(target.address) + b"forged"
        for at in range(2000):
            with UdpPort(f"127.2.{at >> 8}.{at & 255}") as forged:
                forged.send(data, bound)
            if at % 100 == 99:
                relay.wait_for_count("drops", "unknown sender", at + 1)
        assert (descriptors(), relay.state()) == (before, state)
        assert len(relay.daemon.counters.items()) == reasons + 1
        assert relay.drops() == {"unknown sender": 2000}
        client.check_echo(target)
        assert target.silent()


@pytest.mark.parametrize("cap", ["max_sessions: 2", "max_sessions_per_client: 2"])
def test_session_limit_refuses_new_sessions_and_old_ones_keep_working(cap: str) -> None:
    """Hazard 33."""
    with (
        running("listeners: [{listen: '127.0.0.1:0', udp: {%s}}]" % cap) as relay,
        UdpPort() as target,
        ExitStack() as stack,
    ):
        first, second, third = (stack.enter_context(UdpClient(relay.port)) for _ in range(3))
        first.check_echo(target)
        second.check_echo(target)
        third.to(target.address, b"one too many")
        eventually(lambda: relay.drops() == {"session limit": 1})
        first.check_echo(target)
        second.check_echo(target)
        assert relay.state()["sessions"] == sessions_threads() == 2
        first.leave()
        eventually(lambda: relay.state()["sessions"] == 1)
        third.check_echo(target)


@pytest.mark.usefixtures("quick_pools")
def test_20_clients_with_500_targets_leave_nothing_behind() -> None:
    with running() as relay, UdpPort("0.0.0.0") as sink:
        targets = [
            Address(f"127.3.{at // 250}.{at % 250 + 1}", sink.address.port) for at in range(500)
        ]
        start_threads, start_descriptors = threading.active_count(), descriptors()
        with ExitStack() as stack:
            clients = [
                stack.enter_context(UdpClient(relay.port, source=f"127.0.0.{at + 10}"))
                for at in range(20)
            ]
            seen: dict[bytes, set[Address]] = {}
            # 200 datagrams in each turn, ten of every client.
            for turn in range(25):
                for at, client in enumerate(clients):
                    for number in range(10):
                        client.to(targets[(turn * 10 + at * 25 + number) % 500], b"%d" % at)
                for _ in range(200):
                    data, peer = sink.receive()
                    seen.setdefault(data, set()).add(peer)
            assert all(len(ports) == 1 for ports in seen.values()) and len(seen) == 20
            assert relay.state()["sessions"] == sessions_threads() == 20
            assert relay.state()["entries"] >= 500
            # One thread for each control connection and session; idle workers have ended.
            eventually(lambda: threading.active_count() <= start_threads + 20 + 20)
            relay.sweep(300)
            assert relay.state() == {"associations": 20, "sessions": 0, "entries": 0}
            # Each client has two, and the relay has one for it.
            eventually(lambda: descriptors() == start_descriptors + 20 * 3)
        eventually(lambda: relay.idle() and descriptors() == start_descriptors)
        eventually(lambda: threading.active_count() <= start_threads)
        assert not relay.drops()


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
