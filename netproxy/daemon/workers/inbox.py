"""Takes what other workers hand over to this one, and what they tell.

Thread: "inbox".  A thread that needs to know what was told until now takes it itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from functools import partial

from netproxy.daemon.workers.hand_over import parse_given
from netproxy.daemon.workers.messages import close_all, parse_association, receive
from netproxy.typed import TYPE_CHECKING, Callable, Mapping

if TYPE_CHECKING:
    from socket import socket

    from netproxy.daemon.daemon import Daemon
    from netproxy.daemon.workers.messages import Message
    from netproxy.daemon.workers.notices import RightLogins
    from netproxy.handler.socks.associate import Associating
    from netproxy.interfaces.services import Counter, Log
    from netproxy.listener.tcp import TcpListener

CATCH_UP_LIMIT = 512
"""Messages that are taken at once: more than the socket holds."""

REPLY_SECONDS = 10.0
"""For the answer to a request that was handed over."""

Taker = Callable[["Message"], None]
"""Takes a message of one kind, whose descriptors are its own.  Never blocks."""


class Inbox:
    """Reads the messages for one worker."""

    def __init__(
        self, sock: socket, takers: Mapping[str, Taker], counter: Counter, log: Log
    ) -> None:
        """`takers`: by the kind of message."""
        self._socket = sock
        self._takers = takers
        self._counter = counter
        self._log = log
        self._stopped = False
        # Wakes the thread, -1 once closed: a successor reads the socket, so it is never shut down.
        self._wake_up = -1
        # Held while a message is read and taken: so they are taken in their order.
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name="inbox", daemon=True)

    def start(self) -> None:
        """Start the thread.  Raises RuntimeError if there is none to be had, or no descriptor."""
        try:
            self._wake_up = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise RuntimeError(f"no descriptor for the inbox ({error.strerror})") from error
        self.thread.start()

    def stop(self) -> None:
        """Stop the thread; what comes later waits for the successor of this worker."""
        self._stopped = True
        if self.thread.is_alive():
            os.eventfd_write(self._wake_up, 1)
            self.thread.join()
        if self._wake_up >= 0:
            os.close(self._wake_up)
            self._wake_up = -1

    def catch_up(self) -> None:
        """Take what has come until now.  Thread: any, except that of a taker."""
        # Before start() nothing is served yet, and the takers have no configuration.
        if self.thread.is_alive():
            with contextlib.suppress(EOFError, OSError):
                any(not self._take_next() for _ in range(CATCH_UP_LIMIT))

    def _run(self) -> None:
        poll = select.poll()
        for descriptor in (self._socket.fileno(), self._wake_up):
            poll.register(descriptor, select.POLLIN)
        while not self._stopped:
            try:
                poll.poll()
                if not self._stopped:
                    self._take_next()
            except EOFError:
                return
            except OSError as error:
                self._log.limited("inbox", "cannot read messages of other workers: %s", error)

    def _take_next(self) -> bool:
        """Take the next message; return False if there is none.  Raises EOFError, OSError."""
        with self._lock:
            message = receive(self._socket, 0)
            if message is None:
                return False
            try:
                if self._is_whole(message):
                    self._take(message)
            except Exception:
                self._counter.count("connections", "internal error")
                self._log.exception("taking a message of another worker")
        return True

    def _take(self, message: Message) -> None:
        taker = self._takers.get(message.kind)
        if taker is not None:
            taker(message)
            return
        close_all(message.sockets())
        self._log.limited("unknown messages", "another worker sends '%s'", message.kind)

    def _is_whole(self, message: Message) -> bool:
        """Return whether a message has its descriptors; count and record it if not."""
        if not message.is_whole:
            self._counter.count("connections_refused", "no descriptor")
            text = "no descriptor is left for connections of other workers"
            self._log.limited("descriptors of workers", text)
        return message.is_whole


class AssociationTaker:
    """Takes control connections of associations."""

    def __init__(self, daemon: Daemon, logins: RightLogins, counter: Counter) -> None:
        self._daemon = daemon
        self._logins = logins
        self._counter = counter

    def __call__(self, message: Message) -> None:
        """Serve a control connection on the listener that accepted it."""
        sockets = message.sockets()
        try:
            listener, address, flow, reached = parse_association(message)
            accepted_by = str(message.fields.get("accepted_by", listener))
            place = self._place(listener, address, accepted_by)
            if place is None:
                # A reload has removed the listener meanwhile.
                self._counter.count("connections", "listener removed")
                close_all(sockets)
                return
            self._logins.adopt(flow, message.fields.get("grant"))
            accepting, associating = place
            stream, lifetime = parse_given(message, sockets, REPLY_SECONDS)
            begin = partial(associating.take_over, flow=flow, reached=reached)
            accepting.adopt(stream, flow.client, begin, lifetime)
        except BaseException:
            close_all(sockets)
            raise

    def _place(
        self, listener: str, address: str, accepted_by: str
    ) -> tuple[TcpListener, Associating] | None:
        """Return who serves associations on the address of a listener, None if nobody does.

        `accepted_by`: the listener that counts the control connection; another one than
        `listener` if a route of it leads there.
        """
        associating: Associating | None = None
        accepting: TcpListener | None = None
        for spec, running in self._daemon.tcp_pairs:
            is_meant = running.name == listener and str(spec.address) == address
            if is_meant:
                associating = spec.associating
            if running.name == accepted_by and (accepting is None or is_meant):
                accepting = running
        if accepting is None or associating is None:
            return None
        return accepting, associating
