"""Certificates for tests, which the openssl program makes once a session.

A CA, a server's and a client's certificate, those of another authority, and broken files.
"""

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

PASS_PHRASE = "xyzzy-plugh"
"""The pass phrase of encrypted.key."""
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


class Certificates(NamedTuple):
    """The directory with the files."""

    directory: Path

    def path(self, name: str) -> str:
        """Return the path of a file.

        There are a .pem and a .key of ca, server, client, stranger (self-signed) and broken;
        and encrypted.key.
        """
        return str(self.directory / name)

    def listener(self, more: str = "") -> str:
        """Return the value of a listener's `tls`, with `more` at its end."""
        return (
            f"{{certificate: '{self.path('server.pem')}', key: '{self.path('server.key')}'{more}}}"
        )

    def client_context(self, certificate: str = "") -> ssl.SSLContext:
        """Return a context that trusts the CA; `certificate` names the client's own."""
        context = ssl.create_default_context(cafile=self.path("ca.pem"))
        # As in netproxy.net.tls: the CA is one that openssl makes by default.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if certificate:
            context.load_cert_chain(
                self.path(f"{certificate}.pem"), self.path(f"{certificate}.key")
            )
        return context

    def secure(self, sock: socket.socket) -> ssl.SSLSocket:
        """Do the handshake of a client.  Reading a cut stream raises an error."""
        return self.client_context().wrap_socket(
            sock, server_hostname="localhost", suppress_ragged_eofs=False
        )


@functools.cache
def certificates() -> Certificates:
    """Make the files, or skip the test if there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    temporary = tempfile.TemporaryDirectory(prefix="netproxy-certificates-")
    _kept.append(temporary)
    directory = Path(temporary.name)
    for name in ("ca", "stranger"):
        files = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
        subject = ("-subj", f"/CN=test {name}")
        _openssl(directory, "req", "-x509", *_KEY, "-nodes", "-days", "90", *subject, *files)
    (directory / "names").write_text(
        "subjectAltName=DNS:localhost,DNS:agents.example,IP:127.0.0.1\n"
    )
    authority = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
    for name in ("server", "client"):
        files = ("-keyout", f"{name}.key", "-out", f"{name}.csr")
        _openssl(directory, "req", *_KEY, "-nodes", "-subj", f"/CN=test {name}", *files)
        files = ("-in", f"{name}.csr", "-extfile", "names", "-out", f"{name}.pem")
        _openssl(directory, "x509", "-req", *authority, "-days", "90", *files)
    encryption = ("-aes128", "-passout", f"pass:{PASS_PHRASE}")
    _openssl(directory, "ec", "-in", "server.key", *encryption, "-out", "encrypted.key")
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


_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Directories that are removed when the interpreter ends."""
