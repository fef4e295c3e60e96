"""Programs that meet a limit: each one runs once and checks the reply that its protocol has."""

from __future__ import annotations

import base64
import re
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Callable, NamedTuple

from tests.e2e.browser import Loaded, load
from tests.e2e.peers import CONNECT, Endpoint, Login, Make, Refused, exactly, listen, socks5
from tests.e2e.seccomp import without_batches
from tests.e2e.support import LOOPBACK, ROOT, environment, program

# Nothing listens here, and no refused request comes so far.
TARGET: Endpoint = (LOOPBACK, 9)
NOT_ALLOWED = 2
# Exit statuses of curl and wget.
NO_TUNNEL, CURL_PROXY_ERROR, WGET_NETWORK, WGET_SERVER_ERROR = 56, 97, 4, 8
CURL_NO_ANSWER = (52, 56)


class Reply(NamedTuple):
    """How a limit is told to HTTP clients; SOCKS5 clients get 0x02."""

    status: int
    phrase: str = ""
    text: str = ""


CLOSED = Reply(0)
"""The connection is closed before anything was asked."""


class Proxy(NamedTuple):
    """A port of the daemon, and how a program logs in there."""

    address: Endpoint
    login: Login | None
    enter: Callable[[], None] | None = None
    """Moves a program to the network namespace of the clients."""
    make: Make = socket.socket
    """Creates sockets there."""

    def url(self, scheme: str) -> str:
        """Return the URL for programs."""
        user = f"{':'.join(self.login)}@" if self.login else ""
        return f"{scheme}://{user}{self.address[0]}:{self.address[1]}"


def _run(proxy: Proxy, *command: str) -> tuple[int, str]:
    """Return the exit status, and everything that the program has printed."""
    done = subprocess.run(
        command, capture_output=True, env=environment(), timeout=60, preexec_fn=proxy.enter
    )
    return done.returncode, (done.stdout + done.stderr).decode()


def _curl(proxy: Proxy, scheme: str, *more: str) -> tuple[int, str]:
    url = f"http://{TARGET[0]}:{TARGET[1]}/"
    options = ("-q", "-sS", "-i", "-m", "50", "--noproxy", "", "-x", proxy.url(scheme))
    return _run(proxy, program("curl"), *options, *more, url)


def curl_by_socks5(proxy: Proxy, reply: Reply) -> None:
    """curl says the code of a refusal."""
    status, said = _curl(proxy, "socks5")
    assert status == CURL_PROXY_ERROR, said
    assert ("(2)" in said) == (reply is not CLOSED), said


def curl_by_http(proxy: Proxy, reply: Reply) -> None:
    """curl shows the whole answer."""
    status, said = _curl(proxy, "http")
    if reply is CLOSED:
        assert status in CURL_NO_ANSWER, said
        return
    assert said.startswith(f"HTTP/1.1 {reply.status} {reply.phrase}\r\n")
    # A refusal that has a record has an id; a client has few records of one kind.
    assert re.search(rf"\r\n\r\n{re.escape(reply.text)}( \(id [0-9a-z]{{6}}\))?\n\Z", said)
    assert ("\r\nRetry-After: 5\r\n" in said) == (reply.status == 429)


def curl_by_connect(proxy: Proxy, reply: Reply) -> None:
    """curl names the status of a tunnel that it does not get."""
    status, said = _curl(proxy, "http", "-p")
    if reply is CLOSED:
        assert status in CURL_NO_ANSWER, said
    else:
        assert status == NO_TUNNEL and f"response {reply.status}" in said, said


def _wget(proxy: Proxy, scheme: str) -> tuple[int, str]:
    options = ("-t", "1", "-O", "-", "-e", "use_proxy=yes", "-e")
    setting = f"{scheme}_proxy={proxy.url('http')}"
    return _run(proxy, program("wget"), *options, setting, f"{scheme}://{TARGET[0]}:{TARGET[1]}/")


def wget_by_http(proxy: Proxy, reply: Reply) -> None:
    """wget names the status and its phrase."""
    status, said = _wget(proxy, "http")
    if reply is CLOSED:
        assert status == WGET_NETWORK, said
    else:
        assert status == WGET_SERVER_ERROR, said
        assert f"ERROR {reply.status}: {reply.phrase}." in said


def wget_by_connect(proxy: Proxy, reply: Reply) -> None:
    """wget names the phrase of a tunnel that it does not get."""
    status, said = _wget(proxy, "https")
    assert status == WGET_NETWORK, said
    if reply is not CLOSED:
        assert f"Proxy tunneling failed: {reply.phrase}" in said


def raw_socks5(proxy: Proxy, reply: Reply) -> None:
    """A client written from RFC 1928 gets 0x02."""
    try:
        socks5(proxy.address, CONNECT, TARGET, proxy.login)
    except Refused as refused:
        assert reply is not CLOSED and refused.code == NOT_ALLOWED
    except (EOFError, ConnectionError):
        assert reply is CLOSED
    else:
        raise AssertionError("not refused")


PROGRAMS: tuple[Callable[[Proxy, Reply], None], ...] = (
    curl_by_socks5,
    curl_by_http,
    curl_by_connect,
    wget_by_http,
    wget_by_connect,
    raw_socks5,
)


def ban(control: Path, user: str) -> None:
    """Ban a user with netproxyctl."""
    code = "import sys; from netproxy.cli import control_main; sys.exit(control_main())"
    command = [sys.executable, "-c", code, "-s", str(control), "ban", user]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=60)


def dig_by_socks5(proxy: Proxy, server: Endpoint, directory: Path) -> tuple[int, str]:
    """Run dig under socksify with one try; return its exit status and what +short prints."""
    conf = directory / "socks.conf"
    conf.write_text(f"""
route {{
    from: 0.0.0.0/0 to: 0.0.0.0/0 via: {LOOPBACK} port = {proxy.address[1]}
    proxyprotocol: socks_v5
    command: connect udpassociate
    method: {"username" if proxy.login else "none"}
}}
""")
    user, password = proxy.login or ("", "")
    login = {"SOCKS_USERNAME": user, "SOCKS_PASSWORD": password} if proxy.login else {}
    options = (f"@{server[0]}", "-p", str(server[1]), "a.name.test", "A", "+short")
    done = subprocess.run(
        [program("socksify"), program("dig"), *options, "+tries=1", "+time=1"],
        capture_output=True,
        text=True,
        env=environment(SOCKS_CONF=str(conf), SOCKS_AUTOADD_LANROUTES="no", **login),
        timeout=60,
        preexec_fn=without_batches(),
    )
    return done.returncode, done.stdout.strip()


# -- the browser


class LoginRelay:
    """Puts a login into each request that a browser sends to a proxy.

    A browser asks its user for the login; it has no option for one. What the proxy answers comes
    to the browser unchanged. The relay understands the first request of a connection; a proxy
    that answers it with an error closes the connection.
    """

    def __init__(self, proxy: Proxy) -> None:
        credentials = base64.b64encode(":".join(proxy.login or ()).encode())
        self._field = b"Proxy-Authorization: Basic " + credentials + b"\r\n" if proxy.login else b""
        self._proxy = proxy
        self._server = listen(LOOPBACK)
        self.port: int = self._server.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                thread = threading.Thread(target=self._serve, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError, EOFError), self._proxy.make() as proxy:
            proxy.connect(self._proxy.address)
            line = b""
            while not line.endswith(b"\n"):
                line += exactly(client, 1)
            proxy.sendall(line + self._field)
            back = threading.Thread(target=_copy, args=(proxy, client))
            back.start()
            _copy(client, proxy)
            back.join()

    def __enter__(self) -> LoginRelay:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._server.close()
        for thread in self._threads[1:]:
            thread.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Send what comes from one socket to another, and its end."""
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def browse(browser: str, directory: Path, proxy: Proxy, url: str) -> Loaded:
    """Return what the browser makes of a page that it asks the proxy for."""
    with LoginRelay(proxy) as relay:
        return load(browser, directory, f"http://{LOOPBACK}:{relay.port}", url)
