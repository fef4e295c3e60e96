"""Failed logins with curl: their delay and their penalty are those of one client address."""

from __future__ import annotations

import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e.browser import find_browser
from tests.e2e.conftest import Start
from tests.e2e.limit_clients import Proxy, Reply, browse, wget_by_connect, wget_by_http
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.origin import serving
from tests.e2e.support import LOOPBACK, SECONDS, environment, program, wait_for
from tests.e2e.test_curl import Curl

pytestmark = pytest.mark.e2e

BOX, GUESSER, GOOD = "10.78.1.1", "10.78.1.2", "10.78.1.3"
USERS = "users: {alice: {password: secret}, bob: {password: secret}}\n"
ALICE, BOB, WRONG = "alice:secret", "bob:secret", "bob:wrong"
GUESSES = 12


@pytest.fixture
def curl(tmp_path: Path) -> Curl:
    return Curl(tmp_path)


def test_wrong_logins_of_one_loopback_address_keep_no_other_one_out(
    curl: Curl, netproxyd: Start
) -> None:
    """Hazard 110."""
    config = f"{USERS}listeners: [{{listen: '{LOOPBACK}:0', auth: required}}]"
    daemon = netproxyd(config=config, login=("alice", "secret"))
    command = (program("curl"), "-q", "-sS", "--noproxy", "", "-m", "50")
    proxy = ("--interface", "127.0.0.2", "-x", daemon.url("socks5", WRONG), "http://192.0.2.1/")
    guesses = [
        subprocess.Popen([*command, *proxy], stderr=subprocess.PIPE, env=environment())
        for _ in range(GUESSES)
    ]
    with serving() as origin:
        daemon.said("auth_failed client=127.0.0.2")
        good = ("--interface", "127.0.0.3")
        for protocol in ("socks5", "http", "connect"):
            result = curl(daemon, protocol, origin.url(), *good, login=ALICE)
            assert result.code == 200, result.errors
    for guess in guesses:
        assert guess.communicate(timeout=60)[1]
        assert guess.returncode == 97  # the proxy has refused the login
    daemon.said("auth_failed client=127.0.0.2", times=GUESSES)
    assert not daemon.lines("reason=penalty")


@pytest.fixture
def net() -> Iterator[tuple[Namespace, Namespace]]:
    with hosts("guesser", "box") as (client, box):
        connect(client, [f"{GUESSER}/24", f"{GOOD}/24"], box, [f"{BOX}/24"])
        yield client, box


def test_curl_meets_the_penalty_of_its_address_and_no_other(
    net: tuple[Namespace, Namespace], curl: Curl, netproxyd: Start
) -> None:
    """Hazard 110."""
    client, box = net
    config = f"""
{USERS}
listeners: [{{listen: '{BOX}:1080', auth: required, clients: [10.78.1.0/24]}}]
penalty: {{after: 2, for: 5m}}
upstreams: {{nowhere: block}}
rules: [{{domain: a.example, via: nowhere}}]
"""
    daemon = netproxyd(
        config=config, host=BOX, login=("alice", "secret"), make=box.socket, preexec_fn=box.enter
    )

    def status(source: str, login: str) -> int:
        arguments = ("http://a.example/", "--interface", source)
        return curl(daemon, "http", *arguments, login=login, preexec_fn=client.enter).code

    # The rule refuses with 403 what has logged in.
    assert status(GOOD, ALICE) == 403
    assert [status(GUESSER, WRONG) for _ in range(3)] == [407, 407, 429]
    assert status(GUESSER, BOB) == 429
    assert status(GUESSER, ALICE) == 403
    assert status(GOOD, BOB) == 403
    assert status(GUESSER, BOB) == 403  # bob has logged in since
    assert status(GUESSER, WRONG) == 429
    assert status(GUESSER, BOB) == 429  # somebody has guessed at bob's password
    result = curl(
        daemon,
        "socks5h",
        "http://a.example/",
        "--interface",
        GUESSER,
        login=BOB,
        preexec_fn=client.enter,
    )
    assert result.status == 97, result.errors
    wait_for(lambda: len(daemon.lines("reason=penalty")) == 5, SECONDS, "all records")
    assert len(daemon.lines("auth_failed")) == 2


def test_wget_and_a_browser_meet_the_penalty(
    net: tuple[Namespace, Namespace], netproxyd: Start, tmp_path: Path
) -> None:
    client, box = net
    listener = f"listen: '{BOX}:1080', auth: required, clients: [10.78.1.0/24]"
    daemon = netproxyd(
        config=f"{USERS}\nlisteners: [{{{listener}}}]\npenalty: {{after: 2, for: 5m}}",
        host=BOX,
        login=("alice", "secret"),
        make=box.socket,
        preexec_fn=box.enter,
    )
    proxy = Proxy(daemon.server, ("bob", "wrong"), client.enter, client.socket)
    wget_by_http(proxy, Reply(407, "Proxy Authentication Required"))
    wget_by_connect(proxy, Reply(407, "Proxy Authentication Required"))
    daemon.said("auth_failed", times=2)
    wget_by_http(proxy, Reply(429, "Too Many Requests"))
    wget_by_connect(proxy, Reply(429, "Too Many Requests"))
    shown = browse(find_browser(), tmp_path, proxy, "http://a.example/")
    assert ">too many failed logins from this address\n</pre>" in shown.dom, shown.dom
    assert '"Retry-After: ' in shown.net_log
    daemon.counted("authentication{penalty}", 3)
    daemon.said(f"msg=refused reason=penalty .*client={GUESSER} ", times=3)


def test_reload_ends_the_download_of_a_removed_user(
    curl: Curl, netproxyd: Start, tmp_path: Path
) -> None:
    listeners = f"listeners: [{{listen: '{LOOPBACK}:0', auth: required}}]\nend_on_removal: true\n"
    daemon = netproxyd(config=USERS + listeners, login=("alice", "secret"))
    with socket.create_server((LOOPBACK, 0)) as origin, ThreadPoolExecutor(1) as pool:
        url = f"http://{LOOPBACK}:{origin.getsockname()[1]}/"
        download = pool.submit(curl, daemon, "socks5", url, login=BOB)
        server, _ = origin.accept()
        with server:
            server.settimeout(SECONDS)
            assert server.recv(4096).startswith(b"GET /")
            server.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
            users = "users: {alice: {password: secret}}\n"
            (tmp_path / "netproxyd1.yaml").write_text(users + listeners)
            daemon.reload()
            assert server.recv(1) == b""
        assert download.result().status == 18  # a part of the file
    daemon.said('user=bob .*ended="?user removed')
    daemon.said("flows=1 connections=1")
