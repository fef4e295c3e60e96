"""Connect-UDP-Bind: header fields, capsules and contexts, byte for byte and rule by rule."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
from netproxy.protocol import http1
from netproxy.protocol.http import bound_udp, connect_udp
from netproxy.protocol.http.bound_udp import Assignment
from netproxy.protocol.http.contexts import CONTEXTS_LIMIT, PAYLOAD_LIMIT, BoundCapsules
from netproxy.protocol.http1 import HttpError, HttpRequest

FIRST = Address("192.0.2.1", 53)
OTHER = Address("192.0.2.2", 443)
SIXTH = Address("2001:db8::1", 443)
RAW_FIRST = b"\x04\xc0\x00\x02\x01\x00\x35"
RAW_OTHER = b"\x04\xc0\x00\x02\x02\x01\xbb"
RAW_SIXTH = b"\x06" + bytes.fromhex("20010db8000000000000000000000001") + b"\x01\xbb"
ALL, ALL_ACK = b"\x11\x02\x02\x00", b"\x12\x01\x02"


def datagram(context: bytes, data: bytes) -> bytes:
    """Return a DATAGRAM capsule."""
    assert len(context + data) < 64
    return b"\0%c%b%b" % (len(context + data), context, data)


class Contexts:
    """One end of a stream, and what it has refused."""

    def __init__(
        self,
        first: Address | None = FIRST,
        is_proxy: bool = True,
        admits: Callable[[Address], bool] = lambda target: True,
    ) -> None:
        self.refused: list[tuple[str, str]] = []
        self.capsules = BoundCapsules(
            first, is_proxy, admits, lambda counter, reason: self.refused.append((counter, reason))
        )

    def read(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Return the datagrams in whole capsules, each with its raw address."""
        memory, at, found = bytearray(data), 0, []
        while at < len(memory):
            frame = self.capsules.find(memory, at, len(memory))
            assert frame is not None, f"cut off at {at}"
            payload, at, address = frame
            if address is not None:
                found.append((bytes(memory[payload:at]), address))
            elif payload < at:  # a stream counts it
                self.refused.append(("drops", "unknown context"))
        return found

    def answers(self, data: bytes) -> bytes:
        """Return the answers to whole capsules without datagrams."""
        assert self.read(data) == []
        return self.capsules.take_answers()

    def frame(self, address: bytes, data: bytes) -> bytes:
        return self.capsules.prefix(address, len(data)) + data


# -- header fields


@pytest.mark.parametrize(
    "values, offered",
    [
        ([b"?1"], True),
        ([b"?1;a"], True),
        ([b'?1; a=1;b=-2.5; c="x\\"y";*d=tok/en:1;e=:aGk=:;f=?0;g=@12;h=%"x"'], True),
        ([], False),
        ([b"?0"], False),
        ([b"1"], False),
        ([b"?1, ?1"], False),
        ([b"?1", b"?1"], False),
        ([b"?1;"], False),
        ([b"?1;A=1"], False),
        ([b"?1;a=\xff"], False),
        ([b"?1 ;a"], False),
        ([b"?1\n"], False),
    ],
)
def test_only_one_true_boolean_asks_for_a_bound_stream(values: list[bytes], offered: bool) -> None:
    fields = [(b"connect-UDP-bind", value) for value in values]
    assert connect_udp.is_bind_offered(fields) is offered


def test_accepting_fields_have_these_bytes_and_are_read_back() -> None:
    addresses = (Address("192.0.2.45", 54321), Address("2001:db8::1234", 54321))
    fields = bound_udp.accept_fields(addresses)
    assert fields == [
        (b"Connect-UDP-Bind", b"?1"),
        (b"Proxy-Public-Address", b'"192.0.2.45:54321", "[2001:db8::1234]:54321"'),
    ]
    assert bound_udp.parse_public_addresses(fields) == addresses


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"192.0.2.1:1",
        b'"192.0.2.1:1"; a',
        b'"192.0.2.1:1",',
        b'"192.0.2.1"',
        b'"192.0.2.1:0"',
        b'"192.0.2.1:65536"',
        b'"0.0.0.0:1"',
        b'"[::]:1"',
        b'"proxy.test:1"',
        b'"2001:db8::1:1"',
        b'"192.0.2.1:1", ?1',
        b'"192.0.2.1:1\\""',
        b'("192.0.2.1:1")',
    ],
)
def test_public_addresses_that_are_not_valid_are_none(value: bytes) -> None:
    assert bound_udp.parse_public_addresses([(b"Proxy-Public-Address", value)]) == ()


def test_public_addresses_may_come_in_several_fields_and_are_bounded() -> None:
    fields = [(b"proxy-public-address", b'"192.0.2.%d:1"' % number) for number in range(1, 11)]
    addresses = bound_udp.parse_public_addresses(fields)
    assert addresses == tuple(Address(f"192.0.2.{number}", 1) for number in range(1, 9))


# -- the request


def test_request_for_all_targets_has_these_bytes_and_is_read_back() -> None:
    """The example of the draft, in HTTP/1.1."""
    raw = connect_udp.encode_request(UNSPECIFIED_ADDRESS, "proxy.test", is_bound=True)
    assert raw == (
        b"GET /.well-known/masque/udp/%2A/%2A/ HTTP/1.1\r\nHost: proxy.test\r\n"
        b"Connection: Upgrade\r\nUpgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n"
        b"Connect-UDP-Bind: ?1\r\n\r\n"
    )
    request = HttpRequest(b"GET", connect_udp.ANY_PATH, 1, [(connect_udp.BIND_FIELD, b"?1")])
    assert connect_udp.parse_target(request) == UNSPECIFIED_ADDRESS


@pytest.mark.parametrize("path", [b"%2a/%2A", b"%2A/%2a"])
def test_escape_of_the_asterisk_has_any_case(path: bytes) -> None:
    target = b"/.well-known/masque/udp/%b/" % path
    request = HttpRequest(b"GET", target, 1, [(connect_udp.BIND_FIELD, b"?1")])
    assert connect_udp.parse_target(request) == UNSPECIFIED_ADDRESS


@pytest.mark.parametrize("path", [b"%2A/443", b"192.0.2.1/%2A", b"*/*", b"%2A/%2A"])
def test_asterisk_alone_or_without_the_field_is_answered_400(path: bytes) -> None:
    fields = [] if path == b"%2A/%2A" else [(connect_udp.BIND_FIELD, b"?1")]
    request = HttpRequest(b"GET", b"/.well-known/masque/udp/%b/" % path, 1, fields)
    with pytest.raises(HttpError) as caught:
        connect_udp.parse_target(request)
    assert caught.value.status == 400


def test_accepting_response_has_the_fields() -> None:
    fields: http1.Fields = bound_udp.accept_fields([Address("192.0.2.45", 54321)])
    assert connect_udp.encode_accept(fields) == (
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: connect-udp\r\n"
        b'Capsule-Protocol: ?1\r\nConnect-UDP-Bind: ?1\r\nProxy-Public-Address: "192.0.2.45:54321"'
        b"\r\n\r\n"
    )


# -- capsules


@pytest.mark.parametrize(
    "capsule, raw",
    [
        (bound_udp.encode_assign(Assignment(2, None)), "11 02 02 00"),
        (bound_udp.encode_assign(Assignment(4, FIRST)), "11 08 04 04 c0000201 0035"),
        (
            bound_udp.encode_assign(Assignment(64, SIXTH)),
            "11 15 4040 06 20010db8000000000000000000000001 01bb",
        ),
        (bound_udp.encode_ack(2), "12 01 02"),
        (bound_udp.encode_close(16384), "13 04 80004000"),
    ],
)
def test_capsules_have_these_bytes(capsule: bytes, raw: str) -> None:
    assert capsule == bytes.fromhex(raw)


@pytest.mark.parametrize(
    "value, assignment",
    [
        ("02 00", Assignment(2, None)),
        ("4002 00", Assignment(2, None)),
        ("04 04 c0000201 0035", Assignment(4, FIRST)),
        ("07 06 20010db8000000000000000000000001 01bb", Assignment(7, SIXTH)),
        ("07 06 00000000000000000000ffffc0000201 0035", Assignment(7, FIRST)),
    ],
)
def test_registration_is_read(value: str, assignment: Assignment) -> None:
    assert bound_udp.parse_assign(bytes.fromhex(value)) == assignment


@pytest.mark.parametrize(
    "value",
    ["", "02", "40", "00 00", "02 05", "02 00 00", "02 04", "02 04 c0000201", "02 04 c000020100",
     "02 04 c0000201 0035 00", "02 06 c0000201 0035", "02 04" + "00" * 18],
)  # fmt: skip
def test_malformed_registration_is_refused(value: str) -> None:
    with pytest.raises(ProtocolError):
        bound_udp.parse_assign(bytes.fromhex(value))


@pytest.mark.parametrize("value", ["", "00", "40", "4000", "02 00", "8000"])
def test_malformed_context_is_refused(value: str) -> None:
    with pytest.raises(ProtocolError):
        bound_udp.parse_context(bytes.fromhex(value))


def test_name_has_no_raw_address() -> None:
    with pytest.raises(ValueError, match="is a name"):
        bound_udp.encode_address(Address("game.test", 1))


# -- contexts, the proxy's end


def test_context_for_all_targets_is_acknowledged_and_has_addresses() -> None:
    """The bytes of the draft's example."""
    end = Contexts(None)
    assert not end.capsules.takes(RAW_FIRST)
    assert end.answers(ALL) == ALL_ACK
    data = datagram(b"\2", RAW_FIRST + b"hi") + datagram(b"\2", RAW_SIXTH)
    assert end.read(data) == [(b"hi", RAW_FIRST), (b"", RAW_SIXTH)]
    assert end.capsules.takes(RAW_OTHER)
    assert end.frame(RAW_OTHER, b"hi") == datagram(b"\2", RAW_OTHER + b"hi")
    assert end.refused == []


def test_registered_target_needs_no_address_in_both_directions() -> None:
    end = Contexts(None)
    assert end.answers(b"\x11\x08\x04" + RAW_FIRST) == b"\x12\x01\x04"
    assert end.read(datagram(b"\4", b"hi")) == [(b"hi", RAW_FIRST)]
    assert end.frame(RAW_FIRST, b"hi") == datagram(b"\4", b"hi")
    # Without a context for all targets the proxy is a firewall.
    assert end.capsules.takes(RAW_FIRST) and not end.capsules.takes(RAW_OTHER)


def test_closed_context_is_used_no_more() -> None:
    end = Contexts(None)
    end.answers(ALL + b"\x11\x08\x04" + RAW_FIRST)
    assert end.answers(b"\x13\x01\x04") == b""
    assert end.frame(RAW_FIRST, b"hi") == datagram(b"\2", RAW_FIRST + b"hi")
    assert end.read(datagram(b"\4", b"late")) == []
    assert end.refused == [("drops", "unknown context")]
    assert end.answers(b"\x13\x01\x02") == b""
    assert not end.capsules.takes(RAW_FIRST)
    # Only another number begins again.
    assert end.answers(b"\x11\x02\x06\x00") == b"\x12\x01\x06"
    with pytest.raises(ProtocolError, match="has been used"):
        end.read(ALL)


def test_context_0_is_the_target_of_the_request() -> None:
    end = Contexts(FIRST)
    assert end.read(datagram(b"\0", b"hi")) == [(b"hi", RAW_FIRST)]
    end.answers(ALL)
    assert end.frame(RAW_FIRST, b"hi") == datagram(b"\0", b"hi")
    # A context of its own takes its place as long as it is open.
    end.answers(b"\x11\x08\x04" + RAW_FIRST)
    assert end.frame(RAW_FIRST, b"hi") == datagram(b"\4", b"hi")
    end.answers(b"\x13\x01\x04")
    assert end.frame(RAW_FIRST, b"hi") == datagram(b"\0", b"hi")


def test_context_0_without_a_target_ends_the_stream() -> None:
    with pytest.raises(ProtocolError, match="context 0"):
        Contexts(None).read(datagram(b"\0", b"hi"))


MALFORMED = {
    "context 0": b"\x11\x02\x00\x00",
    "context of the proxy": b"\x11\x02\x03\x00",
    "second one for all targets": ALL + b"\x11\x02\x04\x00",
    "same number": ALL + ALL,
    "same number, another address": b"\x11\x08\x04" + RAW_FIRST + b"\x11\x08\x04" + RAW_OTHER,
    "same address": b"\x11\x08\x04" + RAW_OTHER + b"\x11\x08\x06" + RAW_OTHER,
    "number of a refused one": b"\x11\x08\x04\x04\xc0\0\2\1\0\0" + b"\x11\x08\x04" + RAW_OTHER,
    "ACK for nothing": b"\x12\x01\x03",
    "CLOSE of 0": b"\x13\x01\x00",
    "too long": b"\x11\x1c" + bytes(28),
    "DATAGRAM without context": b"\0\0",
    "DATAGRAM beyond UDP": b"\0\x80\x01\x00\x21",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=list(MALFORMED))
def test_malformed_capsule_ends_the_stream(data: bytes) -> None:
    """Hazard 176."""
    end = Contexts(None)
    with pytest.raises(ProtocolError):
        end.read(data)


def test_number_that_was_closed_long_ago_is_remembered_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("netproxy.protocol.http.contexts.CLOSED_LIMIT", 2)
    end = Contexts(None)
    for context in (2, 4, 6):
        end.answers(bound_udp.encode_assign(Assignment(context, None)))
        end.answers(bound_udp.encode_close(context))
    for context, refused in ((4, True), (6, True), (2, False)):
        try:
            end.read(bound_udp.encode_assign(Assignment(context, None)))
        except ProtocolError:
            assert refused
        else:
            assert not refused


def test_contexts_are_bounded_and_the_next_one_is_refused() -> None:
    """Hazard 177."""
    end = Contexts(None)
    for number in range(CONTEXTS_LIMIT):
        address = Address("192.0.2.1", 1 + number)
        context = 2 * number + 2
        answer = end.answers(bound_udp.encode_assign(Assignment(context, address)))
        assert answer == bound_udp.encode_ack(context)
    context = 2 * CONTEXTS_LIMIT + 2
    answer = end.answers(bound_udp.encode_assign(Assignment(context, OTHER)))
    assert answer == bound_udp.encode_close(context)
    assert end.refused == [("requests_refused", "too many contexts")]
    # A place that is free again is taken.
    end.answers(bound_udp.encode_close(2))
    assert end.answers(bound_udp.encode_assign(Assignment(context + 2, OTHER))) == (
        bound_udp.encode_ack(context + 2)
    )


def test_refused_target_is_answered_with_close_and_gets_no_context() -> None:
    asked: list[Address] = []

    def admits(target: Address) -> bool:
        asked.append(target)
        return target != OTHER

    end = Contexts(None, admits=admits)
    assert end.answers(b"\x11\x08\x04" + RAW_OTHER) == b"\x13\x01\x04"
    assert end.answers(b"\x11\x08\x06" + RAW_FIRST) == b"\x12\x01\x06"
    assert end.answers(b"\x11\x08\x08\x04\xc0\0\2\1\0\0") == b"\x13\x01\x08"  # port 0
    assert asked == [OTHER, FIRST]
    assert end.read(datagram(b"\4", b"hi")) == []


def test_unknown_capsules_and_contexts_are_skipped() -> None:
    end = Contexts(None)
    end.answers(ALL)
    data = b"\x17\x05what?" + datagram(b"\x08", b"hi") + datagram(b"\2", RAW_FIRST + b"hi")
    assert end.read(data) == [(b"hi", RAW_FIRST)]
    assert end.answers(b"\x13\x01\x23") == b""  # nothing to be closed
    assert end.refused == [("drops", "unknown context")]


@pytest.mark.parametrize(
    "data", [b"", b"\x04", b"\x04\xc0\0\2\1\0", b"\x05" + bytes(6), b"\x00", b"\x06" + bytes(17)]
)
def test_datagram_without_its_address_is_dropped_and_the_next_one_read(data: bytes) -> None:
    end = Contexts(None)
    end.answers(ALL)
    again = datagram(b"\2", RAW_FIRST + b"hi")
    assert end.read(datagram(b"\2", data) + again) == [(b"hi", RAW_FIRST)]
    assert end.refused == [("drops", "malformed")]


@pytest.mark.parametrize("is_proxy", [True, False])
def test_longest_payload_comes_and_goes(is_proxy: bool) -> None:
    end = Contexts(None, is_proxy)
    if is_proxy:
        end.answers(ALL)
    payload = bytes(PAYLOAD_LIMIT)
    framed = end.frame(RAW_SIXTH, payload)
    assert end.read(framed) == [(payload, RAW_SIXTH)]


def test_every_truncation_waits_for_more() -> None:
    data = ALL + b"\x11\x08\x04" + RAW_FIRST + datagram(b"\4", b"hi")
    for cut in range(len(data)):
        end, at, memory = Contexts(None), 0, bytearray(data)
        while (frame := end.capsules.find(memory, at, cut)) is not None:
            at = frame[1]
        assert at <= cut
        # The rest of the same bytes gives the same datagrams and answers.
        assert end.read(data[at:])[-1:] == [(b"hi", RAW_FIRST)] or at == len(data)
        assert end.capsules.take_answers() == ALL_ACK + b"\x12\x01\x04"


def test_stream_without_agreement_has_context_0_alone() -> None:
    end = Contexts(FIRST)
    end.capsules.disagree()
    # RFC 9297: capsules of unknown types are ignored.
    assert end.answers(ALL + b"\x12\x01\x03" + b"\x13\x01\x00") == b""
    assert end.read(datagram(b"\0", b"hi")) == [(b"hi", RAW_FIRST)]
    assert end.frame(RAW_FIRST, b"hi") == datagram(b"\0", b"hi")
    assert not end.capsules.takes(RAW_OTHER)


# -- contexts, the client's end


def test_client_registers_a_context_for_all_targets_and_uses_it_at_once() -> None:
    end = Contexts(FIRST, is_proxy=False)
    assert end.capsules.take_answers() == ALL
    assert end.frame(RAW_OTHER, b"hi") == datagram(b"\2", RAW_OTHER + b"hi")
    assert end.frame(RAW_FIRST, b"hi") == datagram(b"\0", b"hi")
    assert end.answers(ALL_ACK) == b""
    data = datagram(b"\2", RAW_OTHER + b"hi") + datagram(b"\0", b"ho")
    assert end.read(data) == [(b"hi", RAW_OTHER), (b"ho", RAW_FIRST)]


def test_client_accepts_the_contexts_of_a_proxy() -> None:
    end = Contexts(None, is_proxy=False)
    end.capsules.take_answers()
    assert end.answers(b"\x11\x08\x03" + RAW_OTHER) == b"\x12\x01\x03"
    assert end.read(datagram(b"\3", b"hi")) == [(b"hi", RAW_OTHER)]
    assert end.frame(RAW_OTHER, b"hi") == datagram(b"\3", b"hi")
    assert end.answers(b"\x13\x01\x03") == b""
    assert end.frame(RAW_OTHER, b"hi") == datagram(b"\2", RAW_OTHER + b"hi")


@pytest.mark.parametrize(
    "data", [b"\x11\x02\x03\x00", b"\x11\x08\x04" + RAW_OTHER, b"\x12\x01\x04", b"\x13\x01\x02"]
)
def test_proxy_that_breaks_the_rules_ends_the_stream(data: bytes) -> None:
    end = Contexts(None, is_proxy=False)
    with pytest.raises(ProtocolError):
        end.read(data)
    assert end.capsules.is_closed_to_all is (data[0] == 0x13)


def test_target_of_an_ip_version_that_the_proxy_lacks_is_refused() -> None:
    end = Contexts(SIXTH, is_proxy=False)
    end.capsules.versions = frozenset({bound_udp.IPV4})
    assert end.capsules.encode(FIRST) == RAW_FIRST
    # The proxy itself has accepted the target of the request.
    assert end.capsules.encode(SIXTH) == RAW_SIXTH
    with pytest.raises(ValueError, match="no IPv6 address"):
        end.capsules.encode(SIXTH._replace(port=1))
    with pytest.raises(ValueError, match="is a name"):
        end.capsules.encode(Address("game.test", 1))


def test_raw_address_is_read_back() -> None:
    end: Any = Contexts().capsules
    for address, raw in ((FIRST, RAW_FIRST), (SIXTH, RAW_SIXTH)):
        assert (end.encode(address), end.parse(raw)) == (raw, address)
    for raw in (b"", b"\x04", RAW_FIRST + b"x", b"\x05" + RAW_FIRST[1:]):
        with pytest.raises(ProtocolError):
            end.parse(raw)
