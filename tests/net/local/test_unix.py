"""Connections to UNIX sockets: every failure says what to do."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Iterator

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import UnixAddress
from netproxy.net.connect import AbortableDials
from netproxy.net.local.unix import connect_unix
from tests.support.sockets import read_exactly


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.sock"


@pytest.fixture
def service(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(0)
        yield listening


def failure(address: object, seconds: float = 1.0) -> DialError:
    with pytest.raises(DialError) as caught:
        connect_unix(UnixAddress.of(address), seconds)
    assert not caught.value.detail and not caught.value.hop
    return caught.value


def test_connected_socket_does_not_block(path: Path, service: socket.socket) -> None:
    with connect_unix(UnixAddress.of(path), 1.0) as sock:
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        accepted, _ = service.accept()
        with accepted:
            sock.sendall(b"hello")
            assert read_exactly(accepted, 5) == b"hello"


def test_socket_without_a_file_has_its_name() -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")  # the kernel chooses a name
        listening.listen()
        name = listening.getsockname()[1:].decode()
        connect_unix(UnixAddress.of(f"@{name}"), 1.0).close()


def test_socket_that_is_not_there(path: Path) -> None:
    """Hazard 165."""
    error = failure(path)
    assert (error.reason, str(error)) == (
        Reason.REFUSED,
        "there is no such socket (is its service running?)",
    )


@pytest.mark.parametrize("kind", ["abandoned", "file"])
def test_socket_at_which_nobody_listens(path: Path, kind: str) -> None:
    """Hazard 165."""
    if kind == "file":
        path.touch()
    else:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    error = failure(path)
    assert (error.reason, str(error)) == (
        Reason.REFUSED,
        "nobody listens at the socket (is its service running?)",
    )


def test_socket_that_may_not_be_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 165.  Root may use all sockets: the kernel's refusal is played."""

    class Refused(socket.socket):
        def connect(self, address: object) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "socket", Refused)
    error = failure(path)
    # Not DENIED: no rule of the daemon has refused it.
    assert error.reason is Reason.GENERAL and str(error).startswith("permission denied (the ")


def test_service_that_accepts_nothing_is_given_up_in_time(
    path: Path, service: socket.socket
) -> None:
    """Hazard 165."""
    waiting = [connect_unix(UnixAddress.of(path), 1.0)]
    with pytest.raises(DialError) as caught:
        for _ in range(3):
            waiting.append(connect_unix(UnixAddress.of(path), 0.01))
    for sock in waiting:
        sock.close()
    assert (caught.value.reason, str(caught.value)) == (
        Reason.TIMEOUT,
        "its service accepts no connection",
    )


def test_socket_of_another_kind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        assert "wrong type for socket" in str(failure(path))


def test_dial_that_may_be_aborted(path: Path, service: socket.socket) -> None:
    dials = AbortableDials()
    with dials.watched():
        with connect_unix(UnixAddress.of(path), 1.0) as sock:
            dials.abort()
            assert sock.recv(1) == b""
        assert str(failure(path)) == "aborted"
