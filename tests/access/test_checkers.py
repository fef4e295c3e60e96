"""The program and the service that check logins: what they get, and what their answers mean."""

from __future__ import annotations

import base64
import fcntl
import os
import re
import signal
import socket
import subprocess
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Callable, Iterator

import pytest

from netproxy.access.external import service as service_module
from netproxy.access.external.checker import Checker, Verdict
from netproxy.access.external.command import CommandChecker
from netproxy.access.external.service import ServiceChecker
from netproxy.access.login import Credentials
from netproxy.errors import DialError, LoginUnavailable, Reason
from netproxy.interfaces.addresses import Address
from tests.support.doubles import Lines


class Found:
    """A Resolver whose answers are fixed: a host itself, or an error."""

    def __init__(self, reason: Reason | None = None) -> None:
        self._reason = reason

    def resolve(self, target: Address, client: str = "", seconds: float = 0.0) -> list[Address]:
        if self._reason is not None:
            raise DialError(self._reason, target.host)
        return [target]

    def known(self, target: Address) -> None:
        """Know nothing without a lookup."""


RESOLVER = Found()
CREDENTIALS = Credentials("alice", b"open sesame", "192.0.2.1", "main")
PATIENCE = 60.0

Run = Callable[[str], Verdict]


@pytest.fixture
def log() -> Lines:
    return Lines()


@pytest.fixture
def run(tmp_path: Path, log: Lines) -> Run:
    """Return a function that runs a shell script as the program."""

    def run(script: str, seconds: float = PATIENCE) -> Verdict:
        path = tmp_path / "check"
        path.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        path.chmod(0o700)
        checker = CommandChecker((str(path), "--flag"), log)
        return checker.check(CREDENTIALS, time.monotonic() + seconds)

    return run


def ask(checker: Checker, seconds: float = PATIENCE) -> Verdict:
    return checker.check(CREDENTIALS, time.monotonic() + seconds)


# -- a program


def test_program_gets_the_credentials_on_its_input_alone(tmp_path: Path, run: Run) -> None:
    """Hazard 111."""
    run('cat >input; env >environment; echo "$@" >arguments; tr "\\0" " " </proc/$$/cmdline >ps')
    assert (tmp_path / "input").read_bytes() == b"alice\nopen sesame\n"
    assert (tmp_path / "arguments").read_text() == "--flag\n"
    names = re.findall("^([^=]+)=", (tmp_path / "environment").read_text(), re.M)
    given = {"PATH", "LANG", "NETPROXY_CLIENT", "NETPROXY_LISTENER"}
    # The shell adds its own.
    assert given <= set(names) <= given | {"PWD", "OLDPWD", "SHLVL", "_"}
    facts = (tmp_path / "environment").read_text()
    assert "NETPROXY_CLIENT=192.0.2.1\n" in facts and "NETPROXY_LISTENER=main\n" in facts
    for name in ("environment", "arguments", "ps"):
        text = (tmp_path / name).read_text()
        assert "sesame" not in text and "alice" not in text


@pytest.mark.parametrize(
    "script, verdict",
    [
        ("exit 0", Verdict(True)),
        ("exit 1", Verdict(False)),
        ("echo ' {\"a\": 1} '; exit 0", Verdict(True, '{"a": 1}')),
        ("exec 0<&-; exit 0", Verdict(True)),
    ],
)
def test_status_of_the_program_decides(run: Run, script: str, verdict: Verdict) -> None:
    assert run(script) == verdict


@pytest.mark.parametrize(
    "script, why",
    [
        ("exit 2", "check has ended with status 2"),
        ("kill -9 $$", "check has ended by signal 9"),
        ("head -c 20000 /dev/zero", "check writes more than 8192 bytes"),
    ],
)
def test_every_other_end_of_the_program_is_a_failure(run: Run, script: str, why: str) -> None:
    with pytest.raises(LoginUnavailable) as caught:
        run(script)
    assert str(caught.value) == why


def test_program_that_cannot_be_started_is_a_failure(tmp_path: Path, log: Lines) -> None:
    with pytest.raises(LoginUnavailable, match="nothing cannot be started: No such file"):
        ask(CommandChecker((str(tmp_path / "nothing"),), log))


@pytest.mark.parametrize("stops", [False, True])
def test_program_is_killed_with_its_children_at_the_deadline_or_at_the_stop(
    tmp_path: Path, log: Lines, stops: bool
) -> None:
    os.mkfifo(tmp_path / "pids")
    path = tmp_path / "check"
    path.write_text(f"#!/bin/sh\nsleep 1000 & echo $$ $! >{tmp_path}/pids\nwait\n")
    path.chmod(0o700)
    failures: list[str] = []
    checker = CommandChecker((str(path),), log)

    def check() -> None:
        try:
            ask(checker, PATIENCE if stops else 3.0)
        except LoginUnavailable as error:
            failures.append(str(error))

    thread = threading.Thread(target=check)
    thread.start()
    program, child = map(int, (tmp_path / "pids").read_text().split())
    if stops:
        checker.stop()
    thread.join()
    assert failures == ["check has ended by signal 9" if stops else "check has not ended in time"]
    with pytest.raises(ProcessLookupError):
        os.kill(program, 0)
    deadline = time.monotonic() + PATIENCE
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Return whether a process runs; one that nobody has reaped does not."""
    try:
        return " Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except FileNotFoundError:
        return False


def test_errors_of_the_program_are_logged_without_the_password(run: Run, log: Lines) -> None:
    """Hazard 111."""
    run("echo first >&2; echo second >&2")
    assert log.lines[-1][1].startswith("auth: check says: first")
    run("read user; read password; echo got $password >&2")
    assert log.lines[-1][1].startswith("auth: check says: (left out: it has the password)")
    run("head -c 100000 /dev/zero | tr '\\0' x >&2")
    assert len(log.lines[-1][1]) < 300
    assert "sesame" not in str(log.lines)


def test_program_starts_with_no_signal_blocked_or_ignored(tmp_path: Path, run: Run) -> None:
    blocked = {signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        run("grep -E '^Sig(Blk|Ign):' /proc/self/status >signals")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _, masked, _, ignored = (tmp_path / "signals").read_text().split()
    assert int(masked, 16) == 0
    # Python ignores two; the tests may have been started with more.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        assert not int(ignored, 16) >> (number - 1) & 1


def test_program_is_the_leader_of_its_session_and_has_no_other_descriptor(
    tmp_path: Path, run: Run
) -> None:
    with socket.socket() as sock:
        high = fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, 200)
        try:
            run("echo /proc/$$/fd/* >open; cut -d' ' -f 1,6 /proc/$$/stat >session")
        finally:
            os.close(high)
    names = {name.rpartition("/")[2] for name in (tmp_path / "open").read_text().split()}
    assert {"0", "1", "2"} <= names and str(high) not in names
    number, session = (tmp_path / "session").read_text().split()
    assert number == session


PAM = Path(__file__).resolve().parents[2] / "conf/examples/check-pam"


def pam(folder: Path, given: str, error: str) -> subprocess.CompletedProcess[str]:
    """Run the recipe with a pamtester that gives this error for each other password."""
    fake = folder / "pamtester"
    fake.write_text(
        f'#!/bin/sh\necho "$*" >{folder}/arguments\nIFS= read -r password\n'
        f'[ "$password" = "open sesame" ] || {{ echo "pamtester: {error}" >&2; exit 1; }}\n'
        "echo pamtester: done\n"
    )
    fake.chmod(0o700)
    return subprocess.run(
        [PAM],
        input=f"al ice\n{given}\n",
        env={"PATH": f"{folder}:/usr/bin:/bin", "NETPROXY_CLIENT": "192.0.2.1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("given, status", [("open sesame", 0), ("wrong", 1)])
def test_recipe_for_pam_asks_pamtester(tmp_path: Path, given: str, status: int) -> None:
    done = pam(tmp_path, given, "Authentication failure")
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
    arguments = (tmp_path / "arguments").read_text()
    assert arguments == "-I rhost=192.0.2.1 -- netproxy al ice authenticate acct_mgmt\n"


@pytest.mark.parametrize(
    "error, status",
    [
        ("User not known to the underlying authentication module", 1),
        ("User account has expired", 1),
        ("Authentication service cannot retrieve authentication info", 2),
        ("Module is unknown", 2),
        ("System error", 2),
    ],
)
def test_recipe_for_pam_refuses_only_for_a_failure_of_the_user(
    tmp_path: Path, error: str, status: int
) -> None:
    done = pam(tmp_path, "wrong", error)
    assert done.returncode == status
    assert done.stderr == (f"pamtester: {error}\n" if status == 2 else "")


def test_recipe_for_pam_fails_without_pamtester(tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", PAM], input="alice\nx\n", env={"PATH": str(tmp_path)}, text=True
    )
    assert done.returncode == 2


# -- a service


class Service:
    """An HTTP server with one answer; notes the requests."""

    def __init__(self) -> None:
        self.status, self.fields, self.body = 200, {}, b""  # type: int, dict[str, str], bytes
        self.requests: list[tuple[str, str]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                service.requests.append((self.path, self.headers["Authorization"]))
                self.send_response(service.status)
                for name, value in service.fields.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(service.body)))
                self.end_headers()
                self.wfile.write(service.body)

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/check"


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_service_gets_the_credentials_in_a_field_and_the_facts_in_the_query(
    service: Service,
) -> None:
    assert ask(ServiceChecker(service.url, RESOLVER)) == Verdict(True)
    path, authorization = service.requests[0]
    assert path == "/check?client=192.0.2.1&user=alice&listener=main"
    assert base64.b64decode(authorization.removeprefix("Basic ")) == b"alice:open sesame"


@pytest.mark.parametrize(
    "status, verdict", [(204, Verdict(True)), (401, Verdict(False)), (403, Verdict(False))]
)
def test_status_of_the_service_decides(service: Service, status: int, verdict: Verdict) -> None:
    service.status = status
    assert ask(ServiceChecker(service.url, RESOLVER)) == verdict


@pytest.mark.parametrize("status", [302, 404, 407, 500, 503])
def test_every_other_status_is_a_failure(service: Service, status: int) -> None:
    service.status = status
    service.fields = {"Location": service.url}
    with pytest.raises(LoginUnavailable, match=f"answers with status {status}"):
        ask(ServiceChecker(service.url, RESOLVER))
    assert len(service.requests) == 1


def test_body_of_the_service_counts_if_it_is_json(service: Service) -> None:
    service.body = b'{"upstream": "a"} '
    assert ask(ServiceChecker(service.url, RESOLVER)) == Verdict(True)
    service.fields = {"Content-Type": "application/json; charset=utf-8"}
    assert ask(ServiceChecker(service.url, RESOLVER)) == Verdict(True, '{"upstream": "a"}')
    service.body = b"x" * 8193
    with pytest.raises(LoginUnavailable, match="sends more than 8192 bytes"):
        ask(ServiceChecker(service.url, RESOLVER))


@pytest.mark.parametrize(
    "answer, why",
    [
        (b"", "closed"),
        (b"garbage\r\n\r\n", "garbage"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{", "cut"),
    ],
)
def test_service_that_breaks_the_protocol_is_a_failure(answer: bytes, why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.recv(4096)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(LoginUnavailable, match=why):
            ask(ServiceChecker(f"http://127.0.0.1:{server.getsockname()[1]}", RESOLVER))
        thread.join()


def test_service_that_drips_is_given_up_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = threading.Event()

        def serve() -> None:
            client, _ = server.accept()
            with client:
                try:
                    while not done.wait(0.01):
                        client.sendall(b"H")
                except OSError:
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(LoginUnavailable, match="has not answered in time"):
            ask(ServiceChecker(f"http://127.0.0.1:{server.getsockname()[1]}", RESOLVER), 0.2)
        done.set()
        thread.join()


def test_service_that_is_not_there_is_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(LoginUnavailable, match=f"127.0.0.1:{port}: Connection refused"):
        ask(ServiceChecker(f"http://127.0.0.1:{port}/check", RESOLVER))


def test_addresses_of_the_service_share_the_time_of_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, tried = [100.0], []

    class Three(Found):
        """A Resolver that takes a second, and finds three addresses."""

        def resolve(self, target: Address, client: str = "", seconds: float = 0.0) -> list[Address]:
            assert (target, seconds) == (Address("auth.example", 80), 4.0)
            now[0] += 1.0
            return [target._replace(host=f"192.0.2.{number}") for number in (1, 2, 3)]

    def connect(address: Address, seconds: float) -> None:
        tried.append((address, seconds))
        now[0] += seconds
        raise TimeoutError

    fake = types.SimpleNamespace(create_connection=connect)
    monkeypatch.setattr(service_module, "socket", fake)
    monkeypatch.setattr(service_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    with pytest.raises(LoginUnavailable, match="Auth.example has not answered in time"):
        ServiceChecker("http://Auth.example/", Three()).check(CREDENTIALS, 104.0)
    assert tried == [(Address(f"192.0.2.{number}", 80), 1.0) for number in (1, 2, 3)]


@pytest.mark.parametrize(
    "reason, why",
    [(Reason.NAME, "auth.example: name not resolved"), (Reason.TIMEOUT, "auth.example: timed out")],
)
def test_service_whose_name_is_not_found_is_a_failure(reason: Reason, why: str) -> None:
    with pytest.raises(LoginUnavailable) as caught:
        ask(ServiceChecker("http://auth.example/", Found(reason)))
    assert why in str(caught.value)


def test_address_of_the_service_may_have_every_form() -> None:
    for url, expected in (
        ("http://[::1]/a", ("::1", 80, "/a")),
        ("http://[::1]:8080", ("::1", 8080, "/")),
        ("http://127.0.0.1/", ("127.0.0.1", 80, "/")),
        ("https://auth.example/a/b", ("auth.example", 443, "/a/b")),
    ):
        checker = ServiceChecker(url, RESOLVER)
        assert (checker._host, checker._port, checker._path) == expected
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
