"""The status page in headless Chromium; skipped if there is none.

What the page shows is read from its document.  The user's name is markup here, as a stranger
could choose it: the page must show it as text.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any, Callable, Iterator
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from netproxy.protocol import socks5
from tests.e2e.conftest import Start
from tests.e2e.support import SECONDS, Netproxyd, environment, wait_for
from tests.support.ports import free_port
from tests.support.sockets import read_exactly, server

pytestmark = pytest.mark.e2e

BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome")
TOKEN = "0123456789abcdef0123"
EVIL = "<img src=x onerror=document.title='pwned'>\u202e\u200b"
SHOWN = EVIL[:-2] + r"\u202e\u200b"
BROWSER_SECONDS = 60
# On the clock of the page: it asks the daemon four times.
VIRTUAL_MILLISECONDS = 9000
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
    """Run the browser; return its output."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("chromium is not installed")

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
    """A daemon with a connection of the user EVIL, a refused login and a refused client.

    Hazard 143: the name also has characters that reverse the text or have no width.
    """
    port = free_port()
    config = (
        f"metrics: 127.0.0.1:{port}\nmetrics_token: {TOKEN}\nstatus_page: true\n"
        "listeners:\n- {listen: '127.0.0.1:0', name: main, auth: optional}\n"
        "- {listen: '127.0.0.1:0', name: shut, network: tcp, clients: 10.0.0.0/8}\n"
        f'users: {{"{EVIL}": {{password: secret}}}}\n'
        "upstreams: {office: 'socks5://127.0.0.1:1'}\n"
    )
    daemon = netproxyd(config=config)
    daemon.page = f"http://127.0.0.1:{port}/"  # type: ignore[attr-defined]

    def script(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            sock.sendall(data)

    with (
        server(script) as target,
        socket.create_connection(daemon.server, SECONDS) as client,
        socket.create_connection(daemon.server, SECONDS) as guesser,
    ):
        for sock, password in ((client, "secret"), (guesser, "wrong")):
            sock.sendall(b"\5\1\2" + socks5.encode_credentials(EVIL, password))
            assert read_exactly(sock, 4) == (b"\5\2\1\0" if password == "secret" else b"\5\2\1\1")
        client.sendall(socks5.encode_request(socks5.CONNECT, target))
        read_exactly(client, 10)
        client.sendall(b"x" * 5000)
        read_exactly(client, 5000)
        with socket.create_connection((daemon.host, daemon.tcp_ports[1]), SECONDS) as stranger:
            assert stranger.recv(1) == b""
        # The parent of workers collects usage now and then; the page's clock does not wait for it.
        wait_for(lambda: usage(daemon) == {"up": 5000, "down": 5000}, SECONDS, "the usage")
        yield daemon


def usage(daemon: Netproxyd) -> Any:
    """Return what the user has moved, as the daemon tells the page."""
    request = Request(
        f"{daemon.page}status.json",  # type: ignore[attr-defined]
        headers={"Authorization": f"Bearer {TOKEN}"},
    )
    with build_opener(ProxyHandler({})).open(request, timeout=SECONDS) as answer:
        return next(row["total"] for row in json.load(answer)["users"] if row["name"] == EVIL)


def text_of(document: str) -> str:
    """Return the text of a document, without scripts and styles."""
    return html.unescape(
        re.sub(r"<[^>]+>", " ", re.sub(r"<(style|script).*?</\1>", "", document, flags=re.S))
    )


def test_page_shows_the_status_and_names_as_text(
    daemon: Netproxyd, browse: Callable[..., str]
) -> None:
    document = browse(f"{daemon.page}#token={TOKEN}", "--dump-dom")  # type: ignore[attr-defined]
    text = text_of(document)
    for shown in (
        "serving",
        "Throughput",
        SHOWN + " at 127.0.0.1:",
        "office",
        "unused",
        "main",
        "10.0 kB",
        "logins refused",
        "Last 24 hours",
        "Clients",
        "Last refusals",
        rf'auth_failed client=127.0.0.1 user="{EVIL[:-2]}\\u202e\\u200b" listener=main',
    ):
        assert shown in text
    assert "<img" not in document and "\u202e" not in document and "\u200b" not in document
    assert "<title>NetProxy</title>" in document
    users = re.search(r'<table id="users".*?</table>', document, re.S)
    assert users and SHOWN in text_of(users[0]) and "10.0 kB" in text_of(users[0])
    [incident] = re.findall(r"client not allowed.* listener=shut .* id=([a-z0-9]+)", daemon.log)
    refusals = re.search(r'<ul id="refusals">.*?</ul>', document, re.S)
    assert refusals and incident in text_of(refusals[0])
    assert re.search(r'<section id="bansShown" hidden="">', document)
    assert re.search(r'id="lineDown"[^>]* d="M', document)
    assert TOKEN not in document
    assert TOKEN not in daemon.log


@pytest.mark.any_workers
def test_page_without_the_token_shows_nothing(
    daemon: Netproxyd, browse: Callable[..., str]
) -> None:
    document = browse(daemon.page, "--dump-dom")  # type: ignore[attr-defined]
    assert re.search(r'<form id="login">', document) and '<div id="shown" hidden="">' in document
    assert "127.0.0.1" not in text_of(document)
    wrong = browse(f"{daemon.page}#token=wrong", "--dump-dom")  # type: ignore[attr-defined]
    assert "That is not the token." in text_of(wrong)
    assert re.search(r'<form id="login">', wrong)
    daemon.said("msg=auth_failed client=127.0.0.1 user=- listener=metrics")
