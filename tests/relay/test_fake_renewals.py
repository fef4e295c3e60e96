"""Sessions whose client has written to fake addresses keep these addresses in use."""

from __future__ import annotations

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.relay.table.fake_renewals import SECONDS
from tests.support.flows import OneUpstream
from tests.support.nat import IDLE, NatRig

FIRST, SECOND = "198.18.0.16", "198.18.0.17"


class Naming(OneUpstream):
    """A Router for which all hosts of 198.18.0.0/16 are fake addresses of one name."""

    def named(self, flow: Flow) -> Flow:
        host, port = flow.target
        return flow._replace(target=Address("a.example", port)) if "198.18." in host else flow


def write(rig: NatRig, port: int, *hosts: str) -> None:
    """Let a client endpoint write to hosts."""
    client, router = rig.client(port), Naming(rig.dialer)
    for host in hosts:
        flow = Flow("udp", client.address, Address(host, 443), "main", "")
        entry = rig.table.open((client.peer, host.encode()), client, flow, router)
        assert entry is not None
        rig.send(entry, b"x")


def test_living_sessions_renew_the_use_of_their_fake_addresses(rig: NatRig) -> None:
    """Hazard 159.  Also those that are silent for a while, as their client may go on."""
    write(rig, 5000, FIRST, SECOND, "203.0.113.1")
    write(rig, 5001, "203.0.113.1")
    rig.expire()
    assert rig.renewed == [("192.0.2.1", {FIRST, SECOND})]
    rig.tick(SECONDS - 1)
    assert len(rig.renewed) == 1
    rig.tick(1)
    assert rig.renewed[1:] == [("192.0.2.1", {FIRST, SECOND})]


def test_session_that_has_ended_renews_nothing(rig: NatRig) -> None:
    write(rig, 5000, FIRST)
    rig.tick(IDLE)
    assert len(rig.table) == 0
    before = len(rig.renewed)
    rig.tick(2 * SECONDS)
    assert len(rig.renewed) == before
