"""Asks a running daemon: sends one command to its control socket and returns the answer.

netproxyctl calls it.  Thread: any; blocks.
"""

from __future__ import annotations

import socket

from netproxy.admin.control.client import ANSWER_LIMIT, SECONDS, CommandError
from netproxy.admin.control.server import RELOAD_SECONDS
from netproxy.errors import NetProxyError
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.answers import JsonValue

ANSWER_SECONDS = RELOAD_SECONDS + SECONDS
"""How long netproxyctl waits for an answer."""


class NotRunning(NetProxyError):
    """No daemon answers at the control socket."""


def ask(path: str, command: str, **details: object) -> JsonValue:
    """Send a command to the daemon at a control socket; return its answer.

    Raises NotRunning or CommandError.
    """
    return ask_with_warnings(path, command, ANSWER_SECONDS, **details)[0]


def ask_with_warnings(
    path: str, command: str, seconds: float = ANSWER_SECONDS, **details: object
) -> tuple[JsonValue, list[str]]:
    """Do the same as ask(), for `seconds`; return also what is missing in the answer, as lines."""
    # Imported late: netproxyd needs it only to answer.
    import json

    client = socket.socket(socket.AF_UNIX)
    client.settimeout(seconds)
    try:
        with client:
            client.connect(path)
            try:
                client.sendall(json.dumps({"command": command, **details}).encode() + b"\n")
            except BrokenPipeError:
                # Refused before it was asked: the answer says why.
                pass
            with client.makefile("rb") as lines:
                answer = json.loads(lines.readline(ANSWER_LIMIT))
    except OSError as error:
        raise NotRunning(f"{path}: {error.strerror or 'no answer'}") from error
    except (ValueError, RecursionError) as error:
        # RecursionError: nested too deeply.  No daemon sends that.
        raise NotRunning(f"{path}: no answer") from error
    if not isinstance(answer, dict) or not answer.keys() & {"error", "result"}:
        raise NotRunning(f"{path}: what answers is no netproxyd")
    if "error" in answer:
        raise CommandError(str(answer["error"]))
    return answer["result"], list(answer.get("warnings", ()))
