"""Rigs of a TCP listener and a poller, and sockets that are closed behind the test."""

from __future__ import annotations

import socket
from typing import Any, Callable, Iterator

import pytest

from netproxy.listener import poller as poller_module
from netproxy.listener.poller import Poller
from tests.support.doubles import Lines
from tests.support.pools import Gate
from tests.support.tcp import TcpRig

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def make() -> Iterator[Callable[..., TcpRig]]:
    rigs: list[TcpRig] = []

    def make(*arguments: Any) -> TcpRig:
        rigs.append(TcpRig(*arguments))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make: Callable[..., TcpRig]) -> TcpRig:
    rig = make()
    rig.listener.start()
    return rig


@pytest.fixture
def log() -> Lines:
    return Lines()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.let_go()


@pytest.fixture
def poller(log: Lines, monkeypatch: pytest.MonkeyPatch) -> Iterator[Poller]:
    """A poller that looks at deadlines often."""
    monkeypatch.setattr(poller_module, "TICK", 0.02)
    poller = Poller(log)
    poller.start()
    yield poller
    assert poller.thread.is_alive()
    poller.stop()


@pytest.fixture
def pair() -> Iterator[Callable[[], Pair]]:
    opened: list[socket.socket] = []

    def make() -> Pair:
        ours, theirs = socket.socketpair()
        opened.extend((ours, theirs))
        return ours, theirs

    yield make
    for sock in opened:
        sock.close()
