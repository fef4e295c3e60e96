"""The bytes of the tunnel protocol: each role reads what the other one encodes."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path
from typing import Any, Callable

import pytest
from hypothesis import given, strategies

from netproxy.errors import ProtocolError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.protocol import tunnel
from netproxy.protocol.http.capsule import encode_varint
from netproxy.protocol.tunnel import (
    BridgePort,
    Hello,
    OpenRequest,
    Registration,
    TunnelMessage,
    Welcome,
    encode_hello,
    encode_open,
    parse_message,
    parse_open,
    parse_register,
    parse_registered,
    read_challenge,
    read_hello,
    read_message,
    read_welcome,
)
from netproxy.protocol.tunnels import path
from netproxy.protocol.tunnels.path import FlowOffer, PathOffer
from netproxy.tunnel.streams import chunks
from tests.support.readers import BytesReader, check_read, check_refused

NONCE, OTHER_NONCE, SESSION, PROOF = (
    bytes(range(32)),
    bytes(range(32, 64)),
    bytes(range(64, 80)),
    bytes(range(80, 112)),
)
TOKEN = b"correct horse battery staple"
MANUAL_OFFER = PathOffer(
    *(1, 0, bytes(range(0x50, 0x58)), bytes(range(0x58, 0x60))),
    *(bytes(range(0x60, 0x80)), bytes(range(0x80, 0xA0))),
)
"""The offer of a datagram path in the examples of the manual page."""
MANUAL = Path(__file__).resolve().parents[2] / "man" / "netproxy-tunnel.7"
CLIENT = Address("203.0.113.9", 50000)

HELLOS = {
    "control": (Hello(tunnel.CONTROL, "home", NONCE), b"\x9eNPT\1\0" + NONCE + b"\4home"),
    "work": (
        Hello(tunnel.WORK, "home", NONCE, SESSION),
        b"\x9eNPT\1\1" + NONCE + b"\4home" + SESSION,
    ),
    "resume": (
        Hello(tunnel.RESUME, "home", NONCE, SESSION),
        b"\x9eNPT\1\2" + NONCE + b"\4home" + SESSION,
    ),
    "attach": (
        Hello(tunnel.ATTACH, "home", NONCE, SESSION, 1, 300),
        b"\x9eNPT\1\3" + NONCE + b"\4home" + SESSION + bytes(7) + b"\1" + bytes(6) + b"\1\x2c",
    ),
    "shortest name": (Hello(tunnel.CONTROL, "a", NONCE), b"\x9eNPT\1\0" + NONCE + b"\1a"),
    "longest name": (
        Hello(tunnel.CONTROL, "A-_9" * 15 + "abc", NONCE),
        b"\x9eNPT\1\0" + NONCE + b"\x3f" + b"A-_9" * 15 + b"abc",
    ),
}

# As many bytes as are needed to refuse the hello.
INVALID_HELLOS = {
    "SOCKS5": b"\5\1\0\0\0\0",
    "HTTP": b"GET / ",
    "TLS": b"\x16\3\1\0\xa5\1",
    "half the magic": b"\x9eNPX\1\0",
    "version 0": b"\x9eNPT\0\0",
    "version 2": b"\x9eNPT\2\0",
    "kind 4": b"\x9eNPT\1\4",
    "empty name": b"\x9eNPT\1\0" + NONCE + b"\0",
    "name of 64 bytes": b"\x9eNPT\1\0" + NONCE + b"\x40" + b"a" * 64,
    "name with a dot": b"\x9eNPT\1\0" + NONCE + b"\3a.b",
    "name with a line break": b"\x9eNPT\1\0" + NONCE + b"\2a\n",
    "name that is not ASCII": b"\x9eNPT\1\0" + NONCE + b"\2\xc3\xa4",
}

OPEN_REQUESTS = {
    "service": (
        OpenRequest("tcp", CLIENT, BridgePort("tcp", 8022)),
        b"\6\1\xcb\0\x71\x09\xc3\x50\0\x1f\x56",
    ),
    "UDP service of an IPv6 client": (
        OpenRequest("udp", Address("2001:db8::1", 1), BridgePort("udp", 53)),
        b"\x11\4\x20\1\x0d\xb8" + bytes(11) + b"\1\0\1\0\0\x35",
    ),
    "exit to an address": (
        OpenRequest("tcp", CLIENT, Address("192.168.7.1", 80)),
        b"\6\1\xcb\0\x71\x09\xc3\x50\1\1\xc0\xa8\7\1\0\x50",
    ),
    "exit to a name": (
        OpenRequest("tcp", CLIENT, Address("printer.lan", 80)),
        b"\6\1\xcb\0\x71\x09\xc3\x50\1\3\x0bprinter.lan\0\x50",
    ),
}

INVALID_OPENS = {
    "empty": b"",
    "network alone": b"\6",
    "unknown network": b"\7\1\0\0\0\0\0\0\0\0\1",
    "unknown address type": b"\6\2\0\0\0\0\0\0\0\0\1",
    "client cut off": b"\6\1\0\0",
    "no target": b"\6\1\0\0\0\0\0\0",
    "unknown kind of target": b"\6\1\0\0\0\0\0\0\2\0\1",
    "service of one byte": b"\6\1\0\0\0\0\0\0\0\1",
    "service of three bytes": b"\6\1\0\0\0\0\0\0\0\0\0\1",
    "target cut off": b"\6\1\0\0\0\0\0\0\1\1\0\0\0",
    "bytes after the target": b"\6\1\0\0\0\0\0\0\1\1\0\0\0\0\0\1\0",
    "invalid name": b"\6\1\0\0\0\0\0\0\1\3\2..\0\1",
}


# -- the handshake


@pytest.mark.parametrize(("hello", "data"), HELLOS.values(), ids=HELLOS)
def test_bridge_reads_the_hello_that_the_agent_encodes(hello: Hello, data: bytes) -> None:
    assert encode_hello(hello) == data
    check_read(read_hello, data, hello)


@pytest.mark.parametrize("data", INVALID_HELLOS.values(), ids=INVALID_HELLOS)
def test_invalid_hello_is_refused(data: bytes) -> None:
    check_refused(read_hello, data, ProtocolError)


def test_first_byte_of_a_hello_starts_no_other_protocol() -> None:
    first = tunnel.MAGIC[0]
    assert first not in (4, 5, 0x16, 0x0D) and not chr(first).isascii()


def test_agent_reads_the_answers_that_the_bridge_encodes() -> None:
    check_read(read_challenge, tunnel.encode_challenge(NONCE), NONCE)
    check_read(
        read_welcome, tunnel.encode_welcome(Welcome(PROOF, SESSION)), Welcome(PROOF, SESSION)
    )
    for read in (read_challenge, read_welcome):
        for reason in (*tunnel.REFUSALS, 255):
            check_read(read, tunnel.encode_refusal(reason), reason)


@pytest.mark.parametrize(
    ("read", "data"),
    [(read_challenge, b"\2"), (read_challenge, b"\0"), (read_welcome, b"\1"), (read_welcome, b"H")],
    ids=["welcome for challenge", "0 for challenge", "challenge for welcome", "HTTP for welcome"],
)
def test_invalid_answer_of_a_bridge_is_refused(read: Callable[[Any], Any], data: bytes) -> None:
    check_refused(read, data, ProtocolError)


def test_proof_is_the_hmac_described_in_the_manual() -> None:
    """Written anew from man/netproxy-tunnel.7."""
    work = Hello(tunnel.WORK, "home", NONCE, SESSION)
    signed = b"netproxy tunnel 1 A\1\4home" + NONCE + OTHER_NONCE + SESSION
    proof = tunnel.agent_proof(TOKEN, work, OTHER_NONCE)
    assert proof == hmac.new(TOKEN, signed, hashlib.sha256).digest()
    control = Hello(tunnel.CONTROL, "home", NONCE)
    signed = b"netproxy tunnel 1 B\0\4home" + NONCE + OTHER_NONCE + SESSION
    proof = tunnel.bridge_proof(TOKEN, control, OTHER_NONCE, SESSION)
    assert proof == hmac.new(TOKEN, signed, hashlib.sha256).digest()


def test_proof_is_valid_for_one_connection_and_role() -> None:
    """Hazard 123: it depends on token, name, kind, both nonces, session and role."""
    hello = Hello(tunnel.WORK, "home", NONCE, SESSION)
    proofs = [
        tunnel.agent_proof(TOKEN, hello, OTHER_NONCE),
        tunnel.agent_proof(TOKEN + b"!", hello, OTHER_NONCE),
        tunnel.agent_proof(TOKEN, hello._replace(name="hom"), OTHER_NONCE),
        tunnel.agent_proof(TOKEN, hello._replace(kind=tunnel.CONTROL), OTHER_NONCE),
        tunnel.agent_proof(TOKEN, hello._replace(nonce=OTHER_NONCE), OTHER_NONCE),
        tunnel.agent_proof(TOKEN, hello, NONCE),
        tunnel.agent_proof(TOKEN, hello._replace(session=bytes(16)), OTHER_NONCE),
        tunnel.agent_proof(TOKEN, hello._replace(kind=tunnel.RESUME), OTHER_NONCE),
        tunnel.agent_proof(TOKEN, hello._replace(kind=tunnel.ATTACH, flow=1), OTHER_NONCE),
        tunnel.agent_proof(TOKEN, hello._replace(kind=tunnel.ATTACH, flow=2), OTHER_NONCE),
        tunnel.agent_proof(TOKEN, hello._replace(kind=tunnel.ATTACH, path=1, flow=1), OTHER_NONCE),
        tunnel.bridge_proof(TOKEN, hello, OTHER_NONCE, SESSION),
    ]
    assert len(set(proofs)) == len(proofs)
    assert tunnel.secrets_equal(proofs[0], proofs[0])
    assert not tunnel.secrets_equal(proofs[0], proofs[1])


# -- messages


def value_of(data: bytes) -> bytes:
    """Return the value of the message at the start of `data`."""
    parsed = parse_message(data)
    assert parsed is not None
    return parsed[0].value


@pytest.mark.parametrize("size", [0, 1, 63, 64, 4096])
def test_message_is_read_and_parsed_as_it_was_encoded(size: int) -> None:
    message = TunnelMessage(tunnel.PING, bytes(size))
    data = tunnel.encode_message(*message)
    check_read(read_message, data, message)
    assert parse_message(data + b"more") == (message, len(data))
    assert all(parse_message(data[:cut]) is None for cut in range(len(data)))


def test_message_types_have_the_numbers_of_the_manual() -> None:
    assert [
        tunnel.REGISTER,
        tunnel.REGISTERED,
        tunnel.PING,
        tunnel.PONG,
        tunnel.WANT,
        tunnel.CLOSE,
        tunnel.OPEN,
        tunnel.ACCEPT,
        tunnel.REFUSE,
        tunnel.OPEN_REUSABLE,
    ] == list(range(0x4E5401, 0x4E540B))


@pytest.mark.parametrize("length", [4097, 1 << 16, 1 << 32, (1 << 62) - 1])
def test_long_message_is_refused_as_soon_as_its_length_is_known(length: int) -> None:
    """Hazard 123: a message of 2^32 bytes."""
    data = encode_varint(tunnel.PING) + encode_varint(length)
    check_refused(read_message, data, ProtocolError)
    with pytest.raises(ProtocolError):
        parse_message(data)
    assert parse_message(data[:-1]) is None


def test_register_is_parsed_as_it_was_encoded() -> None:
    services = [BridgePort("tcp", 8022), BridgePort("udp", 53), BridgePort("tcp", 65535)]
    value = value_of(tunnel.encode_register(Registration(services, True)))
    assert value == b"\1\6\x1f\x56\x11\0\x35\6\xff\xff"
    assert parse_register(value) == Registration(services, True)
    assert parse_register(b"\0") == Registration([], False)
    assert value_of(tunnel.encode_register(Registration([], False, False, True))) == b"\4"
    direct = Registration([], True, takes_paths=True, takes_direct=True)
    assert value_of(tunnel.encode_register(direct)) == b"\x15"
    assert value_of(tunnel.encode_register(Registration([], False, True))) == b"\2"
    assert value_of(tunnel.encode_register(Registration([], False, resumes=True))) == b"\x08"
    # Flags of a later version are ignored.
    for flags in range(256):
        said = tuple(bool(flags & flag) for flag in (1, 2, 4, 8, 16))
        assert parse_register(bytes((flags,))) == ([], *said)


def test_registered_is_parsed_as_it_was_encoded() -> None:
    outcomes = [
        (BridgePort("tcp", 8022), tunnel.SERVED),
        (BridgePort("udp", 53), tunnel.NOT_ALLOWED),
        (BridgePort("tcp", 65535), tunnel.CANNOT_LISTEN),
    ]
    assert parse_registered(value_of(tunnel.encode_registered(outcomes))) == outcomes


def test_messages_have_room_for_the_most_services() -> None:
    services = [BridgePort("tcp", port) for port in range(1, tunnel.SERVICES_LIMIT + 1)]
    value = value_of(tunnel.encode_register(Registration(services, False)))
    assert parse_register(value) == Registration(services, False)
    outcomes = [(port, tunnel.SERVED) for port in services]
    assert len(value_of(tunnel.encode_registered(outcomes))) <= tunnel.MESSAGE_LIMIT


@pytest.mark.parametrize(
    "value", [b"", b"\0\6", b"\0\6\0", b"\0\6\0\1\0", b"\0\7\0\1", b"\0" + b"\6\0\1" * 1001]
)
def test_malformed_register_is_refused(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_register(value)


@pytest.mark.parametrize("value", [b"\6", b"\6\0\1", b"\7\0\1\0", b"\6\0\1\0\6"])
def test_malformed_registered_is_refused(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_registered(value)


def test_number_is_parsed_as_it_was_encoded() -> None:
    for number in (0, 63, 64, 1 << 40):
        parsed = parse_message(tunnel.encode_number(tunnel.WANT, number))
        assert parsed is not None and parsed[0].kind == tunnel.WANT
        assert tunnel.parse_number(parsed[0].value) == number
    for value in (b"", b"\x40"):
        with pytest.raises(ProtocolError):
            tunnel.parse_number(value)


@pytest.mark.parametrize(("open_request", "value"), OPEN_REQUESTS.values(), ids=OPEN_REQUESTS)
def test_agent_parses_the_open_that_the_bridge_encodes(
    open_request: OpenRequest, value: bytes
) -> None:
    assert encode_open(open_request) == tunnel.encode_message(tunnel.OPEN, value)
    assert parse_open(value) == open_request
    for cut in range(len(value)):
        with pytest.raises(ProtocolError):
            parse_open(value[:cut])


@pytest.mark.parametrize("value", INVALID_OPENS.values(), ids=INVALID_OPENS)
def test_malformed_open_is_refused(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_open(value)


def test_every_reason_of_a_failed_dial_has_a_number() -> None:
    for reason in Reason:
        assert tunnel.parse_refuse(value_of(tunnel.encode_refuse(reason))) is reason
    # A number of a later version.
    assert tunnel.parse_refuse(b"\x3f") is Reason.GENERAL


@given(strategies.binary(max_size=200))
def test_arbitrary_bytes_raise_no_other_error_than_protocol_error(data: bytes) -> None:
    parsers: list[Callable[[bytes], Any]] = [
        parse_open,
        parse_register,
        parse_registered,
        tunnel.parse_number,
        tunnel.parse_refuse,
        parse_message,
    ]
    for parse in parsers:
        try:
            parse(data)
        except ProtocolError:
            pass
    for read in (read_hello, read_challenge, read_welcome, read_message):
        try:
            read(BytesReader(data))
        except ProtocolError:
            pass


# -- the manual page


def test_example_of_the_manual_has_our_bytes() -> None:
    """Every line "agent: hex" and "bridge: hex" of man/netproxy-tunnel.7."""
    lines = re.findall(r"^(agent|bridge): ([0-9a-f ]+)$", MANUAL.read_text(), re.MULTILINE)
    sent = [(role, bytes.fromhex(text)) for role, text in lines]
    control = Hello(tunnel.CONTROL, "home", NONCE)
    work = Hello(tunnel.WORK, "home", OTHER_NONCE, SESSION)
    service, datagrams = BridgePort("tcp", 8022), BridgePort("udp", 8053)
    control_proof = tunnel.bridge_proof(TOKEN, control, OTHER_NONCE, SESSION)
    work_proof = tunnel.bridge_proof(TOKEN, work, NONCE, SESSION)
    resume = Hello(tunnel.RESUME, "home", NONCE, SESSION)
    resume_proof = tunnel.bridge_proof(TOKEN, resume, OTHER_NONCE, SESSION)
    attach = Hello(tunnel.ATTACH, "home", OTHER_NONCE, SESSION, 1, 1)
    attach_proof = tunnel.bridge_proof(TOKEN, attach, NONCE, SESSION)
    reusable = encode_open(OpenRequest("tcp", CLIENT, service), tunnel.OPEN_REUSABLE)
    assert sent == [
        ("agent", encode_hello(control)),
        ("bridge", tunnel.encode_challenge(OTHER_NONCE)),
        ("agent", tunnel.agent_proof(TOKEN, control, OTHER_NONCE)),
        ("bridge", tunnel.encode_welcome(Welcome(control_proof, SESSION))),
        ("agent", tunnel.encode_register(Registration([service], False))),
        ("bridge", tunnel.encode_registered([(service, tunnel.SERVED)])),
        ("bridge", tunnel.encode_message(tunnel.PING, bytes(range(8)))),
        ("agent", tunnel.encode_message(tunnel.PONG, bytes(range(8)))),
        ("agent", encode_hello(work)),
        ("bridge", tunnel.encode_challenge(NONCE)),
        ("agent", tunnel.agent_proof(TOKEN, work, NONCE)),
        ("bridge", tunnel.encode_welcome(Welcome(work_proof, SESSION))),
        ("bridge", encode_open(OpenRequest("tcp", CLIENT, service))),
        ("agent", tunnel.encode_accept()),
        ("agent", tunnel.encode_register(Registration([service], False, True))),
        ("bridge", reusable),
        ("agent", tunnel.encode_accept()),
        ("bridge", b"\0\0\0\5hello"),
        ("bridge", chunks.END),
        ("agent", b"\0\0\0\5hello"),
        ("agent", chunks.END),
        ("bridge", reusable),
        ("agent", tunnel.encode_register(Registration([datagrams], False, True, True))),
        ("bridge", path.encode_offer(MANUAL_OFFER)),
        ("bridge", path.encode_flow(FlowOffer(1, 1))),
        ("bridge", encode_open(OpenRequest("udp", CLIENT, datagrams))),
        ("agent", tunnel.encode_accept(1)),
        ("agent", tunnel.encode_register(Registration([datagrams], False, True, True, True))),
        ("bridge", tunnel.encode_message(tunnel.RESUMABLE)),
        ("agent", encode_hello(resume)),
        ("bridge", tunnel.encode_challenge(OTHER_NONCE)),
        ("agent", tunnel.agent_proof(TOKEN, resume, OTHER_NONCE)),
        ("bridge", tunnel.encode_welcome(Welcome(resume_proof, SESSION))),
        ("agent", encode_hello(attach)),
        ("bridge", tunnel.encode_challenge(NONCE)),
        ("agent", tunnel.agent_proof(TOKEN, attach, NONCE)),
        ("bridge", tunnel.encode_welcome(Welcome(attach_proof, SESSION))),
    ]
