"""CONNECT: allowed targets, bytes that come before the reply, and the reply to each failure."""

from __future__ import annotations

import threading

import pytest

from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.hop import Hop
from netproxy.dialer.web.http import HttpDialer
from netproxy.errors import Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.resolver.resolver import Resolver
from netproxy.net.stream import Stream
from netproxy.observe.metrics import Counters
from netproxy.protocol.http import connect_udp
from tests.support.flows import Anywhere
from tests.support.origin import (
    PATIENCE,
    LoopbackDialer,
    Origin,
    OriginConnection,
    Play,
    Rig,
    check_refused,
    get,
)

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
BAD_GATEWAY = b"502 Bad Gateway"


def connect_to(target: bytes, *fields: bytes) -> bytes:
    return b"".join(
        [
            b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n" % (target, target),
            *[field + b"\r\n" for field in fields],
            b"\r\n",
        ]
    )


def echo(connection: OriginConnection) -> None:
    """Send back every byte."""
    while data := connection.take(1):
        connection.send(data)


def test_tunnel_carries_bytes_and_ends_in_both_directions() -> None:
    def play(connection: OriginConnection) -> None:
        connection.send(b"welcome")
        assert connection.rest() == b"request"
        connection.send(b"answer after the client's end")

    with Rig(play) as rig:
        client = rig.client(connect_to(b"a.test:443"))
        assert client.take(len(ESTABLISHED) + 7) == ESTABLISHED + b"welcome"
        client.send(b"request")
        client.stop_sending()
        assert client.rest() == b"answer after the client's end" and client.end == "closed"
    [record] = rig.records
    assert (str(record.flow.target), record.sent, record.received, record.ended) == (
        "a.test:443",
        7,
        36,
        "closed",
    )


def test_reply_to_connect_has_no_fields() -> None:
    with Rig(echo) as rig:
        head = rig.client(connect_to(b"a.test:443")).head()
    assert head.fields == []


TARGETS = {
    "no port": b"a.test",
    "empty port": b"a.test:",
    "port 0": b"a.test:0",
    "port 65536": b"a.test:65536",
    "port 99999": b"a.test:99999",
    "port +443": b"a.test:+443",
    "port 4_43": b"a.test:4_43",
    "long port": b"a.test:000443",
    "a path": b"a.test:443/",
    "no host": b":443",
    "userinfo": b"user@a.test:443",
    "an absolute address": b"http://a.test:443/",
    "a comma": b"a.test,b.test:443",
    "asterisk": b"*",
    "IPv6 without brackets": b"::1:443",
    "IPv6 without port": b"[::1]",
    "IPv6 port 0": b"[::1]:0",
    "half a bracket": b"[::1:443",
    "no IPv6": b"[::g]:443",
    "IPv6 with a zone": b"[fe80::1%25lo]:443",
    "a name in brackets": b"[a.test]:443",
    "an empty label": b"a..test:443",
    "a percent sign": b"a%2etest:443",
    "number too large": b"256.1.1.1:443",
    "a label of 64": b"a" * 64 + b":443",
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_target_that_is_not_host_and_port_is_refused(target: bytes) -> None:
    """Hazard 58."""
    with Rig() as rig:
        check_refused(
            rig.client(b"CONNECT " + target + b" HTTP/1.1\r\nHost: a.test\r\n\r\n", b"early"),
            b"400 Bad Request",
        )
    assert rig.dialled == []


@pytest.mark.parametrize(
    "target,dialled",
    [
        (b"[2001:DB8::0:1]:443", "[2001:db8::1]:443"),
        (b"[::ffff:192.0.2.1]:443", "192.0.2.1:443"),
        (b"[::1]:1", "[::1]:1"),
        (b"A.Test.:443", "a.test:443"),
        (b"0x7f.1:443", "127.0.0.1:443"),
        (b"a.test:65535", "a.test:65535"),
        (b"a.test:00443", "a.test:443"),
    ],
)
def test_target_is_dialled_in_canonical_form(target: bytes, dialled: str) -> None:
    """Hazard 58."""
    with Rig(echo) as rig:
        assert rig.client(connect_to(target)).take(len(ESTABLISHED)) == ESTABLISHED
    assert rig.dialled == [dialled]


def test_bracketed_ipv6_target_is_reached() -> None:
    """Hazard 58."""
    try:
        origin = Origin(echo, "::1")
    except OSError:
        pytest.skip("no IPv6 on this machine")
    counters = Counters()
    with Rig() as rig:
        rig.by_host["::1"] = DirectDialer(
            TargetResolver(Resolver(lambda task: task.run(), counters), Anywhere()),
            counters,
            PATIENCE,
        )
        client = rig.client(connect_to(b"[::1]:%d" % origin.address.port), b"hello")
        assert client.take(len(ESTABLISHED) + 5) == ESTABLISHED + b"hello"
    origin.close()


@pytest.mark.parametrize("field", [b"Host: b.test:1\r\n", b""])
def test_host_field_of_connect_is_ignored(field: bytes) -> None:
    """Hazard 141: it may be missing, although RFC 9112 section 3.2 asks for one."""
    with Rig(echo) as rig:
        client = rig.client(b"CONNECT a.test:443 HTTP/1.1\r\n" + field + b"\r\n")
        assert client.take(len(ESTABLISHED)) == ESTABLISHED
    assert rig.dialled == ["a.test:443"]


@pytest.mark.parametrize("target", [b"a.test:25", b"192.0.2.1:25", b"[2001:db8::1]:025"])
def test_port_25_is_refused(target: bytes) -> None:
    """Hazard 59."""
    with Rig() as rig:
        check_refused(rig.client(connect_to(target), b"EHLO a.test\r\n"), b"403 Forbidden")
    assert rig.dialled == [] and rig.origin.connections == []


class HeldDialer(LoopbackDialer):
    """Dials when `let` is set; sets `asked` when dial() is called."""

    def __init__(self, origin: Origin) -> None:
        super().__init__(origin, {})
        self.asked = threading.Event()
        self.let = threading.Event()

    def dial(self, flow: Flow) -> Stream:
        self.asked.set()
        assert self.let.wait(PATIENCE)
        return super().dial(flow)


def test_reply_waits_for_the_dial_and_early_bytes_follow_it() -> None:
    """Hazard 60."""
    with Rig(echo) as rig:
        held = rig.by_host["a.test"] = HeldDialer(rig.origin)
        client = rig.client(connect_to(b"a.test:443") + b"early", b" and ", b"later")
        assert held.asked.wait(PATIENCE)
        client.socket.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.take(1)
        assert rig.origin.connections == []
        client.socket.settimeout(PATIENCE)
        held.let.set()
        assert client.take(len(ESTABLISHED) + 15) == ESTABLISHED + b"early and later"
    assert rig.origin.connections[0].seen == b"early and later"


REASONS = {
    Reason.REFUSED: b"502 Bad Gateway",
    Reason.NAME: b"502 Bad Gateway",
    Reason.HOST_UNREACHABLE: b"502 Bad Gateway",
    Reason.NETWORK_UNREACHABLE: b"502 Bad Gateway",
    Reason.GENERAL: b"502 Bad Gateway",
    Reason.PROTOCOL: b"502 Bad Gateway",
    Reason.AUTHENTICATION: b"502 Bad Gateway",
    Reason.LOOP: b"403 Forbidden",
    Reason.LIMIT: b"429 Too Many Requests",
    Reason.DENIED: b"403 Forbidden",
    Reason.TIMEOUT: b"504 Gateway Timeout",
    Reason.UNSUPPORTED: b"501 Not Implemented",
}


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_failed_dial_is_answered_and_early_bytes_are_not_parsed(reason: Reason) -> None:
    """Hazard 60."""
    with Rig() as rig:
        rig.dialer.failing = [reason]
        client = rig.client(
            connect_to(b"a.test:443") + b"GET http://b.test/ HTTP/1.1\r\nHost: b.test\r\n\r\n"
        )
        answer = check_refused(client, REASONS[reason])
    assert answer.body == reason.value.encode() + b"\n"
    retry_after = [b"5"] if reason is Reason.LIMIT else []
    assert answer.get(b"retry-after") == retry_after
    assert answer.get(b"proxy-status") == [b"netproxy; error=" + connect_udp.ERRORS[reason]]
    assert rig.dialled == ["a.test:443"] and rig.origin.connections == []
    assert [(record.upstream, record.ended) for record in rig.records] == [
        ("loopback", reason.value)
    ]
    assert rig.counters.items() == [("dial_failures", reason.value, 1)]


def test_refusal_reaches_client_that_sent_early_bytes() -> None:
    """Hazard 60."""
    with Rig() as rig:
        rig.dialer.failing = [Reason.REFUSED]
        check_refused(rig.client(connect_to(b"a.test:443"), b"\x16\x03\x01" * 20000), BAD_GATEWAY)


def through(rig: Rig) -> None:
    """Reach a.test through the rig's origin, which plays an HTTP proxy."""
    rig.by_host["a.test"] = HttpDialer(
        Hop(
            "up",
            "http://upstream.test:8080",
            Address("upstream.test", 8080),
            rig.dialer,
            PATIENCE,
            "alice",
            "secret",
        ),
        rig.counters,
    )


def upstream_answers(raw: bytes) -> Play:
    """Return a play that reads a head, sends `raw`, and echoes the rest."""

    def play(connection: OriginConnection) -> None:
        connection.head()
        connection.send(raw)
        echo(connection)

    return play


UPSTREAM_REFUSALS = {
    "407": (
        b'HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm="a"\r\nContent-Length: 0\r\n\r\n',
        BAD_GATEWAY,
    ),
    "500 with a body": (b"HTTP/1.1 500 No\r\nContent-Length: 5\r\n\r\nhello", BAD_GATEWAY),
    "302": (b"HTTP/1.1 302 Found\r\nLocation: http://b.test/\r\n\r\n", BAD_GATEWAY),
    "garbage": (b"\x05\xff garbage\r\n\r\n", BAD_GATEWAY),
    "garbage without end": (b"\xff" * 9000, BAD_GATEWAY),
    "1 MB head": (
        b"HTTP/1.1 200 OK\r\n" + (b"X: " + b"a" * 1000 + b"\r\n") * 1000 + b"\r\n",
        BAD_GATEWAY,
    ),
    "501 fields": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 501 + b"\r\n", BAD_GATEWAY),
    "HTTP/2": (b"HTTP/2 200\r\n\r\n", BAD_GATEWAY),
    "403": (b"HTTP/1.1 403 No\r\n\r\n", b"403 Forbidden"),
    "504": (b"HTTP/1.1 504 No\r\n\r\n", b"504 Gateway Timeout"),
}


@pytest.mark.parametrize("raw,status", UPSTREAM_REFUSALS.values(), ids=UPSTREAM_REFUSALS)
def test_refusal_of_http_upstream_is_translated(raw: bytes, status: bytes) -> None:
    """Hazard 61."""
    with Rig(upstream_answers(raw)) as rig:
        through(rig)
        answer = check_refused(rig.client(connect_to(b"a.test:443") + b"early"), status)
    assert rig.dialled == ["upstream.test:8080"]
    assert b"early" not in rig.origin.connections[0].seen and b"secret" not in answer.body


@pytest.mark.parametrize("sent", [connect_to(b"a.test:443"), get(b"a.test")])
@pytest.mark.parametrize("status", [b"401 Unauthorized", b"407 Proxy Authentication Required"])
def test_challenge_of_an_upstream_is_the_hops_refusal_and_reaches_no_client(
    status: bytes, sent: bytes
) -> None:
    """Hazard 61: the client would send its own password to answer it."""
    challenge = b'Proxy-Authenticate: Basic realm="a"\r\nWWW-Authenticate: Basic realm="b"\r\n'
    refusal = b"HTTP/1.1 " + status + b"\r\n" + challenge + b"Content-Length: 0\r\n\r\n"
    with Rig(upstream_answers(refusal)) as rig:
        through(rig)
        answer = check_refused(rig.client(sent), BAD_GATEWAY)
    assert answer.body == Reason.AUTHENTICATION.value.encode() + b"\n"
    assert not answer.get(b"proxy-authenticate") and not answer.get(b"www-authenticate")
    label = "http://upstream.test:8080"
    ended = f"{label}: {status.decode().lower()}"
    assert [(record.upstream, record.ended) for record in rig.records] == [("up", ended)]
    assert rig.counters.items() == [("dial_failures", Reason.AUTHENTICATION.value, 1)]


def test_http_upstream_that_closes_without_reply_is_bad_gateway() -> None:
    """Hazard 61."""
    with Rig(lambda connection: (connection.head(), connection.close())) as rig:
        through(rig)
        check_refused(rig.client(connect_to(b"a.test:443")), BAD_GATEWAY)


@pytest.mark.parametrize(
    "fields",
    [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: x\r\n"],
)
def test_framing_in_2xx_reply_of_http_upstream_is_ignored(fields: bytes) -> None:
    """Hazard 61."""
    with Rig(
        upstream_answers(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 Fine\r\n" + fields + b"\r\n")
    ) as rig:
        through(rig)
        client = rig.client(connect_to(b"a.test:443"), b"more than five bytes")
        assert client.take(len(ESTABLISHED) + 20) == ESTABLISHED + b"more than five bytes"
    request, _, payload = bytes(rig.origin.connections[0].seen).partition(b"\r\n\r\n")
    assert request.split(b"\r\n") == [
        b"CONNECT a.test:443 HTTP/1.1",
        b"Host: a.test:443",
        b"Proxy-Authorization: Basic YWxpY2U6c2VjcmV0",
    ]
    assert payload == b"more than five bytes"


def test_bytes_behind_request_and_reply_arrive() -> None:
    """Hazard 62."""
    with Rig(upstream_answers(b"HTTP/1.1 200 OK\r\n\r\n220 welcome\r\n")) as rig:
        through(rig)
        client = rig.client(connect_to(b"a.test:443") + b"hello")
        assert client.take(len(ESTABLISHED) + 18) == ESTABLISHED + b"220 welcome\r\nhello"


@pytest.mark.parametrize("size", [1, 16384, 65536, 2_000_000])
def test_early_bytes_of_any_size_arrive(size: int) -> None:
    """Hazard 62."""
    early = bytes(range(256)) * (size // 256 + 1)

    def play(connection: OriginConnection) -> None:
        connection.send(early[:size])

    with Rig(play) as rig:
        client = rig.client()
        sender = threading.Thread(
            target=client.send, args=(connect_to(b"a.test:443") + early[:size],), daemon=True
        )
        sender.start()
        assert client.take(len(ESTABLISHED) + size) == ESTABLISHED + early[:size]
        sender.join(PATIENCE)
        client.stop_sending()
        assert client.rest() == b"" and client.end == "closed"
    assert rig.origin.connections[0].seen == early[:size]


def test_connect_follows_other_requests_of_the_connection() -> None:
    with Rig(elsewhere={"b.test": (second := Origin(echo))}) as rig:
        client = rig.client(
            b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n"
            + connect_to(b"b.test:443")
            + b"hello"
        )
        assert client.answer().body == b"ok"
        assert client.take(len(ESTABLISHED) + 5) == ESTABLISHED + b"hello"
    second.close()
    assert rig.dialled == ["a.test:80", "b.test:443"]


def test_reset_of_target_reaches_client_as_reset() -> None:
    with Rig(lambda connection: (connection.take(1), connection.reset())) as rig:
        client = rig.client(connect_to(b"a.test:443") + b"x")
        assert client.rest().startswith(ESTABLISHED) and client.end == "reset"
