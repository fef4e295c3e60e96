"""haproxy in front, which says by the PROXY protocol whose connection it brings."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.origin import HELLO, Origin, serving
from tests.e2e.support import LOOPBACK, START_SECONDS, Netproxyd, environment, program, wait_for
from tests.support.ports import free_port

pytestmark = pytest.mark.e2e

WAYS = {
    "socks5h": ("socks5h",),
    "socks4": ("socks4",),
    "http": ("http",),
    "connect": ("http", "-p"),
}
EMPTY_OR_RESET = (52, 56)  # curl
CONFIG = """
defaults
    mode tcp
    timeout connect 5s
    timeout client 20s
    timeout server 20s
frontend before
    bind {here}
    default_backend behind
backend behind
    server netproxyd {there} {header}
"""


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def daemon(shared_netproxyd: Start) -> Netproxyd:
    """A plain listener, which the fixture asks at the end, and one behind haproxy."""
    return shared_netproxyd(
        config=f"listeners: [{{name: plain, listen: '{LOOPBACK}:0'}}, "
        f"{{name: behind, listen: '{LOOPBACK}:0', proxy_protocol: [{LOOPBACK}]}}]\n"
    )


@pytest.fixture(scope="module", params=("send-proxy", "send-proxy-v2"))
def haproxy(
    request: pytest.FixtureRequest, daemon: Netproxyd, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """Its port."""
    path, port = program("haproxy"), free_port()
    directory = tmp_path_factory.mktemp("haproxy")
    config = directory / "haproxy.cfg"
    config.write_text(
        CONFIG.format(
            here=f"{LOOPBACK}:{port}",
            there=f"{LOOPBACK}:{daemon.tcp_ports[1]}",
            header=request.param,
        )
    )
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            (path, "-db", "-f", str(config)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(),
        )
    try:
        wait_for(
            lambda: _listens(process, port, directory / "log"), START_SECONDS, "haproxy listens"
        )
        yield port
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def _listens(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    """Looked up and not tried: a connection would be counted."""
    assert process.poll() is None, log.read_text()
    wanted = f":{port:04X} 00000000:0000 0A "
    return wanted in Path("/proc/net/tcp").read_text()


def curl(proxy: str, *arguments: str) -> tuple[int, str, str]:
    """Exit status, what it wrote, what it complained of."""
    command = (program("curl"), "-q", "-sS", "--noproxy", "", "-m", "20", "-x", proxy, *arguments)
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=30, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_access_record_shows_curls_own_port(
    daemon: Netproxyd, haproxy: int, origin: Origin, tmp_path: Path, way: str
) -> None:
    origin.seen.clear()
    scheme, *more = WAYS[way]
    body = tmp_path / "body"
    status, port, errors = curl(
        f"{scheme}://{LOOPBACK}:{haproxy}",
        *more,
        "-w",
        "%{local_port}",
        "-o",
        str(body),
        origin.url(),
    )
    assert (status, body.read_bytes()) == (0, HELLO), errors
    records = daemon.said(
        f"listener=behind .*client={LOOPBACK}:{int(port)} .*target={LOOPBACK}:{origin.port}"
    )
    assert (len(records), len(origin.seen)) == (1, 1)


def test_without_haproxy_nothing_is_served(daemon: Netproxyd, origin: Origin) -> None:
    origin.seen.clear()
    before = daemon.status().get("connections{bad protocol}", 0)
    status, body, errors = curl(f"http://{LOOPBACK}:{daemon.tcp_ports[1]}", origin.url())
    assert status in EMPTY_OR_RESET and not body, errors
    assert daemon.status()["connections{bad protocol}"] == before + 1
    assert not origin.seen
