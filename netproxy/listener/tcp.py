"""A TCP listener: one thread accepts, a bounded pool handles.

A socketserver.ThreadingTCPServer whose steps are replaced where its own are no
good for a daemon: accept errors are paced instead of spun on, threads come from
the pool, the fault of one connection is one log record.
"""

from __future__ import annotations

import errno
import select
import socket
import socketserver
import threading
import time
from typing import Any, Callable

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Admission, Handler, Wait
from netproxy.listener.serving import Connection, Serving
from netproxy.net import syscalls
from netproxy.net.address import from_sockaddr, is_ipv6, is_unspecified, to_sockaddr
from netproxy.net.connect import keep_alive, tune
from netproxy.net.activation import LOOK_SECONDS
from netproxy.net.stream import Stream

BACKLOG = 1024  # connections the kernel holds while all threads are busy
ACCEPT_PAUSE = 0.1  # seconds of rest after an accept that failed for want of descriptors or memory
GREETERS_LIMIT = 256  # clients that have not said yet what they want: the oldest yields to the next
ROOM_PAUSE = 0.5  # seconds between two looks at a full pool
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class _Admitted(Connection):
    __slots__ = ("admission",)

    def __init__(
        self, stream: Stream, client: Address, ended: Callable[[Any], None], admission: Admission
    ) -> None:
        """`admission` has counted it in."""
        super().__init__(stream, client, ended)
        self.admission = admission


class TcpListener(socketserver.ThreadingTCPServer):
    network = "tcp"
    name = ""  # in the configuration; of whoever equips it
    request_queue_size = BACKLOG
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(
        self, address: Address, serving: Serving, activated: socket.socket | None = None
    ) -> None:
        """Bound and listening, or by a socket that was `activated` (net.passed); ListenError.

        `handler` and `admission` are set, and equip() called, before start().
        """
        if activated is not None:
            address = from_sockaddr(activated.getsockname())
        self.address_family = socket.AF_INET6 if is_ipv6(address.host) else socket.AF_INET
        self.handler: Handler
        self.admission: Admission
        self._attempt: Callable[[Stream, Address], Wait | None] | None = None
        self._handshake = 0.0  # seconds a connection has until its handler sets a limit of its own
        self._dual_stack = is_unspecified(address.host)
        self._serving = serving
        self._counter, self._log = serving.counter, serving.log
        self._stopping = False
        self._live: set[_Admitted] = set()
        self._greeters: dict[
            _Admitted, None
        ] = {}  # oldest first; some of them may be welcomed by now
        try:
            super().__init__(
                to_sockaddr(address, self.address_family), None, bind_and_activate=activated is None
            )
        except OSError as error:
            raise ListenError(f"tcp {address}: {error.strerror}") from error
        self._activated = activated is not None
        if activated is not None:
            self.socket.close()
            self.socket = activated
            self._set_options()
        self.address = from_sockaddr(self.socket.getsockname())
        self.socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self.socket, select.POLLIN)
        self.thread = threading.Thread(
            target=self.serve_forever, name=f"tcp-listener {self.address}", daemon=True
        )

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(
                socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if self._dual_stack else 1
            )
        self._set_options()
        super().server_bind()

    def _set_options(self) -> None:
        tune(self.socket)  # inherited by every connection: no system call of its own for each
        keep_alive(self.socket)

    def configure(self, handler: Handler, admission: Admission, handshake: float) -> None:
        """What connections meet from now on: `handshake` is the seconds they have until the handler sets another limit."""
        self.handler, self.admission, self._handshake = handler, admission, handshake
        self._attempt = getattr(handler, "attempt", None)

    def start(self) -> None:
        self.thread.start()

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Accepts until stop().  Takes what waits without waiting for it, and only then waits."""
        while not self._stopping:
            attempts = self._attempt is not None  # most of those need no thread
            if not self._serving.pool.wait_for_room(0 if attempts else ROOM_PAUSE):
                self._log.limited(
                    ("full", self.address),
                    "%s: all threads are busy, connections wait",
                    self.address,
                )
                if not attempts:
                    continue
            try:
                accepted = self.get_request()
            except OSError:
                continue
            self._take(*accepted)

    def get_request(self) -> tuple[socket.socket, Any]:
        """One connection.  Where the process has run out of descriptors it rests, so that it never spins."""
        try:
            while (accepted := syscalls.accept(self.socket)) is None:
                self._poll.poll(LOOK_SECONDS * 1000 if self._activated else None)
                if self._stopping:
                    raise OSError(errno.ECANCELED, "stopped")
            return accepted
        except OSError as error:
            if not self._stopping:
                self._counter.count("accept_errors", errno.errorcode.get(error.errno, "other"))
                if error.errno in _EXHAUSTED:
                    self._log.limited(
                        ("accept", self.address),
                        "%s: cannot accept: %s",
                        self.address,
                        error.strerror,
                    )
                    time.sleep(ACCEPT_PAUSE)
            raise

    def verify_request(self, request: socket.socket, client: Address) -> bool:
        refusal = self.admission.enter(client.host)
        if not refusal:
            return True
        self._counter.count("connections_refused", refusal)
        self._log.limited(
            (refusal, client.host), "%s: %s refused: %s", self.address, client.host, refusal
        )
        request.close()
        return False

    def process_request(self, request: socket.socket, client: Address) -> None:
        stream = Stream(request, limited=self._handshake)
        connection = _Admitted(
            stream, client, self._end, self.admission
        )  # a reload may replace it meanwhile
        self._live.add(connection)
        self._greeters[connection] = None
        if len(self._greeters) > GREETERS_LIMIT:
            self._make_room_for_greeters()
        attempt = self._attempt
        self._serving.begin(
            connection,
            lambda: self.handler.handle(stream, client),
            attempt and (lambda: attempt(stream, client)),
        )

    def _make_room_for_greeters(self) -> None:
        """One silent client cannot be told from another: those that have been silent longest go first."""
        silent = []
        for connection in list(self._greeters):  # others end meanwhile
            if connection.stream.welcomed:
                self._greeters.pop(connection, None)
            else:
                silent.append(connection)
        if len(silent) > GREETERS_LIMIT:
            oldest = silent[0]
            self._greeters.pop(oldest, None)
            self._counter.count("connections_refused", "too many handshakes")
            self._log.limited(
                ("greeters", self.address),
                "%s: %s clients say nothing: the oldest are dropped",
                self.address,
                GREETERS_LIMIT,
            )
            oldest.stream.shutdown()

    def _end(self, connection: _Admitted) -> None:
        self._live.discard(connection)
        self._greeters.pop(connection, None)
        connection.stream.close()
        connection.admission.leave(connection.client.host)

    def stop(self) -> None:
        """Nothing is accepted any more; connections that live go on, and those that the kernel has accepted for us begin."""
        if self.thread.is_alive() and not self._activated:
            self._take_waiting()  # with its socket they would be reset
        self._stopping = True
        if not self._activated:
            try:
                self.socket.shutdown(
                    socket.SHUT_RDWR
                )  # wakes poll(2), and accept(2) fails from then on
            except OSError:
                pass
        if self.thread.is_alive():
            self.thread.join()
        self.server_close()

    def _take_waiting(self) -> None:
        for _ in range(BACKLOG):
            try:
                accepted = syscalls.accept(self.socket)
            except OSError:
                return
            if accepted is None:
                return
            self._take(*accepted)

    def _take(self, request: socket.socket, sockaddr: Any) -> None:
        client = from_sockaddr(sockaddr)
        if self.verify_request(request, client):
            self.process_request(request, client)

    @property
    def live(self) -> int:
        return len(self._live)

    def abort(self) -> None:
        """Ends the connections that live, by waking whoever waits on them."""
        for connection in list(self._live):
            connection.stream.shutdown()
