"""Names that a dns listener has told a client are those of the client's flows, TCP and UDP."""

from __future__ import annotations

import socket
import time
from contextlib import contextmanager
from typing import Iterator

import pytest

from netproxy.errors import Reason
from netproxy.handler.dns.remembering import EXTRA_SECONDS, LEAST_SECONDS, MOST_SECONDS, remember
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import SeenName
from netproxy.resolver.client_names.name_memory import NameMemory
from netproxy.router.named import RememberedNames
from tests.support.dns import QR, RA, RD, a, cname, name, query, question, record
from tests.support.exchanges import GREETING, EchoTarget, converse, socks5_request
from tests.support.flows import tcp_to, udp_to
from tests.support.handlers import LOCALHOST, SECONDS, eventually
from tests.support.nameservers import answer_to, framed, name_server, nxdomain, read_framed
from tests.support.relays import Running, UdpClient, UdpPort, running
from tests.support.sockets import server, udp

HOST, HOST6 = "192.0.2.1", "2001:db8::1"
CLIENT = "192.0.2.77"
ASKED = query(question("www.example"))
OWNER = b"\xc0\x0c"


class Notes:
    """A NameMemory that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, list[str], str, float]] = []

    def note(self, client: str, addresses: list[str], name: str, until: float, now: float) -> None:
        self.notes.append((client, list(addresses), name, until - now))


def noted(answer: bytes) -> list[tuple[str, list[str], str, float]]:
    notes = Notes()
    remember(notes, CLIENT, answer)  # type: ignore[arg-type]
    return notes.notes


@pytest.mark.parametrize(
    ("ttl", "seconds"),
    [
        (0, LEAST_SECONDS + EXTRA_SECONDS),
        (300, 300 + EXTRA_SECONDS),
        (1 << 30, MOST_SECONDS + EXTRA_SECONDS),
    ],
)
def test_answer_is_remembered_for_its_ttl_and_a_little_more(ttl: int, seconds: float) -> None:
    ((client, addresses, asked, left),) = noted(answer_to(ASKED, a(ttl)))
    assert (client, addresses, asked) == (CLIENT, [HOST], "www.example")
    assert left == pytest.approx(seconds)


def test_alias_is_remembered_under_the_name_that_was_asked_for() -> None:
    target = name("other.example")
    answer = answer_to(
        ASKED,
        cname(OWNER, 90, target),
        record(target, 1, 80, b"\xc0\0\2\1"),
        record(target, 1, 80, b"\xc0\0\2\2"),
    )
    ((_, addresses, asked, _),) = noted(answer)
    assert (addresses, asked) == ([HOST, "192.0.2.2"], "www.example")


def test_ipv6_address_is_remembered() -> None:
    asked = query(question("WWW.Example", 28))
    raw = socket.inet_pton(socket.AF_INET6, HOST6)
    ((_, addresses, host, _),) = noted(answer_to(asked, record(OWNER, 28, 60, raw)))
    assert (addresses, host) == ([HOST6], "www.example")


NOTHING = {
    "no such name": nxdomain(ASKED),
    "no address": answer_to(ASKED),
    "a failure": answer_to(ASKED, flags=QR | RD | RA | 2),
    "another type": answer_to(query(question("www.example", 16)), record(OWNER, 16, 60, b"\1a")),
    "no host name": answer_to(query(question("a b.example")), a(60)),
    "the root": answer_to(query(b"\0\0\1\0\1"), a(60)),
    "a query": ASKED,
    "too short": ASKED[:11],
    "a record cut off": answer_to(ASKED, a(60))[:-1],
    "nothing": b"",
}


@pytest.mark.parametrize("answer", NOTHING.values(), ids=NOTHING)
def test_answer_without_an_address_is_not_remembered(answer: bytes) -> None:
    assert noted(answer) == []


# -- the names of flows


def memory(text: str = "www.example") -> NameMemory:
    kept = NameMemory()
    now = time.monotonic()
    kept.note("192.0.2.1", ["203.0.113.9"], text, now + 1000, now)  # the client of tests.support
    return kept


TARGET = Address("203.0.113.9", 443)


def test_name_leads_only_connections_of_transparent_listeners() -> None:
    for flow, transparent, leads in (
        (tcp_to(TARGET), ["main"], True),
        (tcp_to(TARGET), ["other"], False),
        (udp_to(TARGET), ["main"], False),
    ):
        named = RememberedNames(memory(), transparent).named(flow)
        assert named == flow._replace(seen=SeenName("www.example", "dns", leads))


def test_name_of_a_local_network_does_not_lead() -> None:
    named = RememberedNames(memory("printer.lan"), ["main"]).named(tcp_to(TARGET))
    assert named.seen == SeenName("printer.lan", "dns")


def test_flow_without_a_remembered_name_stays_as_it_is() -> None:
    names = RememberedNames(memory(), ["main"])
    for flow in (
        tcp_to(Address("203.0.113.8", 443)),
        tcp_to(Address("www.example", 443)),
        tcp_to(TARGET)._replace(seen=SeenName("other.example", "tls")),
        tcp_to(TARGET)._replace(client=Address("192.0.2.2", 1)),
    ):
        assert names.named(flow) is flow


# -- in a whole daemon

RULES = """
rules: [{domain: www.example, via: direct}]
default: block
"""


@contextmanager
def remembering(remember: bool = True) -> Iterator[Running]:
    """Run a daemon with a dns listener, whose names are all on this machine, and a proxy."""

    def reply(asked: bytes) -> bytes:
        return answer_to(asked, a(60, b"\x7f\0\0\1"))

    with name_server(reply) as address:
        dns = f"dns: {{servers: ['{address}'], remember: {str(remember).lower()}}}"
        listeners = "listeners: [{listen: '127.0.0.1:0'}, {protocol: dns, listen: '127.0.0.1:0'}]"
        with running(f"{listeners}\n{dns}\n{RULES}") as relay:
            yield relay


def ask(relay: Running, asked: bytes, network: str = "udp") -> bytes:
    listeners = relay.daemon._manager.listeners
    (port,) = {
        listener.address.port
        for listener in listeners
        if listener.network == network and listener.address.port != relay.port
    }
    if network == "tcp":
        with socket.create_connection((LOCALHOST, port), SECONDS) as sock:
            sock.sendall(framed(asked))
            return read_framed(sock)
    with udp() as sock:
        sock.sendto(asked, (LOCALHOST, port))
        return sock.recv(2000)


def connect(relay: Running, target: Address) -> bytes:
    with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
        return converse(sock, GREETING + socks5_request(target) + b"x")


@pytest.mark.parametrize("network", ["udp", "tcp"])
def test_rule_by_name_decides_for_the_address_that_was_told(network: str) -> None:
    with server(EchoTarget()) as target, remembering() as relay:
        assert not connect(relay, target).endswith(b"got x")
        for _ in range(2):  # an answer of the server, and one of the cache
            ask(relay, ASKED, network)
            assert connect(relay, target).endswith(b"got x")
        ask(relay, query(question("other.example")), network)
        assert not connect(relay, target).endswith(b"got x")
        eventually(lambda: len(relay.log.records) == 4)
        seen = [record.flow.seen and record.flow.seen.host for record in relay.log.records]
    assert sorted(seen, key=str) == [None, "other.example", "www.example", "www.example"]


def test_nothing_is_remembered_by_default() -> None:
    with server(EchoTarget()) as target, remembering(False) as relay:
        ask(relay, ASKED)
        assert not connect(relay, target).endswith(b"got x")


def test_datagrams_get_the_name_as_well() -> None:
    with remembering() as relay, UdpPort() as target, UdpClient(relay.port) as client:
        client.to(target.address, b"refused")
        relay.wait_for_count("drops", Reason.DENIED.value, 1)
        ask(relay, ASKED)
        client.check_echo(target)
        assert relay.count("drops", Reason.DENIED.value) == 1
