"""squid that takes Digest authentication alone, as an upstream of netproxyd."""

from __future__ import annotations

from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Endpoint, Refused, TcpEcho, exactly, socks5
from tests.e2e.support import LOOPBACK, Netproxyd
from tests.e2e.upstreams import Programs, squid_with_digest

pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]

CONFIGURATION = f"""
listeners:
  - {{{{listen: "{LOOPBACK}:0", upstream: direct}}}}
  - {{{{listen: "{LOOPBACK}:0", upstream: "{{url}}"}}}}
"""
USER, PASSWORD = "alice", "open sesame"
# REP of SOCKS5.
GENERAL_FAILURE = 1
# squid takes a nonce twice.
CONNECTIONS = 5


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of squid."""
    with Programs(tmp_path_factory.mktemp("squid")) as programs:
        yield squid_with_digest(programs, USER, PASSWORD)


@pytest.fixture(scope="module")
def echo() -> Iterator[TcpEcho]:
    with TcpEcho() as server:
        yield server


def through(start: Start, proxy: str, credentials: str) -> Netproxyd:
    """Start a daemon whose second listener has squid as its upstream."""
    url = proxy.replace("://", f"://{credentials}@")
    return start(config=CONFIGURATION.format(url=url))


def check_echo(daemon: Netproxyd, target: Endpoint) -> None:
    client, _ = socks5((LOOPBACK, daemon.tcp_ports[1]), CONNECT, target)
    with client:
        client.sendall(b"hello")
        assert exactly(client, 5) == b"hello"


def test_squid_is_answered_and_its_nonces_are_used_again(
    netproxyd: Start, proxy: str, echo: TcpEcho
) -> None:
    daemon = through(netproxyd, proxy, "alice:open%20sesame")
    for _ in range(CONNECTIONS):
        check_echo(daemon, echo.address)
    assert len(daemon.said(" ended=", CONNECTIONS)) == CONNECTIONS
    assert not daemon.all_lines("refused the credentials| 407 ")


def test_wrong_password_is_the_refusal_of_the_hop(
    netproxyd: Start, proxy: str, echo: TcpEcho
) -> None:
    """The client learns nothing of squid's challenge."""
    daemon = through(netproxyd, proxy, "alice:open")
    with pytest.raises(Refused) as refused:
        check_echo(daemon, echo.address)
    assert refused.value.code == GENERAL_FAILURE
    (line,) = daemon.said(" 407 ")
    assert f"ended={proxy}: 407 proxy authentication required" in line.replace('"', "")
