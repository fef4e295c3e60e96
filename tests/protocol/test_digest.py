"""Digest challenges as they are parsed, and the credentials that answer them."""

from __future__ import annotations

import hashlib
from urllib.request import parse_http_list, parse_keqv_list

import pytest

from netproxy.protocol.http.digest import (
    Challenge,
    Credentials,
    choose_challenge,
    encode_credentials,
    parse_challenges,
)
from tests.support.alarms import stuck_after
from tests.support.sockets import SECONDS

LOGIN = Credentials("Mufasa", "Circle of Life")
REQUEST = (b"GET", b"/dir/index.html")
CONNECT = (b"CONNECT", b"example.com:443")
# RFC 7616 section 3.9.1.
NONCE = b"7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v"
CLIENT_NONCE = b"f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ"
OPAQUE = b"FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS"
REALM = b"http-auth@example.org"


def parse(credentials: bytes) -> dict[str, str]:
    """Return the parameters of credentials, as the standard library parses them."""
    scheme, _, parameters = credentials.decode("latin-1").partition(" ")
    assert scheme == "Digest"
    return parse_keqv_list(parse_http_list(parameters))


@pytest.mark.parametrize(
    ("algorithm", "response"),
    [
        (b"MD5", "8ca523f5e9506fed4657c9700eebdbec"),
        (b"SHA-256", "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
    ],
)
def test_credentials_are_those_of_rfc_7616(algorithm: bytes, response: str) -> None:
    challenge = choose_challenge(
        [
            b'Digest realm="http-auth@example.org", qop="auth, auth-int", algorithm=%b, '
            b'nonce="%b", opaque="%b"' % (algorithm, NONCE, OPAQUE)
        ]
    )
    assert challenge == Challenge(REALM, NONCE, algorithm, OPAQUE, True)
    assert parse(encode_credentials(challenge, LOGIN, REQUEST, 1, CLIENT_NONCE)) == {
        "username": "Mufasa",
        "realm": REALM.decode(),
        "uri": "/dir/index.html",
        "algorithm": algorithm.decode(),
        "nonce": NONCE.decode(),
        "nc": "00000001",
        "cnonce": CLIENT_NONCE.decode(),
        "qop": "auth",
        "response": response,
        "opaque": OPAQUE.decode(),
    }


def test_credentials_are_those_of_rfc_2617() -> None:
    challenge = Challenge(
        b"testrealm@host.com", b"dcd98b7102dd2f0e8b11d0f600bfb0c093", b"", None, True
    )
    login = Credentials("Mufasa", "Circle Of Life")
    sent = parse(encode_credentials(challenge, login, REQUEST, 1, b"0a4f113b"))
    assert sent["response"] == "6629fae49393a05397450978507c4ef1"
    assert "algorithm" not in sent and "opaque" not in sent


def md5(*parts: str) -> str:
    return hashlib.md5(":".join(parts).encode()).hexdigest()


def test_credentials_without_qop_are_those_of_rfc_2069() -> None:
    """They have neither a count nor a client nonce."""
    challenge = Challenge(b"r", b"n", b"MD5", b"", False)
    assert parse(encode_credentials(challenge, Credentials("u", "p"), CONNECT, 7, b"c")) == {
        "username": "u",
        "realm": "r",
        "nonce": "n",
        "uri": "example.com:443",
        "algorithm": "MD5",
        "opaque": "",
        "response": md5(md5("u", "r", "p"), "n", md5("CONNECT", "example.com:443")),
    }


def test_session_variant_hashes_both_nonces_into_the_secret() -> None:
    """RFC 7616 section 3.4.2."""
    challenge = Challenge(b"r", b"n", b"md5-SESS", None, True)
    sent = parse(encode_credentials(challenge, Credentials("u", "p"), CONNECT, 0xAB, b"c"))
    secret = md5(md5("u", "r", "p"), "n", "c")
    hashed = md5("CONNECT", "example.com:443")
    assert sent["response"] == md5(secret, "n", "000000ab", "c", "auth", hashed)
    assert (sent["nc"], sent["algorithm"]) == ("000000ab", "md5-SESS")


def test_user_and_password_are_hashed_in_utf_8() -> None:
    challenge = Challenge(b"r", b"n", b"MD5", None, False)
    credentials = encode_credentials(challenge, Credentials("ü", "pä"), CONNECT, 1, b"c")
    assert 'username="ü"'.encode() in credentials
    secret = md5("ü", "r", "pä")
    assert parse(credentials)["response"] == md5(secret, "n", md5("CONNECT", "example.com:443"))


@pytest.mark.parametrize(
    ("user", "encoded"),
    [
        ('a"b\\c', b'username="a\\"b\\\\c"'),
        ("a\r\nX: b", b"username*=UTF-8''%61%0D%0A%58%3A%20%62"),
        ("a:b", b'username="a:b"'),
    ],
)
def test_user_name_cannot_end_its_parameter(user: str, encoded: bytes) -> None:
    challenge = Challenge(b"r", b"n", b"", None, True)
    credentials = encode_credentials(challenge, Credentials(user, "p"), CONNECT, 1, b"c")
    assert credentials.startswith(b"Digest " + encoded + b", realm=")
    assert b"\r" not in credentials and b"\n" not in credentials


def test_quoted_values_of_the_challenge_are_quoted_again() -> None:
    challenge = choose_challenge([rb'Digest realm="a\"b\\c\d", nonce="e, f=g", opaque="\""'])
    assert challenge == Challenge(b'a"b\\cd', b"e, f=g", b"", b'"', False)
    credentials = encode_credentials(challenge, Credentials("u", "p"), CONNECT, 1, b"c")
    assert rb'realm="a\"b\\cd", nonce="e, f=g", ' in credentials and rb'opaque="\""' in credentials
    secret = md5("u", 'a"b\\cd', "p")
    sent = parse(credentials)
    assert sent["response"] == md5(secret, "e, f=g", md5("CONNECT", "example.com:443"))


CHALLENGES = {
    "one": ([b"Basic realm=x"], [(b"basic", {b"realm": b"x"})]),
    "no parameter": ([b"Negotiate"], [(b"negotiate", {})]),
    "token68": ([b"Negotiate YII+/a==, NTLM"], [(b"negotiate", {}), (b"ntlm", {})]),
    "several in one field": (
        [b'Basic realm="a, b", Digest realm=c,nonce = "d" , NTLM'],
        [
            (b"basic", {b"realm": b"a, b"}),
            (b"digest", {b"realm": b"c", b"nonce": b"d"}),
            (b"ntlm", {}),
        ],
    ),
    "several fields": (
        [b"Basic realm=a", b"DIGEST Realm=b"],
        [(b"basic", {b"realm": b"a"}), (b"digest", {b"realm": b"b"})],
    ),
    "empty members": ([b" , ,Basic realm=a,, ", b""], [(b"basic", {b"realm": b"a"})]),
    "first of equal names counts": ([b"Basic a=1, A=2"], [(b"basic", {b"a": b"1"})]),
    "unfinished string": ([b'Basic realm="a', b"NTLM"], [(b"basic", {})]),
    "parameter without scheme": ([b"realm=a, Basic"], [(b"basic", {})]),
    "empty": ([b""], []),
    "no field": ([], []),
    "garbage": ([b"=\x01"], []),
}


@pytest.mark.parametrize(("values", "challenges"), CHALLENGES.values(), ids=CHALLENGES)
def test_challenges_are_parsed(
    values: list[bytes], challenges: list[tuple[bytes, dict[bytes, bytes]]]
) -> None:
    parsed = parse_challenges(values)
    if values[:1] == [b'Basic realm="a']:
        # What follows the malformed part may be lost, but never becomes a parameter.
        assert [parameters.get(b"realm") for _, parameters in parsed[:1]] == [None]
    else:
        assert parsed == challenges


UNUSABLE = {
    "another scheme": b'Basic realm="a"',
    "no realm": b'Digest nonce="a"',
    "no nonce": b'Digest realm="a"',
    "auth-int alone": b'Digest realm="a", nonce="b", qop="auth-int"',
    "empty qop": b'Digest realm="a", nonce="b", qop=""',
    "unknown algorithm": b'Digest realm="a", nonce="b", qop="auth", algorithm=SHA-512-256',
    "token of its own": b'Digest realm="a", nonce="b", qop="auth", algorithm="MD5, x=y"',
    "session without qop": b'Digest realm="a", nonce="b", algorithm=MD5-sess',
}


@pytest.mark.parametrize("value", UNUSABLE.values(), ids=UNUSABLE)
def test_challenge_that_cannot_be_answered_is_passed_over(value: bytes) -> None:
    assert choose_challenge([value]) is None
    usable = b'Digest realm="c", nonce="d", qop="auth,auth-int", algorithm="sha-256"'
    assert choose_challenge([value, usable, b"Digest realm=e, nonce=f"]) == Challenge(
        b"c", b"d", b"sha-256", None, True
    )


def test_login_is_not_shown() -> None:
    """Hazard 111."""
    assert "Mufasa" not in repr(LOGIN) and "Circle" not in f"{LOGIN}"


@pytest.mark.parametrize(
    "hostile",
    [b'Digest realm="' + b'\\"' * 30_000, b"a " * 30_000, b"a=" * 30_000, b"," * 60_000 + b"="],
    ids=["unfinished string", "schemes", "parameters", "commas"],
)
def test_challenges_are_parsed_in_linear_time(hostile: bytes) -> None:
    """Hazard 69."""
    with stuck_after(SECONDS):
        choose_challenge([hostile])
