"""Responses of the proxy itself: error pages, Via loops, OPTIONS and TRACE with Max-Forwards."""

from __future__ import annotations

import pytest

from netproxy.handler import http_forward
from netproxy.errors import Reason
from tests.support.origin import Rig, check_refused, get

SECRET_LOOKING = b"<script>alert(1)</script>"


def test_request_with_own_via_is_refused_as_loop() -> None:
    """Hazard 70."""
    with Rig() as rig:
        first = rig.client(get(b"a.test", b"/", b"Via: 1.1 other"))
        assert first.answer().body == b"ok"
        first.close()
        rig.join()
        [via] = rig.origin.requests()[0].get(b"via")
        ours = via.split(b" ")[-1]
        for fields in (
            [via],
            [b"1.0 " + ours],
            [b"HTTP/1.1 " + ours + b" (a comment)"],
            [b"1.1 x , 1.1 " + ours + b",1.1 y"],
            [b"1.1 x", b"1.1 " + ours],
            [b"1.1 " + ours.upper()],
        ):
            answer = check_refused(
                rig.client(get(b"a.test", b"/", *[b"Via: " + field for field in fields])),
                b"502 Bad Gateway",
            )
            assert answer.body == Reason.LOOP.value.encode() + b"\n"
    assert len(rig.dialled) == 1


def test_via_of_another_netproxy_is_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 70.  All listeners of a daemon have one pseudonym."""
    with Rig() as rig:
        assert (
            rig.client(get(b"a.test", b"/", b"Via: 1.1 netproxy-0123456789ab")).answer().body
            == b"ok"
        )
    monkeypatch.setattr(http_forward, "PSEUDONYM", b"netproxy-ba9876543210")
    with Rig() as other:
        assert (
            other.client(get(b"a.test", b"/", b"Via: " + rig.origin.requests()[0].get(b"via")[0]))
            .answer()
            .body
            == b"ok"
        )


@pytest.mark.parametrize("separator", [b", ", b"\r\nVia: "], ids=["one field", "many fields"])
def test_request_with_20_via_hops_is_refused_as_loop(separator: bytes) -> None:
    """Hazard 70."""
    hops = [b"1.1 p%d" % number for number in range(20)]
    with Rig() as rig:
        check_refused(
            rig.client(get(b"a.test", b"/", b"Via: " + separator.join(hops))), b"502 Bad Gateway"
        )
        assert rig.dialled == []
        assert (
            rig.client(get(b"a.test", b"/", b"Via: " + separator.join(hops[:19]))).answer().body
            == b"ok"
        )
    [via] = rig.origin.requests()[0].get(b"via")
    assert via.split(b", ")[:-1] == hops[:19]


def raw(method: bytes, target: bytes, *fields: bytes) -> bytes:
    """Return a request without a body."""
    return b"".join(
        [
            method + b" " + target + b" HTTP/1.1\r\nHost: a.test\r\n",
            *[field + b"\r\n" for field in fields],
            b"\r\n",
        ]
    )


@pytest.mark.parametrize(
    "target,line",
    [
        (b"http://a.test", b"OPTIONS * HTTP/1.1"),
        (b"http://a.test:80", b"OPTIONS * HTTP/1.1"),
        (b"http://a.test/", b"OPTIONS / HTTP/1.1"),
        (b"http://a.test?q", b"OPTIONS /?q HTTP/1.1"),
        (b"http://a.test/x", b"OPTIONS /x HTTP/1.1"),
    ],
)
def test_options_for_a_whole_server_becomes_asterisk(target: bytes, line: bytes) -> None:
    with Rig() as rig:
        assert rig.client(raw(b"OPTIONS", target)).answer().body == b"ok"
    assert rig.origin.requests()[0].start == line


@pytest.mark.parametrize("value", [b"0", b"00"])
def test_options_with_max_forwards_0_is_answered_and_keeps_the_connection(value: bytes) -> None:
    with Rig() as rig:
        client = rig.client(raw(b"OPTIONS", b"http://a.test/", b"Max-Forwards: " + value))
        answer = client.answer()
        assert (answer.start, answer.body, len(answer.get(b"allow"))) == (
            b"HTTP/1.1 200 OK",
            b"",
            1,
        )
        assert rig.dialled == []
        client.send(get(b"a.test"))
        assert client.answer().body == b"ok"
    assert [request.start for request in rig.origin.requests()] == [b"GET / HTTP/1.1"]


def test_options_with_max_forwards_0_honours_connection_close() -> None:
    with Rig() as rig:
        check = rig.client(
            raw(b"OPTIONS", b"http://a.test/", b"Max-Forwards: 0", b"Connection: close")
        )
        assert check.answer().get(b"connection") == [b"close"]
        assert check.rest() == b"" and check.end == "closed"


def test_options_with_max_forwards_0_keeps_the_outbound_connection() -> None:
    with Rig() as rig:
        client = rig.client(
            get(b"a.test") + raw(b"OPTIONS", b"http://a.test/", b"Max-Forwards: 0") + get(b"a.test")
        )
        assert [client.answer().body for _ in range(3)] == [b"ok", b"", b"ok"]
    assert len(rig.dialled) == 1


@pytest.mark.parametrize("value", [b"0", b"00"])
def test_trace_with_max_forwards_0_is_refused(value: bytes) -> None:
    with Rig() as rig:
        check_refused(
            rig.client(raw(b"TRACE", b"http://a.test/", b"Max-Forwards: " + value)),
            b"405 Method Not Allowed",
        )
    assert rig.dialled == []


@pytest.mark.parametrize(
    "method,value,left",
    [(b"OPTIONS", b"1", b"0"), (b"TRACE", b"9", b"8"), (b"GET", b"0", b"0"), (b"HEAD", b"7", b"7")],
)
def test_max_forwards_is_decremented_for_options_and_trace_only(
    method: bytes, value: bytes, left: bytes
) -> None:
    with Rig() as rig:
        assert (
            rig.client(raw(method, b"http://a.test/", b"Max-Forwards: " + value))
            .answer(method)
            .status
            == 200
        )
    assert rig.origin.requests()[0].get(b"max-forwards") == [left]


@pytest.mark.parametrize(
    "request_bytes,reason,status",
    [
        (
            get(b"a.test", b"/" + SECRET_LOOKING, b"X: " + SECRET_LOOKING),
            Reason.REFUSED,
            b"502 Bad Gateway",
        ),
        (
            get(b"a.test", b"/" + SECRET_LOOKING, b"Host: " + SECRET_LOOKING),
            None,
            b"400 Bad Request",
        ),
        (raw(b"GET", SECRET_LOOKING), None, b"400 Bad Request"),
        (raw(b"CONNECT", SECRET_LOOKING), None, b"400 Bad Request"),
        (raw(b"CONNECT", b"script.test:25"), None, b"403 Forbidden"),
        (get(b"script.test"), Reason.NAME, b"502 Bad Gateway"),
        (SECRET_LOOKING + b"\r\n\r\n", None, b"400 Bad Request"),
        (get(b"a.test", b"/", SECRET_LOOKING), None, b"400 Bad Request"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_error_page_is_plain_text_without_bytes_of_the_request(
    request_bytes: bytes, reason: Reason | None, status: bytes
) -> None:
    """Hazard 71."""
    with Rig() as rig:
        rig.dialer.failing = [reason]
        answer = check_refused(rig.client(request_bytes), status)
    assert answer.get(b"content-type") == [b"text/plain; charset=us-ascii"] and answer.get(
        b"x-content-type-options"
    ) == [b"nosniff"]
    assert (
        b"script" not in answer.body
        and b"<" not in answer.body
        and answer.body.isascii()
        and answer.body.endswith(b"\n")
    )


def test_refusal_of_head_request_has_no_body() -> None:
    """RFC 9110 section 9.3.2: the client would take a body for the head of the next response."""
    with Rig() as rig:
        rig.dialer.failing = [Reason.REFUSED]
        check_refused(rig.client(raw(b"HEAD", b"http://a.test/")), b"502 Bad Gateway", b"HEAD")


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_failed_dial_is_recorded_counted_and_answered(reason: Reason) -> None:
    with Rig() as rig:
        rig.dialer.failing = [reason]
        answer = rig.client(get(b"a.test")).answer()
    assert answer.status in (403, 429, 501, 502, 504) and [
        record.ended for record in rig.records
    ] == [reason.value]
    assert rig.counters.value("dial_failures", reason.value) == 1
