"""A parent and its workers, on threads: start, reload in two phases, deaths, drain and stop."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any, Callable, Iterator

import pytest

from netproxy.daemon.workers import orders
from netproxy.daemon.workers.messages import Message
from netproxy.errors import ConfigError, ListenError
from netproxy.interfaces.addresses import Address
from netproxy.protocol import socks5
from tests.support.ports import free_port
from tests.support.relays import UdpClient, UdpPort
from tests.support.sockets import SECONDS, listen, nothing_comes, read_exactly, server, wait_until
from tests.support.teams import Team, ThreadWorker, team

SPS = "listeners: [{listen: '127.0.0.1:0', name: main}]"
TWO = f"{SPS[:-1]}, {{listen: '127.0.0.1:0', name: second}}]"
BOTH = (0, 1)

Make = Callable[..., Team]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:
        yield lambda text=SPS, **more: stack.enter_context(team(monkeypatch, text, **more))


@pytest.fixture
def echo() -> Iterator[Address]:
    def script(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            sock.sendall(data)

    with server(script) as address:
        yield address


class Tunnel:
    """A SOCKS5 CONNECT through a worker."""

    def __init__(self, ours: Team, index: int, target: Address, port: int = 0) -> None:
        self.socket = ours.connect(index, port)
        self.socket.sendall(b"\5\1\0" + socks5.encode_request(socks5.CONNECT, target))
        assert read_exactly(self.socket, 12)[3] == 0
        self.check(b"begin")

    def check(self, data: bytes = b"still here") -> None:
        self.socket.sendall(data)
        assert read_exactly(self.socket, len(data)) == data

    def __enter__(self) -> Tunnel:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), SECONDS).close()
    except ConnectionError:
        return True
    return False


def with_listener(port: int, more: str = "") -> str:
    return f"{SPS[:-1]}, {{listen: '127.0.0.1:{port}', name: added}}]\n{more}"


# -- start


def test_every_worker_serves_every_listener(make: Make, echo: Address) -> None:
    ours = make(TWO)
    first, second = ours.ports()
    assert ours.ports("udp") == [first, second]
    for port in (first, second):
        for index in BOTH:
            with Tunnel(ours, index, echo, port):
                assert ours.live()[index]
    assert ours.parent.default_upstream == "direct, 2 workers"


def test_address_in_use_is_a_listen_error(make: Make) -> None:
    with listen() as other, pytest.raises(ListenError, match="in use"):
        make(f"listeners: [{{listen: '127.0.0.1:{other.getsockname()[1]}', network: tcp}}]")


def test_worker_that_cannot_start_ends_the_start(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_in(monkeypatch, 1, "start_plan", ListenError("no thread for the poller"))
    with pytest.raises(ListenError, match="no thread for the poller"):
        make()


def test_worker_that_dies_while_it_starts_ends_the_start(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(self: ThreadWorker, plan: object, own: object) -> int:
        self.daemon.stop()
        return 70

    monkeypatch.setattr(ThreadWorker, "run", vanish)
    with pytest.raises(ListenError, match="worker 0 does not start"):
        make()


# -- reload


def _fail_in(monkeypatch: pytest.MonkeyPatch, index: int, method: str, error: Exception) -> None:
    """Have a method of a worker's daemon fail, in every worker with this number."""
    begin = ThreadWorker.__init__

    def __init__(self: ThreadWorker, *arguments: Any) -> None:
        begin(self, *arguments)
        if self._ends.number == index:
            monkeypatch.setattr(self._daemon, method, _raising(error))

    monkeypatch.setattr(ThreadWorker, "__init__", __init__)


def _raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


def test_added_listener_is_served_by_all_workers(make: Make, echo: Address) -> None:
    ours = make()
    kept = ours.port
    with contextlib.ExitStack() as stack:
        flows = [stack.enter_context(Tunnel(ours, index, echo)) for index in BOTH]
        ours.reload(TWO)
        assert ours.port == kept
        for index in BOTH:
            with Tunnel(ours, index, echo, ours.ports()[1]):
                pass
            flows[index].check()


def test_removed_listener_accepts_nothing_and_its_flows_go_on(make: Make, echo: Address) -> None:
    ours = make(TWO)
    kept, removed = ours.ports()
    with contextlib.ExitStack() as stack:
        flows = [stack.enter_context(Tunnel(ours, index, echo, removed)) for index in BOTH]
        ours.reload(SPS)
        assert ours.ports() == [kept]
        assert refuses(removed)
        for flow in flows:
            flow.check()
        for worker in ours.workers:
            keys = {("udp", f"127.0.0.1:{kept}"), ("tcp", f"127.0.0.1:{kept}")}
            wait_until(lambda worker=worker, keys=keys: worker.sockets.keys == keys)
    # Nobody has the port any more: not even a descriptor that was passed.
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", removed))
        sock.listen()


def test_listener_comes_back_after_it_was_removed(make: Make, echo: Address) -> None:
    port = free_port()
    ours = make()
    for _ in range(3):
        ours.reload(with_listener(port))
        for index in BOTH:
            with Tunnel(ours, index, echo, port):
                pass
        ours.reload(SPS)
        assert refuses(port)


@pytest.mark.parametrize("index", BOTH)
def test_refusal_of_one_worker_changes_nothing_anywhere(
    make: Make, echo: Address, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    ours = make()
    port = free_port()
    before = [worker.sockets.keys for worker in ours.workers]
    daemon = ours.worker(index).daemon
    with Tunnel(ours, index, echo) as flow:
        with monkeypatch.context() as patch:
            patch.setattr(daemon, "prepare", _raising(ListenError("no thread left")))
            with pytest.raises(ListenError, match="no thread left"):
                ours.reload(with_listener(port))
        flow.check()
        assert refuses(port)
        assert len(ours.ports()) == 1
        assert [worker.sockets.keys for worker in ours.workers] == before
        assert [worker._prepared for worker in ours.workers] == [None, None]
        # The next one finds nothing in its way.
        ours.reload(with_listener(port))
        for each in BOTH:
            with Tunnel(ours, each, echo, port):
                pass


def test_error_of_a_configuration_keeps_its_kind(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make()
    monkeypatch.setattr(ours.worker(1).daemon, "prepare", _raising(ConfigError("no such file")))
    with pytest.raises(ConfigError, match="no such file"):
        ours.reload(TWO)


def test_reload_onto_a_port_in_use_changes_nothing(make: Make, echo: Address) -> None:
    ours = make()
    with listen() as other, Tunnel(ours, 1, echo) as flow:
        with pytest.raises(ListenError, match="in use"):
            ours.reload(with_listener(other.getsockname()[1]))
        flow.check()
        with Tunnel(ours, 0, echo):
            pass


def test_worker_that_dies_during_a_reload_is_no_obstacle(
    make: Make, echo: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor has the new configuration."""
    ours = make(has_faults=True)
    port = free_port()
    dying = ours.worker(1)
    monkeypatch.setattr(dying, "_follow", _die)
    ours.reload(with_listener(port))
    _wait_for_successor(ours, dying)
    for index in BOTH:
        with Tunnel(ours, index, echo, port):
            pass


def _die(order: Message) -> None:
    """End a worker that gets an order as the end of its orders does."""
    for sock in order.sockets():
        sock.close()
    raise EOFError


def _wait_for_successor(ours: Team, dead: ThreadWorker) -> None:
    """Wait until the parent has replaced a worker, and it serves."""
    index = dead._ends.number

    def is_replaced() -> bool:
        assert ours.parent.look() == ""
        return ours.worker(index) is not dead and ours.processes.all[index].serving

    wait_until(is_replaced)


class Hesitation:
    """Holds a worker's next order of a kind until release()."""

    def __init__(self, worker: ThreadWorker, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._kind = kind
        self._follow = worker._follow
        self._released = threading.Event()
        self.reached = threading.Event()
        monkeypatch.setattr(worker, "_follow", self._wait)

    def _wait(self, order: Message) -> None:
        if order.kind == self._kind and not self.reached.is_set():
            self.reached.set()
            self._released.wait(SECONDS)
        self._follow(order)

    def release(self) -> None:
        self._released.set()


def test_worker_that_does_not_answer_fails_the_reload_everywhere(
    make: Make, echo: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make()
    monkeypatch.setattr(orders, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(orders, "SETTLE_SECONDS", 0.1)
    port = free_port()
    slow = Hesitation(ours.worker(1), "prepare", monkeypatch)
    with pytest.raises(ConfigError, match="worker 1 does not answer"):
        ours.reload(with_listener(port))
    assert slow.reached.is_set()
    slow.release()
    # Its descriptor of the socket keeps the port open until it has discarded the reload.
    wait_until(lambda: refuses(port))
    for index in BOTH:
        with Tunnel(ours, index, echo):
            pass


def test_late_answers_are_none_to_the_next_order(
    make: Make, echo: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker answers the first reload, which was given up, while the second one begins."""
    ours = make()
    monkeypatch.setattr(orders, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(orders, "SETTLE_SECONDS", 0.1)
    port = free_port()
    slow = Hesitation(ours.worker(1), "prepare", monkeypatch)
    with pytest.raises(ConfigError, match="worker 1 does not answer"):
        ours.reload(with_listener(port))
    monkeypatch.setattr(orders, "ANSWER_SECONDS", SECONDS)
    monkeypatch.setattr(orders, "SETTLE_SECONDS", SECONDS)
    # The second reload is refused by this worker, after it has answered the first one.
    slow.release()
    wait_until(lambda: not nothing_comes(ours.processes.all[1].orders))
    monkeypatch.setattr(
        ours.worker(1).daemon, "prepare", _raising(ListenError("refused by worker 1"))
    )
    other_port = free_port()
    with pytest.raises(ListenError, match="refused by worker 1"):
        ours.reload(with_listener(other_port))
    for index in BOTH:
        with Tunnel(ours, index, echo):
            pass
    assert refuses(port)
    assert refuses(other_port)


# -- deaths


def test_worker_that_has_died_is_replaced(make: Make, echo: Address) -> None:
    ours = make(has_faults=True)
    dead = ours.worker(0)
    with Tunnel(ours, 1, echo) as flow:
        dead._follow = _die  # type: ignore[method-assign]
        ours.processes.tell_one(ours.processes.all[0], Message({"kind": "die"}))
        _wait_for_successor(ours, dead)
        flow.check()
        with Tunnel(ours, 0, echo):
            pass
    lines = "\n".join(ours.log.lines)
    assert "worker 0 has died (exit status 70)" in lines
    assert "worker 0 is started again (pid " in lines


def test_fork_that_fails_is_tried_again(make: Make, echo: Address) -> None:
    ours = make(has_faults=True)
    dead = ours.worker(0)
    ours.processes.forks_fail = True
    dead._follow = _die  # type: ignore[method-assign]
    ours.processes.tell_one(ours.processes.all[0], Message({"kind": "die"}))
    text = "cannot start worker 0 again: Resource temporarily unavailable"
    wait_until(lambda: ours.parent.look() or text in "\n".join(ours.log.lines))
    ours.processes.forks_fail = False
    _wait_for_successor(ours, dead)
    with Tunnel(ours, 0, echo):
        pass


def test_look_is_due_when_a_successor_is(make: Make) -> None:
    ours = make(has_faults=True)
    assert ours.parent.look_seconds > 3600
    dead = ours.worker(0)
    dead._follow = _die  # type: ignore[method-assign]
    ours.processes.tell_one(ours.processes.all[0], Message({"kind": "die"}))
    ours.processes.forks_fail = True
    wait_until(lambda: ours.parent.look() or not ours.processes.all[0].pid)
    assert ours.parent.look_seconds < 10.0
    ours.processes.forks_fail = False
    _wait_for_successor(ours, dead)


# -- the end


def test_drain_refuses_new_connections_and_running_ones_go_on(make: Make, echo: Address) -> None:
    ours = make()
    port = ours.port
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(UdpPort())
        clients = [
            stack.enter_context(UdpClient(port, source=ours.client_of(index))) for index in BOTH
        ]
        flows = [stack.enter_context(Tunnel(ours, index, echo)) for index in BOTH]
        for client in clients:
            client.check_echo(target, b"before")
        assert ours.parent.live == 2
        ours.parent.stop_accepting()
        assert refuses(port)
        assert ours.parent.live == 4
        for flow, client in zip(flows, clients, strict=True):
            flow.check()
            client.check_echo(target, b"after")
    wait_until(lambda: not ours.parent.live)
    assert [worker.ended for worker in ours.processes.all] == ["exit status 0"] * 2


def test_stop_ends_running_flows(make: Make, echo: Address) -> None:
    ours = make()
    with Tunnel(ours, 0, echo) as first, Tunnel(ours, 1, echo) as second:
        ours.parent.stop()
        for flow in (first, second):
            with contextlib.suppress(ConnectionResetError):
                assert flow.socket.recv(1) == b""
    assert ours.processes.running == []
