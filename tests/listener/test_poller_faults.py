"""What the kernel refuses to watch, and what it refuses at the start."""

from __future__ import annotations

import errno
import os
import select
import socket
from pathlib import Path
from typing import Any

import pytest

from netproxy.interfaces.connections import Wait
from netproxy.listener.poller import Poller
from tests.support.doubles import Lines
from tests.support.sockets import wait_until

ATTEMPTS = 300


class Owner:
    """A WaitOwner that counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def step(self, descriptor: int, events: int) -> Wait | None:
        self.calls.append("step")
        return None

    def resume(self, ready: bool) -> Wait | None:
        raise AssertionError("nobody resumes it")

    def wake(self, wait: Wait, ready: bool) -> None:
        self.calls.append("wake")

    def cannot_watch(self, wait: Wait, error: Exception) -> None:
        self.calls.append("unwatched")

    def end(self, error: Exception | None) -> None:
        self.calls.append("end")


def test_wait_that_cannot_be_watched_is_not_stepped(poller: Poller, tmp_path: Path) -> None:
    """Its first descriptor has an event already when the second is refused: a file has no events.

    The caller of watch() goes on with it then, and must be the only one.
    """
    ours, theirs = socket.socketpair()
    owner = Owner()
    with ours, theirs, open(tmp_path / "file", "w") as file:
        theirs.send(b"x")
        wait = Wait(
            ((ours, select.POLLIN), (file, select.POLLIN)), None, owner.resume, step=owner.step
        )
        for _ in range(ATTEMPTS):
            with pytest.raises(PermissionError):
                poller.watch(wait, owner)
    assert owner.calls == [] and len(poller) == 0


def test_wait_after_a_step_that_cannot_be_watched_goes_to_its_owner(
    poller: Poller, tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    owner = Owner()
    with ours, theirs, open(tmp_path / "file", "w") as file:
        following = Wait(((file, select.POLLIN),), None, owner.resume, step=owner.step)
        poller.watch(
            Wait(((ours, select.POLLIN),), None, owner.resume, step=lambda *_: following), owner
        )
        theirs.send(b"x")
        wait_until(lambda: owner.calls)
    assert owner.calls == ["unwatched"] and len(poller) == 0


@pytest.mark.parametrize("module, name", [(os, "pipe"), (select, "epoll")])
def test_start_that_fails_leaves_nothing_open(
    log: Lines, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    """tests/conftest.py counts the descriptors."""

    def fail() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    poller = Poller(log)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(OSError):
            poller.start()
    poller.stop()
    poller.stop()
