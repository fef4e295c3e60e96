"""Lines of the control socket, sent to a running daemon in this process."""

from __future__ import annotations

import json
import socket
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from netproxy.admin.control.client import ActAfterAnswer
from netproxy.admin.control.server import ControlServer, ReloadRequests
from netproxy.admin.content import DaemonContent
from netproxy.admin.stats.stats import Stats
from tests.fuzz.target import Target
from tests.support.doubles import Lines
from tests.support.relays import running

_PATIENCE = 60.0
"""Seconds until an answer that does not come is a finding."""
_ANSWER_LIMIT = 1 << 16
"""Bytes of an answer: the daemon has no flows."""
_CONFIG = (
    "listeners: [{listen: '127.0.0.1:0', name: main}]\nupstreams: {gone: 'socks5://127.0.0.1:1'}"
)


class _Served:
    """The control socket of the daemon."""

    path = ""
    log = Lines()


class _Source:
    """A StatsSource."""

    def __init__(self, stats: Stats) -> None:
        self.stats = stats


def _nothing() -> None:
    """Stand in for a signal to this process."""


@contextmanager
def _serving() -> Iterator[None]:
    with running(_CONFIG) as daemon, tempfile.TemporaryDirectory() as folder:
        view: Any = daemon.daemon  # Any: the class has no name here that a test could import
        log: Any = Lines()  # Any: the commands take the class Log for its level
        log.level = "info"
        content = DaemonContent(view, log)
        source = _Source(content.stats(0.0))
        table = dict(content.commands(source, ReloadRequests(_nothing)))
        # What would signal this process answers only.
        table["reload"] = table["drain"] = lambda request: ActAfterAnswer({}, _nothing)
        _Served.path, _Served.log = str(Path(folder) / "control"), log
        server = ControlServer(_Served.path, table, log)
        server.start()
        try:
            yield
        finally:
            server.stop()


def _check_lines(data: bytes) -> None:
    """Every line has one answer, and the client is served on."""
    request = data.replace(b"\r", b"\n") + b'\n{"command": "log"}\n'
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_PATIENCE)
        client.connect(_Served.path)
        cut = zlib.crc32(data) % len(request)
        client.sendall(request[:cut])
        client.sendall(request[cut:])
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as lines:
            answers = [json.loads(line) for line in lines if _is_bounded(line)]
    assert len(answers) == request.count(b"\n"), (answers, request)
    for answer in answers:
        assert len(answer) == 1 and answer.keys() <= {"result", "error"}, answer
        assert isinstance(answer.get("error", ""), str)
    assert answers[-1]["result"]["level"]
    assert not _Served.log.of("exception"), _Served.log


def _is_bounded(line: bytes) -> bool:
    assert len(line) < _ANSWER_LIMIT and line.endswith(b"}\n"), line[:200]
    return True


TARGETS = (
    Target(
        "control",
        _check_lines,
        (
            *(b'{"command": "', b'"}', b'"flow": "', b'"ids": [', b'"level": "', b"{", b"}", b"["),
            *(b'status"', b'upstreams"', b'tunnels"', b'connections"', b'flows"', b'traffic"'),
            *(b'explain"', b'verdicts"', b'kill"', b'log"', b'reload"', b'drain"', b'"clear": 1'),
            *(b"tcp 10.0.0.1 -> a:443", b"null", b"true", b"1e999", b"-1", b"NaN", b"\\ud800"),
            *(b'"user": "', b'"client": "', b'"listener": "', b'"target": "', b'"upstream": "'),
            *(b"[" * 2000, b"\xff", b"\n", b", ", b": ", b"a -> b:1", b"udp alice@10.0.0.1 -> b:1"),
        ),
        4096,
        around=_serving,
    ),
)
