"""Digest authentication of clients (RFC 7616): parses challenges and encodes the answers.

The client's role alone, with MD5, SHA-256, their session variants, and the form without qop
of RFC 2069.  qop is "auth": no request of ours that is challenged has a body.  Pure; the
caller chooses the client nonce and counts the uses of a nonce.
"""

from __future__ import annotations

import re

from netproxy.typed import NamedTuple, Sequence

# The algorithm of a challenge, in lower case, and the hash (RFC 7616 section 6.1).
_HASHES = {b"": "md5", b"md5": "md5", b"md5-sess": "md5"}
_HASHES |= {b"sha-256": "sha256", b"sha-256-sess": "sha256"}
_SESSION = b"-sess"

# These expressions are text: they are compiled on first use, which few daemons reach.
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# A parameter, or the scheme of the next challenge (RFC 9110 section 11.2).
_ITEM = (
    rb"(?s)[ \t,]*(" + _TOKEN + rb')(?:[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|(' + _TOKEN + rb")))?"
)
# What some schemes, such as Negotiate, have in place of parameters.
_TOKEN68 = rb"[ \t]+[A-Za-z0-9\-._~+/]+=*[ \t]*(?=,|\Z)"
_ESCAPED = rb"(?s)\\(.)"
_CONTROL = rb"[\x00-\x1f\x7f]"


class Challenge(NamedTuple):
    """A Digest challenge that can be answered."""

    realm: bytes
    nonce: bytes
    algorithm: bytes
    """As sent, b"" for none."""
    opaque: bytes | None
    qop: bool
    """False for a server of RFC 2069, which knows neither counter nor client nonce."""


class Credentials(NamedTuple):
    """A user and a password."""

    user: str
    password: str

    def __repr__(self) -> str:
        return "Credentials()"


def parse_challenges(values: Sequence[bytes]) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Return the challenges of Proxy-Authenticate fields: schemes in lower case, parameters.

    What follows something malformed is left out.
    """
    text = b", ".join(values)
    challenges: list[tuple[bytes, dict[bytes, bytes]]] = []
    item, token68_item = re.compile(_ITEM), re.compile(_TOKEN68)
    at = 0
    while match := item.match(text, at):
        at = match.end()
        name = match[1].lower()
        if match[2] is None and match[3] is None:
            challenges.append((name, {}))
            token68 = token68_item.match(text, at)
            at = token68.end() if token68 else at
        elif challenges:
            value = match[3] if match[2] is None else re.sub(_ESCAPED, rb"\1", match[2])
            challenges[-1][1].setdefault(name, value)
    return challenges


def choose_challenge(values: Sequence[bytes]) -> Challenge | None:
    """Return the first Digest challenge of Proxy-Authenticate fields that can be answered."""
    for scheme, parameters in parse_challenges(values):
        algorithm = parameters.get(b"algorithm", b"")
        options = [
            option.strip(b" \t").lower() for option in parameters.get(b"qop", b"").split(b",")
        ]
        qop = b"auth" in options
        session = algorithm.lower().endswith(_SESSION)
        if (
            scheme == b"digest"
            and algorithm.lower() in _HASHES
            and {b"realm", b"nonce"} <= parameters.keys()
            # Without qop there is no client nonce, which a session needs.
            and (qop or (b"qop" not in parameters and not session))
        ):
            opaque = parameters.get(b"opaque")
            return Challenge(parameters[b"realm"], parameters[b"nonce"], algorithm, opaque, qop)
    return None


# Proxy-Authorization: Digest username="alice", realm="...", nonce="...", uri="example.com:443",
#     response="...", algorithm=SHA-256, opaque="...", qop=auth, nc=00000001, cnonce="..."
def encode_credentials(
    challenge: Challenge,
    login: Credentials,
    request: tuple[bytes, bytes],
    count: int,
    cnonce: bytes,
) -> bytes:
    """Encode the credentials for a request, which is its method and its target.

    `count` is how often the nonce has been used, this time included.  `cnonce` is the client
    nonce, printable and the same for all uses of a nonce.
    """
    user, method_and_target = login.user.encode(), b":".join(request)
    secret = _digest(challenge, user, challenge.realm, login.password.encode())
    if challenge.algorithm.lower().endswith(_SESSION):
        secret = _digest(challenge, secret, challenge.nonce, cnonce)
    hashed_request = _digest(challenge, method_and_target)
    if challenge.qop:
        uses = (b"%08x" % count, cnonce, b"auth")
        response = _digest(challenge, secret, challenge.nonce, *uses, hashed_request)
    else:
        response = _digest(challenge, secret, challenge.nonce, hashed_request)
    fields = [
        _encode_user(user),
        b"realm=" + _quote(challenge.realm),
        b"nonce=" + _quote(challenge.nonce),
        b"uri=" + _quote(request[1]),
        b"response=" + _quote(response),
    ]
    if challenge.algorithm:
        fields.append(b"algorithm=" + challenge.algorithm)
    if challenge.opaque is not None:
        fields.append(b"opaque=" + _quote(challenge.opaque))
    if challenge.qop:
        fields.append(b"qop=auth, nc=%08x, cnonce=%b" % (count, _quote(cnonce)))
    return b"Digest " + b", ".join(fields)


def _digest(challenge: Challenge, *parts: bytes) -> bytes:
    """Return the hash of the parts, joined by colons, in hexadecimal digits."""
    # Imported late: it brings libcrypto.
    import hashlib

    name = _HASHES[challenge.algorithm.lower()]
    # The proxy has chosen MD5: it must work even if the system allows none for security.
    return hashlib.new(name, b":".join(parts), usedforsecurity=False).hexdigest().encode()


def _encode_user(user: bytes) -> bytes:
    """Encode the user name; as in RFC 8187 if no quoted string can have its bytes."""
    if not re.search(_CONTROL, user):
        return b"username=" + _quote(user)
    return b"username*=UTF-8''" + b"".join([b"%%%02X" % byte for byte in user])


def _quote(value: bytes) -> bytes:
    return b'"' + value.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
