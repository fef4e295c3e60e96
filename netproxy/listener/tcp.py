"""A TCP listener: one thread accepts and begins each connection's handshake.

It is a socketserver.ThreadingTCPServer with other steps: accept errors are paced, connections
are driven by listener.handshake_driver, and handshakes may be shed (listener.shedding).
"""

from __future__ import annotations

import errno
import select
import socket
import socketserver
import threading
import time
from typing import TYPE_CHECKING, Any

from netproxy.interfaces.listeners import EVICTED
from netproxy.interfaces.services import Refusal
from netproxy.listener.accepted import Accepted
from netproxy.listener.endings import refuse
from netproxy.listener.shedding import Handshakes
from netproxy.listener.handshake_driver import Serving
from netproxy.net import syscalls
from netproxy.net.address import from_sockaddr, is_ipv6, is_unspecified, listen_error, to_sockaddr
from netproxy.net.socket_options import LOOK_SECONDS, tune
from netproxy.net.stream import Stream

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handler
    from netproxy.interfaces.listeners import Admission

# Connections that the kernel holds until they are accepted.
BACKLOG = 1024
# Seconds of rest after an accept that failed because descriptors or memory ran out.
ACCEPT_PAUSE = 0.1
SHED = "too many handshakes"
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class TcpListener(socketserver.ThreadingTCPServer):
    """A bound, listening socket and its thread.  configure() comes before start()."""

    network = "tcp"
    name = ""
    """The listener's name in the configuration."""
    request_queue_size = BACKLOG
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(
        self, address: Address, serving: Serving, activated: socket.socket | None = None
    ) -> None:
        """Bind, or take a socket over from the service manager.  Raises ListenError."""
        if activated is not None:
            address = from_sockaddr(activated.getsockname())
        self.address_family = socket.AF_INET6 if is_ipv6(address.host) else socket.AF_INET
        self.handler: Handler
        self.admission: Admission
        self._handshake_seconds = 0.0
        self._dual_stack = is_unspecified(address.host)
        self._serving = serving
        self._counter, self._log = serving.counter, serving.log
        self._stopping = False
        # Set while serve_forever() does not run.
        self._stopped = threading.Event()
        self._stopped.set()
        self._live: set[Accepted] = set()
        self.handshakes = Handshakes()
        try:
            super().__init__(
                to_sockaddr(address, self.address_family),
                socketserver.BaseRequestHandler,
                bind_and_activate=activated is None,
            )
        except OSError as error:
            raise listen_error("tcp", address, error) from error
        self._activated = activated is not None
        try:
            if activated is not None:
                self.socket.close()
                self.socket = activated
                self._set_options()
            self.address = from_sockaddr(self.socket.getsockname())
        except OSError as error:
            self.server_close()
            raise listen_error("tcp", address, error) from error
        self.socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self.socket, select.POLLIN)
        self.thread = threading.Thread(
            target=self.serve_forever, name=f"tcp-listener {self.address}", daemon=True
        )

    def server_bind(self) -> None:
        """Bind the socket with our options."""
        if self.address_family == socket.AF_INET6:
            only_ipv6 = 0 if self._dual_stack else 1
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
        self._set_options()
        super().server_bind()

    def _set_options(self) -> None:
        # Accepted sockets inherit these, which spares system calls for each of them.
        tune(self.socket)

    def configure(
        self, handler: Handler, admission: Admission, handshake_seconds: float, handshakes: int
    ) -> None:
        """Set what new connections meet.

        `handshake_seconds` is the time of a handshake, unless its handler sets another limit.
        `handshakes`: beyond so many unfinished ones some are shed.
        """
        self.handler = handler
        self.admission = admission
        self._handshake_seconds = handshake_seconds
        self.handshakes.set_limit(handshakes)

    def start(self) -> None:
        """Start the thread.  Raises RuntimeError if there is none to be had."""
        self.thread.start()

    # -- the accepting thread

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Accept until shutdown() or stop().

        `poll_interval` has no meaning here: shutdown() wakes the thread.
        """
        self._stopped.clear()
        try:
            while not self._stopping:
                try:
                    request, client = self.get_request()
                except OSError:
                    continue
                try:
                    if self.verify_request(request, client):
                        self.process_request(request, client)
                except Exception:
                    self.handle_error(request, client)
                    self.shutdown_request(request)
        finally:
            self._stopped.set()

    def get_request(self) -> tuple[socket.socket, Address]:
        """Accept one connection; return its socket and the client's address.

        Pauses if the process has run out of descriptors, so that the thread never spins.
        Raises OSError.
        """
        try:
            while (accepted := syscalls.accept(self.socket)) is None:
                self._poll.poll(LOOK_SECONDS * 1000 if self._activated else None)
                if self._stopping:
                    raise OSError(errno.ECANCELED, "stopped")
            return accepted[0], from_sockaddr(accepted[1])
        except OSError as error:
            if not self._stopping:
                self._note_accept_error(error)
            raise

    def _note_accept_error(self, error: OSError) -> None:
        name = errno.errorcode.get(error.errno or 0, "other")
        self._counter.count("accept_errors", name)
        if error.errno in _EXHAUSTED:
            self._log.limited(
                ("accept", self.address), "%s: cannot accept: %s", self.address, error.strerror
            )
            time.sleep(ACCEPT_PAUSE)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the exception that is being handled.  Any: as in verify_request()."""
        self._log.exception(f"accepting {client_address} on {self.address}")

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether a client may connect; close and count its socket if not.

        Any: socketserver's types; here a socket and an Address.
        """
        refusal = self.admission.enter(client_address.host)
        if not refusal:
            return True
        host = client_address.host
        decided = self.admission.decided_by(refusal, host)
        self._counter.refuse(Refusal("connections_refused", refusal, self.name, host, "", decided))
        request.close()
        return False

    def note_eviction(self, connection: Accepted) -> None:
        """Count a connection that has ended for one of another client.  Thread: any.

        It is recorded as refused, unless the record of its flow says so.
        """
        key = "connections_refused", EVICTED
        if connection.stream.evicted:
            refuse(connection, key, self._counter)
        else:
            self._counter.count(*key)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin the handshake of an admitted connection.  Any: as in verify_request()."""
        stream = Stream(request, limited=self._handshake_seconds)
        if self._log.tracing:
            stream.trace = self._log.trace(self.name, client_address)
            stream.trace.step("accepted", at=self.address)
        connection = Accepted(stream, client_address)
        connection.listener = self
        connection.admission = self.admission  # a reload may replace it meanwhile
        self._live.add(connection)
        connection.admission.residents[connection] = None
        handshakes = self.handshakes
        handshakes.uncounted[connection] = None
        if len(handshakes.uncounted) > handshakes.room:
            self._shed()
        self._serving.begin(connection, self.handler.handle(stream, client_address))

    def _shed(self) -> None:
        """Close a connection of the client with most handshakes, if there are too many."""
        shed = self.handshakes.shed()
        if shed is None:
            return
        shed.refused = SHED
        refuse(shed, ("connections_refused", SHED), self._counter)
        shed.stream.shutdown()

    def forget(self, connection: Accepted) -> None:
        """Note that a connection has ended.  Thread: any."""
        self._live.discard(connection)
        self.handshakes.uncounted.pop(connection, None)
        connection.stream.handshaking = False
        if connection.counted:
            self.handshakes.leave(connection)

    # -- the end

    def shutdown(self) -> None:
        """Stop accepting and wait until serve_forever() has returned."""
        self._stopping = True
        if not self._activated:
            try:
                # Wakes poll(2); accept(2) fails from then on.
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._stopped.wait()

    def stop(self) -> None:
        """Stop accepting and close the socket.

        Live connections go on, and those that the kernel has accepted for us begin.
        """
        if self.thread.is_alive() and not self._activated:
            self._accept_waiting()  # closing the socket would reset them
        self.shutdown()
        if self.thread.is_alive():
            self.thread.join()
        self.server_close()

    def _accept_waiting(self) -> None:
        for _ in range(BACKLOG):
            try:
                accepted = syscalls.accept(self.socket)
            except OSError:
                return
            if accepted is None:
                return
            client = from_sockaddr(accepted[1])
            if self.verify_request(accepted[0], client):
                self.process_request(accepted[0], client)

    @property
    def live(self) -> int:
        """Connections that have not ended."""
        return len(self._live)

    def connections(self) -> list[Accepted]:
        """Return the connections that have not ended."""
        return list(self._live)

    def abort(self) -> None:
        """End live connections, by waking what waits for them."""
        for connection in self.connections():
            connection.stream.shutdown()
