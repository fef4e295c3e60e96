"""Fetches a file by HTTPS into a new file beside the old one.

Size and time are bounded, certificates are checked, and a redirection must lead to HTTPS again.
The time is that of the whole download, with the lookup of the name and the connection: a server
that sends byte by byte, or has many addresses that do not answer, gains nothing.
Blocks.  Thread: that of the keeper.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import queue
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from functools import partial

from netproxy.typed import TYPE_CHECKING, NamedTuple

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net.connect import connect

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from _typeshed import WriteableBuffer

BYTES_LIMIT = 64 << 20
"""Bytes of a list: large public ones have 10 MiB."""
SECONDS_LIMIT = 120.0
"""Seconds of one download."""
SILENT_SECONDS = 30.0
"""Seconds that a server may send nothing, and in which it must be connected to."""
PIECE = 1 << 16
NOT_MODIFIED = 304
_TOO_LATE = f"the list takes more than {SECONDS_LIMIT:g} s"


class DownloadError(Exception):
    """A list could not be fetched; the text says why."""


class Download(NamedTuple):
    """A file that was fetched."""

    path: str
    sha256: str
    """In hexadecimal digits."""
    tag: str
    """Its ETag, "" for none."""


def download(
    url: str, path: str, tag: str, context: ssl.SSLContext | None = None
) -> Download | None:
    """Fetch `url` into the new file `path`; return None if it still has the ETag `tag`.

    `context` replaces the certificates of the system.  Raises DownloadError; then there is no new
    file.
    """
    deadline = time.monotonic() + SECONDS_LIMIT
    context = context or ssl.create_default_context()
    context.sslsocket_class = _Socket
    request = urllib.request.Request(url, headers={"User-Agent": "netproxyd"})
    if tag:
        request.add_header("If-None-Match", tag)
    try:
        with _opener(context, deadline).open(request, timeout=SILENT_SECONDS) as response:
            try:
                checksum = _save(response, path, deadline)
            except BaseException:
                _remove(path)
                raise
            return Download(path, checksum, response.headers.get("ETag") or "")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == NOT_MODIFIED:
            return None
        raise DownloadError(f"the server answers with status {error.code}") from error
    except urllib.error.URLError as error:
        raise DownloadError(str(error.reason)) from error
    except TimeoutError as error:
        is_late = time.monotonic() > deadline
        raise DownloadError(_TOO_LATE if is_late else "the server is silent") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "strerror", None) or error or type(error).__name__
        raise DownloadError(str(why)) from error


def _save(response: HTTPResponse, path: str, deadline: float) -> str:
    """Write a body to a new file; return its checksum.  Raises DownloadError, OSError."""
    checksum, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        while piece := response.read1(PIECE):
            size += len(piece)
            if size > BYTES_LIMIT:
                raise DownloadError(f"the list has more than {BYTES_LIMIT >> 20} MiB")
            if time.monotonic() > deadline:
                raise DownloadError(_TOO_LATE)
            checksum.update(piece)
            file.write(piece)
        if response.length:
            raise DownloadError("the server has closed the connection before the end of the list")
        file.flush()
        os.fsync(file.fileno())
    return checksum.hexdigest()


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


class _Socket(ssl.SSLSocket):
    """A TLS connection to the server of a list."""

    deadline = 0.0
    """When the download must have ended (monotonic seconds)."""

    def recv_into(self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0) -> int:
        """Receive bytes.  Raises TimeoutError at the deadline, and if the server is silent."""
        self.settimeout(_seconds_left(self.deadline))
        return super().recv_into(buffer, nbytes, flags)


class _Connection(http.client.HTTPSConnection):
    """A connection to the server of a list, or to one that it leads to."""

    def __init__(self, host: str, timeout: float, context: ssl.SSLContext, deadline: float) -> None:
        super().__init__(host, timeout=timeout, context=context)
        self._tls, self._deadline = context, deadline

    def connect(self) -> None:
        """Connect, and make the handshake of TLS.  Raises OSError."""
        self.sock = sock = _connect(self.host, self.port, self._deadline)
        sock.settimeout(_seconds_left(self._deadline))
        self.sock = self._tls.wrap_socket(sock, server_hostname=self.host)
        assert isinstance(self.sock, _Socket)
        self.sock.deadline = self._deadline


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """Return a connection to the first address of a host that answers.  Raises OSError."""
    addresses = _look_up(host, port, deadline)
    try:
        return connect(addresses, _seconds_left(deadline))
    except DialError as error:
        kind = TimeoutError if error.reason is Reason.TIMEOUT else OSError
        raise kind(str(error)) from error


def _look_up(host: str, port: int, deadline: float) -> list[Address]:
    """Return the addresses of a host.  Raises OSError.

    getaddrinfo(3) has no deadline: it runs on a thread that ends by itself.
    """
    answers: queue.SimpleQueue[list[Address] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put([Address(str(answer[4][0]), port) for answer in found])
        except (OSError, UnicodeError) as error:
            answers.put(error if isinstance(error, OSError) else OSError(str(error)))

    try:
        threading.Thread(target=ask, name="list-lookup", daemon=True).start()
        answer = answers.get(timeout=_seconds_left(deadline))
    except queue.Empty as error:
        raise TimeoutError(f"{host}: no name server answers") from error
    except RuntimeError as error:
        raise OSError("no thread can be had to look a name up") from error
    if isinstance(answer, OSError):
        raise answer
    return answer


class _HttpsHandler(urllib.request.HTTPSHandler):
    """Opens connections that end with the download."""

    def __init__(self, context: ssl.SSLContext, deadline: float) -> None:
        super().__init__()
        self._connection = partial(_Connection, context=context, deadline=deadline)

    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        """Send a request.  Raises URLError, OSError."""
        return self.do_open(self._connection, request)


def _seconds_left(deadline: float) -> float:
    """Return how long a server may be silent.  Raises TimeoutError at the deadline."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError(_TOO_LATE)
    return min(seconds, SILENT_SECONDS)


def _opener(context: ssl.SSLContext, deadline: float) -> urllib.request.OpenerDirector:
    """Return what follows redirections to HTTPS alone: a list decides where traffic goes."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        _HttpsHandler(context, deadline),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
