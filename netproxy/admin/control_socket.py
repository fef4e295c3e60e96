"""The control socket: asks a running daemon, or tells it, over a Unix socket that only its owner may open.

One JSON object a line each way: {"command": "upstreams"} is answered by {"result": ...}
or {"error": "..."}.  One thread serves one client after the other; a client that is
silent is hung up on.  What only the main thread may do is asked of it (Reloads).
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from netproxy.errors import ListenError, NetProxyError
from netproxy.interfaces.services import Log

SECONDS = 5.0  # for a client to ask, and to take its answer
RELOAD_SECONDS = (
    60.0  # for the main thread to reload: lists may be long, and names may be looked up
)
ANSWER_SECONDS = RELOAD_SECONDS + SECONDS  # that netproxyctl waits
LINE_LIMIT = 65536  # bytes of a request
ANSWER_LIMIT = 64 << 20  # bytes of an answer: sessions by the ten thousand are a few MiB
BACKLOG = 8
PAUSE = 0.1  # seconds, where no client can be accepted

Commands = Mapping[str, Callable[[Mapping[str, Any]], Any]]


class NotRunning(NetProxyError):
    """Nobody answers at the control socket."""


class CommandError(NetProxyError):
    """The daemon has refused a command; the message says why."""


class Then(NamedTuple):
    """What a command gives that has something to do once its answer has been sent."""

    result: Any
    act: Callable[[], None]


class _Asked:
    __slots__ = ("done", "errors")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.errors: Sequence[str] = ()


class Reloads:
    """Reloads that are asked for on one thread and made on the main one, which a signal wakes."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` sends the signal."""
        self._wake = wake
        self._lock = threading.Lock()  # guards _waiting
        self._waiting: list[_Asked] = []

    def ask(self) -> None:
        """Waits for a reload that begins from now on; CommandError with what is wrong, a line each."""
        asked = _Asked()
        with self._lock:
            self._waiting.append(asked)
        self._wake()
        if not asked.done.wait(RELOAD_SECONDS):
            raise CommandError("the reload goes on: how it ends is in the log")
        if asked.errors:
            raise CommandError("\n".join(asked.errors))

    def begin(self) -> Callable[[Sequence[str]], None]:
        """Before a reload, on the main thread; gives back what tells its errors, none for success, to those who asked until now."""
        with self._lock:
            waiting, self._waiting = self._waiting, []

        def tell(errors: Sequence[str]) -> None:
            for asked in waiting:
                asked.errors = errors
                asked.done.set()

        return tell


class ControlServer:
    def __init__(self, path: str, commands: Commands, log: Log) -> None:
        """Binds; ListenError.  A command gets the whole request, and raises CommandError for what is wrong with it."""
        self.path = path
        self._commands = commands
        self._log = log
        self._begun, self._stopped = threading.Event(), threading.Event()
        self._client: socket.socket | None = None  # who is being served
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._bind()
        except OSError as error:
            self._socket.close()
            raise ListenError(f"control unix:{path}: {error.strerror or error}") from error
        self.thread = threading.Thread(target=self._serve, name="control", daemon=True)

    def prepare(self) -> None:
        """Its thread, which answers nobody before start(); ListenError."""
        try:
            self.thread.start()
        except RuntimeError as error:  # can't start new thread
            raise ListenError(f"control unix:{self.path}: {error}") from error

    def start(self) -> None:
        """Answers from now on; cannot fail after prepare(), which it does where nobody has."""
        if self.thread.ident is None:
            self.prepare()
        self._begun.set()

    def retire(self) -> None:
        """Takes no new client; one that is being answered, with the very reload that ends this socket, is answered."""
        self._end(self._socket)

    def stop(self) -> None:
        self._end(self._socket, self._client)
        if self.thread.is_alive():
            self.thread.join(SECONDS)

    def _end(self, *sockets: socket.socket | None) -> None:
        self._stopped.set()
        self._begun.set()  # wakes what has not begun
        for sock in sockets:  # wakes accept(), and a conversation
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
            pass  # somebody was faster

    def _bind(self) -> None:
        if _abandoned(self.path):
            os.unlink(self.path)  # of a daemon that was killed
        before = os.umask(0o177)
        try:
            self._socket.bind(self.path)
        finally:
            os.umask(before)
        self._socket.listen(BACKLOG)

    def _serve(self) -> None:
        self._begun.wait()
        while not self._stopped.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError as error:
                if not self._stopped.wait(PAUSE):  # out of descriptors, most likely
                    self._log.limited("control", "control socket: %s", error.strerror)
                continue
            self._client = client
            with client:
                client.settimeout(SECONDS)
                try:
                    self._converse(client)
                except OSError:
                    pass  # it has gone, or waits for nothing
                except Exception:
                    self._log.exception("answering on the control socket")
        self._socket.close()

    def _converse(self, client: socket.socket) -> None:
        with client.makefile("rwb") as lines:
            while line := lines.readline(LINE_LIMIT):
                answer, then = self._answer(line)
                lines.write(answer + b"\n")
                lines.flush()
                if then is not None:
                    then()
                if self._stopped.is_set():
                    return

    def _answer(self, line: bytes) -> tuple[bytes, Callable[[], None] | None]:
        """And what is to be done once it is sent."""
        import json  # late: few daemons are ever asked

        try:
            request = json.loads(line)
            command = self._commands[request["command"]]
        except (ValueError, TypeError, KeyError):
            return json.dumps(
                {"error": f"no such command; known are {', '.join(self._commands)}"}
            ).encode(), None
        try:
            result = command(request)
        except NetProxyError as error:
            return json.dumps({"error": str(error)}).encode(), None
        result, then = result if isinstance(result, Then) else (result, None)
        return json.dumps({"result": result}).encode(), then


def ask(path: str, command: str, **details: Any) -> Any:
    """The answer of the daemon at a control socket; NotRunning, CommandError."""
    import json  # late: netproxyd needs none to serve

    client = socket.socket(socket.AF_UNIX)
    client.settimeout(ANSWER_SECONDS)
    try:
        with client:
            client.connect(path)
            client.sendall(json.dumps({"command": command, **details}).encode() + b"\n")
            with client.makefile("rb") as lines:
                answer = json.loads(lines.readline(ANSWER_LIMIT))
    except (OSError, ValueError) as error:
        raise NotRunning(f"{path}: {getattr(error, 'strerror', None) or 'no answer'}") from error
    if "error" in answer:
        raise CommandError(answer["error"])
    return answer["result"]


def _abandoned(path: str) -> bool:
    """Whether a socket is there, and nobody behind it."""
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
