"""The control socket: a Unix socket that only its owner may open.

Takes one JSON object a line, {"command": "upstreams"}, and answers each with
{"result": ...} or {"error": "..."}.  admin.commands has the commands, admin.control.client
serves one client on a thread of its own.  If there are too many, the one that has been silent
for longest goes.  What only the main thread may do is handed to it (ReloadRequests).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
import time

from netproxy.admin.control.client import Action, Command, CommandError, ControlClient
from netproxy.admin.control.places import make_folder
from netproxy.errors import ListenError
from netproxy.net.address import is_abandoned
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.services import Log

RELOAD_SECONDS = 60.0
"""For the main thread to reload: lists may be long, and names may be looked up."""
STOP_SECONDS = 5.0
"""How long commands that are being carried out may delay the end."""
CLIENTS_LIMIT = 16
"""Clients at once: people, and a program or two."""
BACKLOG = 8
ACCEPT_PAUSE = 0.1
"""Seconds to wait if no client can be accepted."""


class _ReloadRequest:
    """One client that waits for a reload."""

    __slots__ = ("done", "errors")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.errors: Sequence[str] = ()


class ReloadRequests:
    """Reloads that control threads request and that the main thread does."""

    def __init__(self, wake: Action) -> None:
        """`wake` makes the main thread reload: it sends the signal."""
        self._wake = wake
        # Guards _waiting.
        self._lock = threading.Lock()
        self._waiting: list[_ReloadRequest] = []

    def request(self) -> None:
        """Wait for a reload that begins from now on.

        Raises CommandError with the errors of the reload, one a line.
        """
        request = _ReloadRequest()
        with self._lock:
            self._waiting.append(request)
        self._wake()
        if not request.done.wait(RELOAD_SECONDS):
            raise CommandError("the reload is still running: see the log for its outcome")
        if request.errors:
            raise CommandError("\n".join(request.errors))

    def begin(self) -> Callable[[Sequence[str]], None]:
        """Note that a reload begins.  Thread: main.

        The returned call passes its errors, none for success, to those who had requested it.
        """
        with self._lock:
            waiting, self._waiting = self._waiting, []

        def finish(errors: Sequence[str]) -> None:
            for request in waiting:
                request.errors = errors
                request.done.set()

        return finish


class ControlServer:
    """The bound socket, and the thread that serves its clients."""

    def __init__(
        self, path: str, commands: Mapping[str, Command], log: Log, is_configured: bool = True
    ) -> None:
        """Bind `path`; a socket that a killed daemon has left there is replaced.

        A place that nobody has configured may lack its folder, which is made.  Raises ListenError.
        """
        self.path = path
        self._commands = commands
        self._log = log
        self._begun, self._stopped = threading.Event(), threading.Event()
        # Guards _clients.
        self._lock = threading.Lock()
        # The clients that are being served, each with its thread.
        self._clients: dict[ControlClient, threading.Thread] = {}
        self._number = 0
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            if not is_configured:
                make_folder(path)
            self._bind()
        except OSError as error:
            self._socket.close()
            in_use = error.errno == errno.EADDRINUSE and _is_socket(path)
            whose = " by another daemon" if in_use else ""
            raise ListenError(f"control unix:{path}: {error.strerror}{whose}") from error
        self.thread = threading.Thread(target=self._serve, name="control", daemon=True)

    def prepare(self) -> None:
        """Start the thread, which serves nobody before start().  Raises ListenError."""
        try:
            self.thread.start()
        except RuntimeError as error:
            # "can't start new thread"
            raise ListenError(f"control unix:{self.path}: {error}") from error

    def start(self) -> None:
        """Serve from now on.  Cannot fail after prepare(); without it, this does the same."""
        if self.thread.ident is None:
            self.prepare()
        self._begun.set()

    def stop_accepting(self) -> None:
        """Take no new client.

        Those that wait for an answer still get it, such as the one whose reload has ended this
        socket.
        """
        self._end()

    def stop(self) -> None:
        """Close the socket and its clients, and end the threads."""
        self._end()
        deadline = time.monotonic() + STOP_SECONDS
        if self.thread.is_alive():
            self.thread.join(STOP_SECONDS)
        with self._lock:
            clients = dict(self._clients)
        for client in clients:
            client.shutdown()
        for thread in filter(threading.Thread.is_alive, clients.values()):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _end(self) -> None:
        self._stopped.set()
        # Wakes the thread before start().
        self._begun.set()
        # Wakes the thread in accept().
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        if not self.thread.is_alive():
            self._socket.close()
        try:
            os.unlink(self.path)
        except OSError:
            # Already removed.
            pass

    def _bind(self) -> None:
        if is_abandoned(self.path):
            os.unlink(self.path)
        before = os.umask(0o177)
        try:
            self._socket.bind(self.path)
        finally:
            os.umask(before)
        self._socket.listen(BACKLOG)

    # -- the thread

    def _serve(self) -> None:
        self._begun.wait()
        while not self._stopped.is_set():
            try:
                sock, _ = self._socket.accept()
            except OSError as error:
                # Most likely out of descriptors.
                if not self._stopped.wait(ACCEPT_PAUSE):
                    self._log.limited("control", "control socket: %s", error.strerror)
                continue
            self._admit(ControlClient(sock, self._commands, self._log))
        self._socket.close()

    def _admit(self, client: ControlClient) -> None:
        """Serve a client on a thread of its own."""
        with self._lock:
            self._number += 1
            name = f"control-client-{self._number}"
            silent = [other for other in self._clients if other.silent_since is not None]
            has_room = len(self._clients) < CLIENTS_LIMIT or bool(silent)
            if len(self._clients) >= CLIENTS_LIMIT and silent:
                oldest = min(silent, key=lambda other: other.silent_since or 0.0)
                self._clients.pop(oldest)
                oldest.shutdown()
            if has_room:
                thread = threading.Thread(
                    target=self._converse, args=(client,), name=name, daemon=True
                )
                self._clients[client] = thread
        if not has_room:
            client.refuse("too many clients")
            return
        try:
            thread.start()
        except RuntimeError as error:
            # "can't start new thread"
            self._log.limited("control", "control socket: %s", error)
            self._forget(client)
            client.refuse(str(error))

    def _converse(self, client: ControlClient) -> None:
        try:
            client.serve(self._stopped.is_set)
        finally:
            self._forget(client)

    def _forget(self, client: ControlClient) -> None:
        with self._lock:
            self._clients.pop(client, None)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False
