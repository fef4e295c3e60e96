"""One client of the control socket: its requests are read, carried out and answered in turn.

Each client has a thread of its own, so that none waits for another one: a client may be
silent, send a byte now and then, not read its answer, or wait for a command that takes long.
Each line has a deadline as a whole.
"""

from __future__ import annotations

import socket
import time
from types import MappingProxyType

from netproxy.errors import NetProxyError
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, NamedTuple, Sequence, TypeAlias

if TYPE_CHECKING:
    from netproxy.interfaces.services import Log

SECONDS = 5.0
"""For a client to send a whole request, and again to receive the whole answer."""
LINE_LIMIT = 65536
"""Bytes of a request."""
ANSWER_LIMIT = 64 << 20
"""Bytes of an answer: ten thousand sessions are a few MiB."""

NOTHING: Mapping[str, object] = MappingProxyType({})
"""No keys."""

CommandRequest: TypeAlias = Mapping[str, object]
"""The JSON object that a client has sent.  Only its key "command" has been checked."""
Command: TypeAlias = Callable[[CommandRequest], object]
"""Returns the answer, as JSON values.  Raises CommandError if the request is wrong."""
Action: TypeAlias = Callable[[], None]


class ActAfterAnswer(NamedTuple):
    """The result of a command that acts only after its answer has been sent."""

    answer: object
    act: Action


class PartialAnswer(NamedTuple):
    """The result of a command that some of the daemon's processes may not have answered."""

    answer: object
    warnings: Sequence[str]
    """What is missing, such as "worker 2 does not answer"; empty if nothing is."""


class RequestError(NetProxyError):
    """A line is no request, or its command is unknown."""


class CommandError(NetProxyError):
    """The daemon has refused a command; the message says why."""


class ControlClient:
    """A connected client.  serve() runs on its thread; everything else on any."""

    def __init__(self, sock: socket.socket, commands: Mapping[str, Command], log: Log) -> None:
        """Take the socket over."""
        self._socket = sock
        self._commands = commands
        self._log = log
        self._received = bytearray()
        self.silent_since: float | None = time.monotonic()
        """When it began to wait for a request (monotonic seconds); None while it has one."""

    def serve(self, is_last: Callable[[], bool]) -> None:
        """Answer requests until the client ends, or is_last() is true after an answer."""
        with self._socket:
            try:
                while (line := self._read_line()) is not None:
                    self.silent_since = None
                    answer, act = self._answer(line)
                    self._send(answer)
                    if act is not None:
                        act()
                    if is_last() or len(line) > LINE_LIMIT:
                        return
            except OSError:
                pass  # the client has gone, or a deadline has passed

    def refuse(self, why: str) -> None:
        """Tell the client why it is not served, as far as that needs no waiting; close it."""
        with self._socket:
            try:
                self._socket.setblocking(False)
                self._socket.send(_error(why) + b"\n")
            except OSError:
                pass  # the client has gone, or does not read

    def shutdown(self) -> None:
        """End both directions; the thread of the client wakes."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client has gone

    def _read_line(self) -> bytes | None:
        """Return the next line, None at the end; a line that is too long is cut.

        Raises OSError.
        """
        self.silent_since = time.monotonic()
        deadline = self.silent_since + SECONDS
        while (end := self._received.find(b"\n")) < 0 and len(self._received) <= LINE_LIMIT:
            # A timeout of 0 would mean: do not block.
            self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
            data = self._socket.recv(LINE_LIMIT)
            self._received += data
            if not data:
                break
        line = bytes(self._received[: end if end >= 0 else LINE_LIMIT + 1])
        del self._received[: len(line) + 1]
        return line if line or end >= 0 else None

    def _send(self, answer: bytes) -> None:
        """Send an answer.  Raises OSError if that takes longer than SECONDS in total."""
        self._socket.settimeout(SECONDS)
        self._socket.sendall(answer + b"\n")

    def _answer(self, line: bytes) -> tuple[bytes, Action | None]:
        """Return the answer to a request, and what to do after it has been sent."""
        if len(line) > LINE_LIMIT:
            return _error(f"the request has more than {LINE_LIMIT} bytes"), None
        try:
            request = parse_request(line, self._commands)
        except RequestError as error:
            return _error(str(error)), None
        return answer_request(request, self._commands, self._log)


def parse_request(line: bytes, commands: Mapping[str, Command]) -> CommandRequest:
    """Return the request of a line.  Raises RequestError if it is none for these commands."""
    # Imported late: few daemons are ever asked.
    import json

    try:
        request: CommandRequest = json.loads(line)
        # Raises TypeError or KeyError, too, if the request is no object or its command no text.
        commands[request["command"]]  # type: ignore[index]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RequestError(f"unknown command (known: {', '.join(commands)})") from None
    return request


def answer_request(
    request: CommandRequest,
    commands: Mapping[str, Command],
    log: Log,
    head: Mapping[str, object] = NOTHING,
) -> tuple[bytes, Action | None]:
    """Return the answer to a request, and what to do after it has been sent.

    The answer begins with the keys of `head`.
    """
    try:
        return _carry_out(commands[str(request["command"])], request, head)
    except NetProxyError as error:
        return _error(str(error), head), None
    except Exception:
        log.exception("answering on the control socket")
        return _error("internal error, see the log", head), None


def _carry_out(
    command: Command, request: CommandRequest, head: Mapping[str, object]
) -> tuple[bytes, Action | None]:
    result, act, message = command(request), None, dict(head)
    if isinstance(result, ActAfterAnswer):
        result, act = result
    elif isinstance(result, PartialAnswer):
        result, warnings = result
        if warnings:
            message["warnings"] = warnings
    answer = _encode({**message, "result": result})
    if len(answer) >= ANSWER_LIMIT:
        answer = _error(f"the answer has more than {ANSWER_LIMIT >> 20} MiB: use a filter", head)
    return answer, act


def _error(text: str, head: Mapping[str, object] = NOTHING) -> bytes:
    return _encode({**head, "error": text})


def _encode(message: Mapping[str, object]) -> bytes:
    # Imported late, as above.
    import json

    return json.dumps(message).encode()
