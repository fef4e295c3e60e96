"""Discovery through upstreams of a daemon: whose NAT is probed, and what goes wrong."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from netproxy.admin.control.client import CommandError
from netproxy.admin.nat import exchange, upstream
from netproxy.admin.nat.report import ADDRESS_AND_PORT_DEPENDENT, ENDPOINT_INDEPENDENT, Report
from netproxy.admin.nat.upstream import probe_upstream
from netproxy.interfaces.addresses import Address
from netproxy.net.datagram import Arena, ArenaPool
from tests.support.handlers import eventually
from tests.support.relays import Running, running
from tests.support.stun import Script, Server, stun_server

pytest.importorskip("yaml")
Tell = Callable[..., Any]

FAR = """
listeners: [{listen: "127.0.0.1:0", name: far}]
users: {alice: {password: secret}}
"""
NEAR = """
control: unix:FOLDER/control
listeners: []
upstreams:
  socks: socks5://alice:secret@FAR
  web: http://alice:secret@FAR
  web-each: http://alice:secret@FAR?udp=connect-udp
  uot: socks5://alice:secret@FAR?udp=uot
  wrong: socks5://alice:no@FAR
  closed: socks5://127.0.0.1:1
  tcp-only: socks4://FAR
  failover: {members: [closed, socks], balance: failover}
  turns: {members: [socks, uot, web], balance: round-robin}
"""


@pytest.fixture
def far() -> Iterator[Running]:
    with running(FAR) as daemon:
        yield daemon


@pytest.fixture
def near(far: Running, tmp_path: Path) -> Iterator[Running]:
    text = NEAR.replace("FAR", f"127.0.0.1:{far.port}").replace("FOLDER", str(tmp_path))
    with running(text) as daemon:
        yield daemon


@pytest.fixture
def server() -> Iterator[Server]:
    with stun_server() as server:
        yield server


def probe(tell: Tell, via: str, *servers: Address) -> Report:
    return Report.from_json(tell("nat", via=via, servers=list(map(str, servers))))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "nat-probe" in thread.name]


@pytest.mark.parametrize("via", ["direct", "default", "socks", "uot", "web", "failover", "turns"])
def test_nat_of_an_upstream_is_probed(near: Running, tell: Tell, server: Server, via: str) -> None:
    report = probe(tell, via, server.first)
    assert (report.works, report.nat, report.local) == (True, None, "")
    assert (report.mapping, report.filtering) == (ENDPOINT_INDEPENDENT, ENDPOINT_INDEPENDENT)
    assert (report.hairpin, report.per_target, report.unknown) == (True, False, {})
    assert len(report.external) == 1
    assert threads() == []
    assert {row["live"] for row in near.daemon.upstreams()} == {0}


def test_upstream_with_a_connection_for_each_target_is_recognized(
    near: Running, tell: Tell, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is filtered never comes: three seconds less to wait for that.
    monkeypatch.setattr(exchange, "GIVE_UP_SECONDS", 1.5)
    monkeypatch.setattr(exchange, "SEND_SECONDS", (0.5,))
    report = probe(tell, "web-each", server.first)
    assert (report.works, report.per_target, report.hairpin) == (True, True, False)
    assert (report.mapping, report.filtering) == (ADDRESS_AND_PORT_DEPENDENT,) * 2
    assert len(report.external) == 3
    assert threads() == []


@pytest.mark.parametrize(
    ("via", "error"),
    [("closed", "connection refused"), ("wrong", "the upstream refused the credentials")],
)
def test_upstream_that_fails_is_no_udp(
    near: Running, tell: Tell, server: Server, via: str, error: str
) -> None:
    report = probe(tell, via, server.first, Address("192.0.2.1", 1))
    assert not report.works
    assert all(row.error.endswith(error) for row in report.servers)
    assert not server.requests


REFUSED = {
    "unknown upstream": ({"via": "socksy"}, "there is no upstream 'socksy' .known: direct, "),
    "no upstream": ({}, "there is no upstream ''"),
    "TCP alone": ({"via": "tcp-only"}, "upstream 'tcp-only' carries no UDP: not supported"),
    "no servers": ({"servers": []}, "expected 1 to 8 servers"),
    "too many servers": ({"servers": ["a"] * 9}, "expected 1 to 8 servers"),
    "servers missing": ({"servers": None}, "servers: not a list of texts"),
    "server that is a number": ({"servers": [1]}, "servers: not a list of texts"),
    "servers in one text": ({"servers": "abc"}, "servers: not a list of texts"),
    "no server": ({"servers": ["a b"]}, "'a b' is not a server"),
}


@pytest.mark.parametrize(("details", "message"), REFUSED.values(), ids=REFUSED)
def test_request_that_makes_no_sense_is_refused(
    near: Running, tell: Tell, details: dict[str, object], message: str
) -> None:
    with pytest.raises(CommandError, match=message):
        tell("nat", **{"servers": ["127.0.0.1"], **details})


def test_servers_of_listeners_are_known(tmp_path: Path, tell: Tell) -> None:
    text = (
        f"control: unix:{tmp_path}/control\n"
        "listeners:\n"
        "  - {listen: '0.0.0.0:0', clients: [127.0.0.0/8], announce: auto, stun: [192.0.2.1]}\n"
        "  - {listen: '0.0.0.0:0', name: more, clients: [127.0.0.0/8], announce: auto,\n"
        "     stun: ['192.0.2.1', '[2001:db8::1]:1']}\n"
    )
    with running(text):
        assert tell("known")["stun"] == ["192.0.2.1:3478", "[2001:db8::1]:1"]


def test_name_is_looked_up_by_the_upstream(near: Running, tell: Tell) -> None:
    with stun_server(["127.0.0.1"], Script(second=False)) as server:
        report = probe(tell, "socks", Address("localhost", server.first.port))
        assert (report.works, report.servers[0].address) == (True, str(server.first))
        report = probe(tell, "direct", Address("nosuch.invalid", 3478), server.first)
    assert report.works
    assert report.servers[0].error == "nosuch.invalid: name not resolved"


class Gone:
    """A dialer whose packet connections end at once, and a connection of it."""

    symmetric, carries = False, frozenset({"udp"})

    def __init__(self) -> None:
        self.closed = 0

    def fixed_for(self, flow: object) -> Gone:
        return self

    def dial_packet(self, flow: object) -> Gone:
        return self

    def reaches(self, target: object) -> bool:
        return True

    def prepare(self, flow: object) -> None:
        eventually(lambda: self.closed == 1)

    def send(self, arena: object, run: object, destination: object) -> None:
        raise AssertionError("sent on a closed connection")

    def wait(self) -> bool:
        return False

    def shutdown(self) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


def probe_through(dialer: object) -> Report:
    arenas = ArenaPool(Arena)
    return Report.from_json(probe_upstream("x", {"x": dialer}, arenas, ["127.0.0.1"]))  # type: ignore


def test_upstream_that_ends_its_connection_is_told() -> None:
    dialer = Gone()
    report = probe_through(dialer)
    assert report.servers[0].error == "the upstream has closed its connection"
    assert dialer.closed == 1


def test_discovery_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "SECONDS", -1.0)
    dialer = Gone()
    assert probe_through(dialer).servers[0].error == "the upstream takes too long"
    assert dialer.closed == 0


def test_discovery_without_threads_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    dialer = Gone()
    assert probe_through(dialer).servers[0].error == "can't start new thread"
    assert dialer.closed == 1
