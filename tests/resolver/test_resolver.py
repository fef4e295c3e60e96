"""Names to addresses: what waits, what does not, and what a failed lookup says."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Callable, Iterator

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.resolver.resolver import Resolver
from tests.support.doubles import Counts
from tests.support.sockets import Task


def refuse(task: Callable[[], None]) -> bool:
    return False


def at_once(task: Callable[[], None]) -> bool:
    task()
    return True


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sets what getaddrinfo(3) answers: a list, or an exception."""

    def answer(what: Any) -> None:
        def getaddrinfo(host: bytes, port: int, **_: Any) -> Any:
            if isinstance(what, BaseException):
                raise what
            return what

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return answer


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "2001:db8::1", "fe80::1%2"])
def test_a_literal_needs_no_thread(host: str, counts: Counts) -> None:
    assert Resolver(refuse, counts).resolve(Address(host, 80)) == [Address(host, 80)]


def test_a_name_of_this_machine(counts: Counts) -> None:
    assert Address("127.0.0.1", 80) in Resolver(at_once, counts).resolve(Address("localhost", 80))


def test_all_addresses_in_the_systems_order(answers: Callable[[Any], None], counts: Counts) -> None:
    stream = socket.SOCK_STREAM
    answers(
        [
            (socket.AF_INET6, stream, 6, "", ("2001:db8::1", 80, 0, 0)),
            (socket.AF_INET, stream, 6, "", ("192.0.2.1", 80)),
            (socket.AF_UNIX, stream, 6, "", ("/nowhere", 80)),
        ]
    )
    found = Resolver(at_once, counts).resolve(Address("example.com", 80))
    assert found == [Address("2001:db8::1", 80), Address("192.0.2.1", 80)]


@pytest.mark.parametrize(
    "error",
    [socket.gaierror(socket.EAI_NONAME, "no"), UnicodeError("label too long"), OSError("no"), None],
)
def test_a_name_that_is_not_found(
    answers: Callable[[Any], None], counts: Counts, error: Any
) -> None:
    answers(error or [])
    with pytest.raises(DialError) as caught:
        Resolver(at_once, counts).resolve(Address("example.com", 80))
    assert caught.value.reason is Reason.NAME
    assert str(caught.value) == "example.com: name not resolved"
    assert counts.of("lookups", "failed") == 1


@pytest.mark.parametrize(
    "host",
    [
        "a..b",
        ".",
        "a" * 64,
        "a" * 64 + ".example",
        "b\u00fccher.example",
        "\udcff",
        "a\0b",
        "",
        "a b",
    ],
)
def test_what_the_library_chokes_on_is_a_name_that_is_not_found(host: str, counts: Counts) -> None:
    """The real getaddrinfo: the idna codec raises UnicodeError, a NUL raises ValueError."""
    with pytest.raises(DialError) as caught:
        Resolver(at_once, counts).resolve(Address(host, 80))
    assert caught.value.reason is Reason.NAME


def test_too_many_lookups_wait(counts: Counts) -> None:
    with pytest.raises(DialError) as caught:
        Resolver(refuse, counts).resolve(Address("example.com", 80))
    assert caught.value.reason is Reason.NAME
    assert counts.of("lookups", "queue full") == 1


class TestASilentNameServer:
    @pytest.fixture
    def release(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
        event = threading.Event()

        def getaddrinfo(*_: Any, **__: Any) -> list:
            event.wait(5)
            return []

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield event
        event.set()

    def test_holds_up_its_caller_no_longer_than_the_deadline(
        self, release: threading.Event, counts: Counts
    ) -> None:
        """HAZARDS 99."""

        def submit(task: Callable[[], None]) -> bool:
            Task(at_once, task)
            return True

        started = time.monotonic()
        with pytest.raises(DialError) as caught:
            Resolver(submit, counts).resolve(Address("example.com", 80), 0.05)
        assert caught.value.reason is Reason.TIMEOUT
        assert 0.04 < time.monotonic() - started < 1.0
        assert counts.of("lookups", "abandoned") == 1
