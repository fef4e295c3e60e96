"""haproxy in front of netproxyd and behind it, with the client's address in a PROXY header."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.origin import HELLO, Origin, serving
from tests.e2e.support import LOOPBACK, Netproxyd, environment, program
from tests.e2e.upstreams import Programs
from tests.support.ports import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]

PROTOCOLS = {
    "socks5h": ("socks5h",),
    "socks4": ("socks4",),
    "http": ("http",),
    "connect": ("http", "-p"),
}
# Exit statuses of curl for an empty reply and for a reset.
EMPTY_OR_RESET = (52, 56)
CONFIG = """
defaults
    mode tcp
    timeout connect 5s
    timeout client 20s
    timeout server 20s
frontend before
    bind {listen}
    default_backend behind
backend behind
    server netproxyd {target} {header}
"""


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def daemon(shared_netproxyd: Start) -> Netproxyd:
    """A daemon with a plain listener, which the fixture checks, and one behind haproxy."""
    return shared_netproxyd(
        config=f"listeners: [{{name: plain, listen: '{LOOPBACK}:0'}}, "
        f"{{name: behind, listen: '{LOOPBACK}:0', proxy_protocol: [{LOOPBACK}]}}]\n"
    )


@pytest.fixture(scope="module", params=("send-proxy", "send-proxy-v2"))
def haproxy(
    request: pytest.FixtureRequest, daemon: Netproxyd, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """The port of a haproxy in front of the daemon's second listener."""
    path, port = program("haproxy"), free_port()
    text = CONFIG.format(
        listen=f"{LOOPBACK}:{port}",
        target=f"{LOOPBACK}:{daemon.tcp_ports[1]}",
        header=request.param,
    )
    with Programs(tmp_path_factory.mktemp("haproxy")) as programs:
        config = programs.write("haproxy.cfg", text)
        programs.start(port, path, "-db", "-f", config, required=True)
        yield port


def curl(proxy: str, *arguments: str) -> tuple[int, str, str]:
    """Run curl. Return its exit status, output and errors."""
    command = (program("curl"), "-q", "-sS", "--noproxy", "", "-m", "50", "-x", proxy, *arguments)
    process = subprocess.run(command, capture_output=True, env=environment(), timeout=60, text=True)
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_access_record_behind_haproxy_shows_the_clients_own_port(
    daemon: Netproxyd, haproxy: int, origin: Origin, tmp_path: Path, protocol: str
) -> None:
    origin.seen.clear()
    scheme, *more = PROTOCOLS[protocol]
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


def test_client_without_a_proxy_header_is_refused(daemon: Netproxyd, origin: Origin) -> None:
    origin.seen.clear()
    before = daemon.status().get("connections{bad protocol}", 0)
    status, body, errors = curl(f"http://{LOOPBACK}:{daemon.tcp_ports[1]}", origin.url())
    assert status in EMPTY_OR_RESET and not body, errors
    assert daemon.counted("connections{bad protocol}", before + 1) == before + 1
    assert not origin.seen


BEHIND = """
defaults
    mode http
    timeout connect 5s
    timeout client 20s
    timeout server 20s
frontend behind
    bind {listen} accept-proxy
    http-request return status 200 content-type text/plain lf-string "{fields}"
"""


@pytest.mark.parametrize("version", ("v1", "v2"))
def test_haproxy_behind_a_tcp_listener_reads_the_clients_address(
    netproxyd: Start, tmp_path: Path, version: str
) -> None:
    path, port = program("haproxy"), free_port()
    with Programs(tmp_path) as programs:
        config = programs.write(
            "haproxy.cfg",
            BEHIND.format(listen=f"{LOOPBACK}:{port}", fields="%[src] %[src_port] %[dst_port]"),
        )
        programs.start(port, path, "-db", "-f", config, required=True)
        daemon = netproxyd(
            config=f"listeners: [{{listen: '{LOOPBACK}:0'}}, "
            f"{{protocol: tcp, listen: '{LOOPBACK}:0', "
            f"target: '{LOOPBACK}:{port}', send_proxy: {version}}}]\n"
        )
        url = f"http://{LOOPBACK}:{daemon.tcp_ports[1]}/"
        command = (program("curl"), "-q", "-sS", "--noproxy", "*", "-m", "50", url)
        process = subprocess.run(
            (*command, "-w", " %{local_port}"), capture_output=True, timeout=60, text=True
        )
    source, source_port, port_dialled, local_port = process.stdout.split()
    assert (source, source_port) == (LOOPBACK, local_port)
    assert int(port_dialled) == daemon.tcp_ports[1]
