"""UDP of users who have met a limit: UDP ASSOCIATE is refused, or datagrams are dropped.

dig sends its query under socksify; the other client is written from RFC 1928.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.limit_clients import Proxy, ban, dig_by_socks5
from tests.e2e.peers import Association, Refused, UdpEcho
from tests.e2e.support import LOOPBACK, SECONDS, Netproxyd, wait_for
from tests.e2e.test_udp_clients import ANSWER, dns_answer

pytestmark = pytest.mark.e2e

ALICE, BOB = ("alice", "secret"), ("bob", "secret")
DATAGRAMS = 3


class Case(NamedTuple):
    """A limit, and the reason and the key that everybody must see."""

    alice: str
    reason: str
    decided: str
    more: str = ""
    first: bool = True
    """Whether a first session is served, which uses the limit up."""


DROPPED = {
    "sessions": Case("limits: {sessions: 1}", "session limit", "users.alice.limits.sessions"),
    "connection_rate": Case(
        "limits: {connection_rate: 1/h}",
        "connection rate of the user",
        "users.alice.limits.connection_rate",
    ),
    "hours": Case(
        "",
        "not allowed by the rules",
        "rules[0]",
        'rules: [{user: alice, hours: "00:00-24:00", via: block}]',
        first=False,
    ),
}
REFUSED = {
    "quota": Case(
        "limits: {quota: 8B}", "quota used up", "users.alice.limits.quota", "state: {state}"
    ),
    "ban": Case("", "user banned", '"netproxyctl ban"', "control: unix:{state}/control"),
    "expires": Case("expires: 2020-01-31", "user expired", "users.alice.expires", first=False),
}


def configuration(case: Case, state: Path) -> str:
    """Return the configuration of a daemon with a limited user, and another one."""
    more = case.more.replace("{state}", str(state))
    return (
        f"listeners: [{{name: main, listen: '{LOOPBACK}:0', auth: required}}]\n"
        f"users: {{alice: {{password: secret, {case.alice}}}, bob: {{password: secret}}}}\n"
        f"{more}\n"
    )


@pytest.fixture
def dns() -> Iterator[UdpEcho]:
    with UdpEcho(answer=dns_answer) as server:
        yield server


@pytest.fixture
def udp_echo() -> Iterator[UdpEcho]:
    with UdpEcho() as server:
        yield server


def start(netproxyd: Start, case: Case, tmp_path: Path) -> Netproxyd:
    """Return a daemon with the limit."""
    state = tmp_path / "state"
    state.mkdir()
    return netproxyd(config=configuration(case, state), login=BOB)


def check_drops(daemon: Netproxyd, case: Case, count: int) -> None:
    """Wait until so many datagrams were dropped for the reason, and for no other one."""
    name = f"drops{{{case.reason}}}"
    wait_for(lambda: daemon.drops().get(name) == count, SECONDS, f"{count} x {name}")
    assert daemon.drops() == {name: count}
    decided = case.decided.replace("[", r"\[").replace("]", r"\]")
    record = f'msg=refused reason="{case.reason}" .*user=alice network=udp .*decided={decided} '
    daemon.said(rf"{record}datagrams=\d+ id=")


@pytest.mark.parametrize("name", DROPPED)
def test_datagrams_of_a_new_session_are_dropped_and_counted(
    netproxyd: Start, dns: UdpEcho, udp_echo: UdpEcho, tmp_path: Path, name: str
) -> None:
    case = DROPPED[name]
    daemon = start(netproxyd, case, tmp_path)
    with Association(daemon.server, ALICE) as first:
        if case.first:
            first.echo(udp_echo.address, b"first")
        with Association(daemon.server, ALICE) as second:
            for _ in range(DATAGRAMS):
                second.send(udp_echo.address, b"beyond")
            check_drops(daemon, case, DATAGRAMS)
        status, said = dig_by_socks5(Proxy(daemon.server, ALICE), dns.address, tmp_path)
        assert status != 0 and ANSWER not in said
        check_drops(daemon, case, DATAGRAMS + 1)
        if case.first:
            first.echo(udp_echo.address, b"still there")
    assert not dns.sources
    others = dig_by_socks5(Proxy(daemon.server, BOB), dns.address, tmp_path)
    assert others == (0, ANSWER)


@pytest.mark.parametrize("name", REFUSED)
def test_associations_of_a_user_with_nothing_left_are_refused(
    netproxyd: Start, dns: UdpEcho, udp_echo: UdpEcho, tmp_path: Path, name: str
) -> None:
    case = REFUSED[name]
    daemon = start(netproxyd, case, tmp_path)
    if case.first:
        with Association(daemon.server, ALICE) as association:
            association.echo(udp_echo.address, b"8 bytes.")
            if name == "ban":
                ban(tmp_path / "state" / "control", ALICE[0])
            ended = f'ended="{case.reason}" .*decided={case.decided} id='
            daemon.said(f"msg=finished .*user=alice network=udp .*{ended}")
            for _ in range(DATAGRAMS):
                association.send(udp_echo.address, b"beyond")
            check_drops(daemon, case, DATAGRAMS)
    with pytest.raises(Refused) as caught:
        Association(daemon.server, ALICE)
    assert caught.value.code == 2
    status, said = dig_by_socks5(Proxy(daemon.server, ALICE), dns.address, tmp_path)
    assert status != 0 and ANSWER not in said and not dns.sources
    daemon.said(f'msg=refused reason="{case.reason}" .*user=alice .*decided={case.decided} id=', 2)
    daemon.counted(f"requests_refused{{{case.reason}}}", 2)
    assert len(udp_echo.sources) == case.first


def test_connect_udp_beyond_the_limit_gets_429(
    netproxyd: Start, udp_echo: UdpEcho, tmp_path: Path
) -> None:
    case = DROPPED["sessions"]
    daemon = start(netproxyd, case, tmp_path)
    with Association(daemon.server, ALICE) as first:
        first.echo(udp_echo.address, b"first")
        host, port = udp_echo.address
        request = (
            f"GET /.well-known/masque/udp/{host}/{port}/ HTTP/1.1\r\nHost: proxy.test\r\n"
            "Connection: Upgrade\r\nUpgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n"
            "Proxy-Authorization: Basic YWxpY2U6c2VjcmV0\r\n\r\n"
        )
        with socket.create_connection(daemon.server, SECONDS) as client:
            client.sendall(request.encode())
            answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 ") and b"\r\nRetry-After: 5" in head
    assert re.fullmatch(rb"session limit \(id [0-9a-z]{6}\)\n", body)
    assert daemon.counted("requests_refused{session limit}", 1) == 1
    assert not [name for name in daemon.status() if name.startswith("dial_failures")]
    daemon.said(f'msg=refused reason="session limit" .*user=alice .*decided={case.decided} id=')
