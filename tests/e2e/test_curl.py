"""curl through the one port, by every protocol it speaks."""

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
from tests.e2e.support import ANY_PORT, LOOPBACK, ROOT, Netproxyd, environment, free_port, program

pytestmark = pytest.mark.e2e

USERS = f"""
listeners: [{{protocol: sps, listen: "{LOOPBACK}:0"}}]
users:
  alice: {{password: open sesame}}
  bob: {{password: "%s"}}
"""
ALICE, WRONG, UNKNOWN = "alice:open%20sesame", "alice:open", "mallory:open%20sesame"
NO_TUNNEL, PROXY_SAYS_NO = 56, 97  # exit statuses of curl
# the option that names the proxy, the scheme curl wants, and more options
WAYS: dict[str, tuple[str, ...]] = {
    "socks4": ("-x", "socks4"),
    "socks4a": ("-x", "socks4a"),
    "socks5": ("-x", "socks5"),
    "socks5h": ("-x", "socks5h"),
    "http": ("-x", "http"),
    "connect": ("-x", "http", "-p"),
    "connect-1.0": ("--proxy1.0", "http", "-p"),
}
SOCKS5_AND_HTTP = ("socks5", "socks5h", "http", "connect")
UPLOAD = BIG[:5_000_000]


class Result(NamedTuple):
    status: int  # of curl
    body: bytes  # of the last transfer
    transfers: list[dict[str, Any]]  # what -w %{json} says of each
    errors: str

    @property
    def code(self) -> int:
        return self.transfers[-1]["http_code"]


class Curl:
    def __init__(self, directory: Path) -> None:
        self._path = program("curl")
        self._body = directory / "body"

    def __call__(
        self, daemon: Netproxyd, way: str, *arguments: str, login: str = "", **run: Any
    ) -> Result:
        self._body.unlink(missing_ok=True)
        asked = [
            part
            for argument in arguments
            for part in (
                (argument, "-o", str(self._body)) if argument.startswith("http://") else (argument,)
            )
        ]
        done = subprocess.run(
            [self._path, "-q", *_options(daemon, way, login), *asked],
            capture_output=True,
            env=environment(),
            timeout=30,
            **run,
        )
        transfers = [json.loads(line) for line in done.stdout.splitlines()]
        body = self._body.read_bytes() if self._body.exists() else b""
        return Result(done.returncode, body, transfers, done.stderr.decode())


def _options(daemon: Netproxyd, way: str, login: str = "") -> list[str]:
    """Those that hold for one transfer, up to --next."""
    option, scheme, *more = WAYS[way]
    return [
        "-sS",
        "--noproxy",
        "",
        "-m",
        "20",
        "-w",
        "%{json}\n",
        option,
        daemon.url(scheme, login),
        *more,
    ]


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
def everybody(shared_netproxyd: Start) -> Netproxyd:
    """Lets everybody in."""
    return shared_netproxyd("-l", ANY_PORT)


@pytest.fixture(scope="module")
def users_only(shared_netproxyd: Start) -> Netproxyd:
    """Lets alice in, whose password is plain text, and bob, whose password is a hash."""
    return shared_netproxyd(config=USERS % _hash("builder"), login=("alice", "open sesame"))


def _hash(password: str) -> str:
    """What `netproxyctl hash-password` makes of it."""
    code = "import sys; from netproxy.cli import control_main; sys.exit(control_main())"
    command = [sys.executable, "-c", code, "hash-password"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        input=password + "\n",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


# -- without users


@pytest.mark.parametrize("host", (LOOPBACK, "localhost"))
@pytest.mark.parametrize("way", WAYS)
def test_get(curl: Curl, everybody: Netproxyd, origin: Origin, way: str, host: str) -> None:
    result = curl(everybody, way, origin.url(host=host))
    assert (result.status, result.code, result.body) == (0, 200, HELLO), result.errors
    assert ("via" in origin.seen[0].fields) == (way == "http")


@pytest.mark.parametrize("way", WAYS)
def test_login_that_nobody_asked_for(
    curl: Curl, everybody: Netproxyd, origin: Origin, way: str
) -> None:
    result = curl(everybody, way, origin.url(), login=ALICE)
    assert (result.status, result.body) == (0, HELLO), result.errors
    assert "proxy-authorization" not in origin.seen[0].fields


@pytest.mark.parametrize("way", ("socks5h", "http", "connect"))
def test_two_on_one_connection(curl: Curl, everybody: Netproxyd, origin: Origin, way: str) -> None:
    result = curl(everybody, way, origin.url("/hello?1"), origin.url("/hello?2"))
    assert (result.status, result.body) == (0, HELLO), result.errors
    assert [transfer["num_connects"] for transfer in result.transfers] == [1, 0]
    assert [seen.path for seen in origin.seen] == ["/hello?1", "/hello?2"]
    assert origin.seen[0].port == origin.seen[1].port  # the connection to the origin is kept, too


@pytest.mark.parametrize("way", ("socks4", "socks5", "http", "connect"))
def test_download(curl: Curl, everybody: Netproxyd, origin: Origin, way: str) -> None:
    result = curl(everybody, way, origin.url("/big"))
    assert (result.status, result.code) == (0, 200), result.errors
    assert result.body == BIG


@pytest.mark.parametrize("way", ("socks5h", "http", "connect"))
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
def test_upload(
    curl: Curl, everybody: Netproxyd, origin: Origin, way: str, options: tuple[str, ...]
) -> None:
    result = curl(everybody, way, *options, origin.url("/upload"), input=UPLOAD)
    assert (result.status, result.code) == (0, 200), result.errors
    assert result.body == hashlib.sha256(UPLOAD).hexdigest().encode()
    assert origin.seen[0].body == UPLOAD


@pytest.mark.parametrize("way", ("http", "connect", "socks5"))
def test_download_after_upload_on_one_connection(
    curl: Curl, everybody: Netproxyd, origin: Origin, way: str
) -> None:
    result = curl(
        everybody,
        way,
        "-d",
        "a small one",
        origin.url("/1"),
        "--next",
        *_options(everybody, way),
        origin.url("/2"),
    )
    assert result.status == 0, result.errors
    assert [(seen.method, seen.path, seen.body) for seen in origin.seen] == [
        ("POST", "/1", b"a small one"),
        ("GET", "/2", b""),
    ]


@pytest.mark.parametrize(
    "way, path",
    (("http", "/hello"), ("connect", "/hello"), ("socks5", "/hello"), ("http", "/chunked")),
)  # what the origin sends in chunks the client must not get so
def test_http_1_0(curl: Curl, everybody: Netproxyd, origin: Origin, way: str, path: str) -> None:
    result = curl(everybody, way, "--http1.0", origin.url(path))
    assert (result.status, result.code, result.body) == (0, 200, HELLO), result.errors


@pytest.mark.parametrize("way", ("http", "connect", "socks5"))
def test_head(curl: Curl, everybody: Netproxyd, origin: Origin, way: str) -> None:
    result = curl(everybody, way, "-I", origin.url("/big"), origin.url("/big"))
    assert (result.status, result.code) == (0, 200), result.errors
    assert [transfer["num_connects"] for transfer in result.transfers] == [1, 0]
    assert f"content-length: {len(BIG)}" in result.body.decode().lower()
    assert [seen.method for seen in origin.seen] == ["HEAD", "HEAD"]


@pytest.mark.parametrize(
    "way, status, code",
    (
        ("socks4", PROXY_SAYS_NO, 0),
        ("socks4a", PROXY_SAYS_NO, 0),
        ("socks5", PROXY_SAYS_NO, 0),
        ("socks5h", PROXY_SAYS_NO, 0),
        ("http", 0, 502),
        ("connect", NO_TUNNEL, 502),
    ),
)
def test_refused_port(curl: Curl, everybody: Netproxyd, way: str, status: int, code: int) -> None:
    result = curl(everybody, way, f"http://{LOOPBACK}:{free_port()}/")
    assert result.status == status, result.errors
    assert (result.transfers[0]["http_connect"] if way == "connect" else result.code) == code


@pytest.mark.parametrize("way", ("socks5h", "http", "connect"))
def test_name_that_does_not_exist(curl: Curl, everybody: Netproxyd, way: str) -> None:
    result = curl(everybody, way, "http://no-such-host.invalid/")
    assert result.status == {"socks5h": PROXY_SAYS_NO, "http": 0, "connect": NO_TUNNEL}[way], (
        result.errors
    )
    assert (result.transfers[0]["http_connect"] if way == "connect" else result.code) in (
        0,
        502,
        504,
    )


def test_many_at_once(curl: Curl, everybody: Netproxyd, origin: Origin) -> None:
    """Ten transfers of one curl at the same time, over as many connections as it likes."""
    result = curl(
        everybody,
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


@pytest.mark.parametrize("way", SOCKS5_AND_HTTP)
@pytest.mark.parametrize("login", (ALICE, "bob:builder"))
def test_right_password(
    curl: Curl, users_only: Netproxyd, origin: Origin, way: str, login: str
) -> None:
    result = curl(users_only, way, origin.url(), login=login)
    assert (result.status, result.code, result.body) == (0, 200, HELLO), result.errors
    assert "proxy-authorization" not in origin.seen[0].fields
    users_only.said(f" user={login.split(':')[0]} .*target={LOOPBACK}:{origin.port}")


@pytest.mark.parametrize("way", SOCKS5_AND_HTTP)
@pytest.mark.parametrize("login", ("", WRONG, UNKNOWN, "bob:wrong"))
def test_wrong_or_no_password(
    curl: Curl, users_only: Netproxyd, origin: Origin, way: str, login: str
) -> None:
    result = curl(users_only, way, origin.url(), login=login)
    assert result.status == {"http": 0, "connect": NO_TUNNEL}.get(way, PROXY_SAYS_NO), result.errors
    if not way.startswith("socks"):
        assert (result.transfers[0]["http_connect"] if way == "connect" else result.code) == 407
    assert not origin.seen


@pytest.mark.parametrize("way", ("socks4", "socks4a"))
@pytest.mark.parametrize("login", ("", "alice"))
def test_socks4_has_no_password(
    curl: Curl, users_only: Netproxyd, origin: Origin, way: str, login: str
) -> None:
    result = curl(users_only, way, origin.url(), login=login)
    assert result.status == PROXY_SAYS_NO, result.errors
    assert not origin.seen


def test_password_is_in_no_log(curl: Curl, users_only: Netproxyd, origin: Origin) -> None:
    curl(users_only, "http", origin.url(), login="alice:Tr0ub4dor")
    assert users_only.all_lines("auth_failed") and not users_only.lines("Tr0ub4dor|sesame")
