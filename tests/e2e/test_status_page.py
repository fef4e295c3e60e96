"""The status page in Chromium, without a head; skipped where there is none.  What it shows is read from its document.

Names that strangers choose are markup here: the page must show them and not become them.
"""

from __future__ import annotations

import html
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Callable, Iterator

import pytest

from netproxy.protocol import socks5
from tests.e2e.conftest import Start
from tests.e2e.support import Netproxyd, environment, free_port
from tests.support.sockets import SECONDS, read_exactly, server

pytestmark = pytest.mark.e2e

BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome")
TOKEN = "0123456789abcdef0123"
EVIL = "<img src=x onerror=document.title='pwned'>"
BROWSER_SECONDS = 60
VIRTUAL_MILLISECONDS = 9000  # of the page's own clock: four looks at the daemon
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    f"--virtual-time-budget={VIRTUAL_MILLISECONDS}",
)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium")

    def run(url: str, *flags: str) -> str:
        done = subprocess.run(
            [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, url],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=BROWSER_SECONDS,
        )
        return done.stdout

    return run


@pytest.fixture
def daemon(netproxyd: Start) -> Iterator[Netproxyd]:
    port = free_port()
    config = (
        f"metrics: 127.0.0.1:{port}\nmetrics_token: {TOKEN}\nstatus_page: true\n"
        "listeners: [{listen: '127.0.0.1:0', name: main, auth: optional}]\n"
        f"users: {{\"{EVIL}\": {{password: secret}}}}\nupstreams: {{office: 'socks5://127.0.0.1:1'}}\n"
    )
    one = netproxyd(config=config)
    one.page = f"http://127.0.0.1:{port}/"  # type: ignore[attr-defined]

    def script(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            sock.sendall(data)

    with (
        server(script) as target,
        socket.create_connection(one.server, SECONDS) as client,
        socket.create_connection(one.server, SECONDS) as guesser,
    ):
        for sock, password in ((client, "secret"), (guesser, "wrong")):
            sock.sendall(b"\5\1\2" + socks5.encode_credentials(EVIL, password))
            assert read_exactly(sock, 4) == (b"\5\2\1\0" if password == "secret" else b"\5\2\1\1")
        client.sendall(socks5.encode_request(socks5.CONNECT, target))
        read_exactly(client, 10)
        client.sendall(b"x" * 5000)
        read_exactly(client, 5000)
        yield one


def text_of(document: str) -> str:
    return html.unescape(
        re.sub(r"<[^>]+>", " ", re.sub(r"<(style|script).*?</\1>", "", document, flags=re.S))
    )


def test_shows_what_goes_on_and_no_name_becomes_markup(
    daemon: Netproxyd, browse: Callable[..., str]
) -> None:
    document = browse(f"{daemon.page}#token={TOKEN}", "--dump-dom")  # type: ignore[attr-defined]
    text = text_of(document)
    for shown in (
        "serving",
        "Throughput",
        EVIL + " at 127.0.0.1:",
        "office",
        "unused",
        "main",
        "10.0 kB",
        "logins refused",
        f'auth_failed client=127.0.0.1 user="{EVIL}" listener=main',
    ):
        assert shown in text
    assert "<img" not in document
    assert "<title>NetProxy</title>" in document
    assert re.search(r'id="lineDown"[^>]* d="M', document)
    assert TOKEN not in document
    assert TOKEN not in daemon.log


def test_without_the_token_it_only_asks_for_it(
    daemon: Netproxyd, browse: Callable[..., str]
) -> None:
    document = browse(daemon.page, "--dump-dom")  # type: ignore[attr-defined]
    assert re.search(r'<form id="login">', document) and '<div id="shown" hidden="">' in document
    assert "127.0.0.1" not in text_of(document)
    wrong = browse(f"{daemon.page}#token=wrong", "--dump-dom")  # type: ignore[attr-defined]
    assert "That is not the token." in text_of(wrong)
    assert re.search(r'<form id="login">', wrong)
    assert daemon.lines("msg=auth_failed client=127.0.0.1 user=- listener=metrics")
