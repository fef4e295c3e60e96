"""A TCP listener: one thread accepts and begins each connection's handshake.

It is a socketserver.ThreadingTCPServer with other steps: accept errors are paced, connections
are driven by listener.handshake_driver, and handshakes may be shed (listener.shedding).  While
it is busy the poller's thread accepts (listener.busy).
"""

from __future__ import annotations

import errno
import socket
import socketserver
import threading
import time

from netproxy.interfaces.services import Refusal
from netproxy.listener.accepted import Accepted, CountedElsewhere, Lifetime
from netproxy.listener.busy import BusyAccept
from netproxy.listener.endings import refuse
from netproxy.listener.shedding import Handshakes
from netproxy.listener.handshake_driver import Serving
from netproxy.listener.sockets.accept_wait import AcceptWait, SharedAcceptWait, note_accept_error
from netproxy.net import syscalls
from netproxy.net.address import family_and_sockaddr, from_sockaddr, is_unspecified, listen_error
from netproxy.net.socket_options import tune
from netproxy.net.stream import Stream
from netproxy.typed import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handler, Handshake
    from netproxy.interfaces.listeners import Admission

    Begin = Callable[[Stream], Handshake]

BACKLOG = 1024  # connections that the kernel holds until they are accepted
ACCEPT_PAUSE = 0.1  # seconds of rest after an accept for which descriptors or memory ran out
SHED = "too many handshakes"


class TcpListener(socketserver.ThreadingTCPServer):
    """A bound, listening socket and its thread.  configure() comes before start()."""

    network = "tcp"
    name = ""  # the listener's name in the configuration
    leaves_waiting = False  # True if another process accepts what waits when this one stops
    ends_socket = False  # True if stop() ends the listening for all processes that hold the socket
    local_address: Address | None = None  # that of its connections; None: the kernel tells
    _accept = staticmethod(syscalls.accept)
    _to_address, _place = staticmethod(from_sockaddr), staticmethod(family_and_sockaddr)
    _handshake_seconds, _stopping = 0.0, False
    request_queue_size = BACKLOG
    allow_reuse_address = True
    daemon_threads, block_on_close = True, False

    def __init__(
        self, address: Address, serving: Serving, given: socket.socket | None = None
    ) -> None:
        """Bind, or take over a socket that was bound for this process.  Raises ListenError."""
        if given is not None:
            address = self._to_address(given.getsockname())
        self.address_family, sockaddr = self._place(address)
        self.handler: Handler
        self.admission: Admission
        self._serving = serving
        self._counter, self._log = serving.counter, serving.log
        # Set while serve_forever() does not run.
        self._stopped, self._begun = threading.Event(), threading.Event()
        self._stopped.set()
        self._begun.set()
        self._live: set[Accepted] = set()
        self.handshakes = Handshakes()
        self._wait: AcceptWait | SharedAcceptWait = AcceptWait()
        self._busy = BusyAccept(serving.poller, self._accept_now)
        try:
            super().__init__(sockaddr, socketserver.BaseRequestHandler, given is None)
        except OSError as error:
            raise listen_error("tcp", address, error) from error
        try:
            if given is not None:
                self.socket.close()
                self.socket = given
                self._set_options()
                self._wait = SharedAcceptWait()
            self._wait.watch(self.socket)
            self.address = self._to_address(self.socket.getsockname())
        except OSError as error:
            self.server_close()
            raise listen_error("tcp", address, error) from error
        self.socket.setblocking(False)
        name = f"tcp-listener {self.address}"
        self.thread = threading.Thread(target=self.serve_forever, name=name, daemon=True)

    def server_bind(self) -> None:
        """Bind the socket with our options."""
        if self.address_family == socket.AF_INET6:
            only = 0 if is_unspecified(str(self.server_address[0])) else 1
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        self._set_options()
        super().server_bind()

    def _set_options(self) -> None:
        tune(self.socket)  # accepted sockets inherit these, which spares system calls

    def configure(
        self, handler: Handler, admission: Admission, handshake_seconds: float, handshakes: int
    ) -> None:
        """Set what new connections meet.  `handshake_seconds`: of a handshake, unless its handler
        sets another limit.  Beyond `handshakes` unfinished ones some are shed."""
        self.handler = handler
        self.admission = admission
        self._handshake_seconds = handshake_seconds
        self.handshakes.set_limit(handshakes)

    def start(self, held: bool = False) -> None:
        """Start the thread; `held`: it accepts nothing before begin().  Raises RuntimeError."""
        if held:
            self._begun.clear()
        self.thread.start()

    def begin(self) -> None:
        """Accept from now on."""
        self._begun.set()

    def halt(self) -> None:
        """Do nothing: stop() takes no time."""

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Accept until shutdown() or stop(), which wake the thread.  `poll_interval`: unused."""
        self._stopped.clear()
        try:
            self._begun.wait()
            while not self._stopping:
                try:
                    request, client = self.get_request()
                except OSError:
                    continue
                self._serve(request, client)
                if self._busy.count():
                    self._busy.lend(self._wait.watched)
        finally:
            self._stopped.set()

    def _serve(self, request: socket.socket, client: Address) -> None:
        try:
            if self.verify_request(request, client):
                self.process_request(request, client)
        except Exception:
            self.handle_error(request, client)
            self.shutdown_request(request)

    def _accept_now(self) -> bool:
        """Serve a connection; return False if none waits.  Raises OSError, also if stopped."""
        if self._stopping:
            raise OSError(errno.ECANCELED, "stopped")
        try:
            accepted = self._accept(self.socket)
        except OSError as error:
            self._note(error)
            raise
        if accepted is not None:
            self._serve(*accepted)
        return accepted is not None

    def get_request(self) -> tuple[socket.socket, Address]:
        """Return a new connection and its client.  Raises OSError, perhaps after a pause."""
        try:
            while True:
                # Wait first: most connections come alone, and accept(2) would return EAGAIN.
                self._wait.wait()
                if self._stopping:
                    raise OSError(errno.ECANCELED, "stopped")
                if (accepted := self._accept(self.socket)) is not None:
                    return accepted
        except OSError as error:
            if not self._stopping and self._note(error):
                time.sleep(ACCEPT_PAUSE)
            raise

    def _note(self, error: OSError) -> bool:
        return note_accept_error(error, self.address, self._counter, self._log)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the exception that is being handled.  Any: as in verify_request()."""
        self._log.exception(f"accepting {client_address} on {self.address}")

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether a client may connect; close and count its socket if not.

        Any: socketserver's types; here a socket and an Address.
        """
        host = client_address.host
        refusal = self.admission.enter(host)
        if not refusal:
            return True
        decided = self.admission.decided_by(refusal, host)
        self._counter.refuse(Refusal("connections_refused", refusal, self.name, host, "", decided))
        request.close()
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin the handshake of an admitted connection.  Any: as in verify_request()."""
        stream = Stream(request, b"", self._handshake_seconds, self.local_address)
        connection = self._resident(stream, client_address, self.admission)
        self.handshakes.uncounted[connection] = None
        if len(self.handshakes.uncounted) > self.handshakes.room:
            self._shed()
        self._counter.count("connections", "accepted")
        handshake = self.handler.handle(stream, client_address)
        # A connection to a busy listener has mostly sent its first bytes before it is accepted.
        self._serving.begin(connection, handshake, self._busy.is_lent)

    def adopt(
        self, stream: Stream, client: Address, begin: Begin, lifetime: socket.socket | None
    ) -> None:
        """Serve a connection that another process counts; `lifetime` tells it of the end."""
        stream.handshaking = False
        elsewhere = CountedElsewhere(self.admission)
        connection = self._resident(stream, client, elsewhere)
        if lifetime is not None:
            Lifetime(lifetime, stream, elsewhere.count_here).begin(self._serving.poller)
        self._serving.begin(connection, begin(stream))

    def _resident(self, stream: Stream, client: Address, admission: Admission) -> Accepted:
        """Return the connection of an admitted client."""
        if self._log.tracing:
            stream.trace = self._log.trace(self.name, client)
            stream.trace.step("accepted", at=self.address)
        connection = Accepted(stream, client)
        connection.listener = self
        connection.admission = admission  # a reload may replace that of the listener
        self._live.add(connection)
        connection.admission.residents[connection] = None
        return connection

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

    def server_close(self) -> None:
        """Close the socket."""
        super().server_close()
        self._wait.close()

    def shutdown(self) -> None:
        """Stop accepting and wait until serve_forever() has returned."""
        self._stopping = True
        self._begun.set()
        self._wait.wake()
        self._stopped.wait()

    def stop(self) -> None:
        """Stop accepting; live connections go on, and those that the kernel holds begin."""
        if self.thread.is_alive() and self._begun.is_set() and not self.leaves_waiting:
            try:
                try:  # closing the socket would reset those that wait
                    all(self._accept_now() for _ in range(BACKLOG))  # until none waits
                finally:
                    if self.ends_socket:  # another's copy would take what nobody accepts
                        self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.shutdown()
        if self.thread.is_alive():
            self.thread.join()
        self.server_close()

    @property
    def live(self) -> int:
        """Connections that have not ended."""
        return len(self._live)

    @property
    def counted(self) -> int:
        """Connections that have not ended, without those that another process counts."""
        return sum(connection.admission.counts_here for connection in self.connections())

    def connections(self) -> list[Accepted]:
        """Return the connections that have not ended."""
        return list(self._live)

    def abort(self) -> None:
        """End live connections, by waking what waits for them."""
        for connection in self.connections():
            connection.stream.shutdown()
