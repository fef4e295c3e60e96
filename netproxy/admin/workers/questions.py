"""The worker's end of its line: answers the parent's questions, as the control socket does.

Thread: "questions", and one more for each command that may wait for others.
"""

from __future__ import annotations

import contextlib
import socket
import threading

from netproxy.admin.control.client import LINE_LIMIT, RequestError, answer_request, parse_request
from netproxy.admin.workers.lines import read_lines
from netproxy.typed import TYPE_CHECKING, Mapping

if TYPE_CHECKING:
    from netproxy.admin.control.client import Command, CommandRequest
    from netproxy.interfaces.services import Log

REQUEST_LIMIT = 8 * LINE_LIMIT
"""Bytes of a request: JSON that was read and written again is longer."""
MAY_WAIT = frozenset(("explain", "test", "nat"))
"""Commands that may wait for others, such as name servers: a thread answers each of them."""


def serve_questions(
    sock: socket.socket, commands: Mapping[str, Command], log: Log
) -> threading.Thread:
    """Start the thread that answers the parent's questions at the worker's end; return it.

    The questions are answered in turn, except those of MAY_WAIT.  The thread takes the socket over
    and ends with it: when the parent closes the line, or after shutdown() of the socket.
    """
    questions = _Questions(sock, commands, log)
    thread = threading.Thread(target=questions.serve, name="questions", daemon=True)
    thread.start()
    return thread


class _Questions:
    """The worker's end of a line."""

    def __init__(self, sock: socket.socket, commands: Mapping[str, Command], log: Log) -> None:
        self._socket = sock
        self._commands = commands
        self._log = log
        # Serializes sending.
        self._sending = threading.Lock()

    def serve(self) -> None:
        """Answer until the end of the line."""
        # RequestError: not our parent.
        with self._socket, contextlib.suppress(OSError, RequestError):
            for line in read_lines(self._socket, REQUEST_LIMIT):
                request = parse_request(line, self._commands)
                if request["command"] in MAY_WAIT and self._answer_apart(request):
                    continue
                self._answer(request)

    def _answer_apart(self, request: CommandRequest) -> bool:
        """Answer on another thread; return False if there is none."""
        thread = threading.Thread(
            target=self._answer, args=(request,), name="question", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            # "can't start new thread"
            return False
        return True

    def _answer(self, request: CommandRequest) -> None:
        head = {"number": request.get("number")}
        answer, _ = answer_request(request, self._commands, self._log, head)
        # OSError: the line has ended.
        with contextlib.suppress(OSError), self._sending:
            self._socket.sendall(answer + b"\n")
