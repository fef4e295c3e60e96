"""Limits of users in a whole daemon: rates change no byte, quotas are kept over a restart."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e.browser import find_browser
from tests.e2e.conftest import Start
from tests.e2e.limit_clients import Proxy, browse
from tests.e2e.origin import BIG, Origin, serving
from tests.e2e.peers import ASSOCIATE, CONNECT, Association, Refused, UdpEcho, socks5
from tests.e2e.site import BINARY, RESOURCES, Site, serving_site, tls_context
from tests.e2e.support import LOOPBACK, SECONDS, Netproxyd, environment, program
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


def test_rates_change_no_byte_of_tunnels(netproxyd: Start, tmp_path: Path) -> None:
    """With wget, and with a browser whose page checks its fifty resources."""
    listeners = f"listeners: [{{listen: '{LOOPBACK}:0', auth: required, limits: {{%s}}}}]\n"
    users = "users: {alice: {password: secret, limits: {rate: 2MB/s, burst: 64KiB}}}"
    daemon = netproxyd(config=listeners % "rate_per_client: 3MB/s" + users, login=LOGIN)
    with serving_site(Site(tls_context())) as site:
        options = ["-q", "-O", "-", "--no-check-certificate", "-e", "use_proxy=yes", "-e"]
        options += [f"https_proxy={daemon.url('http', ALICE)}"]
        wget = subprocess.run(
            [program("wget"), *options, f"https://{LOOPBACK}:{site.port}{BINARY}"],
            capture_output=True,
            env=environment(),
            timeout=60,
        )
        assert wget.stdout == RESOURCES[BINARY].body, wget.stderr
        proxy, url = Proxy(daemon.server, LOGIN), f"https://localhost:{site.port}/"
        shown = browse(find_browser(), tmp_path, proxy, url)
    count = f"{len(RESOURCES)} of {len(RESOURCES)}"
    assert f"<title>{count}</title>" in shown.dom, shown.dom


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
    daemon.said("decided=users.alice.limits.quota")
