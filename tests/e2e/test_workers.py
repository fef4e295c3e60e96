"""A daemon with two worker processes: associations, deaths, reloads, ends and limits."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Iterator

import pytest

from netproxy.listener.steering import owner
from tests.e2e.conftest import Start
from tests.e2e.peers import (
    ASSOCIATE,
    CONNECT,
    Endpoint,
    Refused,
    TcpEcho,
    UdpEcho,
    echo,
    encode,
    exactly,
    socks5,
)
from tests.e2e.support import ANY_PORT, LOOPBACK, SECONDS, Netproxyd, run_netproxyd, runs, wait_for
from tests.support.certificates import certificates
from tests.support.ports import free_port
from tests.support.sockets import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.any_workers]

CLIENTS = [f"127.0.0.{number}" for number in range(2, 62)]
TWO = ("-w", "2")
CANNOT_LISTEN = 69
NOT_ALLOWED = 2
HIGH = 150
"""Where sockets are passed to LAUNCH, so that it overwrites none of them."""
LAUNCH = """import os, sys
for number in range(2):
    os.dup2(int(sys.argv[1]) + number, 3 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="main:main")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
ACTIVATED = """
listeners: [{listen: "systemd:main", clients: [127.0.0.0/8]}]
destinations: {deny: []}
"""


@pytest.fixture(scope="module")
def tcp_echo() -> Iterator[TcpEcho]:
    with TcpEcho() as server:
        yield server


@pytest.fixture(scope="module")
def udp_echo() -> Iterator[UdpEcho]:
    with UdpEcho() as server:
        yield server


def listener(port: int = 0, name: str = "main", more: str = "") -> str:
    return f"- {{name: {name}, listen: '{LOOPBACK}:{port}'{', ' if more else ''}{more}}}\n"


def configuration(*listeners: str, more: str = "") -> str:
    return f"workers: 2\nlisteners:\n{''.join(listeners)}{more}\n"


def serving(daemon: Netproxyd) -> list[int]:
    """Return the workers' processes once there are two, and both serve."""

    def look() -> bool:
        return len(daemon.workers()) == 2 and daemon.status()["workers"] == 2

    wait_for(look, SECONDS, "two workers")
    return daemon.workers()


def holder(daemon: Netproxyd, sock: socket.socket) -> int:
    """Return the process that has the other end of a client's connection, 0 for none."""
    local, remote = (_hex(address) for address in (sock.getpeername(), sock.getsockname()))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == [local, remote]:
            target = f"socket:[{fields[9]}]"
            return next((pid for pid in daemon.workers() if target in _descriptors(pid)), 0)
    return 0


def _hex(address: Endpoint) -> str:
    number = struct.unpack("=I", socket.inet_aton(address[0]))[0]
    return f"{number:08X}:{address[1]:04X}"


def _descriptors(pid: int) -> set[str]:
    targets = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            targets.add(os.readlink(path))
    return targets


class Client:
    """An association of a client with its own address."""

    def __init__(self, server: Endpoint, host: str, tls: bool = False) -> None:
        self.host = host
        self.control: socket.socket = socket.socket()
        self.control.settimeout(SECONDS)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.settimeout(SECONDS)
        self.socket.bind((host, 0))
        self.control.bind((host, 0))
        self.control.connect(server)
        if tls:
            self.control = certificates().secure(self.control)
        self.control.sendall(b"\5\1\0")
        assert exactly(self.control, 2) == b"\5\0"
        self.control.sendall(b"\5\3\0" + encode(("0.0.0.0", self.socket.getsockname()[1])))
        reply = exactly(self.control, 10)
        assert reply[1] == 0
        self.bound = socket.inet_ntoa(reply[4:8]), struct.unpack("!H", reply[8:])[0]

    def echo(self, target: UdpEcho, data: bytes = b"ping") -> None:
        header = b"\0\0\0" + encode(target.address)
        self.socket.sendto(header + data, self.bound)
        assert self.socket.recv(2048) == header + data

    def is_over(self) -> bool:
        """Return whether the control connection has ended."""
        try:
            return self.control.recv(1) == b""
        except OSError:
            return True

    def close(self) -> None:
        self.control.close()
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(server: Endpoint, target: TcpEcho, host: str = LOOPBACK) -> socket.socket:
    """Return a connection to the echo server, from a client's address."""

    def make(*kind: int) -> socket.socket:
        sock = socket.socket(*kind)
        sock.bind((host, 0))
        return sock

    sock, _ = socks5(server, CONNECT, target.address, make=make)
    return sock


def on_all(
    daemon: Netproxyd, target: TcpEcho, stack: ExitStack, least: int = 8, port: int = 0
) -> dict[int, list[socket.socket]]:
    """Open flows until each worker has `least`; return them by their worker's process."""
    pids = daemon.workers()
    flows: dict[int, list[socket.socket]] = {pid: [] for pid in pids}
    for _ in range(100 * least):
        server = (daemon.host, port or daemon.port)
        sock = stack.enter_context(connect(server, target))
        flows[holder(daemon, sock)].append(sock)
        if all(len(flows[pid]) >= least for pid in pids):
            break
    assert all(len(flows[pid]) >= least for pid in pids), "the kernel spreads no connections"
    for sock in (sock for socks in flows.values() for sock in socks):
        echo(sock, b"begin")
    return flows


def _states(pid: int) -> set[str]:
    """Return the states of the threads of a process."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {stat.rpartition(")")[2].split()[0] for stat in stats}


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Let a process do nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: _states(pid) == {"T"}, SECONDS, "all threads have stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def refuses(server: Endpoint) -> bool:
    try:
        socket.create_connection(server, SECONDS).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    return False


# -- associations


@pytest.mark.parametrize(
    "more", ["", "tls", "udp: {relay_port: any}", "udp: {relay_port: 21000-21999}"]
)
def test_associations_work_wherever_they_were_accepted(
    netproxyd: Start, udp_echo: UdpEcho, more: str
) -> None:
    tls = more == "tls"
    if tls:
        more = f"tls: {certificates().listener()}"
    daemon = netproxyd(*TWO, config=configuration(listener(more=more)))
    assert {owner(host, 2) for host in CLIENTS} == {0, 1}
    if tls:
        daemon.answers = lambda seconds=0.0: True  # type: ignore[method-assign]
    with ExitStack() as stack:
        # Two of each client: the kernel gives their connections to any worker.
        clients = [stack.enter_context(Client(daemon.server, host, tls)) for host in CLIENTS * 2]
        for _ in range(2):
            for client in clients:
                client.echo(udp_echo, client.host.encode())
        for client in clients[::2]:
            client.close()
        for client in clients[1::2]:
            client.echo(udp_echo, b"still here")
        assert daemon.drops() == {}
    wait_for(lambda: daemon.status()["connections"] == 0, SECONDS, "all are over")
    wait_for(lambda: daemon.status().get("associations", 0) == 0, SECONDS, "no association")


def test_datagrams_of_a_client_never_reach_two_workers(netproxyd: Start, tcp_echo: TcpEcho) -> None:
    """Neither while the other worker dies and is replaced, nor through reloads."""
    daemon = netproxyd(*TWO, config=configuration(listener()))
    daemon.provoked = r"worker 1 has died \(SIGKILL\)"
    with ExitStack() as stack:
        target = stack.enter_context(UdpEcho())
        hosts = [host for host in CLIENTS if owner(host, 2) == 0]
        clients = [stack.enter_context(Client(daemon.server, host)) for host in hosts]
        for client in clients:
            client.echo(target)
        sources = set(target.sources)
        assert len(sources) == len(clients)
        for number in range(3):
            if number < 2:
                os.kill(serving(daemon)[1 - daemon_order(daemon)], signal.SIGKILL)
            else:
                daemon.reload()
            for _ in range(5):
                for client in clients:
                    client.echo(target, b"round %d" % number)
            assert len(daemon.said("worker 1 has died", min(number + 1, 2))) == min(number + 1, 2)
        serving(daemon)
        for client in clients:
            client.echo(target)
        # One socket towards the target for each client, all the time; and nothing was dropped.
        assert set(target.sources) == sources
        assert daemon.drops() == {}
        others = [host for host in CLIENTS if owner(host, 2) == 1]
        for host in others:
            stack.enter_context(Client(daemon.server, host)).echo(target)
        assert daemon.drops() == {}


def daemon_order(daemon: Netproxyd) -> int:
    """Return the place of worker 0 among workers(): it was never replaced, so it is the first."""
    assert not daemon.lines("worker 0 has died")
    return 0


# -- deaths


@pytest.mark.parametrize("number", [0, 1])
def test_killed_worker_takes_its_own_flows_alone(
    netproxyd: Start, tcp_echo: TcpEcho, number: int
) -> None:
    """New connections are served at once, and none is refused while clients come all the time."""
    daemon = netproxyd(*TWO, config=configuration(listener()))
    daemon.provoked = rf"worker {number} has died \(SIGKILL\)"
    with ExitStack() as stack:
        flows = on_all(daemon, tcp_echo, stack)
        killed = daemon.workers()[number]
        load = Load(daemon.server, tcp_echo)
        with load:
            load.wait_for(50)
            os.kill(killed, signal.SIGKILL)
            load.wait_for(50)
            daemon.said(f"worker {number} is started again")
            load.wait_for(50)
        # What was under way in the worker that died; nothing was refused, and nothing is stuck.
        assert set(load.errors) <= {"ConnectionResetError", "EOFError", "BrokenPipeError"}
        for pid, socks in flows.items():
            for sock in socks:
                if pid == killed:
                    assert ended(sock)
                else:
                    echo(sock, b"still here")
        serving(daemon)
        assert killed not in daemon.workers()
        on_all(daemon, tcp_echo, stack)
    daemon.baseline = 0


class Load:
    """Clients that come, and have an answer, one after the other, on some threads."""

    THREADS = 4

    def __init__(self, server: Endpoint, target: TcpEcho) -> None:
        self._server, self._target = server, target
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._served = 0
        self.errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, name="test-load") for _ in range(self.THREADS)
        ]

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with connect(self._server, self._target) as sock:
                    echo(sock, b"load")
            except (OSError, EOFError) as error:
                self.errors.append(type(error).__name__)
                continue
            with self._changed:
                self._served += 1
                self._changed.notify_all()

    def wait_for(self, more: int) -> None:
        """Wait until so many more were served."""
        with self._changed:
            wanted = self._served + more
            assert self._changed.wait_for(lambda: self._served >= wanted, SECONDS)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


def test_connections_wait_for_the_successor_of_a_worker(
    netproxyd: Start, tcp_echo: TcpEcho
) -> None:
    """Those that the kernel has accepted for a worker that does not run any more."""
    daemon = netproxyd(*TWO, config=configuration(listener()))
    daemon.provoked = r"worker 0 has died \(SIGKILL\)"
    first = daemon.workers()[0]
    os.kill(first, signal.SIGSTOP)
    # What it has accepted before it stands still ends with it.
    wait_until(lambda: "\nState:\tT" in Path(f"/proc/{first}/status").read_text())
    waiting = [socket.create_connection(daemon.server, SECONDS) for _ in range(40)]
    for sock in waiting:
        sock.sendall(b"\5\1\0")
    os.kill(first, signal.SIGKILL)
    for sock in waiting:
        with sock:
            assert exactly(sock, 2) == b"\5\0"
    daemon.baseline = 0


def test_associations_of_a_killed_worker_end_within_tls_too(
    netproxyd: Start, udp_echo: UdpEcho
) -> None:
    daemon = netproxyd(
        *TWO, config=configuration(listener(more=f"tls: {certificates().listener()}"))
    )
    daemon.answers = lambda seconds=0.0: True  # type: ignore[method-assign]
    daemon.provoked = r"worker 1 has died \(SIGKILL\)"
    with ExitStack() as stack:
        clients = [
            stack.enter_context(Client(daemon.server, host, tls=True)) for host in CLIENTS[:30]
        ]
        for client in clients:
            client.echo(udp_echo)
        held = {client: holder(daemon, client.control) for client in clients}
        killed = daemon.workers()[1]
        os.kill(killed, signal.SIGKILL)
        for client in clients:
            if owner(client.host, 2) == 1 or held[client] == killed:
                assert client.is_over()
            else:
                client.echo(udp_echo, b"still here")
        serving(daemon)
        for host in CLIENTS[:30]:
            stack.enter_context(Client(daemon.server, host, tls=True)).echo(udp_echo)
    daemon.baseline = 0


def test_end_of_the_parent_ends_the_workers(netproxyd: Start, tcp_echo: TcpEcho) -> None:
    daemon = netproxyd(*TWO, config=configuration(listener()))
    with ExitStack() as stack:
        flows = on_all(daemon, tcp_echo, stack)
        pids = daemon.workers()
        daemon.kill()
        assert not any(map(runs, pids))
        assert all(ended(sock) for socks in flows.values() for sock in socks)
    # The port is free at once.
    assert refuses(daemon.server)
    netproxyd(*TWO, config=configuration(listener(daemon.port)))


def test_signals_of_the_terminal_reach_the_parent_alone(
    netproxyd: Start, tcp_echo: TcpEcho
) -> None:
    """INT, TERM and HUP to a worker do nothing."""
    daemon = netproxyd(*TWO, config=configuration(listener()))
    with ExitStack() as stack:
        flows = on_all(daemon, tcp_echo, stack)
        pids = daemon.workers()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            for pid in pids:
                os.kill(pid, number)
        serving(daemon)
        for sock in (sock for socks in flows.values() for sock in socks):
            echo(sock, b"still here")
        assert daemon.workers() == pids


# -- reloads


def test_reload_adds_and_removes_listeners_and_keeps_connections(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho, tmp_path: Path
) -> None:
    first, second = free_port(), free_port()
    daemon = netproxyd(*TWO, config=configuration(listener(first)))
    file = next(tmp_path.glob("*.yaml"))
    with ExitStack() as stack:
        flows = on_all(daemon, tcp_echo, stack)
        clients = [stack.enter_context(Client(daemon.server, host)) for host in CLIENTS[:20]]

        def check() -> None:
            for sock in (sock for socks in flows.values() for sock in socks):
                echo(sock, b"still here")
            for client in clients:
                client.echo(udp_echo)

        check()
        file.write_text(configuration(listener(first), listener(second, "second")))
        daemon.reload()
        check()
        for sockets in on_all(daemon, tcp_echo, stack, port=second).values():
            assert sockets
        more = [stack.enter_context(Client((LOOPBACK, second), host)) for host in CLIENTS[:20]]
        for client in more:
            client.echo(udp_echo)
        for client in more:
            client.close()
        file.write_text(configuration(listener(second, "second")))
        daemon.reload()
        wait_for(lambda: refuses((LOOPBACK, first)), SECONDS, "no listener")
        for sock in (sock for socks in flows.values() for sock in socks):
            echo(sock, b"still here")
        file.write_text(configuration(listener(first)))
        daemon.reload()
        on_all(daemon, tcp_echo, stack)
        with Client(daemon.server, CLIENTS[0]) as client:
            client.echo(udp_echo)
    daemon.baseline = 0


@pytest.mark.parametrize("fault", ["a key", "a port in use", "a file of one listener"])
def test_reload_with_errors_changes_nothing_in_any_worker(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho, tmp_path: Path, fault: str
) -> None:
    first, second = free_port(), free_port()
    daemon = netproxyd(*TWO, config=configuration(listener(first)))
    file = next(tmp_path.glob("*.yaml"))
    with ExitStack() as stack:
        flows = on_all(daemon, tcp_echo, stack)
        clients = [stack.enter_context(Client(daemon.server, host)) for host in CLIENTS[:20]]
        used = stack.enter_context(socket.create_server((LOOPBACK, 0)))
        bad = {
            "a key": listener(0, "bad", "anounce: 203.0.113.5"),
            "a port in use": listener(used.getsockname()[1], "bad"),
            "a file of one listener": listener(0, "bad", "tls: {certificate: /no/file, key: /no}"),
        }
        file.write_text(configuration(listener(second, "second"), bad[fault]))
        pids = daemon.workers()
        daemon.reload()
        daemon.said("not reloaded: ")
        wait_for(lambda: refuses((LOOPBACK, second)), SECONDS, "no listener")
        for sock in (sock for socks in flows.values() for sock in socks):
            echo(sock, b"still here")
        for client in clients:
            client.echo(udp_echo)
        on_all(daemon, tcp_echo, stack)
        assert daemon.workers() == pids
        file.write_text(configuration(listener(first), listener(second, "second")))
        daemon.reload()
        on_all(daemon, tcp_echo, stack, port=second)
    daemon.baseline = 0


def test_successor_has_the_configuration_in_force(
    netproxyd: Start, tcp_echo: TcpEcho, tmp_path: Path
) -> None:
    first, second = free_port(), free_port()
    daemon = netproxyd(*TWO, config=configuration(listener(first)))
    daemon.provoked = r"worker [01] has died \(SIGKILL\)"
    next(tmp_path.glob("*.yaml")).write_text(
        configuration(listener(first), listener(second, "second"))
    )
    daemon.reload()
    for number in (0, 1):
        os.kill(daemon.workers()[0], signal.SIGKILL)
        daemon.said(f"worker {number} is started again")
        serving(daemon)
    with ExitStack() as stack:
        for port in (first, second):
            on_all(daemon, tcp_echo, stack, port=port)
    daemon.baseline = 0


# -- the end


def test_term_lets_flows_of_all_workers_finish(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho
) -> None:
    daemon = netproxyd(*TWO, config=configuration(listener(), more="timeouts: {drain: 600s}"))
    pids = daemon.workers()
    with ExitStack() as stack:
        flows = on_all(daemon, tcp_echo, stack)
        clients = [stack.enter_context(Client(daemon.server, host)) for host in CLIENTS[:20]]
        for client in clients:
            client.echo(udp_echo)
        daemon.signal(signal.SIGTERM)
        daemon.said("stopping: ")
        wait_for(lambda: refuses(daemon.server), SECONDS, "no new connections")
        for sock in (sock for socks in flows.values() for sock in socks):
            echo(sock, b"still here")
        for client in clients:
            client.echo(udp_echo, b"after")
        assert daemon.process.poll() is None
    assert daemon.wait(SECONDS) == 0
    assert not any(map(runs, pids))


@pytest.mark.parametrize("number", [0, 1])
def test_term_lets_associations_within_tls_finish(
    netproxyd: Start, udp_echo: UdpEcho, number: int
) -> None:
    """One worker has the keys of a connection, the other one its association."""
    config = configuration(
        listener(more=f"tls: {certificates().listener()}"), more="timeouts: {drain: 600s}"
    )
    daemon = netproxyd(*TWO, config=config)
    daemon.answers = lambda seconds=0.0: True  # type: ignore[method-assign]
    with ExitStack() as stack:
        # All are accepted by one worker, and handed over: the owner has nothing else.
        clients: list[Client] = []
        for host in (host for host in CLIENTS * 9 if owner(host, 2) != number):
            client = stack.enter_context(Client(daemon.server, host, tls=True))
            if holder(daemon, client.control) != daemon.workers()[number]:
                client.close()
                continue
            client.echo(udp_echo)
            clients.append(client)
            if len(clients) == 5:
                break
        daemon.signal(signal.SIGTERM)
        daemon.said("stopping: ")
        wait_for(lambda: refuses(daemon.server), SECONDS, "no new connections")
        # Longer than a worker takes to see that it has nothing left.
        for _ in range(20):
            for client in clients:
                client.echo(udp_echo, b"after")
            time.sleep(0.05)
        assert daemon.process.poll() is None
    assert daemon.wait(SECONDS) == 0


@pytest.mark.parametrize("workers", [3, 4])
def test_datagrams_come_to_their_workers_while_others_have_ended(
    netproxyd: Start, udp_echo: UdpEcho, workers: int
) -> None:
    """A worker that has drained leaves the group; the others keep their places."""
    daemon = netproxyd("-w", str(workers), config=listener_alone("timeouts: {drain: 600s}"))
    with ExitStack() as stack:
        hosts = [host for host in CLIENTS if owner(host, workers) == workers - 1]
        clients = [stack.enter_context(Client(daemon.server, host)) for host in hosts]
        for client in clients:
            client.echo(udp_echo)
        daemon.signal(signal.SIGTERM)
        wait_for(lambda: len(daemon.workers()) == 1, SECONDS, "one worker is left")
        for client in clients:
            client.echo(udp_echo, b"after")
    assert daemon.wait(SECONDS) == 0


def listener_alone(more: str) -> str:
    return f"listeners:\n{listener()}{more}\n"


def test_second_term_ends_all_workers_at_once(netproxyd: Start, tcp_echo: TcpEcho) -> None:
    daemon = netproxyd(*TWO, config=configuration(listener(), more="timeouts: {drain: 600s}"))
    pids = daemon.workers()
    with ExitStack() as stack:
        flows = on_all(daemon, tcp_echo, stack)
        daemon.signal(signal.SIGTERM)
        daemon.said("stopping: ")
        for sock in (sock for socks in flows.values() for sock in socks):
            echo(sock, b"still here")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(SECONDS) == 0
        assert all(ended(sock) for socks in flows.values() for sock in socks)
    assert not any(map(runs, pids))
    finished = daemon.lines("msg=finished .*network=tcp")
    assert len(finished) == sum(len(socks) for socks in flows.values())


def test_connections_under_load_are_not_cut_when_the_daemon_drains(
    netproxyd: Start, tcp_echo: TcpEcho
) -> None:
    """What was accepted is served; what comes later is refused, not left alone."""
    # Not a port that the kernel may give to a client, which would then connect to itself.
    daemon = netproxyd(*TWO, config=configuration(listener(free_port())))
    load = Load(daemon.server, tcp_echo)
    with load:
        load.wait_for(50)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(SECONDS) == 0
    assert set(load.errors) <= {"ConnectionRefusedError", "ConnectionResetError"}


# -- start


def test_port_of_a_running_daemon_is_refused_with_a_clear_line(
    netproxyd: Start, tcp_echo: TcpEcho
) -> None:
    """Sockets that share a port would take half of the connections without a word."""
    daemon = netproxyd(*TWO, "-l", ANY_PORT)
    for more in (TWO, ()):
        status, text = run_netproxyd("-l", f"sps://{LOOPBACK}:{daemon.port}", *more)
        assert status == CANNOT_LISTEN
        assert re.search(
            rf"cannot listen on (udp|tcp) {LOOPBACK}:{daemon.port}: Address already in use", text
        )
        assert "Traceback" not in text
    with ExitStack() as stack:
        on_all(daemon, tcp_echo, stack)


def test_configuration_error_ends_a_start_with_workers() -> None:
    status, text = run_netproxyd("-l", "sps://127.0.0.1:0?anounce=x", *TWO)
    assert status in (64, 78)
    assert "Traceback" not in text


@pytest.mark.parametrize("count", ["0", "-1", "65", "many", "1.5"])
def test_wrong_number_of_workers_is_refused(count: str) -> None:
    status, text = run_netproxyd("-l", ANY_PORT, f"-w={count}", "-t")
    assert status == 78
    assert "is not a number of processes (1 to 64, or auto)" in text


def test_workers_share_an_activation_socket(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho
) -> None:
    """All of them accept connections; the datagrams of all clients come to the first one."""
    with ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server((LOOPBACK, 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind((LOOPBACK, 0))
        for number, sock in enumerate((tcp, udp)):
            os.dup2(sock.fileno(), HIGH + number)
            stack.callback(os.close, HIGH + number)
        daemon = netproxyd(
            *TWO,
            config=ACTIVATED,
            python=(sys.executable, "-c", LAUNCH, str(HIGH)),
            pass_fds=(HIGH, HIGH + 1),
        )
        assert daemon.port == tcp.getsockname()[1]
        with ExitStack() as flows:
            for pid, other in (daemon.workers(), daemon.workers()[::-1]):
                with stopped(pid):
                    for _ in range(3):
                        sock = flows.enter_context(connect(daemon.server, tcp_echo))
                        assert holder(daemon, sock) == other
            clients = [flows.enter_context(Client(daemon.server, host)) for host in CLIENTS[:30]]
            for client in clients:
                client.echo(udp_echo)
            assert daemon.drops() == {}
            first = daemon.workers()[0]
            wait_for(
                lambda: {holder(daemon, client.control) for client in clients} == {first},
                SECONDS,
                "all associations are in the first worker",
            )


# -- limits over all workers


def opened(
    server: Endpoint, target: TcpEcho, stack: ExitStack, hosts: list[str]
) -> list[socket.socket]:
    """Return the connections that were served, of one for each of `hosts`."""
    served = []
    for host in hosts:
        with contextlib.suppress(OSError, EOFError):
            sock = stack.enter_context(connect(server, target, host))
            echo(sock, b"begin")
            served.append(sock)
    return served


def test_connections_of_a_listener_are_exact(netproxyd: Start, tcp_echo: TcpEcho) -> None:
    daemon = netproxyd(*TWO, config=configuration(listener(more="limits: {connections: 24}")))
    for _ in range(3):
        with ExitStack() as stack:
            assert len(opened(daemon.server, tcp_echo, stack, [LOOPBACK] * 40)) == 24
        wait_for(lambda: daemon.status()["connections"] == 0, SECONDS, "all are over")


def test_connections_of_a_client_are_exact(netproxyd: Start, tcp_echo: TcpEcho) -> None:
    more = "limits: {connections_per_client: 9}"
    daemon = netproxyd(*TWO, config=configuration(listener(more=more)))
    for _ in range(3):
        with ExitStack() as stack:
            for host in CLIENTS[:4]:
                assert len(opened(daemon.server, tcp_echo, stack, [host] * 14)) == 9
        wait_for(lambda: daemon.status()["connections"] == 0, SECONDS, "all are over")


@pytest.mark.parametrize("tls", [False, True])
def test_association_counts_once_for_its_client(
    netproxyd: Start, udp_echo: UdpEcho, tls: bool
) -> None:
    """Although two workers have a part of it: within TLS one relays for the other."""
    more = "limits: {connections_per_client: 2}"
    if tls:
        more += f", tls: {certificates().listener()}"
    daemon = netproxyd(*TWO, config=configuration(listener(more=more)))
    if tls:
        daemon.answers = lambda seconds=0.0: True  # type: ignore[method-assign]
    with ExitStack() as stack:
        for host in CLIENTS[:20]:
            for _ in range(2):
                stack.enter_context(Client(daemon.server, host, tls)).echo(udp_echo)
    wait_for(lambda: daemon.status()["connections"] == 0, SECONDS, "all are over")
    daemon.baseline = 0


USERS = """
users:
  alice: {password: secret, limits: {%s}}
  bob: {password: secret}
"""
ALICE, BOB = ("alice", "secret"), ("bob", "secret")


def test_connections_of_a_user_are_exact(netproxyd: Start, tcp_echo: TcpEcho) -> None:
    more = USERS % "connections: 11"
    daemon = netproxyd(
        *TWO, config=configuration(listener(more="auth: required"), more=more), login=BOB
    )
    for _ in range(3):
        with ExitStack() as stack:
            served, codes = 0, []
            for _ in range(20):
                try:
                    sock, _ = socks5(daemon.server, CONNECT, tcp_echo.address, ALICE)
                except Refused as error:
                    codes.append(error.code)
                    continue
                stack.enter_context(sock)
                served += 1
            assert (served, codes) == (11, [NOT_ALLOWED] * 9)
        wait_for(lambda: daemon.status()["connections"] == 0, SECONDS, "all are over")


def test_connections_of_a_killed_worker_count_no_more(netproxyd: Start, tcp_echo: TcpEcho) -> None:
    daemon = netproxyd(
        *TWO,
        config=configuration(
            listener(more="auth: required, limits: {connections_per_client: 12}"),
            more=USERS % "connections: 12",
        ),
        login=BOB,
    )
    daemon.provoked = r"worker \d has died \(SIGKILL\)"
    with ExitStack() as stack:

        def fill() -> list[socket.socket]:
            socks = []
            for _ in range(30):
                with contextlib.suppress(OSError, EOFError):
                    sock, _ = socks5(daemon.server, CONNECT, tcp_echo.address, ALICE)
                    socks.append(stack.enter_context(sock))
            return socks

        socks = fill()
        assert len(socks) == 12
        killed = daemon.workers()[0]
        lost = sum(holder(daemon, sock) == killed for sock in socks)
        os.kill(killed, signal.SIGKILL)
        daemon.said("worker 0 is started again")
        serving(daemon)
        assert len(fill()) == lost
    wait_for(lambda: daemon.status()["connections"] == 0, SECONDS, "all are over")
    daemon.baseline = 0


def test_quota_of_a_user_counts_in_all_workers(
    netproxyd: Start, tcp_echo: TcpEcho, tmp_path: Path
) -> None:
    """Both workers carry a part of it; once it is used up, neither gives anything new."""
    size, quota = 10_000, 400_000
    (state := tmp_path / "state").mkdir()
    daemon = netproxyd(
        *TWO,
        config=configuration(
            listener(more="auth: required"),
            more=USERS % f"quota: {{total: {quota}B}}" + f"state: {state}",
        ),
        login=BOB,
    )
    moved, holders = 0, set()
    while moved + 2 * size <= quota:
        sock, _ = socks5(daemon.server, CONNECT, tcp_echo.address, ALICE)
        with sock:
            holders.add(holder(daemon, sock))
            echo(sock, b"x" * size)
            moved += 2 * size
    assert holders == set(daemon.workers())

    def code() -> int:
        try:
            sock, _ = socks5(daemon.server, CONNECT, tcp_echo.address, ALICE)
        except Refused as error:
            return error.code
        with sock:
            return 0

    wait_for(lambda: code() == NOT_ALLOWED, SECONDS, "the quota is used up")
    # In each worker.
    assert [code() for _ in range(20)] == [NOT_ALLOWED] * 20
    with pytest.raises(Refused):
        socks5(daemon.server, ASSOCIATE, ("0.0.0.0", 0), ALICE)
    sock, _ = socks5(daemon.server, CONNECT, tcp_echo.address, BOB)
    sock.close()


def test_quota_that_was_used_up_counts_from_the_start_on(
    netproxyd: Start, tcp_echo: TcpEcho, tmp_path: Path
) -> None:
    """And from a reload on that makes it smaller."""
    (state := tmp_path / "state").mkdir()

    def text(quota: int) -> str:
        more = USERS % f"quota: {{total: {quota}B}}" + f"state: {state}"
        return configuration(listener(more="auth: required"), more=more)

    daemon = netproxyd(*TWO, config=text(1_000_000), login=BOB)
    with socks5(daemon.server, CONNECT, tcp_echo.address, ALICE)[0] as sock:
        echo(sock, b"x" * 50_000)
    daemon.said("user=alice .*sent=50000 received=50000")
    (tmp_path / "netproxyd1.yaml").write_text(text(100_000))
    for _ in range(3):
        daemon.reload()
        for _ in range(10):
            with pytest.raises(Refused):
                socks5(daemon.server, CONNECT, tcp_echo.address, ALICE)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait(SECONDS) == 0
    again = netproxyd(*TWO, config=text(100_000), login=BOB)
    for _ in range(10):
        with pytest.raises(Refused):
            socks5(again.server, CONNECT, tcp_echo.address, ALICE)
