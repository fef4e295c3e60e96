"""Limits of users in a whole daemon: what each protocol answers, what is kept over a restart."""

from __future__ import annotations

import signal
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.origin import BIG, Origin, serving
from tests.e2e.peers import ASSOCIATE, CONNECT, Association, Refused, TcpEcho, UdpEcho, echo, socks5
from tests.e2e.support import LOOPBACK, SECONDS, Netproxyd, environment, program, wait_for
from tests.e2e.test_curl import Curl

pytestmark = pytest.mark.e2e

LOGIN, ALICE = ("alice", "secret"), "alice:secret"
BOB = ("bob", "secret")
DATAGRAMS = 400


def configuration(limits: str, more: str = "") -> str:
    """Return the configuration of a daemon with a limited user, and another one."""
    return (
        f"listeners: [{{listen: '{LOOPBACK}:0', auth: required}}]\n"
        f"users: {{alice: {{password: secret, {limits}}}, bob: {{password: secret}}}}\n{more}\n"
    )


@pytest.fixture
def curl(tmp_path: Path) -> Curl:
    return Curl(tmp_path)


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


def refused(daemon: Netproxyd, command: int = CONNECT) -> int:
    """Return the code with which SOCKS5 refuses a request."""
    with pytest.raises(Refused) as caught:
        socks5(daemon.server, command, (LOOPBACK, 9), LOGIN)
    return caught.value.code


def test_connection_beyond_the_limit_gets_the_reply_of_its_protocol(
    curl: Curl, netproxyd: Start, origin: Origin
) -> None:
    daemon = netproxyd(config=configuration("limits: {connections: 1}"), login=BOB)
    with (
        TcpEcho() as target,
        closing(socks5(daemon.server, CONNECT, target.address, LOGIN)[0]) as held,
    ):
        echo(held, b"one")
        assert refused(daemon) == 2
        for protocol in ("http", "connect"):
            result = curl(daemon, protocol, "-i", origin.url(), login=ALICE)
            assert "429" in result.errors or b"429 Too Many Requests" in result.body
        result = curl(daemon, "http", "-i", origin.url(), login=ALICE)
        assert b"Retry-After: 5" in result.body
        assert b"a limit of this proxy is reached" in result.body
        echo(held, b"still there")
    daemon.said("decided=users.alice.limits.connections")
    wait_for(lambda: curl(daemon, "socks5", origin.url(), login=ALICE).code == 200, SECONDS, "room")


def test_new_connections_of_a_second_are_limited(netproxyd: Start) -> None:
    config = configuration("limits: {connection_rate: 3/h}")
    daemon = netproxyd(config=config, login=BOB)
    with TcpEcho() as target:
        socks5(daemon.server, CONNECT, target.address, LOGIN)[0].close()
    assert refused(daemon) == 2
    daemon.said("decided=users.alice.limits.connection_rate")


def test_rates_change_no_byte(curl: Curl, netproxyd: Start, origin: Origin) -> None:
    """TCP is delayed, not cut: with curl by every protocol, and with wget."""
    rate = len(BIG) * 4
    config = configuration(f"limits: {{rate: {rate}B/s, burst: 64KiB}}")
    daemon = netproxyd(config=config, login=BOB)
    for protocol in ("socks5", "http", "connect"):
        result = curl(daemon, protocol, origin.url("/big"), login=ALICE)
        assert result.code == 200 and result.body == BIG
    wget = subprocess.run(
        [program("wget"), "-q", "-O", "-", "-e", f"http_proxy={daemon.url('http', ALICE)}"]
        + ["-e", "use_proxy=yes", origin.url("/big")],
        capture_output=True,
        env=environment(),
        timeout=60,
    )
    assert wget.stdout == BIG, wget.stderr


def test_datagrams_beyond_the_rate_are_dropped_and_counted(netproxyd: Start) -> None:
    config = configuration("limits: {rate_up: 8kbit/s, burst: 64KiB}")
    daemon = netproxyd(config=config, login=BOB)
    with UdpEcho() as target, Association(daemon.server, LOGIN) as association:
        association.echo(target.address, b"first")
        for number in range(DATAGRAMS):
            association.send(target.address, b"%04d" % number + bytes(1196))
        received = 1
        association.socket.settimeout(0.5)
        try:
            while True:
                association.receive()
                received += 1
        except TimeoutError:
            pass
        dropped = daemon.drops().get("drops{rate limit}", 0)
        assert received >= 65536 // 1200 and received + dropped == DATAGRAMS + 1
    daemon.said('reason="rate limit"')
    daemon.said("decided=users.alice.limits.rate_up")


def test_quota_ends_what_runs_and_is_kept_over_a_restart(
    curl: Curl, netproxyd: Start, origin: Origin, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    limits = f"limits: {{rate: {len(BIG) // 10}B/s, quota: {{day: {len(BIG) // 10}B}}}}"
    config = configuration(limits, f"state: {state}")
    daemon = netproxyd(config=config, login=BOB)
    result = curl(daemon, "socks5", origin.url("/big"), login=ALICE)
    assert result.status != 0 and len(result.body) < len(BIG)
    daemon.said('ended="quota used up"')
    check_quota_refusals(daemon, curl, origin)
    daemon.signal(signal.SIGTERM)
    daemon.wait(SECONDS)
    again = netproxyd(config=config, login=BOB)
    check_quota_refusals(again, curl, origin)


def check_quota_refusals(daemon: Netproxyd, curl: Curl, origin: Origin) -> None:
    """Check what each protocol answers once the quota is used up."""
    assert refused(daemon) == refused(daemon, ASSOCIATE) == 2
    result = curl(daemon, "http", "-i", origin.url(), login=ALICE)
    assert result.body.startswith(b"HTTP/1.1 403 Forbidden") and b"quota used up" in result.body
    assert "403" in curl(daemon, "connect", origin.url(), login=ALICE).errors
    daemon.said("decided=users.NAME.limits.quota")


def test_user_who_has_expired_gets_nothing(netproxyd: Start) -> None:
    daemon = netproxyd(config=configuration("expires: 2020-01-31"), login=BOB)
    assert refused(daemon) == refused(daemon, ASSOCIATE) == 2
    daemon.said('reason="user expired"')
