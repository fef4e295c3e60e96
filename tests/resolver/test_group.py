"""A group of name servers: which is asked next, and what counts as a failure."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any, Sequence

import pytest

from netproxy.errors import DialError, ProtocolError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net.stream import Stream
from netproxy.resolver import group as group_module
from netproxy.resolver import servers as servers_module
from netproxy.resolver.group import REST_SECONDS, NameServerGroup
from netproxy.resolver.servers import ServerError, StreamServer, UdpServer
from tests.support.dns import QR, RA, RD, a
from tests.support.nameservers import (
    MAIL,
    RIGHT,
    WWW,
    answer_to,
    dial_to,
    far_deadline,
    is_answer,
    serve,
)
from tests.support.sockets import SECONDS, refusing, server


def fixed_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time of the resolver, as a list of one number."""
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(group_module, "time", clock)
    monkeypatch.setattr(servers_module, "time", clock)
    return now


class Scripted:
    """A NameServer with one outcome for each exchange; the last one repeats.

    An outcome is an exception, or a response code and records.
    """

    def __init__(self, name: str, *outcomes: Any) -> None:
        self.name = name
        self.closed = False
        # The deadlines of the exchanges.
        self.deadlines: list[float] = []
        self._outcomes = list(outcomes)

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        self.deadlines.append(deadline)
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return [
            answer_to(query, *outcome[1:], flags=QR | RD | RA | outcome[0]) for query in queries
        ]

    def close(self) -> None:
        self.closed = True


GOOD, SERVFAIL, REFUSED, NXDOMAIN = (0, RIGHT), (2,), (5,), (3,)


def test_first_server_is_asked_alone_while_it_answers() -> None:
    first, second = Scripted("first", GOOD), Scripted("second", GOOD)
    group = NameServerGroup([first, second])
    for _ in range(3):
        assert is_answer(group.exchange([WWW], far_deadline())[0], WWW, RIGHT)
    assert (len(first.deadlines), len(second.deadlines)) == (3, 0)


def test_nxdomain_is_an_answer() -> None:
    first, second = Scripted("first", NXDOMAIN), Scripted("second", GOOD)
    assert NameServerGroup([first, second]).exchange([WWW], far_deadline())[0][3] & 15 == 3
    assert not second.deadlines


@pytest.mark.parametrize(
    "failure",
    [ServerError("first: no answer"), ProtocolError("no"), SERVFAIL, REFUSED],
    ids=["silent", "nonsense", "SERVFAIL", "REFUSED"],
)
def test_server_that_fails_is_asked_last(failure: Any) -> None:
    first, second = Scripted("first", failure), Scripted("second", GOOD)
    group = NameServerGroup([first, second])
    for _ in range(3):
        assert is_answer(group.exchange([WWW], far_deadline())[0], WWW, RIGHT)
    assert (len(first.deadlines), len(second.deadlines)) == (1, 3)


def test_server_that_failed_is_asked_first_again_after_its_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = fixed_time(monkeypatch)
    first, second = Scripted("first", ServerError("no"), GOOD), Scripted("second", GOOD)
    group = NameServerGroup([first, second])
    group.exchange([WWW], now[0] + 5)
    now[0] += REST_SECONDS - 0.1
    group.exchange([WWW], now[0] + 5)
    assert (len(first.deadlines), len(second.deadlines)) == (1, 2)
    now[0] += 0.2
    group.exchange([WWW], now[0] + 5)
    assert (len(first.deadlines), len(second.deadlines)) == (2, 2)


def test_servers_that_all_failed_are_asked_in_their_order() -> None:
    first, second = (
        Scripted("first", ServerError("first: no"), GOOD),
        Scripted("second", ServerError("second: no")),
    )
    group = NameServerGroup([first, second])
    with pytest.raises(ServerError) as caught:
        group.exchange([WWW], far_deadline())
    assert str(caught.value) == "first: no; second: no"
    assert is_answer(group.exchange([WWW], far_deadline())[0], WWW, RIGHT)


def test_servfail_is_returned_if_no_server_answers() -> None:
    (answer,) = NameServerGroup(
        [
            Scripted("first", SERVFAIL),
            Scripted("second", ServerError("no")),
            Scripted("third", REFUSED),
        ]
    ).exchange([WWW], far_deadline())
    assert answer == answer_to(WWW, flags=QR | RD | RA | 2)


def test_servfail_for_one_of_two_queries_is_a_failure() -> None:
    class Half(Scripted):
        def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
            return [answer_to(queries[0], RIGHT), answer_to(queries[1], flags=QR | 2)]

    second = Scripted("second", GOOD)
    assert NameServerGroup([Half("half"), second]).exchange([WWW, MAIL], far_deadline()) == [
        answer_to(WWW, RIGHT),
        answer_to(MAIL, RIGHT),
    ]


def test_servers_share_the_time_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    now = fixed_time(monkeypatch)

    class Slow(Scripted):
        def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
            self.deadlines.append(deadline)
            now[0] = deadline
            raise ServerError(self.name)

    servers = [Slow(name) for name in "abc"]
    with pytest.raises(ServerError, match="^a; b; c$"):
        NameServerGroup(servers).exchange([WWW], 1006.0)
    assert [server.deadlines for server in servers] == [[1002.0], [1004.0], [1006.0]]


def test_unreachable_server_leaves_time_for_the_next() -> None:
    with refusing() as closed_port, server(serve()) as address:

        def refuse(deadline: float) -> Stream:
            with pytest.raises(OSError) as caught:
                socket.create_connection(closed_port, SECONDS)
            raise DialError(Reason.REFUSED, str(closed_port)) from caught.value

        group = NameServerGroup(
            [StreamServer("dead", refuse), StreamServer("alive", dial_to(address))]
        )
        assert group.exchange([WWW], far_deadline())[0] == answer_to(WWW, a(60))
        group.close()


def test_close_of_a_group_closes_all_servers() -> None:
    first, by_tcp = Scripted("first", GOOD), Scripted("second", GOOD)
    by_udp = UdpServer("udp", Address("127.0.0.1", 9), by_tcp, lambda: None)
    NameServerGroup([first, by_udp]).close()
    assert first.closed and by_tcp.closed
