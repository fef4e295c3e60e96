"""TLS on streams: contexts, handshakes with clients and with servers, sessions to resume.

The handshake runs on the thread of its connection, within the stream's deadline, and
never on the thread that accepts.  net.tls_socket has the socket that it leads to.
Imported late and only where TLS is configured: ssl costs time and memory.
"""

from __future__ import annotations

import ssl
import time

from netproxy.errors import ProtocolError, StreamError, cannot_read, check_regular, open_regular
from netproxy.net.tls_socket import LayeredCalls, TlsSocket
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream

SESSION_SECONDS = 3600.0
"""How long a session is resumed, and the certificate not verified again.

Some servers allow days.
"""
FILE_LIMIT = 1 << 20
"""Bytes of a file that are looked at to tell what is wrong with it."""


def server_context(certificate: str, key: str, client_ca: str = "") -> ssl.SSLContext:
    """Return the context of a listener; the parameters are names of PEM files.

    With `client_ca` clients must have a certificate of that authority.
    Raises ValueError, which names the file that cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, certificate, key)
    if client_ca:
        try:
            check_regular(client_ca)
            context.load_verify_locations(client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"cannot use {client_ca}: {_ca_reason(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def accept(stream: Stream, context: ssl.SSLContext) -> None:
    """Do the handshake with a client; from here on the stream is encrypted.

    Bytes of the client that are unread belong to it.  Blocks, within the stream's deadline.
    Raises ProtocolError or StreamError.
    """
    _handshake(stream, context, None)


def client_context(
    ca: str = "", certificate: str = "", key: str = "", insecure: bool = False
) -> ssl.SSLContext:
    """Return the context for connections to a server; the names are those of PEM files.

    `ca`: trusted authorities in place of the system's.  `certificate` and `key`: what this
    client shows.  `insecure`: accept any certificate.
    Raises ValueError, which names the file that cannot be used.
    """
    try:
        if ca:
            check_regular(ca)
        context = ssl.create_default_context(cafile=ca or None)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"cannot use {ca}: {_ca_reason(error)}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Python 3.13 refuses authorities without key usage, such as `openssl req -x509` makes.
    # All versions should accept the same certificates.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if certificate:
        _load(context, certificate, key)
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def connect(stream: Stream, context: ssl.SSLContext, server_name: str) -> None:
    """Do the handshake with a server whose certificate must be for `server_name`.

    Blocks, within the stream's deadline.  Raises ProtocolError or StreamError.
    """
    _handshake(stream, context, server_name)


def version(stream: Stream) -> str:
    """Return the version of TLS that a stream has agreed on, "" without TLS."""
    sock = stream.socket
    return sock.version if isinstance(sock, TlsSocket) else ""


class TlsClient:
    """Connects to one server again and again, and resumes its session to save time.

    The session is used for SESSION_SECONDS; then, and by another TlsClient, the certificate is
    verified anew.  Thread: any.
    """

    def __init__(self, context: ssl.SSLContext, server_name: str) -> None:
        """Connect with `context`, as connect() does."""
        self._context = context
        self._server_name = server_name
        self._session: ssl.SSLSession | None = None
        self._session_until = 0.0
        """Monotonic seconds."""

    def connect(self, stream: Stream) -> None:
        """Do the handshake, with the session if there is one.  Raises as connect() does."""
        session = self._session if time.monotonic() < self._session_until else None
        _handshake(stream, self._context, self._server_name, session)

    def keep_session(self, stream: Stream) -> None:
        """Keep the session of a stream that went through connect().

        Call it after the server has sent something: in TLS 1.3 sessions come after the handshake.
        """
        sock = stream.socket
        session = sock.new_session() if isinstance(sock, TlsSocket) else None
        if session is not None:
            self._session = session
            self._session_until = time.monotonic() + SESSION_SECONDS


def _handshake(
    stream: Stream,
    context: ssl.SSLContext,
    server_name: str | None,
    session: ssl.SSLSession | None = None,
) -> None:
    calls = stream.calls
    sock, unread = stream.detach()
    if unread and server_name is not None:
        raise ProtocolError("plaintext before TLS")
    secured = TlsSocket(sock, calls, context, server_name, session)
    secured.feed(unread)
    stream.become(secured, LayeredCalls)  # type: ignore[arg-type]  # any StreamSocket will do
    try:
        while events := secured.handshake():
            stream.wait(events)
    except ssl.SSLError as error:
        raise ProtocolError(f"TLS: {_reason(error)}") from error
    except OSError as error:
        raise StreamError(error.strerror or str(error)) from error


def _load(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Load a certificate and its key.  Raises ValueError, which names the file at fault."""
    try:
        for path in filter(None, (certificate, key)):
            check_regular(path)
        context.load_cert_chain(certificate, key or None, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as error:
        fault = _file_fault(certificate, key)
        if not fault and "MISMATCH" in _reason(error):
            fault = f"{key or certificate}: the key does not belong to the certificate"
            fault += f" in {certificate}" if key else ""
        files = f"{certificate} with {key}" if key else certificate
        raise ValueError(f"cannot use {fault or f'{files}: {_reason(error)}'}") from error


def _file_fault(certificate: str, key: str) -> str:
    """Return the file that cannot be read or lacks its part, and why; "" if there is none."""
    try:
        path = certificate
        has_certificate, has_key = _pem_parts(path)
        path = key or certificate
        key_file_parts = _pem_parts(path)
    except OSError as error:
        return f"{path}: {cannot_read(error, path)}"
    if not has_certificate:
        other = ", but a private key" if has_key else ""
        swapped = ": certificate and key are swapped" if has_key and key_file_parts[0] else ""
        return f"{certificate}: it holds no certificate in PEM format{other}{swapped}"
    if not key_file_parts[1]:
        needed = "" if key else " (without a key file it must contain the private key as well)"
        return f"{path}: it holds no private key in PEM format{needed}"
    return ""


def _pem_parts(path: str) -> tuple[bool, bool]:
    """Return whether a file holds a certificate, and whether it holds a key.  Raises OSError."""
    with open_regular(path) as file:
        text = file.read(FILE_LIMIT)
    return b"CERTIFICATE-----" in text, b"PRIVATE KEY-----" in text


def _no_password() -> str:
    raise ValueError("the private key is encrypted; NetProxy needs one without a pass phrase")


def _ca_reason(error: Exception) -> str:
    reason = _reason(error)
    # Both say the same: OpenSSL has changed the word.
    is_empty = reason in ("NO_CERTIFICATE_OR_CRL_FOUND", "NO_START_LINE")
    return "it holds no certificate in PEM format" if is_empty else reason


def _reason(error: Exception) -> str:
    """Return the shortest text that tells what is wrong."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
