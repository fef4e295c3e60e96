"""curl through netproxyd, by every proxy protocol that curl speaks."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.origin import BIG, HELLO, Origin, serving
from tests.e2e.support import ANY_PORT, LOOPBACK, ROOT, Netproxyd, environment, program
from tests.support.ports import free_port

pytestmark = pytest.mark.e2e

USERS = f"""
listeners: [{{protocol: sps, listen: "{LOOPBACK}:0"}}]
users:
  alice: {{password: open sesame}}
  bob: {{password: "%s"}}
"""
ALICE, WRONG, UNKNOWN = "alice:open%20sesame", "alice:open", "mallory:open%20sesame"
# Exit statuses of curl.
NO_TUNNEL, PROXY_ERROR = 56, 97
# The option that names the proxy, the scheme of its URL, and more options.
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "socks4": ("-x", "socks4"),
    "socks4a": ("-x", "socks4a"),
    "socks5": ("-x", "socks5"),
    "socks5h": ("-x", "socks5h"),
    "http": ("-x", "http"),
    "connect": ("-x", "http", "-p"),
    "connect-1.0": ("--proxy1.0", "http", "-p"),
}
SOCKS5_AND_HTTP = ("socks5", "socks5h", "http", "connect")
WRONG_LOGINS = ("", WRONG, UNKNOWN, "bob:wrong")
UPLOAD = BIG[:5_000_000]


class Result(NamedTuple):
    """What curl did."""

    status: int
    """Exit status."""
    body: bytes
    """Body of the last transfer."""
    transfers: list[dict[str, Any]]
    """What -w %{json} prints for each transfer."""
    errors: str

    @property
    def code(self) -> int:
        """The HTTP status of the last transfer."""
        return self.transfers[-1]["http_code"]


class Curl:
    """Runs curl through a daemon."""

    def __init__(self, directory: Path) -> None:
        self._path = program("curl")
        self._body = directory / "body"

    def __call__(
        self, daemon: Netproxyd, protocol: str, *arguments: str, login: str = "", **run: Any
    ) -> Result:
        self._body.unlink(missing_ok=True)
        words: list[str] = []
        for argument in arguments:
            words += (argument,)
            if argument.startswith("http://"):
                words += ("-o", str(self._body))
        process = subprocess.run(
            [self._path, "-q", *_options(daemon, protocol, login), *words],
            capture_output=True,
            env=environment(),
            timeout=60,
            **run,
        )
        transfers = [json.loads(line) for line in process.stdout.splitlines()]
        body = self._body.read_bytes() if self._body.exists() else b""
        return Result(process.returncode, body, transfers, process.stderr.decode())


def _options(daemon: Netproxyd, protocol: str, login: str = "") -> list[str]:
    """Return the options of one transfer, which --next resets."""
    option, scheme, *more = PROTOCOLS[protocol]
    general = ("-sS", "--noproxy", "", "-m", "50", "-w", "%{json}\n")
    return [*general, option, daemon.url(scheme, login), *more]


@pytest.fixture
def curl(tmp_path: Path) -> Curl:
    return Curl(tmp_path)


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def forget(origin: Origin) -> None:
    origin.seen.clear()


@pytest.fixture(scope="module")
def open_daemon(shared_netproxyd: Start) -> Netproxyd:
    """A daemon without users."""
    return shared_netproxyd("-l", ANY_PORT)


@pytest.fixture(scope="module")
def users_daemon(shared_netproxyd: Start) -> Netproxyd:
    """A daemon with two users: alice, whose password is plain text, and bob, who has a hash."""
    return shared_netproxyd(config=USERS % _hash("builder"), login=("alice", "open sesame"))


def _hash(password: str) -> str:
    """Return the output of `netproxyctl hash-password`."""
    code = "import sys; from netproxy.cli import control_main; sys.exit(control_main())"
    command = [sys.executable, "-c", code, "hash-password"]
    process = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        input=password + "\n",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return process.stdout.strip()


# -- without users


@pytest.mark.parametrize("host", (LOOPBACK, "localhost"))
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_curl_gets_a_page(
    curl: Curl, open_daemon: Netproxyd, origin: Origin, protocol: str, host: str
) -> None:
    result = curl(open_daemon, protocol, origin.url(host=host))
    assert (result.status, result.code, result.body) == (0, 200, HELLO), result.errors
    assert ("via" in origin.seen[0].fields) == (protocol == "http")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_curl_with_a_login_is_served_by_a_daemon_without_users(
    curl: Curl, open_daemon: Netproxyd, origin: Origin, protocol: str
) -> None:
    result = curl(open_daemon, protocol, origin.url(), login=ALICE)
    assert (result.status, result.body) == (0, HELLO), result.errors
    assert "proxy-authorization" not in origin.seen[0].fields


@pytest.mark.parametrize("protocol", ("socks5h", "http", "connect"))
def test_curl_reuses_a_connection_for_two_requests(
    curl: Curl, open_daemon: Netproxyd, origin: Origin, protocol: str
) -> None:
    result = curl(open_daemon, protocol, origin.url("/hello?1"), origin.url("/hello?2"))
    assert (result.status, result.body) == (0, HELLO), result.errors
    assert [transfer["num_connects"] for transfer in result.transfers] == [1, 0]
    assert [seen.path for seen in origin.seen] == ["/hello?1", "/hello?2"]
    # The connection to the origin is reused as well.
    assert origin.seen[0].port == origin.seen[1].port


@pytest.mark.parametrize("protocol", ("socks4", "socks5", "http", "connect"))
def test_curl_downloads_20_mb(
    curl: Curl, open_daemon: Netproxyd, origin: Origin, protocol: str
) -> None:
    result = curl(open_daemon, protocol, origin.url("/big"))
    assert (result.status, result.code) == (0, 200), result.errors
    assert result.body == BIG


@pytest.mark.parametrize("protocol", ("socks5h", "http", "connect"))
@pytest.mark.parametrize(
    "options",
    (
        pytest.param(("-T", "-"), id="put-chunked"),
        pytest.param(
            ("-H", "Transfer-Encoding: chunked", "--data-binary", "@-"), id="post-chunked"
        ),
        pytest.param(("--data-binary", "@-"), id="post-length"),
        pytest.param(("-H", "Expect:", "-T", "-"), id="no-expect"),
    ),
)
def test_curl_uploads_5_mb(
    curl: Curl, open_daemon: Netproxyd, origin: Origin, protocol: str, options: tuple[str, ...]
) -> None:
    result = curl(open_daemon, protocol, *options, origin.url("/upload"), input=UPLOAD)
    assert (result.status, result.code) == (0, 200), result.errors
    assert result.body == hashlib.sha256(UPLOAD).hexdigest().encode()
    assert origin.seen[0].body == UPLOAD


@pytest.mark.parametrize("protocol", ("http", "connect", "socks5"))
def test_curl_downloads_after_an_upload_on_one_connection(
    curl: Curl, open_daemon: Netproxyd, origin: Origin, protocol: str
) -> None:
    result = curl(
        open_daemon,
        protocol,
        "-d",
        "a small body",
        origin.url("/1"),
        "--next",
        *_options(open_daemon, protocol),
        origin.url("/2"),
    )
    assert result.status == 0, result.errors
    assert [(seen.method, seen.path, seen.body) for seen in origin.seen] == [
        ("POST", "/1", b"a small body"),
        ("GET", "/2", b""),
    ]


@pytest.mark.parametrize(
    "protocol, path",
    (("http", "/hello"), ("connect", "/hello"), ("socks5", "/hello"), ("http", "/chunked")),
)
def test_curl_with_http_1_0_gets_a_page_without_chunks(
    curl: Curl, open_daemon: Netproxyd, origin: Origin, protocol: str, path: str
) -> None:
    result = curl(open_daemon, protocol, "--http1.0", origin.url(path))
    assert (result.status, result.code, result.body) == (0, 200, HELLO), result.errors


@pytest.mark.parametrize("protocol", ("http", "connect", "socks5"))
def test_curl_sends_two_head_requests_on_one_connection(
    curl: Curl, open_daemon: Netproxyd, origin: Origin, protocol: str
) -> None:
    result = curl(open_daemon, protocol, "-I", origin.url("/big"), origin.url("/big"))
    assert (result.status, result.code) == (0, 200), result.errors
    assert [transfer["num_connects"] for transfer in result.transfers] == [1, 0]
    assert f"content-length: {len(BIG)}" in result.body.decode().lower()
    assert [seen.method for seen in origin.seen] == ["HEAD", "HEAD"]


@pytest.mark.parametrize(
    "protocol, status, code",
    (
        ("socks4", PROXY_ERROR, 0),
        ("socks4a", PROXY_ERROR, 0),
        ("socks5", PROXY_ERROR, 0),
        ("socks5h", PROXY_ERROR, 0),
        ("http", 0, 502),
        ("connect", NO_TUNNEL, 502),
    ),
)
def test_curl_is_told_that_a_port_refuses(
    curl: Curl, open_daemon: Netproxyd, protocol: str, status: int, code: int
) -> None:
    result = curl(open_daemon, protocol, f"http://{LOOPBACK}:{free_port()}/")
    assert result.status == status, result.errors
    assert (result.transfers[0]["http_connect"] if protocol == "connect" else result.code) == code


@pytest.mark.parametrize("protocol", ("socks5h", "http", "connect"))
def test_curl_is_told_that_a_name_does_not_exist(
    curl: Curl, open_daemon: Netproxyd, protocol: str
) -> None:
    result = curl(open_daemon, protocol, "http://no-such-host.invalid/")
    assert result.status == {"socks5h": PROXY_ERROR, "http": 0, "connect": NO_TUNNEL}[protocol], (
        result.errors
    )
    assert (result.transfers[0]["http_connect"] if protocol == "connect" else result.code) in (
        0,
        502,
        504,
    )


def test_curl_makes_ten_transfers_at_once(
    curl: Curl, open_daemon: Netproxyd, origin: Origin
) -> None:
    result = curl(
        open_daemon,
        "http",
        "-Z",
        "--parallel-max",
        "10",
        "--parallel-immediate",
        *(origin.url(f"/hello?{number}") for number in range(10)),
    )
    assert result.status == 0, result.errors
    assert [transfer["http_code"] for transfer in result.transfers] == [200] * 10
    assert len({seen.path for seen in origin.seen}) == 10


# -- with users


@pytest.mark.parametrize("protocol", SOCKS5_AND_HTTP)
@pytest.mark.parametrize("login", (ALICE, "bob:builder"))
def test_curl_with_the_right_password_is_served(
    curl: Curl, users_daemon: Netproxyd, origin: Origin, protocol: str, login: str
) -> None:
    result = curl(users_daemon, protocol, origin.url(), login=login)
    assert (result.status, result.code, result.body) == (0, 200, HELLO), result.errors
    assert "proxy-authorization" not in origin.seen[0].fields
    users_daemon.said(f" user={login.split(':')[0]} .*target={LOOPBACK}:{origin.port}")


@pytest.mark.parametrize("protocol", SOCKS5_AND_HTTP)
@pytest.mark.parametrize("login", WRONG_LOGINS)
def test_curl_with_a_wrong_password_or_none_is_refused(
    curl: Curl, users_daemon: Netproxyd, origin: Origin, protocol: str, login: str
) -> None:
    # Each case has an address of its own: the delay of a refusal grows with each wrong login.
    number = 4 * WRONG_LOGINS.index(login) + SOCKS5_AND_HTTP.index(protocol)
    source = f"127.0.1.{number + 1}"
    result = curl(users_daemon, protocol, origin.url(), "--interface", source, login=login)
    assert result.status == {"http": 0, "connect": NO_TUNNEL}.get(protocol, PROXY_ERROR), (
        result.errors
    )
    if not protocol.startswith("socks"):
        assert (
            result.transfers[0]["http_connect"] if protocol == "connect" else result.code
        ) == 407
    assert not origin.seen


@pytest.mark.parametrize("protocol", ("socks4", "socks4a"))
@pytest.mark.parametrize("login", ("", "alice"))
def test_curl_with_socks4_is_refused_where_users_are_required(
    curl: Curl, users_daemon: Netproxyd, origin: Origin, protocol: str, login: str
) -> None:
    result = curl(users_daemon, protocol, origin.url(), login=login)
    assert result.status == PROXY_ERROR, result.errors
    assert not origin.seen


def test_log_contains_no_password(curl: Curl, users_daemon: Netproxyd, origin: Origin) -> None:
    curl(users_daemon, "http", origin.url(), login="alice:Tr0ub4dor")
    assert not users_daemon.all_lines("Tr0ub4dor|sesame")
