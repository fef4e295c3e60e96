"""Proxy credentials are demanded, checked with every request, and not forwarded."""

from __future__ import annotations

import base64

import pytest

from netproxy.access.login import Login
from netproxy.access.users import Users
from netproxy.errors import LoginUnavailable, Reason
from netproxy.observe.metrics import Counters
from tests.support.logins import FailureCounts
from tests.support.origin import OriginConnection, Rig, Wire, check_refused, get

CHALLENGE = b'Basic realm="netproxy", charset="UTF-8"'
USERS = {"alice": "secret", "bob": "pass:word", "zo\u00eb": "\u00fcber", "": "nobody"}


def basic(user: str, password: str, scheme: bytes = b"Basic") -> bytes:
    return (
        b"Proxy-Authorization: " + scheme + b" " + base64.b64encode(f"{user}:{password}".encode())
    )


def guarded(mode: str = "required", play: object = None) -> Rig:
    """Return a Rig that demands credentials of USERS."""
    counters = Counters()
    login = Login(Users(USERS), mode, FailureCounts(counters))
    if play is None:
        return Rig(login=login, counters=counters)
    return Rig(play, login=login, counters=counters)


def check_challenged(client: Wire) -> None:
    """Check that the answer is 407 with the challenge."""
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
def test_request_without_exactly_one_right_credential_dials_nothing(
    fields: list[bytes], request_line: bytes
) -> None:
    raw = (
        request_line
        + b" HTTP/1.1\r\nHost: a.test\r\n"
        + b"".join(field + b"\r\n" for field in fields)
        + b"\r\n"
    )
    with guarded() as rig:
        check_challenged(rig.client(raw))
    assert rig.dialled == [] and rig.records == []
    shown = len(fields) == 1 and fields != WRONG["in the field of the origin"]
    assert not shown or rig.counters.value("authentication", "refused") == 1


def test_login_that_cannot_be_checked_is_answered_with_503(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 145."""

    def unavailable(*_: object) -> str:
        raise LoginUnavailable("no memory to check the password")

    monkeypatch.setattr(Login, "check", unavailable)
    with guarded() as rig:
        client = rig.client(get(b"a.test", b"/", basic("alice", "secret")))
        answer = check_refused(client, b"503 Service Unavailable")
        assert not answer.get(b"proxy-authenticate")
        # The client has not logged in: the reason is in the record alone.
        assert answer.body == b"the login cannot be checked now\n"


@pytest.mark.parametrize("user,password", [pair for pair in USERS.items() if pair[0]])
@pytest.mark.parametrize("scheme", [b"Basic", b"basic", b"BASIC", b"Basic "])
def test_right_credential_is_accepted_and_its_user_recorded(
    user: str, password: str, scheme: bytes
) -> None:
    with guarded() as rig:
        assert (
            rig.client(get(b"a.test", b"/", basic(user, password, scheme))).answer().body == b"ok"
        )
    assert [record.flow.user for record in rig.records] == [user]
    assert rig.counters.value("authentication", "refused") == 0


def test_connect_with_right_credential_opens_a_tunnel() -> None:
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
def test_proxy_credential_is_not_forwarded_and_origin_credential_is(
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


def test_unsolicited_proxy_credential_is_not_forwarded() -> None:
    """Hazard 56."""
    with Rig() as rig:
        assert rig.client(get(b"a.test", b"/", basic("alice", "secret"))).answer().body == b"ok"
    assert (
        b"proxy-authorization" not in rig.origin.requests()[0].names()
        and rig.records[0].flow.user == ""
    )


def test_proxy_challenge_of_an_origin_is_not_forwarded() -> None:
    def play(connection: OriginConnection) -> None:
        connection.request()
        connection.send(
            b'HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm="theirs"\r\n'
            b"Content-Length: 0\r\n\r\n"
        )

    with guarded(play=play) as rig:
        assert (
            b"proxy-authenticate"
            not in rig.client(get(b"a.test", b"/", basic("alice", "secret"))).answer().names()
        )


def test_credential_is_demanded_again_for_the_next_request() -> None:
    with guarded() as rig:
        client = rig.client(get(b"a.test", b"/1", basic("alice", "secret")) + get(b"a.test", b"/2"))
        assert client.answer().body == b"ok"
        check_challenged(client)
    assert [request.start for request in rig.origin.requests()] == [b"GET /1 HTTP/1.1"]


def test_user_belongs_to_each_request() -> None:
    with guarded() as rig:
        client = rig.client(
            get(b"a.test", b"/1", basic("alice", "secret"))
            + get(b"a.test", b"/2", basic("bob", "pass:word"))
        )
        assert [client.answer().body, client.answer().body] == [b"ok", b"ok"]
    assert [record.flow.user for record in rig.records] == ["alice", "bob"]


def test_kept_connection_serves_no_other_user() -> None:
    """Its local address may be the user's own, by the bind of the upstream."""
    login = Login(Users(USERS), "optional")
    with Rig(login=login) as rig:
        alice, bob = (basic(name, USERS[name]) for name in ("alice", "bob"))
        credentials = [(alice,), (alice,), (bob,), (), ()]
        client = rig.client(*(get(b"a.test", b"/", *fields) for fields in credentials))
        assert [client.answer().body for _ in credentials] == [b"ok"] * 5
        assert [len(connection.requests()) for connection in rig.origin.connections] == [2, 1, 2]
    users = ["alice", "alice", "bob", "", ""]
    assert [record.flow.user for record in rig.records] == users


def test_client_is_served_with_a_credential_after_407() -> None:
    with guarded() as rig:
        check_challenged(rig.client(get(b"a.test")))
        assert rig.client(get(b"a.test", b"/", basic("alice", "secret"))).answer().body == b"ok"


def test_optional_login_accepts_no_credential_and_refuses_a_wrong_one() -> None:
    with guarded("optional") as rig:
        assert rig.client(get(b"a.test")).answer().body == b"ok"
        assert rig.client(get(b"a.test", b"/", basic("alice", "secret"))).answer().body == b"ok"
        check_challenged(rig.client(get(b"a.test", b"/", basic("alice", "wrong"))))
    assert [record.flow.user for record in rig.records] == ["", "alice"]


def test_optional_login_refuses_two_credentials() -> None:
    """Two credentials name no user, and are not the same as no credential."""
    with guarded("optional") as rig:
        check_challenged(
            rig.client(get(b"a.test", b"/", basic("alice", "secret"), basic("bob", "pass:word")))
        )
    assert rig.dialled == []


def test_password_is_in_no_response_and_no_record() -> None:
    with guarded(play=lambda connection: connection.close()) as rig:
        rig.dialer.failing = [Reason.REFUSED]
        check_refused(
            rig.client(get(b"a.test", b"/", basic("alice", "secret"))), b"502 Bad Gateway"
        )
        refused = rig.client(get(b"a.test", b"/", basic("alice", "secret!")))
        check_challenged(refused)
        assert b"secret" not in refused.seen
    assert "secret" not in repr(rig.records)


def test_body_of_request_without_credential_is_not_parsed_as_request() -> None:
    inner = get(b"a.test", b"/inner", basic("alice", "secret"))
    with guarded() as rig:
        check_challenged(
            rig.client(
                b"POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nContent-Length: %d\r\n\r\n"
                % len(inner)
                + inner
            )
        )
    assert rig.dialled == []
