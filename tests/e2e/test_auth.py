"""Logins that a program or a service checks, by curl and by raw clients; upstreams of users."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Iterator

import pytest

from netproxy.access.users import hash_password
from netproxy.interfaces.addresses import Address
from netproxy.protocol import uot
from tests.e2e.conftest import Start
from tests.e2e.origin import Origin, serving
from tests.e2e.peers import Association, Endpoint, Refused, TcpEcho, UdpEcho, echo, exactly, socks5
from tests.e2e.test_shared_threads import AUDITED_START, SHARED
from tests.e2e.support import (
    LOOPBACK,
    PROCESSES,
    SECONDS,
    Netproxyd,
    environment,
    program,
    wait_for,
)

pytestmark = pytest.mark.e2e

FEW_THREADS = 8
SECRET = "pa$$-w0rd-of-all"
SCRIPT = """#!/bin/sh
cd %s
read -r user
read -r password
echo "$user $NETPROXY_CLIENT" >>asked
case "$user:$password" in
broken:*) echo "this is $password" >&2; exit 3 ;;
slow*:*) read -r line <gate; exit 1 ;;
carol:'pa$$-w0rd-of-all') echo '{"upstream": "office"}'; exit 0 ;;
*:'pa$$-w0rd-of-all') exit 0 ;;
esac
exit 1
"""
CONFIG = """
listeners:
- {{protocol: sps, listen: "{host}:0", clients: [127.0.0.0/8]}}
users: {{local: {{password: "{secret}"}}}}
upstreams: {{office: "socks5://{host}:{office}"}}
auth: {{command: [./check], timeout: 4s}}
control: "unix:{folder}/control"
log: {{level: debug}}
"""


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


class Checked:
    """A daemon whose logins a script checks."""

    def __init__(self, start: Start, folder: Path, office: int = 1, **more: Any) -> None:
        self.folder = folder
        script = folder / "check"
        script.write_text(SCRIPT % folder)
        script.chmod(0o700)
        os.mkfifo(folder / "gate")
        text = CONFIG.format(host=LOOPBACK, secret=SECRET, office=office, folder=folder)
        self.daemon = start(config=text, login=("local", SECRET), **more)

    @property
    def asked(self) -> list[str]:
        """The users that the script was asked for, with their clients."""
        try:
            return (self.folder / "asked").read_text().splitlines()
        except FileNotFoundError:
            return []

    def login(self, user: str, target: TcpEcho, password: str = SECRET) -> socket.socket:
        """Return a connection to the target.  Raises Refused."""
        return socks5(self.daemon.server, 1, target.address, (user, password))[0]


@pytest.fixture
def checked(netproxyd: Start, tmp_path: Path) -> Iterator[Checked]:
    yield Checked(netproxyd, tmp_path)
    # Scripts that wait go on, and those that come do not wait.
    waiting = os.open(tmp_path / "gate", os.O_RDWR)
    os.unlink(tmp_path / "gate")
    os.close(waiting)


@pytest.fixture
def tcp_echo() -> Iterator[TcpEcho]:
    with TcpEcho() as server:
        yield server


def curl(daemon: Netproxyd, scheme: str, login: str, url: str, *more: str) -> tuple[int, int]:
    """Return curl's exit status and the HTTP status of the answer."""
    command = [program("curl"), "-q", "-sS", "-m", "50", "--noproxy", "", "-o", "/dev/null"]
    command += ["-x", f"{scheme}://{LOOPBACK}:{daemon.port}", "-U", login, *more]
    done = subprocess.run(
        [*command, "-w", "%{http_code} %{http_connect}", url],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    code, connect = done.stdout.split()
    return done.returncode, int(connect) or int(code)


def test_curl_logs_in_through_the_program(checked: Checked, origin: Origin) -> None:
    url = f"http://{LOOPBACK}:{origin.port}/hello"
    daemon = checked.daemon
    for scheme, more in (("socks5", ()), ("http", ()), ("http", ("-p",))):
        assert curl(daemon, scheme, f"alice:{SECRET}", url, *more) == (0, 200)
    for scheme, status in (("socks5", (97, 0)), ("http", (0, 407))):
        assert curl(daemon, scheme, "alice:wrong", url) == status
    # Not known, not refused: the answer differs, and there is a record with the reason.
    assert curl(daemon, "http", f"broken:{SECRET}", url) == (0, 503)
    assert curl(daemon, "socks5", f"broken:{SECRET}", url)[0] == 97
    assert daemon.said("reason=unavailable .*check has ended with status 3", 2)
    # The users of the file are not asked for; answers are remembered, failures are not.
    assert curl(daemon, "http", f"local:{SECRET}", url) == (0, 200)
    assert curl(daemon, "http", "local:wrong", url) == (0, 407)
    asked = [f"{user} {LOOPBACK}" for user in ("alice", "alice", "broken", "broken")]
    assert checked.asked == asked
    assert daemon.said("msg=auth_failed .*user=alice", 2)


def test_many_slow_checks_delay_no_other_client(checked: Checked, tcp_echo: TcpEcho) -> None:
    """Hazard 110."""
    daemon = checked.daemon
    checked.login("alice", tcp_echo).close()
    with ExitStack() as stack:
        for number in range(200):
            sock = stack.enter_context(socket.create_connection(daemon.server))
            user, password = b"slow%d" % number, b"x"
            sock.sendall(b"\5\1\2\1%c%b%c%b" % (len(user), user, len(password), password))
        wait_for(lambda: len(checked.asked) > 4, SECONDS, "checks that wait")
        # Known: at once.  Unknown, from another address: a thread is free for it.
        with checked.login("alice", tcp_echo) as sock:
            echo(sock, b"known")
        with socket.socket() as sock:
            sock.bind(("127.0.0.2", 0))
            sock.settimeout(SECONDS)
            sock.connect(daemon.server)
            login = SECRET.encode()
            sock.sendall(b"\5\1\2\1\3bob%c%b" % (len(login), login))
            assert sock.recv(2) + sock.recv(2) == b"\5\2\1\0"
        assert "bob 127.0.0.2" in checked.asked
        # No connection thread waits with them.
        assert daemon.status()["threads"] <= FEW_THREADS * PROCESSES


def test_secrets_are_nowhere(checked: Checked, tcp_echo: TcpEcho) -> None:
    """Hazard 111."""
    daemon = checked.daemon
    checked.login("alice", tcp_echo).close()
    for user, password in (("alice", f"{SECRET}x"), ("broken", SECRET)):
        with pytest.raises(Refused):
            checked.login(user, tcp_echo, password)
    sock = socket.create_connection(daemon.server)
    login = SECRET.encode()
    with sock:
        sock.sendall(b"\5\1\2\1\4slow%c%b" % (len(login), login))
        wait_for(lambda: f"slow {LOOPBACK}" in checked.asked, SECONDS, "the check")
        seen = b"".join(_of_children(daemon.process.pid))
    assert b"check" in seen and SECRET.encode() not in seen
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(SECONDS)
        control.connect(str(checked.folder / "control"))
        for command in ("status", "connections", "sessions", "upstreams", "tunnels"):
            control.sendall(json.dumps({"command": command}).encode() + b"\n")
        answers = b""
        while answers.count(b"\n") < 5:
            answers += control.recv(65536)
    assert SECRET.encode() not in answers
    daemon.said("auth: check says: .left out: it has the password")
    assert SECRET not in daemon.log


def test_shared_threads_start_no_program_and_import_nothing(
    netproxyd: Start, tmp_path: Path, tcp_echo: TcpEcho
) -> None:
    """Hazard 133."""
    (tmp_path / "start.py").write_text(AUDITED_START)
    audit = tmp_path / "audit"
    python = (sys.executable, str(tmp_path / "start.py"), str(audit))
    checked = Checked(netproxyd, tmp_path, python=python)
    checked.login("alice", tcp_echo).close()
    checked.login("alice", tcp_echo).close()
    for user, password in (("alice", "wrong"), ("broken", SECRET)):
        with pytest.raises(Refused):
            checked.login(user, tcp_echo, password)
    lines = audit.read_text().splitlines()
    programs = [line.partition("\t")[0] for line in lines if "\tos.posix_spawn" in line]
    # Each worker remembers for itself.
    assert 3 <= len(programs) <= 2 + PROCESSES
    assert all(name.startswith("login-") for name in programs)
    assert not [
        line for line in lines if line.startswith(SHARED) and "\tsocket.connect" not in line
    ]


def _of_children(pid: int) -> Iterator[bytes]:
    """Yield arguments and environment of a process and its descendants."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _of_children(int(child))
    for name in ("cmdline", "environ"):
        yield Path(f"/proc/{pid}/{name}").read_bytes()


def test_upstream_of_an_answer_and_of_a_user_serves_tcp_udp_and_http(
    netproxyd: Start, tmp_path: Path, tcp_echo: TcpEcho, origin: Origin
) -> None:
    office = netproxyd("-l", f"sps://{LOOPBACK}:0")
    checked = Checked(netproxyd, tmp_path, office.port)
    daemon = checked.daemon
    with UdpEcho() as udp_echo:
        for user, through in (("alice", 0), ("carol", 1)):
            with checked.login(user, tcp_echo) as sock:
                echo(sock, b"tcp")
            with Association(daemon.server, (user, SECRET)) as association:
                association.echo(udp_echo.address, b"udp")
            _uot(daemon, user, udp_echo.address)
            url = f"http://{LOOPBACK}:{origin.port}/hello"
            assert curl(daemon, "http", f"{user}:{SECRET}", url) == (0, 200)
            lines = daemon.said(f"msg=finished .*user={user} ", 4)
            rule = "rule=auth.upstream upstream=office" if through else "rule=default"
            assert all(rule in line for line in lines), lines
    assert checked.asked == [f"{user} {LOOPBACK}" for user in ("alice", "carol")]


def _uot(daemon: Netproxyd, user: str, target: Endpoint) -> None:
    """Exchange a datagram with an echo server by UDP over TCP."""
    request = uot.encode_request(uot.UotRequest(True, Address(*target)))
    sock, _ = socks5(daemon.server, 1, (uot.MAGIC, 0), (user, SECRET))
    with sock:
        sock.sendall(request + b"\0\3uot")
        assert exactly(sock, 5) == b"\0\3uot"


USERS_FILE = """
listeners: [{{protocol: sps, listen: "{host}:0"}}]
users_file: users
upstreams: {{office: "socks5://{host}:{office}"}}
"""


def test_users_file_is_read_again_by_hup(
    netproxyd: Start, tmp_path: Path, tcp_echo: TcpEcho
) -> None:
    office = netproxyd("-l", f"sps://{LOOPBACK}:0")
    users = tmp_path / "users"
    users.touch(0o600)
    users.write_text(f"alice:{hash_password('a', 1024)}:upstream=office\n")
    daemon = netproxyd(
        config=USERS_FILE.format(host=LOOPBACK, office=office.port), login=("bob", "b")
    )
    with socks5(daemon.server, 1, tcp_echo.address, ("alice", "a"))[0] as sock:
        echo(sock, b"file")
    assert daemon.said("user=alice .*rule=users.alice.upstream upstream=office")
    users.write_text(f"bob:{hash_password('b', 1024)}\n")
    daemon.signal(signal.SIGHUP)
    daemon.said("reloaded")
    with pytest.raises(Refused):
        socks5(daemon.server, 1, tcp_echo.address, ("alice", "a"))
    socks5(daemon.server, 1, tcp_echo.address, ("bob", "b"))[0].close()
    users.write_text("bob:secret\n")
    daemon.signal(signal.SIGHUP)
    daemon.said(f"{users}:1:5: the password is not a hash")
    socks5(daemon.server, 1, tcp_echo.address, ("bob", "b"))[0].close()


class _Service(BaseHTTPRequestHandler):
    """Says yes to alice with the right password, and fails for broken."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        is_right = self.headers["Authorization"] == "Basic YWxpY2U6c2VjcmV0"
        self.send_response(500 if "broken" in self.path else 204 if is_right else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def test_tunnel_behind_a_checked_login_is_relayed(checked: Checked, origin: Origin) -> None:
    """CONNECT whose user no answer is remembered of: it waits for the program."""
    url = f"http://{LOOPBACK}:{origin.port}/hello"
    for number in range(3):
        user = f"user{number}:{SECRET}"
        assert curl(checked.daemon, "http", user, url, "-p") == (0, 200)


def test_curl_logs_in_through_the_service(netproxyd: Start, origin: Origin) -> None:
    server = ThreadingHTTPServer((LOOPBACK, 0), _Service)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    _Service.asked.clear()
    try:
        text = f"""
listeners: [{{protocol: sps, name: main, listen: "{LOOPBACK}:0"}}]
auth: {{url: "http://{LOOPBACK}:{server.server_port}/check"}}
"""
        daemon = netproxyd(config=text, login=("alice", "secret"))
        url = f"http://{LOOPBACK}:{origin.port}/hello"
        # Each worker remembers for itself; the kernel gives connections to any of them.
        for scheme in ("socks5", "http") * (1 if PROCESSES == 1 else 8):
            assert curl(daemon, scheme, "alice:secret", url) == (0, 200)
        assert curl(daemon, "http", "alice:secret", url, "-p") == (0, 200)
        assert curl(daemon, "http", "alice:wrong", url) == (0, 407)
        assert curl(daemon, "http", "broken:x", url) == (0, 503)
        assert daemon.said("reason=unavailable .*answers with status 500")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    facts = [
        f"client={LOOPBACK}&user={user}&listener=main" for user in ("alice", "alice", "broken")
    ]
    assert _Service.asked == [f"/check?{fact}" for fact in facts]
    # Gone: logins that are not remembered are refused.
    assert curl(daemon, "http", "alice:secret", url) == (0, 200)
    assert curl(daemon, "http", "bob:secret", url) == (0, 503)
    assert daemon.said("reason=unavailable .*Connection refused")
