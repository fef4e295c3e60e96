"""Proxy credentials: asked for, checked with every request, never passed on."""

from __future__ import annotations

import base64

import pytest

from netproxy.access.login import Login
from netproxy.access.users import Users
from netproxy.errors import Reason
from tests.support.origin import OriginConnection, Rig, Wire, check_refused, get

CHALLENGE = b'Basic realm="netproxy", charset="UTF-8"'
USERS = {"alice": "secret", "bob": "pass:word", "zo\u00eb": "\u00fcber", "": "nobody"}


def basic(user: str, password: str, scheme: bytes = b"Basic") -> bytes:
    return (
        b"Proxy-Authorization: " + scheme + b" " + base64.b64encode(f"{user}:{password}".encode())
    )


def guarded(mode: str = "required", play: object = None) -> Rig:
    login = Login(Users(USERS), mode)
    return Rig(play, login=login) if play else Rig(login=login)


def check_asked(client: Wire) -> None:
    answer = check_refused(client, b"407 Proxy Authentication Required")
    assert answer.get(b"proxy-authenticate") == [CHALLENGE]


WRONG = {
    "nothing": [],
    "wrong password": [basic("alice", "Secret")],
    "empty password": [basic("alice", "")],
    "unknown user": [basic("carol", "secret")],
    "password of another": [basic("alice", "pass:word")],
    "no colon": [b"Proxy-Authorization: Basic " + base64.b64encode(b"alicesecret")],
    "no base64": [b"Proxy-Authorization: Basic alice:secret"],
    "base64 and more": [basic("alice", "secret") + b"*"],
    "white space within": [b"Proxy-Authorization: Basic YWxpY2U6 c2VjcmV0"],
    "another scheme": [basic("alice", "secret", b"Bearer")],
    "no scheme": [b"Proxy-Authorization: " + base64.b64encode(b"alice:secret")],
    "empty": [b"Proxy-Authorization:"],
    "scheme alone": [b"Proxy-Authorization: Basic"],
    "in the field of the origin": [b"Authorization: Basic " + base64.b64encode(b"alice:secret")],
    "two fields": [basic("alice", "secret"), basic("bob", "pass:word")],
    "one field twice": [basic("alice", "secret"), basic("alice", "secret")],
    "wrong one first": [basic("alice", "wrong"), basic("alice", "secret")],
    "two in one field": [
        basic("alice", "secret") + b", Basic " + base64.b64encode(b"bob:pass:word")
    ],
    "no UTF-8": [b"Proxy-Authorization: Basic " + base64.b64encode(b"\xff\xfe:secret")],
}


@pytest.mark.parametrize("fields", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("request_line", [b"GET http://a.test/", b"CONNECT a.test:443"])
def test_without_the_one_right_credential_nothing_is_dialled(
    fields: list[bytes], request_line: bytes
) -> None:
    raw = (
        request_line
        + b" HTTP/1.1\r\nHost: a.test\r\n"
        + b"".join(field + b"\r\n" for field in fields)
        + b"\r\n"
    )
    with guarded() as rig:
        check_asked(rig.client(raw))
    assert rig.dialled == [] and rig.records == []
    shown = len(fields) == 1 and fields != WRONG["in the field of the origin"]
    assert not shown or rig.counters.value("authentication", "refused") == 1


@pytest.mark.parametrize("user,password", [pair for pair in USERS.items() if pair[0]])
@pytest.mark.parametrize("scheme", [b"Basic", b"basic", b"BASIC", b"Basic "])
def test_the_right_one_opens_and_its_user_is_recorded(
    user: str, password: str, scheme: bytes
) -> None:
    with guarded() as rig:
        assert (
            rig.client(get(b"a.test", b"/", basic(user, password, scheme))).answer().body == b"ok"
        )
    assert [record.flow.user for record in rig.records] == [user]
    assert rig.counters.value("authentication", "refused") == 0


def test_a_tunnel_opens_with_the_right_one() -> None:
    with guarded(play=lambda connection: connection.send(b"hello")) as rig:
        client = rig.client(
            b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test\r\n"
            + basic("alice", "secret")
            + b"\r\n\r\n"
        )
        assert client.head().status == 200 and client.take(5) == b"hello"
    assert rig.records[0].flow.user == "alice" and rig.origin.connections[0].seen == b""


@pytest.mark.parametrize(
    "extra", [(), (b"Connection: proxy-authorization",), (b"Connection: close",)]
)
def test_the_credential_is_not_forwarded_and_that_of_the_origin_is(
    extra: tuple[bytes, ...],
) -> None:
    """Hazard 56."""
    with guarded() as rig:
        own = b"Authorization: Basic " + base64.b64encode(b"at:origin")
        assert (
            rig.client(get(b"a.test", b"/", own, basic("alice", "secret"), *extra)).answer().body
            == b"ok"
        )
    [request] = rig.origin.requests()
    assert request.get(b"authorization") == [b"Basic " + base64.b64encode(b"at:origin")]
    assert b"proxy-authorization" not in request.names()
    assert base64.b64encode(b"alice:secret") not in rig.origin.connections[0].seen


def test_a_credential_that_nobody_asked_for_is_not_forwarded() -> None:
    """Hazard 56."""
    with Rig() as rig:
        assert rig.client(get(b"a.test", b"/", basic("alice", "secret"))).answer().body == b"ok"
    assert (
        b"proxy-authorization" not in rig.origin.requests()[0].names()
        and rig.records[0].flow.user == ""
    )


def test_the_challenge_of_an_origin_is_not_passed_on() -> None:
    def play(connection: OriginConnection) -> None:
        connection.request()
        connection.send(
            b'HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm="theirs"\r\nContent-Length: 0\r\n\r\n'
        )

    with guarded(play=play) as rig:
        assert (
            b"proxy-authenticate"
            not in rig.client(get(b"a.test", b"/", basic("alice", "secret"))).answer().names()
        )


def test_nothing_is_remembered_from_one_request_to_the_next() -> None:
    with guarded() as rig:
        client = rig.client(get(b"a.test", b"/1", basic("alice", "secret")) + get(b"a.test", b"/2"))
        assert client.answer().body == b"ok"
        check_asked(client)
    assert [request.start for request in rig.origin.requests()] == [b"GET /1 HTTP/1.1"]


def test_each_request_of_a_connection_has_the_user_of_its_own_credential() -> None:
    with guarded() as rig:
        client = rig.client(
            get(b"a.test", b"/1", basic("alice", "secret"))
            + get(b"a.test", b"/2", basic("bob", "pass:word"))
        )
        assert [client.answer().body, client.answer().body] == [b"ok", b"ok"]
    assert [record.flow.user for record in rig.records] == ["alice", "bob"]


def test_a_client_may_come_again_with_a_credential_after_a_407() -> None:
    with guarded() as rig:
        check_asked(rig.client(get(b"a.test")))
        assert rig.client(get(b"a.test", b"/", basic("alice", "secret"))).answer().body == b"ok"


def test_where_it_is_optional_nobody_passes_and_a_wrong_one_does_not() -> None:
    with guarded("optional") as rig:
        assert rig.client(get(b"a.test")).answer().body == b"ok"
        assert rig.client(get(b"a.test", b"/", basic("alice", "secret"))).answer().body == b"ok"
        check_asked(rig.client(get(b"a.test", b"/", basic("alice", "wrong"))))
    assert [record.flow.user for record in rig.records] == ["", "alice"]


def test_where_it_is_optional_two_credentials_are_not_nobody() -> None:
    """One source for one decision: who shows two is neither of them, and has not come without one either."""
    with guarded("optional") as rig:
        check_asked(
            rig.client(get(b"a.test", b"/", basic("alice", "secret"), basic("bob", "pass:word")))
        )
    assert rig.dialled == []


def test_a_secret_is_in_no_answer_and_no_record() -> None:
    with guarded(play=lambda connection: connection.close()) as rig:
        rig.dialer.failing = [Reason.REFUSED]
        check_refused(
            rig.client(get(b"a.test", b"/", basic("alice", "secret"))), b"502 Bad Gateway"
        )
        refused = rig.client(get(b"a.test", b"/", basic("alice", "secret!")))
        check_asked(refused)
        assert b"secret" not in refused.seen
    assert "secret" not in repr(rig.records)


def test_a_body_behind_a_request_without_credential_is_not_a_request() -> None:
    inner = get(b"a.test", b"/inner", basic("alice", "secret"))
    with guarded() as rig:
        check_asked(
            rig.client(
                b"POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nContent-Length: %d\r\n\r\n"
                % len(inner)
                + inner
            )
        )
    assert rig.dialled == []
