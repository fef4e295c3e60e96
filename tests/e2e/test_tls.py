"""Listeners with TLS, with curl as the client."""

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

pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]

PART = BIG[:5_000_000]
FORWARD_AND_CONNECT = pytest.mark.parametrize("options", ((), ("-p",)), ids=("forward", "connect"))
# The fixture connects to the first listener to check that the daemon still answers.
PLAIN = f"{{name: plain, listen: '{LOOPBACK}:0'}}"
WRONG_CONFIGURATION = 78
# Exit statuses of curl. In TLS 1.3 a client learns of a refused certificate when it reads, or from
# a reset when it writes.
BAD_CERTIFICATE = (35, 55, 56)


@pytest.fixture(scope="module")
def files() -> Certificates:
    return certificates()


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def daemon(shared_netproxyd: Start, files: Certificates) -> Netproxyd:
    """Three listeners: plain, TLS, and TLS that requires a client certificate."""
    tls, strict = files.listener(), files.listener(f", client_ca: '{files.path('ca.pem')}'")
    return shared_netproxyd(
        config=f"listeners: [{PLAIN}, {{name: tls, listen: '{LOOPBACK}:0', tls: {tls}}},"
        f" {{name: strict, listen: '{LOOPBACK}:0', tls: {strict}}}]\n"
    )


def curl(
    files: Certificates, port: int, *arguments: str, scheme: str = "https", **run: bytes
) -> tuple[int, bytes, str]:
    """Run curl with the proxy on a port. Return its exit status, body and errors."""
    options = ("-q", "-sS", "--noproxy", "", "-m", "50", "-x", f"{scheme}://localhost:{port}")
    trust = ("--proxy-cacert", files.path("ca.pem"))
    command = (program("curl"), *options, *trust, *arguments)
    process = subprocess.run(command, capture_output=True, env=environment(), timeout=60, **run)
    return process.returncode, process.stdout, process.stderr.decode()


@FORWARD_AND_CONNECT
def test_client_gets_a_page(
    daemon: Netproxyd, files: Certificates, origin: Origin, options: tuple[str, ...]
) -> None:
    assert curl(files, daemon.tcp_ports[1], *options, origin.url()) == (0, HELLO, "")


@FORWARD_AND_CONNECT
def test_client_reuses_a_tls_connection(
    daemon: Netproxyd, files: Certificates, origin: Origin, options: tuple[str, ...]
) -> None:
    status, body, errors = curl(
        files, daemon.tcp_ports[1], *options, "-w", "%{num_connects};", origin.url(), origin.url()
    )
    assert (status, body) == (0, HELLO + b"1;" + HELLO + b"0;"), errors


@FORWARD_AND_CONNECT
def test_client_downloads_20_mb(
    daemon: Netproxyd, files: Certificates, origin: Origin, options: tuple[str, ...]
) -> None:
    status, body, errors = curl(files, daemon.tcp_ports[1], *options, origin.url("/big"))
    assert status == 0, errors
    assert hashlib.sha256(body).hexdigest() == hashlib.sha256(BIG).hexdigest()


@FORWARD_AND_CONNECT
def test_client_uploads_5_mb(
    daemon: Netproxyd, files: Certificates, origin: Origin, options: tuple[str, ...]
) -> None:
    status, body, errors = curl(
        files, daemon.tcp_ports[1], *options, "-T", "-", origin.url("/upload"), input=PART
    )
    assert status == 0, errors
    assert body == hashlib.sha256(PART).hexdigest().encode()


@FORWARD_AND_CONNECT
def test_client_with_a_certificate_is_served(
    daemon: Netproxyd, files: Certificates, origin: Origin, options: tuple[str, ...]
) -> None:
    shown = ("--proxy-cert", files.path("client.pem"), "--proxy-key", files.path("client.key"))
    assert curl(files, daemon.tcp_ports[2], *options, *shown, origin.url()) == (0, HELLO, "")


@FORWARD_AND_CONNECT
@pytest.mark.parametrize("shown", ("", "stranger"))
def test_client_without_a_valid_certificate_is_refused(
    daemon: Netproxyd, files: Certificates, origin: Origin, options: tuple[str, ...], shown: str
) -> None:
    origin.seen.clear()
    certificate = (
        ("--proxy-cert", files.path(f"{shown}.pem"), "--proxy-key", files.path(f"{shown}.key"))
        if shown
        else ()
    )
    status, body, errors = curl(files, daemon.tcp_ports[2], *options, *certificate, origin.url())
    assert status in BAD_CERTIFICATE and not body, errors
    assert not origin.seen


def test_plain_client_at_a_tls_listener_is_refused(
    daemon: Netproxyd, files: Certificates, origin: Origin
) -> None:
    before = daemon.status().get("connections{bad protocol}", 0)
    status, body, errors = curl(files, daemon.tcp_ports[1], origin.url(), scheme="http")
    # The number depends on how curl understands a TLS alert.
    assert status, errors
    assert not body.startswith(HELLO)
    assert daemon.counted("connections{bad protocol}", before + 1) == before + 1


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
def test_configuration_check_names_the_file_that_cannot_be_used(
    files: Certificates, tmp_path: Path, certificate: str, key: str, client_ca: str, named: str
) -> None:
    """In one line, without a secret."""
    given = {"certificate": certificate, "key": key, "client_ca": client_ca}
    tls = ", ".join(f"{name}: '{files.path(value)}'" for name, value in given.items() if value)
    config = tmp_path / "netproxyd.yaml"
    config.write_text(f"listeners:\n- listen: '{LOOPBACK}:0'\n  tls: {{{tls}}}\n")
    status, said = run_netproxyd("-t", "-c", str(config))
    assert status == WRONG_CONFIGURATION, said
    lines = said.splitlines()
    assert len(lines) == 1 and files.path(named) in lines[0], said
    assert PASS_PHRASE not in said and "PRIVATE" not in said


def test_configuration_check_accepts_valid_files(files: Certificates, tmp_path: Path) -> None:
    config = tmp_path / "netproxyd.yaml"
    config.write_text(f"listeners: [{{listen: '{LOOPBACK}:0', tls: {files.listener()}}}]\n")
    status, said = run_netproxyd("-t", "-c", str(config))
    assert status == 0, said
