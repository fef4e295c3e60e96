"""UNIX sockets: netproxyd at one, and upstreams and targets there; curl, several workers, kills."""

from __future__ import annotations

import http.server
import signal
import socketserver
import stat
import subprocess
import threading
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.origin import BIG, Origin, serving
from tests.e2e.support import LOOPBACK, SECONDS, environment, program, run_netproxyd

pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


def config(path: Path, more: str = "") -> str:
    return (
        f"listeners: [{{listen: '{LOOPBACK}:0'}}, "
        f"{{listen: 'unix:{path}', name: local, mode: '0600'{more}}}]\n"
    )


def curl(path: Path, url: str) -> bytes:
    proxy = f"socks5h://localhost{path}"
    command = (program("curl"), "-q", "-sS", "--noproxy", "", "-m", "50", "-x", proxy, url)
    process = subprocess.run(command, capture_output=True, timeout=60, env=environment())
    assert not process.returncode, process.stderr
    return process.stdout


@pytest.mark.parametrize("workers", ["1", "3"])
def test_curl_through_a_path(
    netproxyd: Start, tmp_path: Path, origin: Origin, workers: str
) -> None:
    path = tmp_path / "proxy.sock"
    daemon = netproxyd("-w", workers, config=config(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for _ in range(4):
        assert curl(path, origin.url("/big")) == BIG
    daemon.said("listener=local client=unix: .*ended=closed", 4)
    daemon.reload()
    assert curl(path, origin.url("/big")) == BIG
    daemon.signal(signal.SIGTERM)
    assert daemon.wait(SECONDS) == 0
    assert not path.exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_file_of_a_killed_daemon_is_replaced(
    netproxyd: Start, tmp_path: Path, origin: Origin, workers: str
) -> None:
    path = tmp_path / "proxy.sock"
    first = netproxyd("-w", workers, config=config(path))
    # Workers end with their parent.
    processes = first.processes()
    first.kill()
    for pid in processes[1:]:
        while Path(f"/proc/{pid}").exists():
            pass
    assert path.exists()
    netproxyd("-w", workers, config=config(path))
    assert curl(path, origin.url("/big")) == BIG


@pytest.mark.parametrize("workers", ["1", "2"])
def test_socket_of_a_running_daemon_is_an_error(
    netproxyd: Start, tmp_path: Path, origin: Origin, workers: str
) -> None:
    path, second = tmp_path / "proxy.sock", tmp_path / "second.yaml"
    netproxyd("-w", workers, config=config(path))
    second.write_text(config(path))
    status, output = run_netproxyd("-w", workers, "-c", str(second))
    assert status == 69
    assert f"cannot listen on tcp unix:{path}: Address already in use" in output
    assert curl(path, origin.url("/big")) == BIG


class _AtPath(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """An HTTP server at a UNIX socket."""

    daemon_threads = True


class _Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


def test_curl_through_upstreams_and_a_target_at_paths(
    netproxyd: Start, tmp_path: Path, origin: Origin
) -> None:
    proxy, app, gone = (tmp_path / name for name in ("proxy.sock", "app.sock", "gone.sock"))
    back = netproxyd(config=config(proxy))
    upstreams = "upstreams: {a: 'socks5h://unix:%s', b: 'http://unix:%s'}\n" % (proxy, proxy)
    # The first one, by which the daemon is checked in the end, needs no other daemon.
    ports = [f"{{listen: '{LOOPBACK}:0'}}"]
    ports += [f"{{listen: '{LOOPBACK}:0', upstream: {name}, name: {name}}}" for name in "ab"]
    ports += [
        f"{{protocol: tcp, listen: '{LOOPBACK}:0', target: 'unix:{path}', name: '{path.stem}'}}"
        for path in (app, gone)
    ]
    front = netproxyd("-w", "2", config=f"{upstreams}listeners: [{', '.join(ports)}]\n")
    command = [program("curl"), "-q", "-sS", "--noproxy", "", "-m", "50"]

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*command, *arguments], capture_output=True, timeout=60, env=environment()
        )

    _, first, second, to_app, to_nothing = front.tcp_ports
    for port in (first, second):
        for scheme in ("socks5h", "http"):
            url = origin.url("/big")
            assert run("-x", f"{scheme}://{LOOPBACK}:{port}", url).stdout == BIG
    back.said("listener=local client=unix: .*ended=(closed|done)", 4)
    with _AtPath(str(app), _Hello) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        assert run(f"http://{LOOPBACK}:{to_app}/").stdout == b"hello"
        server.shutdown()
        thread.join()
    front.said(f"target=unix:{app} .*ended=closed")
    assert run(f"http://{LOOPBACK}:{to_nothing}/").returncode
    front.said(f'ended="unix:{gone}: there is no such socket')
