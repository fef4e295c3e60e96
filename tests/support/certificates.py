"""Certificates that the openssl program makes once a session: a CA, a server's and a client's, and what is wrong with some."""

from __future__ import annotations

import functools
import shutil
import socket
import ssl
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

PASS_PHRASE = "xyzzy-plugh"  # of the encrypted key
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


class Certificates(NamedTuple):
    directory: Path

    def path(self, name: str) -> str:
        """ca, server, client, stranger (of no CA but its own) end in .pem and .key; encrypted.key; broken.pem, broken.key."""
        return str(self.directory / name)

    def listener(self, more: str = "") -> str:
        """The value of a listener's `tls`."""
        return (
            f"{{certificate: '{self.path('server.pem')}', key: '{self.path('server.key')}'{more}}}"
        )

    def client_context(self, certificate: str = "") -> ssl.SSLContext:
        """Trusts the CA; `certificate` is what it shows of itself, by its name."""
        context = ssl.create_default_context(cafile=self.path("ca.pem"))
        context.verify_flags &= (
            ~ssl.VERIFY_X509_STRICT
        )  # as in netproxy.net.tls: the CA is one that openssl makes without more
        if certificate:
            context.load_cert_chain(
                self.path(f"{certificate}.pem"), self.path(f"{certificate}.key")
            )
        return context

    def secure(self, sock: socket.socket) -> ssl.SSLSocket:
        """The client's end, behind the handshake; it does not take a cut stream for a whole one."""
        return self.client_context().wrap_socket(
            sock, server_hostname="localhost", suppress_ragged_eofs=False
        )


@functools.cache
def certificates() -> Certificates:
    """The test is skipped where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    made = tempfile.TemporaryDirectory(prefix="netproxy-certificates-")
    _kept.append(made)
    directory = Path(made.name)
    for name in ("ca", "stranger"):
        _openssl(
            directory,
            "req",
            "-x509",
            *_KEY,
            "-nodes",
            "-days",
            "2",
            "-subj",
            f"/CN=test {name}",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
        )
    for name in ("server", "client"):
        _openssl(
            directory,
            "req",
            *_KEY,
            "-nodes",
            "-subj",
            f"/CN=test {name}",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.csr",
        )
        (directory / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        _openssl(
            directory,
            "x509",
            "-req",
            "-in",
            f"{name}.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            "names",
            "-out",
            f"{name}.pem",
        )
    _openssl(
        directory,
        "ec",
        "-in",
        "server.key",
        "-aes128",
        "-passout",
        f"pass:{PASS_PHRASE}",
        "-out",
        "encrypted.key",
    )
    for name in ("broken.pem", "broken.key"):
        (directory / name).write_text("not what it should be\n")
    return Certificates(directory)


def _openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(
        ("openssl", *arguments),
        cwd=directory,
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )


_kept: list[tempfile.TemporaryDirectory[str]] = []  # removed when the interpreter ends
