"""Signals to a daemon, and starts that cannot work (hazards 104-106, 108 and 142)."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Association, Endpoint, TcpEcho, UdpEcho, echo, socks5
from tests.e2e.support import (
    ANY_PORT,
    LOOPBACK,
    PROCESSES,
    SECONDS,
    Netproxyd,
    run_netproxyd,
    wait_for,
)
from tests.support.ports import free_port
from tests.support.sockets import Task

pytestmark = [pytest.mark.e2e, pytest.mark.long]

FLOWS = 100
# Each process reloads: together they do it a hundred times.
TURNS = 100 // PROCESSES
USAGE, CANNOT_LISTEN, CONFIGURATION = 64, 69, 78
SECOND_HOST = "127.0.0.2"
ONE_LISTENER = f"""
listeners:
- {{name: first, listen: "{LOOPBACK}:0"}}
timeouts: {{drain: %s}}
"""
TWO_LISTENERS = f"""
listeners:
- {{name: first, listen: "{LOOPBACK}:0"}}
- {{name: second, listen: "{SECOND_HOST}:0"}}
"""
BAD_KEY = f"""
listeners:
- name: first
  listen: "{LOOPBACK}:0"
  anounce: 203.0.113.5
"""


@pytest.fixture(scope="module")
def tcp_echo() -> Iterator[TcpEcho]:
    with TcpEcho() as server:
        yield server


@pytest.fixture(scope="module")
def udp_echo() -> Iterator[UdpEcho]:
    with UdpEcho() as server:
        yield server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "netproxyd.yaml"


def flow(daemon: Netproxyd, target: TcpEcho, stack: ExitStack) -> socket.socket:
    sock, _ = socks5(daemon.server, CONNECT, target.address)
    return stack.enter_context(sock)


def refuses(server: Endpoint) -> bool:
    try:
        socket.create_connection(server, 1.0).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    return False


# -- TERM and INT


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_term_lets_running_flows_finish(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho, number: int
) -> None:
    """Hazard 104.  Nothing new is accepted; running connections and datagrams continue."""
    daemon = netproxyd(config=ONE_LISTENER % "600s")
    with ExitStack() as stack:
        flows = [flow(daemon, tcp_echo, stack) for _ in range(FLOWS)]
        association = stack.enter_context(Association(daemon.server))
        association.echo(udp_echo.address, b"before")
        daemon.signal(number)
        wait_for(lambda: refuses(daemon.server), SECONDS, "no new connections")
        for sock in flows:
            echo(sock, b"still here")
        association.echo(udp_echo.address, b"after")
        time.sleep(0.3)
        assert daemon.process.poll() is None
    assert daemon.wait(SECONDS) == 0
    assert daemon.said(r"stopping: \d+ connections may finish within 600 s")
    assert len(daemon.lines("msg=finished .*network=tcp")) == FLOWS


def test_term_ends_flows_that_outlast_the_drain(netproxyd: Start, tcp_echo: TcpEcho) -> None:
    daemon = netproxyd(config=ONE_LISTENER % "3s")
    with ExitStack() as stack:
        flows = [flow(daemon, tcp_echo, stack) for _ in range(FLOWS)]
        daemon.signal(signal.SIGTERM)
        daemon.said("stopping: ")
        for sock in flows:
            echo(sock, b"still here")
        assert daemon.wait(SECONDS) == 0
        assert [ended(sock) for sock in flows] == [True] * FLOWS
    assert len(daemon.lines("msg=finished .*network=tcp")) == FLOWS
    assert daemon.lines(r"stopping: \d+ connections are cut after 3 s")


@pytest.mark.parametrize("second", (signal.SIGTERM, signal.SIGINT))
def test_second_stop_signal_ends_at_once(netproxyd: Start, tcp_echo: TcpEcho, second: int) -> None:
    daemon = netproxyd(config=ONE_LISTENER % "600s")
    with ExitStack() as stack:
        flows = [flow(daemon, tcp_echo, stack) for _ in range(FLOWS)]
        daemon.signal(signal.SIGTERM)
        daemon.said("stopping: ")
        daemon.signal(second)
        assert daemon.wait(SECONDS) == 0
        assert [ended(sock) for sock in flows] == [True] * FLOWS
    assert not daemon.lines("are cut")


def ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_drain_waits_for_a_silent_client_until_its_handshake_is_over(netproxyd: Start) -> None:
    """The time of the handshake ends before that of the drain."""
    daemon = netproxyd(config=ONE_LISTENER % "600s, handshake: 1s")
    with socket.create_connection(daemon.server):
        wait_for(lambda: daemon.status()["connections"] == 1, SECONDS, "it is accepted")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(SECONDS) == 0


def test_other_signals_are_obeyed_during_the_drain(netproxyd: Start, tcp_echo: TcpEcho) -> None:
    """SIGUSR1 writes the status; SIGHUP is refused in the log."""
    daemon = netproxyd(config=ONE_LISTENER % "600s")
    with ExitStack() as stack:
        sock = flow(daemon, tcp_echo, stack)
        daemon.signal(signal.SIGTERM)
        daemon.said("stopping: 1 connections")
        assert daemon.status()["connections"] == 1
        daemon.signal(signal.SIGHUP)
        daemon.said("error not reloaded: the daemon is draining")
        echo(sock, b"still here")
    assert daemon.wait(SECONDS) == 0


# -- HUP


def test_reload_keeps_running_flows(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho, file: Path
) -> None:
    """Hazard 106.  A listener comes and goes; a connection and an association go on over both."""
    file.write_text(ONE_LISTENER % "30s")
    daemon = netproxyd("-c", str(file))
    with ExitStack() as stack:
        sock = flow(daemon, tcp_echo, stack)
        association = stack.enter_context(Association(daemon.server))
        association.echo(udp_echo.address, b"before")
        file.write_text(TWO_LISTENERS)
        daemon.reload()
        said = daemon.said(rf"reloaded; .*tcp {SECOND_HOST}:\d+")[-1]
        second = SECOND_HOST, int(said.split(f"tcp {SECOND_HOST}:")[1].split(",")[0])
        echo(sock, b"still here")
        association.echo(udp_echo.address, b"after")
        assert len(set(udp_echo.sources[-2:])) == 1, "it is the same session"
        in_second = stack.enter_context(socks5(second, CONNECT, tcp_echo.address)[0])
        with Association(second) as other:
            other.echo(udp_echo.address, b"a session of its own")
        assert daemon.answers()
        file.write_text(ONE_LISTENER % "30s")
        daemon.reload()
        assert refuses(second)
        for running in (sock, in_second):
            echo(running, b"still here")
        association.echo(udp_echo.address, b"after")


@pytest.mark.parametrize(
    "text, place",
    (
        pytest.param(
            BAD_KEY, r"netproxyd\.yaml:5:3: listeners\[0\]\.anounce: .*announce", id="unknown key"
        ),
        pytest.param(
            'listeners:\n- listen: "127.0.0.1:0\n', r"netproxyd\.yaml:\d+:\d+: ", id="not YAML"
        ),
        pytest.param("listeners: 5\n", r"netproxyd\.yaml:1:12: ", id="no list"),
        pytest.param(
            "listeners:\n- {listen: '127.0.0.1:0', listen: '127.0.0.1:0'}\n",
            r"netproxyd\.yaml:2:27: .*listen",
            id="twice",
        ),
        pytest.param(None, r"netproxyd\.yaml: ", id="no file"),
    ),
)
def test_reload_of_a_bad_file_changes_nothing_and_names_the_place(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho, file: Path, text: str | None, place: str
) -> None:
    """Hazard 105.  A daemon does not start with the same file either."""
    file.write_text(ONE_LISTENER % "30s")
    daemon = netproxyd("-c", str(file))
    with ExitStack() as stack:
        sock = flow(daemon, tcp_echo, stack)
        association = stack.enter_context(Association(daemon.server))
        association.echo(udp_echo.address, b"before")
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        daemon.reload()
        daemon.said(f"error not reloaded: .*{place}")
        echo(sock, b"still here")
        association.echo(udp_echo.address, b"after")
        assert len(set(udp_echo.sources[-2:])) == 1
        assert daemon.answers()
    for arguments in (("-c", str(file)), ("-t", "-c", str(file))):
        status, said = run_netproxyd(*arguments)
        assert status == CONFIGURATION and re.search(place, said.splitlines()[0])
        assert "Traceback" not in said


def test_reload_with_a_busy_port_opens_no_listener(
    netproxyd: Start, tcp_echo: TcpEcho, file: Path
) -> None:
    """The old ones stay."""
    file.write_text(ONE_LISTENER % "30s")
    daemon = netproxyd("-c", str(file))
    daemon.status()
    before = daemon.descriptors()
    file.write_text(
        TWO_LISTENERS + f"- {{name: three, listen: '{LOOPBACK}:{tcp_echo.address[1]}'}}\n"
    )
    daemon.reload()
    assert daemon.said(f"error not reloaded: .*{LOOPBACK}:{tcp_echo.address[1]}")
    wait_for(lambda: daemon.descriptors() == before, SECONDS, "what was opened is closed")
    assert daemon.answers()


def test_reload_with_the_same_address_twice_is_refused(netproxyd: Start, file: Path) -> None:
    """A daemon would not start so either: one of the two would never be served."""
    file.write_text(f"listeners: [{{name: first, listen: '{LOOPBACK}:{free_port()}'}}]\n")
    daemon = netproxyd("-c", str(file))
    twice = [
        f"{{name: {name}, protocol: {name}, listen: '{daemon.host}:{daemon.port}'}}"
        for name in ("sps", "http")
    ]
    file.write_text(f"listeners: [{', '.join(twice)}]\n")
    assert run_netproxyd("-c", str(file))[0] in (CANNOT_LISTEN, CONFIGURATION)
    daemon.reload()
    daemon.said("error not reloaded: ")
    assert daemon.answers()


def test_hundred_reloads_under_load_break_no_flow(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho, file: Path
) -> None:
    """Hazard 106.  No flow breaks, every new one succeeds, and nothing is left open."""
    file.write_text(ONE_LISTENER % "30s")
    daemon = netproxyd("-c", str(file))
    stop, faults, done = threading.Event(), [], [0, 0, 0]

    def work(at: int) -> None:
        try:
            with ExitStack() as stack:
                sock = flow(daemon, tcp_echo, stack)
                association = stack.enter_context(Association(daemon.server))
                while not stop.is_set():
                    if at == 0:
                        echo(sock, os.urandom(2000))
                    elif at == 1:
                        association.echo(udp_echo.address, os.urandom(1000))
                    else:
                        with ExitStack() as short:
                            echo(flow(daemon, tcp_echo, short), b"short")
                            short.enter_context(Association(daemon.server)).echo(
                                udp_echo.address, b"short"
                            )
                    done[at] += 1
                    time.sleep(0.001)
        except (OSError, AssertionError, EOFError) as error:
            faults.append(f"{at}: {error!r}")

    workers = [threading.Thread(target=work, args=(at,)) for at in range(3)]
    for worker in workers:
        worker.start()
    try:
        for turn in range(1, TURNS + 1):
            file.write_text(
                (TWO_LISTENERS, ONE_LISTENER % "30s", BAD_KEY)[turn % 3]
                if turn < TURNS
                else ONE_LISTENER % "30s"
            )
            daemon.reload()
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert not faults
    assert min(done) >= 20
    assert len(daemon.lines(r" reloaded; serves|not reloaded: ")) == TURNS


# Runs `-m netproxy ARGUMENT...`, and sends itself both signals at imports that main() makes. There
# is a limit, as a reload imports modules, too: it would be followed by another one for ever.
SIGNALLED_START = """
import importlib.abc, os, runpy, signal, sys

class Signals(importlib.abc.MetaPathFinder):
    started, left = False, 200

    def find_spec(self, name, path, target=None):
        self.started = self.started or name == "argparse" or name.startswith("netproxy.daemon")
        if self.started and self.left:
            self.left -= 1
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)

sys.path.insert(0, os.getcwd())
sys.meta_path.insert(0, Signals())
sys.argv = ["netproxyd", *sys.argv[3:]]
runpy.run_module("netproxy", run_name="__main__", alter_sys=True)
"""


def test_signals_during_the_start_are_obeyed_after_it(
    netproxyd: Start, file: Path, tmp_path: Path
) -> None:
    """Hazard 142.  Two hundred of each come until the daemon serves, or soon after."""
    file.write_text(ONE_LISTENER % "30s")
    (tmp_path / "start.py").write_text(SIGNALLED_START)
    daemon = netproxyd("-c", str(file), python=(sys.executable, str(tmp_path / "start.py")))
    daemon.said(" info reloaded; serves")
    daemon.said(r" info connections=\d+ ")
    assert daemon.answers()


@pytest.mark.parametrize("number", (signal.SIGHUP, signal.SIGUSR1))
def test_signal_as_soon_as_it_is_blocked_does_not_end_the_daemon(
    netproxyd: Start, tmp_path: Path, number: int
) -> None:
    """Hazard 142."""
    pid_file = tmp_path / "pid"

    def send() -> None:
        pid = int(
            wait_for(lambda: pid_file.exists() and pid_file.read_text(), SECONDS, "a process")
        )
        wait_for(lambda: blocked_signals(pid) & 1 << number - 1, SECONDS, "the signal is blocked")
        os.kill(pid, number)

    sender = Task(send)
    python = ("sh", "-c", 'echo $$ > "$0"; exec "$@"', str(pid_file), sys.executable)
    daemon = netproxyd("-l", ANY_PORT, python=python)
    sender.result()
    daemon.said(" info reloaded; " if number == signal.SIGHUP else r" info connections=\d+ ")


def test_ignored_sigchld_is_no_obstacle(netproxyd: Start, file: Path) -> None:
    """Hazard 181.  Its starter has ignored it: the kernel would reap what the daemon waits for."""
    file.write_text(ONE_LISTENER % "30s")
    code = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    daemon = netproxyd("-c", str(file), python=(sys.executable, "-c", code))
    daemon.reload()
    daemon.said(" info reloaded; serves")


def blocked_signals(pid: int) -> int:
    """Return the bits of the signals that the main thread of a process blocks."""
    return int(re.search(r"SigBlk:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)


# -- starts that cannot work


def test_port_in_use_is_named_in_one_line(netproxyd: Start) -> None:
    """Hazard 108."""
    daemon = netproxyd("-l", ANY_PORT)
    status, said = run_netproxyd("-l", f"sps://{LOOPBACK}:{daemon.port}")
    assert status == CANNOT_LISTEN
    assert len(said.splitlines()) == 1 and f"{LOOPBACK}:{daemon.port}" in said


@pytest.mark.any_workers
@pytest.mark.parametrize("kind", (socket.SOCK_STREAM, socket.SOCK_DGRAM))
def test_port_in_use_on_one_network_is_enough_to_refuse(kind: int) -> None:
    """TCP without UDP would be half a service."""
    with socket.socket(socket.AF_INET, kind) as busy:
        busy.bind((LOOPBACK, 0))
        if kind == socket.SOCK_STREAM:
            busy.listen()
        port = busy.getsockname()[1]
        status, said = run_netproxyd("-l", f"sps://{LOOPBACK}:{port}")
        assert status == CANNOT_LISTEN
        assert len(said.splitlines()) == 1 and f"{LOOPBACK}:{port}" in said


@pytest.mark.any_workers
def test_address_of_another_machine_is_refused() -> None:
    status, said = run_netproxyd("-l", "sps://192.0.2.1:1080?allow_open=true")
    assert status == CANNOT_LISTEN
    assert len(said.splitlines()) == 1 and "192.0.2.1:1080" in said


@pytest.mark.any_workers
@pytest.mark.parametrize(
    "arguments, status, words",
    (
        (("--no-such-option",), USAGE, "--no-such-option"),
        (("-v", "-q"), USAGE, "-q"),
        (("-l",), USAGE, "-l"),
        (("extra",), USAGE, "extra"),
        (("-l", "sps://127.0.0.1"), CONFIGURATION, "-l[0]: listeners[0].listen: "),
        (("-l", "spss://127.0.0.1:1080"), CONFIGURATION, "did you mean 'sps'"),
        (("-l", "sps://:1080"), CONFIGURATION, "allow_open"),
        (("-u", "sock5://127.0.0.1:1080"), CONFIGURATION, "socks5"),
        (("-c", "no-such-file.yaml"), CONFIGURATION, "no-such-file.yaml"),
    ),
)
def test_wrong_command_line_is_one_line(
    arguments: tuple[str, ...], status: int, words: str
) -> None:
    found, said = run_netproxyd(*arguments)
    assert found == status and words in said
    assert len(said.splitlines()) == 1 and "Traceback" not in said


@pytest.mark.any_workers
def test_check_opens_nothing(file: Path) -> None:
    port = free_port()
    file.write_text(f"listeners: [{{listen: '{LOOPBACK}:{port}'}}]\n")
    with socket.create_server((LOOPBACK, port)):
        status, said = run_netproxyd("-t", "-c", str(file))
    assert status == 0 and f"{LOOPBACK}:{port}" in said


def test_finished_flows_go_to_a_file_that_logrotate_may_rename(
    netproxyd: Start, tcp_echo: TcpEcho, tmp_path: Path
) -> None:
    """In all workers, and within squid's form."""
    path = tmp_path / "access.log"
    text = f"listeners: [{{listen: '{LOOPBACK}:0'}}]\nlog: {{file: {path}, access_format: squid}}\n"
    daemon = netproxyd(config=text)

    def flow() -> None:
        sock, _ = socks5(daemon.server, CONNECT, tcp_echo.address)
        with sock:
            echo(sock, b"hello")

    def lines(name: Path) -> list[str]:
        text = name.read_text() if name.exists() else ""
        return [
            line
            for line in text.splitlines()
            if f" CONNECT {LOOPBACK}:{tcp_echo.address[1]} " in line
        ]

    for _ in range(8):
        flow()
    wait_for(lambda: len(lines(path)) == 8, SECONDS, "the lines of all flows")
    renamed = path.rename(tmp_path / "access.log.1")
    daemon.process.send_signal(signal.SIGUSR2)
    wait_for(path.exists, SECONDS, "the new file")
    # All workers have the new file once a flow of each has been written there.
    wait_for(lambda: flow() is None and len(lines(path)) >= 8, SECONDS, "lines in the new file")
    assert "msg=finished" not in daemon.log
    assert all(line.split()[3] == "TCP_TUNNEL/200" for line in lines(renamed) + lines(path))
