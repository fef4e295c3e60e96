"""The control socket: a Unix socket that only its owner may open.

Takes one JSON object a line, {"command": "upstreams"}, and answers each with
{"result": ...} or {"error": "..."}.  admin.commands has the commands.  One thread serves one
client after the other; a silent client is disconnected.  What only the main thread may do is
handed to it (ReloadRequests).
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Sequence, TypeAlias

from netproxy.errors import ListenError, NetProxyError

if TYPE_CHECKING:
    from netproxy.interfaces.services import Log

SECONDS = 5.0
"""For a client to send a request, and to receive the answer."""
RELOAD_SECONDS = 60.0
"""For the main thread to reload: lists may be long, and names may be looked up."""
ANSWER_SECONDS = RELOAD_SECONDS + SECONDS
"""How long netproxyctl waits for an answer."""
LINE_LIMIT = 65536
"""Bytes of a request."""
ANSWER_LIMIT = 64 << 20
"""Bytes of an answer: ten thousand sessions are a few MiB."""
BACKLOG = 8
ACCEPT_PAUSE = 0.1
"""Seconds to wait if no client can be accepted."""

CommandRequest: TypeAlias = Mapping[str, object]
"""The JSON object that a client has sent.  Only its key "command" has been checked."""
Command: TypeAlias = Callable[[CommandRequest], object]
"""Returns the answer, as JSON values.  Raises CommandError if the request is wrong."""
_Action: TypeAlias = Callable[[], None]


class NotRunning(NetProxyError):
    """No daemon answers at the control socket."""


class CommandError(NetProxyError):
    """The daemon has refused a command; the message says why."""


class ActAfterAnswer(NamedTuple):
    """The result of a command that acts only after its answer has been sent."""

    answer: object
    act: _Action


class _ReloadRequest:
    """One client that waits for a reload."""

    __slots__ = ("done", "errors")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.errors: Sequence[str] = ()


class ReloadRequests:
    """Reloads that control threads request and that the main thread does."""

    def __init__(self, wake: _Action) -> None:
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

    def __init__(self, path: str, commands: Mapping[str, Command], log: Log) -> None:
        """Bind `path`; a socket that a killed daemon has left there is replaced.

        Raises ListenError.
        """
        self.path = path
        self._commands = commands
        self._log = log
        self._begun, self._stopped = threading.Event(), threading.Event()
        # The client that is being served.
        self._client: socket.socket | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._bind()
        except OSError as error:
            self._socket.close()
            raise ListenError(f"control unix:{path}: {error.strerror or error}") from error
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

        The client whose reload has ended this socket still gets its answer.
        """
        self._end(self._socket)

    def stop(self) -> None:
        """Close the socket and its client, and end the thread."""
        self._end(self._socket, self._client)
        if self.thread.is_alive():
            self.thread.join(SECONDS)

    def _end(self, *sockets: socket.socket | None) -> None:
        self._stopped.set()
        # Wakes the thread before start().
        self._begun.set()
        # Wakes the thread in accept() or in a conversation.
        for sock in sockets:
            try:
                if sock is not None:
                    sock.shutdown(socket.SHUT_RDWR)
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
        if _is_abandoned(self.path):
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
                client, _ = self._socket.accept()
            except OSError as error:
                # Most likely out of descriptors.
                if not self._stopped.wait(ACCEPT_PAUSE):
                    self._log.limited("control", "control socket: %s", error.strerror)
                continue
            self._client = client
            with client:
                client.settimeout(SECONDS)
                try:
                    self._converse(client)
                except OSError:
                    # The client has gone, or was silent for too long.
                    pass
                except Exception:
                    self._log.exception("answering on the control socket")
        self._socket.close()

    def _converse(self, client: socket.socket) -> None:
        with client.makefile("rwb") as lines:
            while line := lines.readline(LINE_LIMIT):
                answer, act = self._answer(line)
                lines.write(answer + b"\n")
                lines.flush()
                if act is not None:
                    act()
                if self._stopped.is_set():
                    return

    def _answer(self, line: bytes) -> tuple[bytes, _Action | None]:
        """Return the answer, and what to do after it has been sent."""
        # Imported late: few daemons are ever asked.
        import json

        try:
            request = json.loads(line)
            command = self._commands[request["command"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            known = ", ".join(self._commands)
            return json.dumps({"error": f"unknown command (known: {known})"}).encode(), None
        try:
            result = command(request)
        except NetProxyError as error:
            return json.dumps({"error": str(error)}).encode(), None
        act = None
        if isinstance(result, ActAfterAnswer):
            result, act = result
        return json.dumps({"result": result}).encode(), act


def ask(path: str, command: str, **details: object) -> Any:
    """Send a command to the daemon at a control socket; return its answer.

    Raises NotRunning or CommandError.  Any: each command has an answer of its own.
    """
    # Imported late: netproxyd needs it only to answer.
    import json

    client = socket.socket(socket.AF_UNIX)
    client.settimeout(ANSWER_SECONDS)
    try:
        with client:
            client.connect(path)
            client.sendall(json.dumps({"command": command, **details}).encode() + b"\n")
            with client.makefile("rb") as lines:
                answer = json.loads(lines.readline(ANSWER_LIMIT))
    except OSError as error:
        raise NotRunning(f"{path}: {error.strerror or 'no answer'}") from error
    except ValueError as error:
        raise NotRunning(f"{path}: no answer") from error
    if "error" in answer:
        raise CommandError(answer["error"])
    return answer["result"]


def _is_abandoned(path: str) -> bool:
    """Return whether there is a socket on which nobody listens."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
