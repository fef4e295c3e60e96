"""A handler that is made for its first client."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from netproxy.errors import CannotLoad
from netproxy.handler.sps import LateHandler
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Blocking, Handshake, Stream
from tests.support.handlers import LOCALHOST

CLIENT = Address(LOCALHOST, 1)


class Real:
    """The handler that is made: it notes its clients."""

    def __init__(self) -> None:
        self.clients: list[Address] = []

    def handle(self, stream: Stream, client: Address) -> Handshake:
        self.clients.append(client)
        return None
        yield


class Maker:
    """Makes handlers after some failures."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.made: list[Real] = []

    def make(self) -> Real:
        if self.failures:
            self.failures -= 1
            raise CannotLoad("http", OSError(errno.EMFILE, "Too many open files"))
        self.made.append(Real())
        return self.made[-1]


def serve(late: LateHandler) -> list[Any]:
    """Handle a client; return the needs of the handshake, each of which is satisfied."""
    stream: Any = None
    handshake, needs, result = late.handle(stream, CLIENT), list[Any](), None
    while True:
        try:
            needs.append(handshake.send(result))
        except StopIteration as done:
            assert done.value is None
            return needs
        result = needs[-1].block()


def test_handler_is_made_for_the_first_client_on_a_thread_that_may_wait() -> None:
    maker = Maker()
    late = LateHandler(maker.make)
    assert maker.made == []
    (need,) = serve(late)
    assert isinstance(need, Blocking)
    assert serve(late) == serve(late) == []
    assert [real.clients for real in maker.made] == [[CLIENT] * 3]


def test_client_whose_handler_cannot_be_made_ends_and_the_next_one_is_served() -> None:
    """Hazard 188."""
    maker = Maker(failures=1)
    late = LateHandler(maker.make)
    with pytest.raises(CannotLoad, match="Too many open files"):
        serve(late)
    serve(late)
    assert [real.clients for real in maker.made] == [[CLIENT]]
