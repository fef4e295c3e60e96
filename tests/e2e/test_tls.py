"""netproxyd with TLS, and curl that speaks to it."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.origin import BIG, HELLO, Origin, serving
from tests.e2e.support import LOOPBACK, Netproxyd, environment, program, run_netproxyd
from tests.support.certificates import PASS_PHRASE, Certificates, certificates

pytestmark = pytest.mark.e2e

PART = BIG[:5_000_000]
WAYS = pytest.mark.parametrize("way", ((), ("-p",)), ids=("forward", "connect"))
PLAIN = (
    f"{{name: plain, listen: '{LOOPBACK}:0'}}"  # where the fixture asks whether the daemon lives
)
WRONG_CONFIGURATION = 78
BAD_CERTIFICATE = (
    35,
    55,
    56,
)  # curl: in TLS 1.3 it learns it when it reads, or by a reset when it writes


@pytest.fixture(scope="module")
def made() -> Certificates:
    return certificates()


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def daemon(shared_netproxyd: Start, made: Certificates) -> Netproxyd:
    """Plain, TLS, and TLS with clients' certificates."""
    strict = made.listener(f", client_ca: '{made.path('ca.pem')}'")
    return shared_netproxyd(
        config=f"listeners: [{PLAIN}, {{name: tls, listen: '{LOOPBACK}:0', tls: {made.listener()}}},"
        f" {{name: strict, listen: '{LOOPBACK}:0', tls: {strict}}}]\n"
    )


def curl(
    made: Certificates, port: int, *arguments: str, scheme: str = "https", **run: bytes
) -> tuple[int, bytes, str]:
    """Exit status, body, what it complained of."""
    command = (
        program("curl"),
        "-q",
        "-sS",
        "--noproxy",
        "",
        "-m",
        "20",
        "-x",
        f"{scheme}://localhost:{port}",
        "--proxy-cacert",
        made.path("ca.pem"),
        *arguments,
    )
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=30, **run)
    return done.returncode, done.stdout, done.stderr.decode()


@WAYS
def test_get(daemon: Netproxyd, made: Certificates, origin: Origin, way: tuple[str, ...]) -> None:
    assert curl(made, daemon.tcp_ports[1], *way, origin.url()) == (0, HELLO, "")


@WAYS
def test_two_on_one_connection(
    daemon: Netproxyd, made: Certificates, origin: Origin, way: tuple[str, ...]
) -> None:
    status, body, errors = curl(
        made, daemon.tcp_ports[1], *way, "-w", "%{num_connects};", origin.url(), origin.url()
    )
    assert (status, body) == (0, HELLO + b"1;" + HELLO + b"0;"), errors


@WAYS
def test_download(
    daemon: Netproxyd, made: Certificates, origin: Origin, way: tuple[str, ...]
) -> None:
    status, body, errors = curl(made, daemon.tcp_ports[1], *way, origin.url("/big"))
    assert status == 0, errors
    assert hashlib.sha256(body).hexdigest() == hashlib.sha256(BIG).hexdigest()


@WAYS
def test_upload(
    daemon: Netproxyd, made: Certificates, origin: Origin, way: tuple[str, ...]
) -> None:
    status, body, errors = curl(
        made, daemon.tcp_ports[1], *way, "-T", "-", origin.url("/upload"), input=PART
    )
    assert status == 0, errors
    assert body == hashlib.sha256(PART).hexdigest().encode()


@WAYS
def test_client_certificate(
    daemon: Netproxyd, made: Certificates, origin: Origin, way: tuple[str, ...]
) -> None:
    shown = ("--proxy-cert", made.path("client.pem"), "--proxy-key", made.path("client.key"))
    assert curl(made, daemon.tcp_ports[2], *way, *shown, origin.url()) == (0, HELLO, "")


@WAYS
@pytest.mark.parametrize("shown", ("", "stranger"))
def test_no_or_a_strange_client_certificate(
    daemon: Netproxyd, made: Certificates, origin: Origin, way: tuple[str, ...], shown: str
) -> None:
    origin.seen.clear()
    options = (
        ("--proxy-cert", made.path(f"{shown}.pem"), "--proxy-key", made.path(f"{shown}.key"))
        if shown
        else ()
    )
    status, body, errors = curl(made, daemon.tcp_ports[2], *way, *options, origin.url())
    assert status in BAD_CERTIFICATE and not body, errors
    assert not origin.seen


def test_plain_client_at_the_tls_port(
    daemon: Netproxyd, made: Certificates, origin: Origin
) -> None:
    before = daemon.status().get("connections{bad protocol}", 0)
    status, body, errors = curl(made, daemon.tcp_ports[1], origin.url(), scheme="http")
    assert status, errors  # which, hangs on how curl takes an alert of TLS
    assert not body.startswith(HELLO)
    assert daemon.status()["connections{bad protocol}"] == before + 1


@pytest.mark.parametrize(
    "certificate, key, client_ca, named",
    (
        ("missing.pem", "server.key", "", "missing.pem"),
        ("server.pem", "missing.key", "", "missing.key"),
        ("broken.pem", "server.key", "", "broken.pem"),
        ("server.pem", "client.key", "", "client.key"),
        ("server.pem", "encrypted.key", "", "encrypted.key"),
        ("server.pem", "", "", "server.pem"),
        ("server.pem", "server.key", "broken.pem", "broken.pem"),
    ),
)
def test_check_names_the_file_that_cannot_be_used(
    made: Certificates, tmp_path: Path, certificate: str, key: str, client_ca: str, named: str
) -> None:
    """In one line, and without a secret."""
    given = {"certificate": certificate, "key": key, "client_ca": client_ca}
    files = ", ".join(f"{name}: '{made.path(value)}'" for name, value in given.items() if value)
    config = tmp_path / "netproxyd.yaml"
    config.write_text(f"listeners:\n- listen: '{LOOPBACK}:0'\n  tls: {{{files}}}\n")
    status, said = run_netproxyd("-t", "-c", str(config))
    assert status == WRONG_CONFIGURATION, said
    lines = said.splitlines()
    assert len(lines) == 1 and made.path(named) in lines[0], said
    assert PASS_PHRASE not in said and "PRIVATE" not in said


def test_check_of_what_can_be_used(made: Certificates, tmp_path: Path) -> None:
    config = tmp_path / "netproxyd.yaml"
    config.write_text(f"listeners: [{{listen: '{LOOPBACK}:0', tls: {made.listener()}}}]\n")
    status, said = run_netproxyd("-t", "-c", str(config))
    assert status == 0, said
