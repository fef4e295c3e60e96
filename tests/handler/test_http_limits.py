"""Limits and forwarded requests: which one is new, and what goes on when one is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from netproxy.errors import FlowRefused, Reason
from netproxy.interfaces.accounts import limit_reason
from tests.support.accounts import account_book
from tests.support.origin import Rig, check_refused, get

if TYPE_CHECKING:
    from netproxy.interfaces.accounts import Account
    from netproxy.interfaces.flows import Flow

POST = b"POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\nhello"


class Limit:
    """Accounts that note what is new, and refuse while they are told to."""

    def __init__(self) -> None:
        self.opened: list[bool] = []
        self.refuses = False
        self._book = account_book()

    def open(self, flow: Flow, is_new: bool = True) -> Account:
        if self.refuses:
            key = "users.alice.limits.connections"
            raise FlowRefused(Reason.LIMIT, said=limit_reason(key), decided=key)
        self.opened.append(is_new)
        return self._book.open(flow, is_new)

    def reached(self, user: str) -> str:
        return ""


def test_request_on_a_kept_connection_is_no_new_connection() -> None:
    with Rig() as rig:
        rig.outbound.accounts = limit = Limit()
        client = rig.client(get(b"a.test", b"/1"))
        client.answer()
        client.send(get(b"a.test", b"/2"))
        client.answer()
        client.send(get(b"b.test", b"/3"))
        client.answer()
    assert limit.opened == [True, False, True] and rig.dialled == ["a.test:80", "b.test:80"]


@pytest.mark.parametrize(
    "method, body", [(b"GET", b"connection limit of the user\n"), (b"HEAD", b"")]
)
def test_limit_refuses_a_request_and_both_connections_go_on(method: bytes, body: bytes) -> None:
    with Rig() as rig:
        rig.outbound.accounts = limit = Limit()
        client = rig.client(get(b"a.test", b"/1"))
        client.answer()
        limit.refuses = True
        client.send(get(b"a.test", b"/2").replace(b"GET", method))
        refused = client.answer(method)
        assert refused.start == b"HTTP/1.1 429 Too Many Requests" and refused.body == body
        assert (refused.get(b"retry-after"), refused.get(b"connection")) == ([b"5"], [])
        limit.refuses = False
        client.send(get(b"a.test", b"/3"))
        assert client.answer().body == b"ok"
    assert rig.dialled == ["a.test:80"] and [
        request.start for request in rig.origin.requests()
    ] == [b"GET /1 HTTP/1.1", b"GET /3 HTTP/1.1"]
    assert rig.counters.value("requests_refused", "connection limit of the user") == 1


@pytest.mark.parametrize(
    "request_bytes", [POST, get(b"a.test", b"/2", b"Connection: close")], ids=["body", "close"]
)
def test_limit_refuses_a_request_behind_which_nothing_can_follow(request_bytes: bytes) -> None:
    with Rig() as rig:
        rig.outbound.accounts = limit = Limit()
        client = rig.client(get(b"a.test", b"/1"))
        client.answer()
        limit.refuses = True
        client.send(request_bytes)
        check_refused(client, b"429 Too Many Requests")
    assert rig.dialled == ["a.test:80"]
    assert rig.counters.value("requests_refused", "connection limit of the user") == 1
