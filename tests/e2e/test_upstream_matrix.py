"""Every scheme of an upstream against real programs that speak it: 8 MB both ways, half-close, UDP or why there is none."""

from __future__ import annotations

import os
import re
import socket
from typing import Any, Callable, Iterator, NamedTuple

import pytest

from tests.e2e import upstreams
from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Association, Refused, TcpEcho, UdpEcho, Where, socks5, udp
from tests.e2e.support import ANY_PORT, LOOPBACK, Netproxyd, wait_for
from tests.e2e.upstreams import PIECE, Exchange, Programs, http_connect, secured
from tests.support.certificates import certificates

pytestmark = pytest.mark.e2e

SIZES = (1, 100, 1200, 8000)
TIMES = 20  # datagrams of each size, or for nothing
SECONDS = 5.0
COMMAND_NOT_SUPPORTED = 7  # SOCKS5
NO_CONNECT_UDP = r"connect-udp to {target}: 4\d\d "
NO_UDP = "carries no UDP"
HUNG_UP = "closed "  # the program's only answer
GREETING = b"\5\1\0"  # of a SOCKS5 client without a password
PLAIN, HTTP, SOCKS5, SECURED = range(4)  # ports of NetProxy as an upstream
FAR = """\
listeners:
  - {{listen: "{host}:0", name: plain}}
  - {{listen: "{host}:0", name: http, protocol: http}}
  - {{listen: "{host}:0", name: socks5, protocol: socks5}}
  - {{listen: "{host}:0", name: secured, tls: {tls}}}
"""


class Cell(NamedTuple):
    start: Callable[
        [Programs, Netproxyd], str
    ]  # gives the URL; the daemon is NetProxy as a program among them
    no_udp: str = ""  # a pattern of the reason, where it carries none
    sizes: tuple[int, ...] = SIZES
    half_close: bool = True


class Running(NamedTuple):
    cell: Cell
    url: str
    daemon: Netproxyd  # its way out is the cell's program

    @property
    def hop(self) -> str:
        return self.url.partition("?")[0]

    @property
    def program(self) -> Where:
        return LOOPBACK, int(self.hop.rpartition(":")[2])


def alone(start: Callable[..., str], *arguments: str) -> Callable[[Programs, Netproxyd], str]:
    """For a program that needs no NetProxy behind it."""
    return lambda programs, far: start(programs, *arguments)


def behind_tls(scheme: str, port: int) -> Callable[[Programs, Netproxyd], str]:
    """haproxy before one of the far daemon's ports."""
    return lambda programs, far: upstreams.haproxy(programs, scheme, far.tcp_ports[port])


def ourselves(scheme: str, more: str = "") -> Callable[[Programs, Netproxyd], str]:
    def start(programs: Programs, far: Netproxyd) -> str:
        plain, tls = far.tcp_ports[PLAIN], far.tcp_ports[SECURED]
        if scheme == "https" or scheme.endswith("+tls"):
            return secured(scheme, tls) + more.replace("?", "&")
        return f"{scheme}://{LOOPBACK}:{plain}{more}"

    return start


CELLS = {
    "danted-socks5": Cell(alone(upstreams.danted, "socks5")),
    "danted-socks4": Cell(alone(upstreams.danted, "socks4"), NO_UDP),
    "microsocks-socks5h": Cell(
        alone(upstreams.microsocks), "UDP ASSOCIATE: not supported", half_close=False
    ),
    "tinyproxy-http": Cell(alone(upstreams.tinyproxy), NO_CONNECT_UDP, half_close=False),
    "squid-http": Cell(alone(upstreams.squid), NO_CONNECT_UDP, half_close=False),
    # v2ray cuts datagrams of more than 2 KB, whoever sends them
    "v2ray-socks5": Cell(
        alone(upstreams.v2ray, "socks", "socks5"), sizes=SIZES[:3], half_close=False
    ),
    "v2ray-socks4a": Cell(alone(upstreams.v2ray, "socks", "socks4a"), NO_UDP, half_close=False),
    "v2ray-http": Cell(alone(upstreams.v2ray, "http", "http"), NO_CONNECT_UDP, half_close=False),
    "ssh-socks5": Cell(alone(upstreams.ssh), HUNG_UP),
    "haproxy-https": Cell(behind_tls("https", HTTP)),
    "haproxy-socks5+tls": Cell(behind_tls("socks5+tls", SOCKS5)),
    "pproxy-socks5": Cell(alone(upstreams.pproxy, "socks5"), HUNG_UP, half_close=False),
    "pproxy-http": Cell(alone(upstreams.pproxy, "http"), HUNG_UP, half_close=False),
    "netproxy-socks4": Cell(ourselves("socks4"), NO_UDP),
    "netproxy-socks4a": Cell(ourselves("socks4a"), NO_UDP),
    **{
        f"netproxy-{scheme}": Cell(ourselves(scheme))
        for scheme in ("socks5", "socks5h", "http", "https", "socks5+tls", "socks5h+tls")
    },
    **{
        f"netproxy-{scheme}-uot": Cell(ourselves(scheme, "?udp=uot"))
        for scheme in ("socks4a", "socks5", "http", "https")
    },
    **{
        f"netproxy-{scheme}-none": Cell(ourselves(scheme, "?udp=none"), NO_UDP)
        for scheme in ("socks5", "http")
    },
}


@pytest.fixture(scope="module")
def far(shared_netproxyd: Start) -> Netproxyd:
    """NetProxy as an upstream."""
    return shared_netproxyd(config=FAR.format(host=LOOPBACK, tls=certificates().listener()))


@pytest.fixture(scope="module")
def exchange() -> Iterator[Exchange]:
    with Exchange() as made:
        yield made


@pytest.fixture(scope="module")
def echo() -> Iterator[UdpEcho]:
    with UdpEcho() as made:
        yield made


@pytest.fixture(scope="module", params=CELLS)
def running(
    request: pytest.FixtureRequest,
    far: Netproxyd,
    echo: UdpEcho,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """The program, and a daemon whose only way out it is; besides an sps port it has one that leads to `echo` alone."""
    cell, directory = CELLS[request.param], tmp_path_factory.mktemp("cell")
    with Programs(directory) as programs:
        url = cell.start(programs, far)
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
            yield Running(cell, url, daemon)
        finally:
            daemon.finish()


def drops(daemon: Netproxyd) -> dict[str, int]:
    return {name: value for name, value in daemon.status().items() if name.startswith("drops{")}


def directly(running: Running, target: Where) -> socket.socket:
    """The program without NetProxy."""
    if running.url.startswith("http"):
        return http_connect(running.program, target)
    return socks5(running.program, CONNECT, target)[0]


def test_megabytes_both_ways_at_once_and_the_answer_to_the_clients_end(
    running: Running, exchange: Exchange
) -> None:
    client, _ = socks5(running.daemon.server, CONNECT, exchange.address)
    answer = exchange.run(client)
    if running.cell.half_close:
        assert answer == exchange.answer
    else:
        assert answer == exchange.run(directly(running, exchange.address)), (
            "the program alone does it otherwise"
        )
    record = running.daemon.said(f" network=tcp target={LOOPBACK}:{exchange.address[1]} ")[-1]
    assert f" sent={exchange.SIZE} received={exchange.SIZE + len(answer)} " in record
    assert record.endswith(" ended=closed")


def test_datagrams_of_every_size_come_back_or_the_log_says_why_not(
    running: Running, echo: UdpEcho
) -> None:
    if running.cell.no_udp:
        _check_refusal(running, echo)
    else:
        _check_datagrams(running, echo)


def _check_datagrams(running: Running, echo: UdpEcho) -> None:
    with Association(running.daemon.server) as client:
        for size in running.cell.sizes:
            for _ in range(TIMES):
                assert client.echo(echo.address, os.urandom(size)) == (echo.address, client.bound)
    assert not drops(running.daemon)
    assert not running.daemon.all_lines("^[^ ]+ warning udp by ")


def _check_refusal(running: Running, echo: UdpEcho) -> None:
    daemon = running.daemon
    target = f"{LOOPBACK}:{echo.address[1]}"
    before = len(echo.sources)
    if running.cell.no_udp == NO_UDP:
        _check_refused_at_once(running)
        fixed = next(port for network, _, port in reversed(daemon.listens) if network == "udp")
        with udp(LOOPBACK) as client:
            _send_for_nothing(daemon, lambda: client.sendto(b"x", (LOOPBACK, fixed)))
    else:
        with Association(daemon.server) as association:
            _send_for_nothing(daemon, lambda: association.send(echo.address, b"x"))
    lines = daemon.said(" udp by ")
    assert len(lines) == 1
    reason = lines[0].partition(f" warning udp by {running.hop}: ")[2]
    assert running.hop in reason
    assert re.search(running.cell.no_udp.format(target=target), reason), reason
    assert len(echo.sources) == before


def _check_refused_at_once(running: Running) -> None:
    """What can never be is said at the start and in the reply to ASSOCIATE."""
    with pytest.raises(Refused) as refused:
        Association(running.daemon.server).close()
    assert refused.value.code == COMMAND_NOT_SUPPORTED
    assert running.daemon.lines(
        f" warning listener 'sps-0' accepts UDP, but its upstream carries none: {running.hop}"
    )


def _send_for_nothing(daemon: Netproxyd, send: Callable[[], Any]) -> None:
    """All of them are counted by reason."""
    for _ in range(TIMES):
        send()
    wait_for(
        lambda: sum(drops(daemon).values()) == TIMES, SECONDS, f"{TIMES} drops: {drops(daemon)}"
    )


class HangsUp(TcpEcho):
    """A proxy whose answer to any question is its end; a SOCKS5 client is greeted first."""

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
def test_an_upstream_that_hangs_up_is_blamed_with_what_it_was_asked_for(
    netproxyd: Start, scheme: str, asked: str
) -> None:
    """ssh -D and pproxy do that, and "closed after 0 of 4 bytes" alone says nothing of UDP to who reads the log."""
    with HangsUp() as proxy:
        hop = f"{scheme}://{LOOPBACK}:{proxy.address[1]}"
        daemon = netproxyd(
            config=f"listeners: [{{listen: '{LOOPBACK}:0', upstream: direct}}, "
            f"{{protocol: udp, listen: '{LOOPBACK}:0', target: '192.0.2.1:53', upstream: '{hop}'}}]\n"
        )
        with udp(LOOPBACK) as client:
            client.sendto(b"x", (LOOPBACK, daemon.listens[-1][2]))
        (line,) = daemon.said(" warning udp by ")
    assert asked in line
