"""Creates certificates with the openssl program, once in a test run: valid ones and faulty ones."""

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

# Of encrypted.key.
PASS_PHRASE = "xyzzy-plugh"
_KEY = ("-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


class Certificates(NamedTuple):
    """The files in `directory`.

    ca, server, client (both signed by ca) and stranger (signed by itself), each with .pem and .key;
    encrypted.key, which is server.key with a pass phrase; broken.pem and broken.key, which are
    plain text.
    """

    directory: Path

    def path(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.directory / name)

    def listener(self, more: str = "") -> str:
        """Return the YAML value of a listener's `tls`. `more` is appended to its options."""
        certificate, key = self.path("server.pem"), self.path("server.key")
        return f"{{certificate: '{certificate}', key: '{key}'{more}}}"

    def client_context(self, certificate: str = "") -> ssl.SSLContext:
        """Return a context for clients. It trusts the CA and presents the certificate, if any."""
        context = ssl.create_default_context(cafile=self.path("ca.pem"))
        # As in netproxy.net.tls: the CA has only the extensions that openssl adds by itself.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if certificate:
            context.load_cert_chain(
                self.path(f"{certificate}.pem"), self.path(f"{certificate}.key")
            )
        return context

    def secure(self, sock: socket.socket) -> ssl.SSLSocket:
        """Perform the client's handshake. Reads raise if the stream ends without close_notify."""
        return self.client_context().wrap_socket(
            sock, server_hostname="localhost", suppress_ragged_eofs=False
        )


@functools.cache
def certificates() -> Certificates:
    """Create the certificates once in the process. Skip the test if there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tempfile.TemporaryDirectory(prefix="netproxy-certificates-")
    _folders.append(folder)
    directory = Path(folder.name)
    for name in ("ca", "stranger"):
        files = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
        _openssl(
            directory, "req", "-x509", *_KEY, "-days", "2", "-subj", f"/CN=test {name}", *files
        )
    (directory / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        files = ("-keyout", f"{name}.key", "-out", f"{name}.csr")
        _openssl(directory, "req", *_KEY, "-subj", f"/CN=test {name}", *files)
        signer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        files = ("-in", f"{name}.csr", "-extfile", "names", "-out", f"{name}.pem")
        _openssl(directory, "x509", "-req", "-days", "2", *signer, *files)
    phrase = ("-aes128", "-passout", f"pass:{PASS_PHRASE}")
    _openssl(directory, "ec", "-in", "server.key", *phrase, "-out", "encrypted.key")
    for name in ("broken.pem", "broken.key"):
        (directory / name).write_text("neither a certificate nor a key\n")
    return Certificates(directory)


def _openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(
        ("openssl", *arguments),
        cwd=directory,
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )


# Keeps the folders until the interpreter ends, which removes them.
_folders: list[tempfile.TemporaryDirectory[str]] = []
