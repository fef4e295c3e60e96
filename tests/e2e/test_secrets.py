"""Secrets, planted wherever one can be configured or sent, are found nowhere else."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import resource
import signal
import socket
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Iterator
from unittest import mock

import pytest

from netproxy import cli
from netproxy.access.users import hash_password
from netproxy.admin.content import DaemonContent
from netproxy.interfaces.addresses import Address
from netproxy.protocol import tunnel
from netproxy.protocol.http import connect_udp
from netproxy.net.stream import Stream, complete
from tests.e2e.conftest import Start
from tests.e2e.origin import Origin, serving
from tests.e2e.peers import Association, Endpoint, Refused, TcpEcho, UdpEcho, socks5
from tests.e2e.support import LOOPBACK, ROOT, SECONDS, Netproxyd, environment, run_netproxyd
from tests.support.ports import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.long]

NAMES = (
    *("plain", "hashed", "filed", "env", "file", "asked", "wrong", "badpair", "nobody"),
    *("socks", "basic", "digest", "refused", "token", "faketoken", "metrics", "fakemetrics"),
    *("userinfo", "query", "cookie", "bearer", "noise", "mistake", "socks4"),
)
SECRETS = {name: f"Zq{name}7rX{number}kW0vN" for number, name in enumerate(NAMES)}
VARIABLE = "NETPROXY_TEST_SECRET"
SCRIPT = """#!/bin/sh
cd {folder}
tr '\\0' '\\n' </proc/$$/environ >>children
tr '\\0' '\\n' </proc/$$/cmdline >>children
cat >answer
echo "no such account" >&2
grep -q '^{asked}$' answer
"""
CONFIG = """
listeners: [{{name: main, listen: "{host}:0", auth: required}}]
users:
  plain: {{password: {plain}, upstream: socks}}
  hashed: {{password: "{hash}", upstream: basic, limits: {{quota: 1GiB}}}}
  env: {{password: "${{{variable}}}", upstream: digest}}
  file: {{password: !file password, upstream: refused}}
users_file: users
auth: {{command: [./check], timeout: 4s}}
state: {folder}/state
upstreams:
  socks: "socks5://up:{socks}@{host}:{office}"
  basic: "http://down:{basic}@{host}:{office}"
  digest: "http://over:{digest}@{host}:{digester}"
  refused: {{members: ["http://up:{refused}@{host}:{office}"]}}
tunnel: {{bridge: {{listen: "tcp://{host}:{bridge}", agents: {{home: {{token: {token}}}}}}}}}
metrics: "{host}:{metrics_port}"
metrics_token: {metrics}
status_page: true
control: "unix:{folder}/control"
log: {{level: debug}}
"""
OFFICE = """
listeners: [{{listen: "{host}:0", auth: required}}]
users: {{up: {{password: {socks}}}, down: {{password: {basic}}}}}
tunnel:
  agent: {{bridge: "tcp://{host}:{bridge}", name: home, token: {token}, exit: true}}
control: "unix:{folder}/office"
log: {{level: debug}}
"""
REFUSED_LOGIN = b"\1\1"


class _DigestProxy(BaseHTTPRequestHandler):
    """Asks for Digest, and answers every CONNECT with it by 403."""

    protocol_version = "HTTP/1.1"
    seen: list[str] = []

    def do_CONNECT(self) -> None:
        login = self.headers.get("Proxy-Authorization", "")
        self.seen.append(login)
        self.send_response(403 if login.startswith("Digest") else 407)
        self.send_header("Proxy-Authenticate", 'Digest realm="r", qop="auth", nonce="n1"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class Planted:
    """A daemon with every secret, a second one behind it, and what has been seen of both."""

    def __init__(self, start: Start, folder: Path, digester: int) -> None:
        self.folder, self.bridge, self.metrics = folder, free_port(), free_port()
        (folder / "state").mkdir()
        self.hash = hash_password(SECRETS["hashed"], 1024)
        self.filed_hash = hash_password(SECRETS["filed"], 1024)
        for name, text in (
            ("password", SECRETS["file"]),
            ("users", f"filed:{self.filed_hash}\n"),
            ("check", SCRIPT.format(folder=folder, **SECRETS)),
        ):
            (folder / name).touch(0o700)
            (folder / name).write_text(text)
        self.values: dict[str, Any] = {
            **{"host": LOOPBACK, "folder": folder, "bridge": self.bridge, "digester": digester},
            **{"hash": self.hash, "variable": VARIABLE, "metrics_port": self.metrics},
            **SECRETS,
        }
        office = start(config=OFFICE.format(**self.values), login=("up", SECRETS["socks"]))
        self.text = CONFIG.format(**self.values, office=office.port)
        self.environment = environment(**{VARIABLE: SECRETS["env"]})
        self.daemon: Netproxyd = start(
            config=self.text, login=("filed", SECRETS["filed"]), env=self.environment
        )
        self.office = office
        # The tunnel between them takes descriptors.
        self.daemon.baseline = office.baseline = 0
        self.path = self.daemon.process.args[self.daemon.process.args.index("-c") + 1]
        self.office.said("tunnel.*connected|connected.*tunnel")

    def check(self, seen: dict[str, bytes]) -> None:
        """Fail for each place that has a secret."""
        leaks = [
            f"{name} in {place}: {data[max(0, at - 100) : at + 100]!r}"
            for place, data in seen.items()
            for name, form in self._forms()
            if (at := data.find(form)) >= 0
        ]
        assert not leaks, "\n".join(leaks)

    def _forms(self) -> Iterator[tuple[str, bytes]]:
        for name, secret in SECRETS.items():
            raw = secret.encode()
            yield name, raw
            yield name, raw.hex().encode()
            for shift in range(3):
                # Without the characters that depend on what is before and behind it.
                yield name, base64.b64encode(bytes(shift) + raw)[4:-4]
        for hashed in (self.hash, self.filed_hash):
            yield from (("a hash", part.encode()) for part in hashed.split("$")[-2:])


@pytest.fixture
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


@pytest.fixture
def planted(netproxyd: Start, tmp_path: Path) -> Iterator[Planted]:
    server = ThreadingHTTPServer((LOOPBACK, 0), _DigestProxy)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    _DigestProxy.seen.clear()
    try:
        yield Planted(netproxyd, tmp_path, server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_no_secret_is_seen_of_a_daemon_at_level_debug(planted: Planted, origin: Origin) -> None:
    """Hazard 111: log, records, control socket, metrics, page, processes, files, reloads."""
    daemon = planted.daemon
    with TcpEcho() as tcp, UdpEcho() as udp:
        _log_in_by_socks(daemon, tcp.address, udp.address)
        _log_in_by_http(daemon, origin, udp.address)
        _send_noise(daemon, planted.bridge)
        with ExitStack() as stack:
            for user in ("plain", "hashed", "asked"):
                login = (user, SECRETS[user])
                stack.enter_context(socks5(daemon.server, 1, tcp.address, login)[0])
            seen = {**_answers_of_control(planted), **_answers_of_metrics(planted)}
    assert any(login.startswith("Digest ") for login in _DigestProxy.seen)
    assert not [field for request in origin.seen for field in request.fields if "proxy-" in field]
    Path(planted.path).write_text(f"{planted.text}\nlog: !file password\n")
    daemon.signal(signal.SIGHUP)
    daemon.said("level=error|error")
    Path(planted.path).write_text(planted.text)
    daemon.reload()
    daemon.status()
    seen["children"] = (planted.folder / "children").read_bytes()
    for running in (daemon, planted.office):
        seen[f"arguments of {running.port}"] = _process_file(running, "cmdline")
        seen[f"log of {running.port}"] = running.log.encode()
    assert b"NETPROXY_CLIENT" in seen["children"] and "auth_failed" in daemon.log
    assert daemon.lines("check says: no such account") and daemon.lines("msg=finished")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait(SECONDS) == 0
    for path in (planted.folder / "state").iterdir():
        seen[path.name] = path.read_bytes()
    assert b"SQLite" in seen["usage.sqlite"]
    planted.check(seen)


@pytest.mark.any_workers
def test_no_secret_is_printed_by_check_and_explain(planted: Planted) -> None:
    """Hazard 111."""
    seen = {}
    for flow in ("tcp 127.0.0.2 -> a.example:1 on main", "udp -> 192.0.2.1:1", "nonsense"):
        arguments = ("-c", planted.path, "--explain", flow)
        seen[flow] = run_netproxyd(*arguments, env=planted.environment)[1].encode()
    for flags in ((), ("-v",), ("-q",)):
        status, text = run_netproxyd("-t", "-c", planted.path, *flags, env=planted.environment)
        assert status == 0, text
        seen[f"-t {flags}"] = text.encode()
    planted.check(seen)


@pytest.mark.any_workers
def test_no_secret_is_printed_for_a_wrong_configuration(planted: Planted) -> None:
    """Hazard 111: each line of the file with a secret, broken in several ways."""
    lines = planted.text.splitlines()
    seen = {}
    for number, line in enumerate(lines):
        if not any(secret in line for secret in (*SECRETS.values(), "${", "!file", "$1024$")):
            continue
        for broken in (
            line.replace("password: ", "password:").replace("token: ", "token:"),
            line.replace("password", "passwrd").replace("token", "tokn").replace("//", "/"),
            line.replace("}", "", 1) if "}" in line else f"{line}: x",
            line.replace('"', "", 1) if '"' in line else line.replace(": ", ': "', 1),
            line.replace("socks5:", "sock5:").replace("http:", "ftp:").replace("$1024$", "$7$"),
            f"{line}\n{line}",
        ):
            if broken == line:
                continue
            text = "\n".join((*lines[:number], broken, *lines[number + 1 :]))
            wrong = planted.folder / "wrong.yaml"
            wrong.touch(0o600)
            wrong.write_text(text)
            seen[broken] = _told(wrong)
    assert len(seen) > 40 and all(seen.values())
    planted.check(seen)


def _told(path: Path) -> bytes:
    """Return what -t says of a file; in this process, because there are many."""
    out = io.StringIO()
    with (
        mock.patch.dict(os.environ, {VARIABLE: SECRETS["env"]}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        cli.main(["-t", "-c", str(path)])
    return out.getvalue().encode()


def test_packaged_unit_makes_no_core_file(netproxyd: Start, tmp_path: Path) -> None:
    """Hazard 111: the memory of the daemon has secrets; with the limit of the unit none is kept."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    if pattern.startswith(("|", "/")):
        pytest.skip(f"core files do not go to the working directory: {pattern.strip()}")
    unit = (ROOT / "debian/netproxyd.service").read_text()
    match = re.search(r"^LimitCORE=(\d+)$", unit, re.MULTILINE)
    assert match is not None
    limit = int(match[1])
    daemon = netproxyd(
        "-l",
        f"sps://{LOOPBACK}:0",
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (limit, limit)),
    )
    daemon.signal(signal.SIGABRT)
    assert daemon.wait(SECONDS) == -signal.SIGABRT
    assert not list(tmp_path.glob("*core*"))


# -- what clients send


def _log_in_by_socks(daemon: Netproxyd, tcp: Endpoint, udp: Endpoint) -> None:
    for user in ("plain", "hashed", "filed", "asked"):
        socks5(daemon.server, 1, tcp, (user, SECRETS[user]))[0].close()
    for user, password in (
        *(("env", "env"), ("file", "file"), ("plain", "wrong")),
        *(("asked", "wrong"), ("stranger", "nobody")),
    ):
        with pytest.raises(Refused):
            socks5(daemon.server, 1, tcp, (user, SECRETS[password]))
    with Association(daemon.server, ("filed", SECRETS["filed"])) as association:
        association.echo(udp, b"datagram")


def _basic(user: str, secret: str) -> bytes:
    return b"Basic " + base64.b64encode(f"{user}:{SECRETS[secret]}".encode())


def _log_in_by_http(daemon: Netproxyd, origin: Origin, udp: Endpoint) -> None:
    """Send requests with secrets in every field and part of the target."""
    query, userinfo = SECRETS["query"], SECRETS["userinfo"]
    target = f"http://me:{userinfo}@{LOOPBACK}:{origin.port}/hello?key={query}".encode()
    more = f"Cookie: {SECRETS['cookie']}\r\nAuthorization: Bearer {SECRETS['bearer']}\r\n".encode()
    for login, status in (
        (_basic("filed", "filed"), b"200"),
        (_basic("asked", "asked"), b"200"),
        (_basic("filed", "wrong"), b"407"),
        (SECRETS["badpair"].encode(), b"407"),
        (b"Bearer " + SECRETS["bearer"].encode(), b"407"),
        (b"Digest response=" + SECRETS["bearer"].encode(), b"407"),
    ):
        request = b"GET %b HTTP/1.1\r\nHost: a\r\nProxy-Authorization: %b\r\n%b\r\n"
        head = _exchange(daemon.server, request % (target, login, more))
        # A userinfo in the target may be refused as a whole.
        assert head.split(b" ")[1] in (status, b"400"), head
    for user in ("plain", "hashed", "filed", "env", "file"):
        request = b"CONNECT %b:%d HTTP/1.1\r\nHost: a\r\nProxy-Authorization: %b\r\n%b\r\n"
        _exchange(
            daemon.server, request % (LOOPBACK.encode(), origin.port, _basic(user, user), more)
        )
        datagrams = connect_udp.encode_request(Address(*udp), "a", _basic(user, user))
        _exchange(daemon.server, datagrams)
    _exchange(daemon.server, connect_udp.encode_request(Address(*udp), "a", _basic("a", "wrong")))
    for login in (_basic("filed", "filed"), _basic("filed", "wrong")):
        plain = b"GET http://%b:%d/hello?key=%b HTTP/1.1\r\nHost: a\r\nProxy-Authorization: %b\r\n"
        _exchange(
            daemon.server,
            plain % (LOOPBACK.encode(), origin.port, query.encode(), login) + more + b"\r\n",
        )


def _send_noise(daemon: Netproxyd, bridge: int) -> None:
    """Send what is no request, and a wrong token."""
    noise = SECRETS["noise"].encode()
    for data in (
        noise + b"\r\n\r\n",
        b"GET /%b?%b HTTP/1.1\r\nHost: a\r\n\r\n" % (noise, noise),
        b"GET http://%b HTTP/9.9\r\n\r\n" % noise,
        b"%b http://a/ HTTP/1.1\r\n\r\n" % noise,
        b"GET http://a/%b HTTP/1.1\r\n%b\r\n\r\n" % (noise, noise),
        b"GET http://a/ HTTP/1.1\r\nHost: a\r\nX %b: 1\r\n\r\n" % noise,
        b"GET http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: %b\r\n\r\n" % noise,
        b"CONNECT me:%b@a:1 HTTP/1.1\r\nHost: a\r\n\r\n" % noise,
        b"\5\1\2\2" + noise,
        b"\5\1\x77" + noise,
        b"\4\1\0\1\x7f\0\0\1" + SECRETS["socks4"].encode() + b"\0",
        b"PROXY TCP4 %b\r\n" % noise,
    ):
        _exchange(daemon.server, data)
    with socket.create_connection((LOOPBACK, bridge), SECONDS) as sock:
        stream = Stream(sock, limited=SECONDS)
        hello = tunnel.Hello(tunnel.CONTROL, "home", bytes(range(32)))
        stream.write(tunnel.encode_hello(hello))
        nonce = complete(tunnel.read_challenge(stream))
        assert isinstance(nonce, bytes)
        stream.write(tunnel.agent_proof(SECRETS["faketoken"].encode(), hello, nonce))
        assert isinstance(complete(tunnel.read_welcome(stream)), int)


def _exchange(server: Endpoint, data: bytes) -> bytes:
    """Send data, and return what comes back up to the end of a head."""
    with socket.create_connection(server, SECONDS) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while b"\r\n\r\n" not in answer and (piece := sock.recv(65536)):
                answer += piece
        except ConnectionError:
            pass
        return answer


# -- what is seen


def _answers_of_control(planted: Planted) -> dict[str, bytes]:
    """Ask every command of the control socket, except those that end something."""
    none: Any = None
    commands = DaemonContent(none, none).commands(none, none).keys() - {"kill", "drain"}
    flows = ("tcp -> a.example:1", "udp 127.0.0.1 plain@127.0.0.2 -> 192.0.2.1:1")
    answers = {}
    for path in ("control", "office"):
        for command in sorted(commands):
            for flow in flows:
                request = {"command": command, "flow": flow, "user": "plain"}
                with socket.socket(socket.AF_UNIX) as control:
                    control.settimeout(SECONDS)
                    control.connect(str(planted.folder / path))
                    control.sendall(json.dumps(request).encode() + b"\n")
                    with control.makefile("rb") as reader:
                        answers[f"{path} {command} {flow}"] = reader.readline()
    assert all(answers.values())
    return answers


def _answers_of_metrics(planted: Planted) -> dict[str, bytes]:
    """Ask for every page, with the right token, a wrong one and none."""
    answers = {}
    for path in ("/", "/metrics", "/status.json", "/healthz", "/readyz", "/x"):
        for name in ("metrics", "fakemetrics", "nothing"):
            token = f"Authorization: Bearer {SECRETS.get(name, '')}\r\n"
            query = f"?token={SECRETS['query']}"
            request = f"GET {path}{query} HTTP/1.1\r\nHost: {LOOPBACK}\r\n{token}\r\n".encode()
            with socket.create_connection((LOOPBACK, planted.metrics), SECONDS) as sock:
                sock.sendall(request)
                with sock.makefile("rb") as reader:
                    answers[f"{path} {name}"] = reader.read()
    assert b"200 OK" in answers["/status.json metrics"] and b"auth_failed" in b"".join(
        answers.values()
    )
    return answers


def _process_file(daemon: Netproxyd, name: str) -> bytes:
    return Path(f"/proc/{daemon.process.pid}/{name}").read_bytes()
