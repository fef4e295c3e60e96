"""Who may connect: networks, exclusions, denied networks, and proxies that speak for clients."""

from __future__ import annotations

from netproxy.access.limits import Admission
from netproxy.access.login import Login
from netproxy.access.permission import Permission
from netproxy.access.users import Users
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.listeners import ALL_CLIENTS, AllowedClients
from netproxy.interfaces.networks import IpNetwork
from tests.support.accounts import standing
from tests.support.doubles import Counts


def networks(*texts: str) -> list[IpNetwork]:
    return [IpNetwork.parse(text) for text in texts]


OFFICE = networks("192.168.0.0/16")
GUESTS = networks("192.168.9.0/24")
DENIED = networks("192.168.1.66", "10.0.0.0/8")
ALLOWED = AllowedClients((OFFICE, GUESTS), (DENIED, ()), networks("10.0.0.2", "172.16.0.1"))


def test_everybody_may_connect_if_nothing_is_named() -> None:
    assert ALL_CLIENTS.everybody and not ALLOWED.everybody
    assert ALL_CLIENTS.refused_by("192.0.2.1") == ALL_CLIENTS.refused_by("::1") == ""


def test_key_that_refuses_a_client_is_named() -> None:
    hosts = {
        "192.168.1.5": "",
        "192.168.1.66": "clients_deny",
        "192.168.9.1": "clients",
        "192.0.2.1": "clients",
        # In both: what is denied is denied whatever is allowed.
        "10.0.0.1": "clients_deny",
        "::1": "clients",
    }
    assert {host: ALLOWED.refused_by(host) for host in hosts} == hosts


def test_proxies_may_connect_whatever_is_denied() -> None:
    assert ALLOWED.refused_by("10.0.0.2") == ALLOWED.refused_by("172.16.0.1") == ""


def test_denied_networks_alone_leave_all_others_in() -> None:
    clients = AllowedClients(((), ()), (DENIED, networks("10.1.0.0/16")))
    assert not clients.everybody
    assert [clients.refused_by(host) for host in ("10.0.0.1", "10.1.0.1", "192.0.2.1")] == [
        "clients_deny",
        "",
        "",
    ]


def test_admission_tells_which_key_has_decided() -> None:
    door = Admission(ALLOWED, 2, 1)
    assert [door.enter(host) for host in ("192.168.1.66", "192.0.2.1", "192.168.1.5")] == [
        "client not allowed",
        "client not allowed",
        "",
    ]
    assert door.decided_by("client not allowed", "192.168.1.66") == "clients_deny"
    assert door.decided_by("client not allowed", "192.0.2.1") == "clients"
    assert door.enter("192.168.1.5") == "client limit"
    assert door.decided_by("client limit", "192.168.1.5") == "limits.connections_per_client"
    # As on loopback: there is no limit of clients, and so the other one has decided.
    door = door.with_limits(ALLOWED, 1, 1)
    assert door.enter("192.168.1.5") == "connection limit"
    assert door.decided_by("connection limit", "192.168.1.5") == "limits.connections"


def test_permission_refuses_by_the_key_that_decides() -> None:
    counts = Counts()
    permission = Permission("main", Login(Users({}), "none"), ALLOWED, counts, standing())
    for host in ("192.168.1.66", "192.0.2.1", "192.168.1.5"):
        flow = Flow("udp", Address(host, 1), Address("198.51.100.1", 443), "main", "")
        permission.refuses(flow, 1)
    assert [(refusal.reason, refusal.decided) for refusal in counts.refusals] == [
        ("client not allowed", "clients_deny"),
        ("client not allowed", "clients"),
    ]
