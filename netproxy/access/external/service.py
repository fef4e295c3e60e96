"""Checks a login with a service over HTTP.

A GET has the client, the user and the listener as query parameters, and the credentials in the
field Authorization (RFC 7617).  2xx is yes, 401 and 403 are no, everything else is a failure.
Redirections are not followed.  The body of a yes counts if its type is application/json.
"""

from __future__ import annotations

import binascii
import http.client
import io
import socket
import time
import urllib.parse

from netproxy.access.external.checker import Verdict
from netproxy.errors import DialError, LoginUnavailable
from netproxy.interfaces.addresses import Address
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.access.login import Credentials
    from netproxy.interfaces.routing import Resolver
    from ssl import SSLContext

BODY_LIMIT = 8192
"""Bytes."""
PORTS = {"http": 80, "https": 443}
NO = (401, 403)


class ServiceChecker:
    """A Checker that asks a service.  Thread: any."""

    def __init__(self, url: str, resolver: Resolver) -> None:
        """`url` has neither a query nor a user: config.sections.auth has seen to it."""
        self._resolver = resolver
        scheme, _, rest = url.partition("://")
        authority, _, path = rest.partition("/")
        host, _, port = authority.rpartition(":") if authority[-1] != "]" else (authority, "", "")
        if not host:
            host, port = authority, ""
        self._host, self._port = host.strip("[]"), int(port or PORTS[scheme])
        self._path, self._authority = f"/{path}", authority
        self._context = _tls_context() if scheme == "https" else None

    def check(self, credentials: Credentials, deadline: float) -> Verdict:
        """Ask the service; blocks.  Raises LoginUnavailable."""
        try:
            sock = self._connect(deadline)
            try:
                return self._ask(_TimedSocket(sock, deadline), credentials)
            finally:
                sock.close()
        except TimeoutError as error:
            raise LoginUnavailable(f"{self._authority} has not answered in time") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = getattr(error, "strerror", None) or error or type(error).__name__
            raise LoginUnavailable(f"{self._authority}: {why}") from error

    def stop(self) -> None:
        """Do nothing: requests end at their deadline, or with the daemon."""

    def _connect(self, deadline: float) -> socket.socket:
        sock = self._connect_to_any(deadline)
        if self._context is None:
            return sock
        try:
            sock.settimeout(_seconds_left(deadline))
            return self._context.wrap_socket(sock, server_hostname=self._host)
        except BaseException:
            sock.close()
            raise

    def _connect_to_any(self, deadline: float) -> socket.socket:
        """Return a connection to the first address that answers.  Raises OSError.

        Each address gets an equal share of the time that is left, so that the last one is tried.
        """
        target = Address(self._host.lower(), self._port)
        try:
            addresses = self._resolver.resolve(target, seconds=_seconds_left(deadline))
        except DialError as error:
            raise OSError(str(error)) from error
        failure = OSError("no address")
        for number, address in enumerate(addresses):
            try:
                seconds = _seconds_left(deadline) / (len(addresses) - number)
                return socket.create_connection(address, seconds)
            except OSError as error:
                failure = error
        raise failure

    def _ask(self, sock: _TimedSocket, credentials: Credentials) -> Verdict:
        """Send the request and read the answer.  Raises LoginUnavailable, OSError and others."""
        facts = {
            "client": credentials.client,
            "user": credentials.user,
            "listener": credentials.listener,
        }
        pair = b"%b:%b" % (credentials.user.encode(), credentials.password)
        connection = http.client.HTTPConnection(self._host, self._port)
        connection.sock = sock
        connection.request(
            "GET",
            f"{self._path}?{urllib.parse.urlencode(facts)}",
            headers={
                "Host": self._authority,
                "Authorization": f"Basic {binascii.b2a_base64(pair, newline=False).decode()}",
                "Accept": "application/json",
                "User-Agent": "netproxyd",
                "Connection": "close",
            },
        )
        response = connection.getresponse()
        if response.status in NO:
            return Verdict(False)
        if not 200 <= response.status < 300:
            raise LoginUnavailable(f"{self._authority} answers with status {response.status}")
        if response.headers.get_content_type() != "application/json":
            return Verdict(True)
        body = response.read(BODY_LIMIT + 1)
        if len(body) > BODY_LIMIT:
            raise LoginUnavailable(f"{self._authority} sends more than {BODY_LIMIT} bytes")
        if response.length:
            raise LoginUnavailable(f"{self._authority} has cut its answer")
        return Verdict(True, body.decode("utf-8", "replace").strip())


class _TimedSocket:
    """A socket of http.client whose calls end at a deadline, all of them together."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        """Send all of `data`.  Raises OSError."""
        self._sock.settimeout(_seconds_left(self._deadline))
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the reader of the response."""
        return io.BufferedReader(_TimedReader(self._sock, self._deadline))

    def close(self) -> None:
        """Do nothing: the checker closes the socket."""


class _TimedReader(io.RawIOBase):
    """Reads from a socket until a deadline: a server that drips holds no thread for longer."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # what io passes
        """Read into `buffer`; return how many bytes.  Raises OSError."""
        self._sock.settimeout(_seconds_left(self._deadline))
        return self._sock.recv_into(buffer)


def _seconds_left(deadline: float) -> float:
    """Return the seconds until a deadline.  Raises TimeoutError if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _tls_context() -> SSLContext:
    import ssl  # late: 3 MiB, and a service on loopback needs none

    return ssl.create_default_context()
