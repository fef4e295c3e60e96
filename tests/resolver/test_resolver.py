"""Lookups by the system: what needs a thread, and what a failed lookup raises."""

from __future__ import annotations

import socket
import threading
from typing import Any, Callable

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.fairness import ClientTask
from netproxy.resolver.resolver import Resolver
from tests.support.doubles import Counts
from tests.support.sockets import SECONDS, Task


def refuse(task: ClientTask) -> None:
    task.drop()


def at_once(task: ClientTask) -> None:
    task.run()


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Return a function that sets the outcome of getaddrinfo(3): a list, or an exception."""

    def answer(outcome: Any) -> None:
        def getaddrinfo(host: bytes, port: int, **_: Any) -> Any:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return answer


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "2001:db8::1", "fe80::1%2"])
def test_literal_address_needs_no_thread(host: str, counts: Counts) -> None:
    assert Resolver(refuse, counts).resolve(Address(host, 80)) == [Address(host, 80)]


def test_localhost_is_resolved(counts: Counts) -> None:
    assert Address("127.0.0.1", 80) in Resolver(at_once, counts).resolve(Address("localhost", 80))


def test_addresses_keep_the_order_of_the_system(
    answers: Callable[[Any], None], counts: Counts
) -> None:
    stream = socket.SOCK_STREAM
    answers(
        [
            (socket.AF_INET6, stream, 6, "", ("2001:db8::1", 80, 0, 0)),
            (socket.AF_INET, stream, 6, "", ("192.0.2.1", 80)),
            (socket.AF_UNIX, stream, 6, "", ("/nowhere", 80)),
        ]
    )
    addresses = Resolver(at_once, counts).resolve(Address("example.com", 80))
    assert addresses == [Address("2001:db8::1", 80), Address("192.0.2.1", 80)]


@pytest.mark.parametrize(
    "error",
    [socket.gaierror(socket.EAI_NONAME, "no"), UnicodeError("label too long"), OSError("no"), None],
)
def test_name_that_the_system_does_not_find_is_a_dial_error(
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
    ["a..b", ".", "a" * 64, "a" * 64 + ".example", "bücher.example", "\udcff", "a\0b", "", "a b"],
)
def test_name_that_getaddrinfo_rejects_is_a_dial_error(host: str, counts: Counts) -> None:
    """The real getaddrinfo: the idna codec raises UnicodeError, a NUL raises ValueError."""
    with pytest.raises(DialError) as caught:
        Resolver(at_once, counts).resolve(Address(host, 80))
    assert caught.value.reason is Reason.NAME


def test_full_queue_of_lookups_is_a_dial_error(counts: Counts) -> None:
    with pytest.raises(DialError) as caught:
        Resolver(refuse, counts).resolve(Address("example.com", 80))
    assert caught.value.reason is Reason.NAME
    assert counts.of("lookups", "queue full") == 1


def test_silent_name_server_holds_its_caller_for_the_given_time_only(
    monkeypatch: pytest.MonkeyPatch, counts: Counts
) -> None:
    """Hazard 99."""
    release = threading.Event()
    tasks: list[Task] = []

    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        release.wait(SECONDS)
        return []

    def submit(task: ClientTask) -> None:
        tasks.append(Task(at_once, task))

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    try:
        with pytest.raises(DialError) as caught:
            Resolver(submit, counts).resolve(Address("example.com", 80), "192.0.2.9", 0.05)
        assert caught.value.reason is Reason.TIMEOUT
        assert not tasks[0].done
        assert counts.of("lookups", "abandoned") == 1
    finally:
        release.set()
