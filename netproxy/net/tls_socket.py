"""TLS on a connected socket that does not block: bytes in clear here, records on the wire.

OpenSSL works on memory, not on the socket.  Its own half-close would read, and lose,
what the peer is still sending; and the peer's end without an alert would keep it from
writing.  A TlsSocket can be within another one: a chain may have several hops with TLS.
Imported with net.tls only: ssl costs time and memory.
Thread: one may read while another writes.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading

from netproxy.interfaces.sockets import LayeredSocket, RecordSocket
from netproxy.net import syscalls
from netproxy.net.syscalls import ROOM
from netproxy.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from netproxy.interfaces.sockets import SocketCalls, StreamSocket

RECORD = 16_709
"""Bytes of the longest record: RFC 8446 section 5.2, and what older versions add."""

RECEIVE_LIMIT = ROOM - RECORD - 1024
"""Bytes taken from the socket at a time: with the rest of a record less than ROOM."""

ENCRYPT_LIMIT = ROOM
"""Bytes encrypted at a time."""

JOIN_LIMIT = 8192
"""Bytes that are copied to share a record with what precedes them: a record costs more."""


class TlsSocket(RecordSocket):
    """A connected socket, its bytes in clear.  Blocking is reported as a plain socket does.

    A send that is not complete raises BlockingIOError.  The next send must begin with the
    same bytes; it returns their number once they are gone.
    """

    send_limit = ENCRYPT_LIMIT

    # Any: `calls` fit the kind of socket that `sock` is.
    def __init__(
        self,
        sock: StreamSocket,
        calls: SocketCalls[Any],
        context: ssl.SSLContext,
        server_name: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """Speak TLS on `sock`, which is read and written with `calls`.

        `server_name` is the server's; None: this end is the server.
        `session`, of an earlier connection to the same server, shortens the handshake.
        """
        self._sock = sock
        self._calls = calls
        self._outer = sock if isinstance(sock, LayeredSocket) else None
        self._receive_limit = RECEIVE_LIMIT
        if self._outer is not None:
            self._outer.reserve_record()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_name is None,
            server_hostname=server_name,
            session=session,
        )
        # Guards the TLS object, which one thread may use at a time, and what follows.
        self._lock = threading.Lock()
        self._unsent = memoryview(b"")
        """Records that the socket has not taken yet."""
        self._encrypted = 0
        """Bytes that were encrypted and that no send() has reported yet."""
        self._alert_written = False
        """True once the alert that nothing more will come from this end was encrypted."""
        self.fileno, self.detach, self.gettimeout = sock.fileno, sock.detach, sock.gettimeout
        self.setsockopt, self.getsockopt = sock.setsockopt, sock.getsockopt
        self.getsockname, self.getpeername = sock.getsockname, sock.getpeername

    def feed(self, received: bytes) -> None:
        """Decipher these bytes first, which were received before; call it before handshake()."""
        self._incoming.write(received)

    def reserve_record(self, count: int = 1) -> None:
        """Take less at a time, as there is TLS within this TLS.

        What is read here must fit into the inner buffer, behind the rest of an inner record.
        """
        self._receive_limit -= count * RECORD
        if self._outer is not None:
            self._outer.reserve_record(count)

    @property
    def version(self) -> str:
        """The version of TLS that both sides have agreed on, "" before that."""
        return self._tls.version() or ""

    def new_session(self) -> ssl.SSLSession | None:
        """Return the session for later connections; None if this one has resumed a session.

        Only for a client, and only after the server has sent something.
        """
        return None if self._tls.session_reused else self._tls.session

    def handshake(self) -> int:
        """Go on with the handshake; return the event of poll(2) that it waits for, 0 if done.

        Raises OSError.
        """
        if not self._flush():
            return select.POLLOUT
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                if not self._flush():
                    return select.POLLOUT
                received = self._calls.receive(self._sock, self._receive_limit)
                if received is None:
                    return select.POLLIN
                if received:
                    self._incoming.write(received)
                else:
                    self._incoming.write_eof()
            except ssl.SSLError:
                # The alert tells the peer why.
                self._flush()
                raise
            else:
                self._flush()
                return 0

    def recv_into(self, buffer: memoryview) -> int:
        """Read what is there into `buffer`; return the count.

        A buffer of ROOM bytes takes all.  A smaller one may leave deciphered bytes behind, of
        which the descriptor does not tell: if it was filled, read again.
        Raises BlockingIOError if nothing is there yet.
        """
        with self._lock:
            return self._receive(buffer)

    def recv_ready(self, buffer: memoryview) -> int:
        """Read what was received before into `buffer`; return the count, 0 for none."""
        with self._lock:
            return max(0, self._decrypt(buffer))

    def _receive(self, buffer: memoryview) -> int:
        total = self._decrypt(buffer)
        while not total:
            received = self._calls.receive(self._sock, self._receive_limit)
            if received is None:
                raise BlockingIOError
            if not received:
                # The end, with or without an alert.
                return 0
            self._incoming.write(received)
            total = self._decrypt(buffer)
            if total < 0:
                return 0
        if self._outer is not None and self._outer.peer_ended:
            # Nothing more comes; but what did not fit into the buffer is still to be read.
            is_cut = total == len(buffer) and (self._incoming.pending or self._tls.pending())
            self.peer_ended = self.peer_ended or not is_cut
        return max(0, total)

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Encrypt and send the first bytes of `data`; return their number.

        Raises BlockingIOError if they are not all gone; see the class.
        """
        with self._lock:
            if not self._encrypted:
                self._encrypted = self._tls.write(data[:ENCRYPT_LIMIT])
            return self._report_sent()

    def send_behind(self, head: bytes, data: bytes | bytearray | memoryview) -> int:
        """Send as send() does, with `head` before `data`; return the bytes sent of `data`.

        `data` has at most `send_limit` bytes.  Few bytes share a record with the head.  More have
        records of their own, as joining would copy them.
        """
        with self._lock:
            if not self._encrypted:
                if len(data) <= JOIN_LIMIT:
                    self._encrypted = self._tls.write(b"".join((head, data))) - len(head)
                else:
                    self._tls.write(head)
                    self._encrypted = self._tls.write(data)
            return self._report_sent()

    def _report_sent(self) -> int:
        """Flush; return the bytes that send() has encrypted.  Raises BlockingIOError."""
        if not self._flush():
            raise BlockingIOError
        sent, self._encrypted = self._encrypted, 0
        return sent

    def shutdown(self, how: int) -> None:
        """Shut down.  SHUT_WR tells the peer in TLS and in TCP; reading goes on.

        Raises BlockingIOError if there is no room for the alert now.
        """
        if how == socket.SHUT_WR:
            with self._lock:
                self._send_alert()
        self._sock.shutdown(how)

    def _send_alert(self) -> None:
        """Send close_notify (RFC 8446 section 6.1), or what is left of it."""
        if not self._alert_written:
            self._alert_written = True
            try:
                self._tls.unwrap()
            except (ssl.SSLError, ValueError):
                # unwrap() would wait for the peer's alert, which need not come now.
                pass
        if not self._flush():
            raise BlockingIOError

    def shutdown_in_tcp(self) -> None:
        """Tell the peer in TCP alone that nothing more comes; what is unsent is lost."""
        self._calls.shutdown(self._sock, socket.SHUT_WR)

    def _decrypt(self, buffer: memoryview) -> int:
        """Return the bytes put into `buffer`: 0 for none yet, -1 if the peer's alert came first."""
        total = 0
        # If nothing is left, read() would only raise, which takes time.  But unwrap() may have
        # taken the peer's records in.
        while total < len(buffer) and (
            self._incoming.pending or self._tls.pending() or self._alert_written or self.peer_ended
        ):
            free = buffer[total:]
            try:
                # With a buffer read() returns the count.
                count: int = self._tls.read(len(free), free)  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                count = 0
            if not count:
                self.peer_ended = True
                return total or -1
            total += count
        return total

    def _flush(self) -> bool:
        """Send what is encrypted; return whether nothing is left."""
        while True:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
                if not self._unsent:
                    return True
            sent = self._calls.send(self._sock, self._unsent)
            if not sent:
                return False
            self._unsent = self._unsent[sent:]


class LayeredCalls:
    """The SocketCalls of a LayeredSocket: a TlsSocket, or a stream in chunks within it."""

    @staticmethod
    def receive(sock: LayeredSocket, limit: int) -> memoryview | None:
        """Return what is there, as SocketCalls says.

        More than `limit` if more is there: the socket would tell nothing of what is kept.
        """
        view = syscalls.buffers.cleartext.view
        try:
            return view[: sock.recv_into(view)]
        except BlockingIOError:
            return None

    @staticmethod
    def send(sock: LayeredSocket, data: bytes | bytearray | memoryview) -> int:
        """Return how many bytes were sent without waiting."""
        try:
            return sock.send(data)
        except BlockingIOError:
            return 0

    @staticmethod
    def shutdown(sock: LayeredSocket, how: int) -> None:
        """Shut down; in TCP alone if there is no room for the layer's own end."""
        try:
            sock.shutdown(how)
        except BlockingIOError:
            sock.shutdown_in_tcp()

    close = staticmethod(syscalls.close)
