"""The threads that all clients share read no file and look no name up.

The daemon runs with an audit hook that writes which thread does what.  Blocking there would
delay everybody: the disk may be slow or gone, and a name server may not answer.
"""

from __future__ import annotations

import re
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.conftest import Start
from tests.e2e.every_protocol import Clients
from tests.e2e.peers import Association, encode

pytestmark = pytest.mark.e2e

SHARED = ("poller", "tcp-listener", "udp-listener", "udp-session", "janitor", "inbox")
EVENTS = (
    *("open", "import", "os.listdir", "os.scandir", "glob.glob", "time.sleep"),
    *("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"),
    *("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system"),
)
# Shows that other threads do the blocking work.
CONNECT = "socket.connect"
# Runs `-m netproxy ARGUMENT...`.
AUDITED_START = f"""
import os, runpy, sys, threading

# As standard input, which workers keep open.
os.dup2(os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 0)

def note(event, arguments):
    if event in {(*EVENTS, CONNECT)!r}:
        # Not current_thread(), which would name a thread that has not begun yet.
        thread = threading._active.get(threading.get_ident())
        name = thread.name if thread else "?"
        os.write(0, f"{{name}}\\t{{event}} {{arguments!r}}\\n".encode())

sys.addaudithook(note)
sys.path.insert(0, os.getcwd())
sys.argv = ["netproxyd", *sys.argv[3:]]
runpy.run_module("netproxy", run_name="__main__", alter_sys=True)
"""
RULES = """
rules:
- {domain: [blocked.test], via: block}
- {port: 7, via: "socks5://127.0.0.1:1"}
- {ip: [203.0.113.0/24], via: block}
"""
# Looked up, unlike names of the domain invalid.
NOWHERE = "nowhere.example.test"


def refused_requests() -> list[bytes]:
    """Return requests of all protocols that are refused, each kind for another reason."""
    greeting = b"\5\1\0"
    targets = (("blocked.test", 80), ("127.0.0.1", 7), (NOWHERE, 80), ("127.0.0.1", 1))
    http = [f"{host}:{port}".encode() for host, port in targets]
    return [
        b"\x99 nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\4\1\0\1\177\0\0\1\0",
        b"\5\1\2\1\5alice\3bad",
        *[greeting + b"\5\1\0" + encode(target) for target in targets],
        *[b"CONNECT %b HTTP/1.1\r\nHost: a\r\n\r\n" % target for target in http],
        *[
            b"GET http://%b/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % target
            for target in http
        ],
    ]


@pytest.mark.parametrize("form", ["text", "json"])
def test_shared_threads_read_no_file_and_look_nothing_up(
    netproxyd: Start, tmp_path: Path, form: str
) -> None:
    """Hazard 133.  All protocols are served, refused and logged at the level debug."""
    (tmp_path / "start.py").write_text(AUDITED_START)
    audit = tmp_path / "audit"
    with ExitStack() as stack:
        clients = Clients(stack)
        daemon = netproxyd(
            config=f"{clients.config}{RULES}log: {{level: debug, format: {form}}}\n",
            python=(sys.executable, str(tmp_path / "start.py"), str(audit)),
        )
        for serve in clients.all:
            for _ in range(3):
                serve()
        clients.many_datagrams(3)
        for data in refused_requests():
            with clients.dial(data) as sock:
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
        with Association(daemon.server) as association:
            for target in (("blocked.test", 80), (NOWHERE, 9), ("127.0.0.1", 1)):
                association.send(target, b"x")
        # The janitor's turn comes once a second.
        time.sleep(1.5)
    lines = audit.read_text().splitlines()
    assert any(re.match(rf"(lookup|name|connection|dial)-\d+\t{CONNECT}", line) for line in lines)
    shared = [line for line in lines if line.startswith(SHARED) and f"\t{CONNECT}" not in line]
    assert not shared
