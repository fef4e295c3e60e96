"""Every scheme of an upstream with programs that speak it.

8 MB in both directions, half-close, and UDP, or the reason why there is none.
"""

from __future__ import annotations

import os
import re
import socket
from typing import Any, Callable, Iterator, NamedTuple

import pytest

from tests.e2e import upstreams
from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Association, Endpoint, Refused, TcpEcho, UdpEcho, socks5, udp
from tests.e2e.support import ANY_PORT, LOOPBACK, SECONDS, Netproxyd, wait_for
from tests.e2e.upstreams import PIECE, Exchange, Programs, http_connect, secured
from tests.support.certificates import certificates

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.any_workers]

SIZES = (1, 100, 1200, 8000)
# Datagrams of each size, or to an upstream without UDP.
TIMES = 20
# REP of SOCKS5.
COMMAND_NOT_SUPPORTED = 7
# Patterns of the reasons why an upstream carries no UDP. The last one is for programs that answer
# an unknown request by closing the connection.
NO_CONNECT_UDP = r"connect-udp to {target}: 4\d\d "
NO_UDP = "carries no UDP"
CLOSED = "closed "
# Of a SOCKS5 client without a password.
GREETING = b"\5\1\0"
# Listeners of netproxyd as an upstream.
PLAIN, HTTP, SOCKS5, SECURED = range(4)
FAR = """\
listeners:
  - {{listen: "{host}:0", name: plain}}
  - {{listen: "{host}:0", name: http, protocol: http}}
  - {{listen: "{host}:0", name: socks5, protocol: socks5}}
  - {{listen: "{host}:0", name: secured, tls: {tls}}}
"""


# Starts a program if need be, and returns the URL of the upstream. The daemon is netproxyd as an
# upstream, or behind the program.
Starter = Callable[[Programs, Netproxyd], str]


class Case(NamedTuple):
    """An upstream, and what it carries."""

    start: Starter
    no_udp: str = ""
    """The pattern of the reason if it carries no UDP."""
    sizes: tuple[int, ...] = SIZES
    """Sizes of datagrams that it carries."""
    half_close: bool = True
    """False if it ends both directions at the first FIN."""


class Running(NamedTuple):
    """A running upstream, and the daemon that uses it."""

    case: Case
    url: str
    daemon: Netproxyd

    @property
    def hop(self) -> str:
        """The URL as the log names it."""
        return self.url.partition("?")[0]

    @property
    def program(self) -> Endpoint:
        """The address of the upstream."""
        return LOOPBACK, int(self.hop.rpartition(":")[2])


def alone(start: Callable[..., str], *arguments: str) -> Starter:
    """Return a starter for a program that needs no netproxyd behind it."""
    return lambda programs, far: start(programs, *arguments)


def behind_tls(scheme: str, port: int) -> Starter:
    """Return a starter for haproxy in front of a listener of the far daemon."""
    return lambda programs, far: upstreams.haproxy(programs, scheme, far.tcp_ports[port])


def netproxyd_itself(scheme: str, more: str = "") -> Starter:
    """Return a starter for the far daemon itself, without another program."""

    def start(programs: Programs, far: Netproxyd) -> str:
        plain, tls = far.tcp_ports[PLAIN], far.tcp_ports[SECURED]
        if scheme == "https" or scheme.endswith("+tls"):
            return secured(scheme, tls) + more.replace("?", "&")
        return f"{scheme}://{LOOPBACK}:{plain}{more}"

    return start


CASES = {
    "danted-socks5": Case(alone(upstreams.danted, "socks5")),
    "danted-socks4": Case(alone(upstreams.danted, "socks4"), NO_UDP),
    "microsocks-socks5h": Case(
        alone(upstreams.microsocks), "UDP ASSOCIATE: not supported", half_close=False
    ),
    "tinyproxy-http": Case(alone(upstreams.tinyproxy), NO_CONNECT_UDP, half_close=False),
    "squid-http": Case(alone(upstreams.squid), NO_CONNECT_UDP, half_close=False),
    # v2ray truncates datagrams of more than 2 KB.
    "v2ray-socks5": Case(
        alone(upstreams.v2ray, "socks", "socks5"), sizes=SIZES[:3], half_close=False
    ),
    "v2ray-socks4a": Case(alone(upstreams.v2ray, "socks", "socks4a"), NO_UDP, half_close=False),
    "v2ray-http": Case(alone(upstreams.v2ray, "http", "http"), NO_CONNECT_UDP, half_close=False),
    "ssh-socks5": Case(alone(upstreams.ssh), CLOSED),
    "haproxy-https": Case(behind_tls("https", HTTP)),
    "haproxy-socks5+tls": Case(behind_tls("socks5+tls", SOCKS5)),
    "pproxy-socks5": Case(alone(upstreams.pproxy, "socks5"), CLOSED, half_close=False),
    "pproxy-http": Case(alone(upstreams.pproxy, "http"), CLOSED, half_close=False),
    "netproxy-socks4": Case(netproxyd_itself("socks4"), NO_UDP),
    "netproxy-socks4a": Case(netproxyd_itself("socks4a"), NO_UDP),
    **{
        f"netproxy-{scheme}": Case(netproxyd_itself(scheme))
        for scheme in ("socks5", "socks5h", "http", "https", "socks5+tls", "socks5h+tls")
    },
    **{
        f"netproxy-{scheme}-uot": Case(netproxyd_itself(scheme, "?udp=uot"))
        for scheme in ("socks4a", "socks5", "http", "https")
    },
    **{
        f"netproxy-{scheme}-none": Case(netproxyd_itself(scheme, "?udp=none"), NO_UDP)
        for scheme in ("socks5", "http")
    },
}


@pytest.fixture(scope="module")
def far(shared_netproxyd: Start) -> Netproxyd:
    """netproxyd as an upstream."""
    return shared_netproxyd(config=FAR.format(host=LOOPBACK, tls=certificates().listener()))


@pytest.fixture(scope="module")
def exchange() -> Iterator[Exchange]:
    with Exchange() as target:
        yield target


@pytest.fixture(scope="module")
def echo() -> Iterator[UdpEcho]:
    with UdpEcho() as server:
        yield server


@pytest.fixture(scope="module", params=CASES)
def running(
    request: pytest.FixtureRequest,
    far: Netproxyd,
    echo: UdpEcho,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """A daemon with the upstream, an sps listener, and a udp listener whose target is `echo`."""
    case, directory = CASES[request.param], tmp_path_factory.mktemp("upstream")
    with Programs(directory) as programs:
        url = case.start(programs, far)
        daemon = Netproxyd(
            directory / "netproxyd.log",
            "-l",
            ANY_PORT,
            "-u",
            url,
            "-l",
            f"udp://{LOOPBACK}:0?target={LOOPBACK}:{echo.address[1]}",
        )
        try:
            yield Running(case, url, daemon)
        finally:
            daemon.finish()


def connect_directly(running: Running, target: Endpoint) -> socket.socket:
    """Return a connection through the upstream alone, without the daemon."""
    if running.url.startswith("http"):
        return http_connect(running.program, target)
    return socks5(running.program, CONNECT, target)[0]


def test_upstream_carries_8_mb_in_both_directions_and_half_close(
    running: Running, exchange: Exchange
) -> None:
    """An upstream without half-close behaves as without the daemon. The record counts the bytes."""
    client, _ = socks5(running.daemon.server, CONNECT, exchange.address)
    answer = exchange.run(client)
    if running.case.half_close:
        assert answer == exchange.answer
    else:
        assert answer == exchange.run(connect_directly(running, exchange.address))
    record = running.daemon.said(f" network=tcp target={LOOPBACK}:{exchange.address[1]} ")[-1]
    assert f" sent={exchange.SIZE} received={exchange.SIZE + len(answer)} " in record
    assert record.endswith(" ended=closed")


def test_upstream_carries_datagrams_of_every_size_or_the_log_says_why_not(
    running: Running, echo: UdpEcho
) -> None:
    if running.case.no_udp:
        _check_refusal(running, echo)
    else:
        _check_datagrams(running, echo)


def _check_datagrams(running: Running, echo: UdpEcho) -> None:
    with Association(running.daemon.server) as client:
        for size in running.case.sizes:
            for _ in range(TIMES):
                assert client.echo(echo.address, os.urandom(size)) == (echo.address, client.bound)
    assert not running.daemon.drops()
    assert not running.daemon.all_lines("udp by ")


def _check_refusal(running: Running, echo: UdpEcho) -> None:
    daemon = running.daemon
    target = f"{LOOPBACK}:{echo.address[1]}"
    before = len(echo.sources)
    if running.case.no_udp == NO_UDP:
        _check_refused_at_once(running)
        fixed = next(port for network, _, port in reversed(daemon.listens) if network == "udp")
        with udp(LOOPBACK) as client:
            _check_dropped(daemon, lambda: client.sendto(b"x", (LOOPBACK, fixed)))
    else:
        with Association(daemon.server) as association:
            _check_dropped(daemon, lambda: association.send(echo.address, b"x"))
    lines = daemon.said("udp by ")
    reason = lines[0].partition(f"udp by {running.hop}: ")[2]
    assert running.hop in reason
    assert re.search(running.case.no_udp.format(target=target), reason), reason
    assert len(echo.sources) == before


def _check_refused_at_once(running: Running) -> None:
    """Check the warning at the start and the reply to ASSOCIATE."""
    with pytest.raises(Refused) as refused:
        Association(running.daemon.server).close()
    assert refused.value.code == COMMAND_NOT_SUPPORTED
    assert running.daemon.lines(
        f": listener 'sps-0' accepts UDP, but its upstream carries none: {running.hop}"
    )


def _check_dropped(daemon: Netproxyd, send: Callable[[], Any]) -> None:
    """Send datagrams, and wait until all of them are counted as dropped."""
    for _ in range(TIMES):
        send()
    drops = daemon.drops
    wait_for(lambda: sum(drops().values()) == TIMES, SECONDS, f"{TIMES} drops: {drops()}")


class ClosingProxy(TcpEcho):
    """A proxy that closes the connection at the first request, after a SOCKS5 greeting."""

    def _serve(self, sock: Any) -> None:
        if sock is self.socket:
            super()._serve(sock)
        elif sock.recv(PIECE) == GREETING:
            sock.sendall(b"\5\0")
        else:
            self._selector.unregister(sock)
            sock.close()


@pytest.mark.parametrize(
    "scheme, asked", [("socks5", "UDP ASSOCIATE"), ("http", "connect-udp to 192.0.2.1:53")]
)
def test_log_names_the_request_at_which_an_upstream_closes_the_connection(
    netproxyd: Start, scheme: str, asked: str
) -> None:
    """ssh -D and pproxy close it. "closed after 0 of 4 bytes" alone would not mention UDP."""
    with ClosingProxy() as proxy:
        hop = f"{scheme}://{LOOPBACK}:{proxy.address[1]}"
        daemon = netproxyd(
            config=f"""
listeners:
- {{listen: '{LOOPBACK}:0', upstream: direct}}
- {{protocol: udp, listen: '{LOOPBACK}:0', target: '192.0.2.1:53', upstream: '{hop}'}}
"""
        )
        with udp(LOOPBACK) as client:
            client.sendto(b"x", (LOOPBACK, daemon.listens[-1][2]))
        line = daemon.said("udp by ")[0]
    assert asked in line
