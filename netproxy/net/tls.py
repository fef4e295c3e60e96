"""TLS on connections, those that clients open and those to proxies: contexts, handshakes, what reads and writes then mean.

Imported only where TLS is configured: ssl costs time and memory.  A handshake runs on
the connection's own thread under its own deadline, never where connections are accepted.
OpenSSL works on memory, not on the socket: its own half-close would read, and lose, what
the peer is sending, and an end without its alert would keep it from writing.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from typing import Any

from netproxy.errors import ProtocolError, StreamError
from netproxy.net import syscalls
from netproxy.net.syscalls import ROOM
from netproxy.net.stream import Stream

RECORD = 16_709  # bytes of the longest record, RFC 8446 section 5.2 and what older versions add
# Bytes taken from the socket at a time: with a record that is not whole yet, less than ROOM.
PULL = ROOM - RECORD - 1024
PUSH = ROOM  # bytes encrypted at a time
SESSION_SECONDS = 3600.0  # that a session spares a look at the certificate, whatever the server allows: some say days


class TlsSocket:
    """A connected socket that does not block and what it carries in clear.  Says what waits as a plain socket says it.

    A send that is not all gone raises BlockingIOError; the next must begin with the same bytes, and is then answered
    with their number.
    """

    def __init__(
        self,
        sock: Any,
        how: Any,
        context: ssl.SSLContext,
        server_name: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """`how` a Stream reads and writes `sock`; `server_name`: who is called, None where a client has called us.

        `session` of an earlier connection, which makes the handshake shorter where the server has kept its part.
        """
        self._sock = sock
        self._how = how
        self._pull = PULL
        if isinstance(sock, TlsSocket):
            sock.narrow()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_name is None,
            server_hostname=server_name,
            session=session,
        )
        self._unsent = memoryview(b"")
        self._owed = 0  # bytes encrypted, whose number no send has told yet
        self._lock = threading.Lock()  # guards all of it: one thread may read while another writes, and OpenSSL allows that to none
        self._told = False  # that nothing more will come from here
        self.over = False  # the peer has told so, and all it sent was read: its socket need not say any more
        self.fileno, self.detach, self.gettimeout = sock.fileno, sock.detach, sock.gettimeout
        self.setsockopt, self.getsockopt = sock.setsockopt, sock.getsockopt
        self.getsockname, self.getpeername = sock.getsockname, sock.getpeername

    def narrow(self) -> None:
        """What is in it is TLS again: all that it gives at a time must fit there, with the rest of a record."""
        self._pull -= RECORD
        if isinstance(self._sock, TlsSocket):
            self._sock.narrow()

    def fresh_session(self) -> ssl.SSLSession | None:
        """Of a client: for connections to come, once the server has said something; None where an old one has served."""
        return None if self._tls.session_reused else self._tls.session

    def handshake(self) -> int:
        """0 when it is done, else the event of poll(2) that it waits for.  OSError."""
        if not self._push():
            return select.POLLOUT
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                if not self._push():
                    return select.POLLOUT
                found = self._how.receive(self._sock, self._pull)
                if found is None:
                    return select.POLLIN
                if found:
                    self._incoming.write(found)
                else:
                    self._incoming.write_eof()
            except ssl.SSLError:
                self._push()  # the alert that says why
                raise
            else:
                self._push()
                return 0

    def recv_into(self, buffer: memoryview) -> int:
        """All that is there in clear; `buffer` has ROOM bytes."""
        with self._lock:
            return self._receive(buffer)

    def _receive(self, buffer: memoryview) -> int:
        total = self._read(buffer)
        while not total:
            found = self._how.receive(self._sock, self._pull)
            if found is None:
                raise BlockingIOError
            if not found:
                return 0  # with or without its alert
            self._incoming.write(found)
            total = self._read(buffer)
            if total < 0:
                return 0
        self.over = self.over or getattr(self._sock, "over", False)
        return max(0, total)

    def send(self, data: bytes | memoryview) -> int:
        with self._lock:
            if not self._owed:
                self._owed = self._tls.write(data[:PUSH])
            if not self._push():
                raise BlockingIOError
            sent, self._owed = self._owed, 0
            return sent

    def shutdown(self, how: int) -> None:
        """SHUT_WR: the peer is told in TLS and in TCP; reading goes on.  BlockingIOError where there is no room to tell."""
        if how == socket.SHUT_WR:
            with self._lock:
                self._tell()
        self._sock.shutdown(how)

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            try:
                self._tls.unwrap()
            except (ssl.SSLError, ValueError):
                pass  # it would wait for the peer's own end, which need not come now
        if not self._push():
            raise BlockingIOError

    def abandon(self) -> None:
        """Nothing more is sent, and what could not go is lost."""
        self._how.shutdown(self._sock, socket.SHUT_WR)

    def _read(self, buffer: memoryview) -> int:
        """Bytes in clear, 0 for none yet, -1 at the peer's alert that there will be no more."""
        total = 0
        # where nothing is left it would only raise, which takes time; but having told our end may have taken in the peer's
        while total < len(buffer) and (
            self._incoming.pending or self._tls.pending() or self._told or self.over
        ):
            try:
                count = self._tls.read(len(buffer) - total, buffer[total:])
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                count = 0
            if not count:
                self.over = True
                return total or -1
            total += count
        return total

    def _push(self) -> bool:
        """Whether all that was encrypted has gone."""
        while True:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
                if not self._unsent:
                    return True
            sent = self._how.send(self._sock, self._unsent)
            if not sent:
                return False
            self._unsent = self._unsent[sent:]


class _Calls:
    """As net.calls, for a TlsSocket: how a Stream reads and writes it."""

    @staticmethod
    def receive(sock: TlsSocket, limit: int) -> memoryview | None:
        """More than `limit` where more is there: what stays here the socket does not tell of."""
        view = syscalls.thread_clear().view
        try:
            return view[: sock.recv_into(view)]
        except BlockingIOError:
            return None

    @staticmethod
    def send(sock: TlsSocket, data: bytes | memoryview) -> int:
        try:
            return sock.send(data)
        except BlockingIOError:
            return 0

    @staticmethod
    def shutdown(sock: TlsSocket, how: int) -> None:
        """Where there is no room to tell in TLS, in TCP alone."""
        try:
            sock.shutdown(how)
        except BlockingIOError:
            sock.abandon()

    close = staticmethod(syscalls.close)


def server_context(certificate: str, key: str, client_ca: str = "") -> ssl.SSLContext:
    """What a listener shows its clients; with `client_ca` they must show a certificate of its.  ValueError names the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, certificate, key)
    if client_ca:
        try:
            context.load_verify_locations(client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"cannot use {client_ca}: {_why(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def accept(stream: Stream, context: ssl.SSLContext) -> None:
    """The handshake, within the stream's deadline; from here on the stream is encrypted.  ProtocolError, StreamError."""
    _shake_hands(stream, context, None)


def client_context(
    ca: str = "", certificate: str = "", key: str = "", insecure: bool = False
) -> ssl.SSLContext:
    """Who is believed, and what is shown.  `ca`: a file of authorities in place of the system's; ValueError names the file.

    `insecure`: whoever answers is believed.
    """
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"cannot use {ca}: {_why(error)}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Python 3.13 refuses authorities without a key usage, which is what `openssl req -x509` makes: the same everywhere
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if certificate:
        _load(context, certificate, key)
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def connect(stream: Stream, context: ssl.SSLContext, server_name: str) -> None:
    """As accept(), from the other side; `server_name` is what its certificate must be for."""
    _shake_hands(stream, context, server_name)


class Acquaintance:
    """One server that is called again and again: what was agreed on once makes later handshakes shorter.  Any thread.

    Its certificate is looked at again after SESSION_SECONDS, and by another acquaintance anew.
    """

    def __init__(self, context: ssl.SSLContext, server_name: str) -> None:
        self._context = context
        self._server_name = server_name
        self._session: ssl.SSLSession | None = None
        self._until = 0.0  # monotonic; that a session is used

    def connect(self, stream: Stream) -> None:
        session = self._session if time.monotonic() < self._until else None
        _shake_hands(stream, self._context, self._server_name, session)

    def remember(self, stream: Stream) -> None:
        """A connection of connect()'s on which the server has spoken."""
        fresh = stream.socket.fresh_session()  # type: ignore[attr-defined]
        if fresh is not None:
            self._session, self._until = fresh, time.monotonic() + SESSION_SECONDS


def _shake_hands(
    stream: Stream,
    context: ssl.SSLContext,
    server_name: str | None,
    session: ssl.SSLSession | None = None,
) -> None:
    how = stream.calls
    sock, unread = stream.detach()
    if unread:
        raise ProtocolError("plaintext before TLS")
    secured = TlsSocket(sock, how, context, server_name, session)
    stream.become(secured, _Calls)
    try:
        while events := secured.handshake():
            stream.wait(events)
    except ssl.SSLError as error:
        raise ProtocolError(f"TLS: {_why(error)}") from error
    except OSError as error:
        raise StreamError(error.strerror or str(error)) from error


def _load(context: ssl.SSLContext, certificate: str, key: str) -> None:
    try:
        context.load_cert_chain(certificate, key or None, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ValueError(
            f"cannot use {certificate} with {key or certificate}: {_why(error)}"
        ) from error


def _no_password() -> str:
    raise ValueError("it needs a pass phrase, and nobody is there to type one")


def _why(error: BaseException) -> str:
    return (
        getattr(error, "verify_message", None)
        or getattr(error, "reason", None)
        or getattr(error, "strerror", None)
        or str(error)
    )
