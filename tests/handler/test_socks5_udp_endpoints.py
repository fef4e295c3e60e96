"""Several endpoints of one SOCKS5 association, through a real daemon."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.socks5 import encode_header
from netproxy.relay import association as association_module
from netproxy.relay.association import ENDPOINTS_LIMIT
from tests.support.handlers import eventually
from tests.support.relays import (
    NO_HINT,
    SPS,
    Running,
    UdpClient,
    UdpPort,
    running,
    sessions_threads,
)


@pytest.fixture
def relay() -> Iterator[Running]:
    with running() as relay:
        yield relay


def header(target: UdpPort) -> bytes:
    return encode_header(target.address)


def test_named_endpoint_is_served_after_another_one_of_its_address(relay: Running) -> None:
    """Hazard 23."""
    with UdpClient(relay.port) as client, UdpPort() as target:
        with relay.held(), UdpPort() as other:
            other.send(header(target) + b"other", client.bound)
            client.to(target.address, b"named")
        received = dict(target.receive() for _ in range(2))
        assert set(received) == {b"other", b"named"}
        assert client.check_echo(target) == received[b"named"]


def test_association_without_named_port_serves_several_endpoints(relay: Running) -> None:
    """Hazards 22 and 23.  Each has its own session and gets its own replies."""
    with UdpClient(relay.port, hint=NO_HINT) as client, UdpPort() as target, UdpPort() as other:
        other.send(header(target) + b"first", client.bound)
        others = target.expect(b"first")
        own = client.check_echo(target)
        target.send(b"answer", others)
        assert other.receive()[0] == header(target) + b"answer"
        assert client.check_echo(target) == own != others
        assert relay.state()["sessions"] == 2 and client.silent()
        client.leave()
        eventually(relay.idle)
        eventually(lambda: not sessions_threads())
    assert [record.ended for record in relay.log.records] == ["association ended"] * 2


def test_several_endpoints_keep_working_over_a_reload(relay: Running) -> None:
    with UdpClient(relay.port, hint=NO_HINT) as client, UdpPort() as target, UdpPort() as other:
        other.send(header(target) + b"first", client.bound)
        others, own = target.expect(b"first"), client.check_echo(target)
        relay.reload(SPS + "\nlog: {level: debug}")
        other.send(header(target) + b"again", client.bound)
        assert target.expect(b"again") == others and client.check_echo(target) == own


@pytest.mark.parametrize("hint", [NO_HINT, None])
@pytest.mark.parametrize("replies", [False, True])
def test_forged_endpoints_take_no_datagram_of_the_client(
    relay: Running, monkeypatch: pytest.MonkeyPatch, hint: Address | None, replies: bool
) -> None:
    """Hazard 23.  Each forged datagram comes from another port of the client's address."""
    monkeypatch.setattr(association_module, "DISPLACED_LIMIT", 10_000)
    rounds, forged = 30, 6
    with UdpClient(relay.port, hint=hint) as client, UdpPort() as target, UdpPort() as victim:
        seen = []
        for _ in range(rounds):
            for _ in range(forged):
                with UdpPort() as forger:
                    forger.send(header(victim) + b"forged", client.bound)
                    if replies and not seen:
                        victim.send(b"reply", victim.expect(b"forged"))
            seen.append(client.check_echo(target))
        assert len(seen) == rounds
        if hint is None or not replies:
            # What has got no reply is displaced, and not the client.
            assert len(set(seen)) == 1


def test_number_of_endpoints_is_bounded(relay: Running) -> None:
    with UdpClient(relay.port, hint=NO_HINT) as client, UdpPort() as target, ExitStack() as stack:
        others = [stack.enter_context(UdpPort()) for _ in range(2 * ENDPOINTS_LIMIT)]
        for number, other in enumerate(others):
            other.send(header(target) + b"%d" % number, client.bound)
            target.expect(b"%d" % number)
        assert relay.state()["sessions"] == ENDPOINTS_LIMIT
        assert relay.count("sessions_evicted", "displaced") == ENDPOINTS_LIMIT
        assert len(relay.log.records) == ENDPOINTS_LIMIT
        client.check_echo(target)
