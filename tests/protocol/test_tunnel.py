"""The tunnel's wire: what each role writes the other reads, and what neither takes."""

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
from netproxy.protocol.capsule import encode_varint
from netproxy.protocol.host import HostError
from netproxy.protocol.tunnel import (
    AddressedDatagrams,
    Hello,
    Message,
    Opening,
    Service,
    Welcome,
    encode_hello,
    encode_open,
    next_message,
    parse_open,
    parse_register,
    parse_registered,
    read_challenge,
    read_hello,
    read_message,
    read_welcome,
)
from tests.support.readers import BytesReader, check_read, check_refused

NONCE, OTHER, SESSION, PROOF = (
    bytes(range(32)),
    bytes(range(32, 64)),
    bytes(range(64, 80)),
    bytes(range(80, 112)),
)
TOKEN = b"correct horse battery staple"
MANUAL = Path(__file__).resolve().parents[2] / "man" / "netproxy-tunnel.7"
CLIENT = Address("203.0.113.9", 50000)

HELLOS = {
    "control": (Hello(tunnel.CONTROL, "home", NONCE), b"\x9eNPT\1\0" + NONCE + b"\4home"),
    "work": (
        Hello(tunnel.WORK, "home", NONCE, SESSION),
        b"\x9eNPT\1\1" + NONCE + b"\4home" + SESSION,
    ),
    "shortest name": (Hello(tunnel.CONTROL, "a", NONCE), b"\x9eNPT\1\0" + NONCE + b"\1a"),
    "longest name": (
        Hello(tunnel.CONTROL, "A-_9" * 15 + "abc", NONCE),
        b"\x9eNPT\1\0" + NONCE + b"\x3f" + b"A-_9" * 15 + b"abc",
    ),
}

# as far as the refusal needs to be read
NO_HELLOS = {
    "SOCKS5": b"\5\1\0\0\0\0",
    "HTTP": b"GET / ",
    "TLS": b"\x16\3\1\0\xa5\1",
    "half the magic": b"\x9eNPX\1\0",
    "version 0": b"\x9eNPT\0\0",
    "version 2": b"\x9eNPT\2\0",
    "kind 2": b"\x9eNPT\1\2",
    "no name": b"\x9eNPT\1\0" + NONCE + b"\0",
    "name of 64 bytes": b"\x9eNPT\1\0" + NONCE + b"\x40" + b"a" * 64,
    "name with a dot": b"\x9eNPT\1\0" + NONCE + b"\3a.b",
    "name with a line break": b"\x9eNPT\1\0" + NONCE + b"\2a\n",
    "name that is not ASCII": b"\x9eNPT\1\0" + NONCE + b"\2\xc3\xa4",
}

OPENINGS = {
    "service": (
        Opening("tcp", CLIENT, Service("tcp", 8022)),
        b"\6\1\xcb\0\x71\x09\xc3\x50\0\x1f\x56",
    ),
    "UDP service of an IPv6 client": (
        Opening("udp", Address("2001:db8::1", 1), Service("udp", 53)),
        b"\x11\4\x20\1\x0d\xb8" + bytes(11) + b"\1\0\1\0\0\x35",
    ),
    "exit to an address": (
        Opening("tcp", CLIENT, Address("192.168.7.1", 80)),
        b"\6\1\xcb\0\x71\x09\xc3\x50\1\1\xc0\xa8\7\1\0\x50",
    ),
    "exit to a name": (
        Opening("tcp", CLIENT, Address("printer.lan", 80)),
        b"\6\1\xcb\0\x71\x09\xc3\x50\1\3\x0bprinter.lan\0\x50",
    ),
}

NO_OPENINGS = {
    "nothing": b"",
    "network alone": b"\6",
    "unknown network": b"\7\1\0\0\0\0\0\0\0\0\1",
    "unknown address type": b"\6\2\0\0\0\0\0\0\0\0\1",
    "client cut off": b"\6\1\0\0",
    "no target": b"\6\1\0\0\0\0\0\0",
    "unknown kind of target": b"\6\1\0\0\0\0\0\0\2\0\1",
    "service of one byte": b"\6\1\0\0\0\0\0\0\0\1",
    "service of three": b"\6\1\0\0\0\0\0\0\0\0\0\1",
    "target cut off": b"\6\1\0\0\0\0\0\0\1\1\0\0\0",
    "target with more behind": b"\6\1\0\0\0\0\0\0\1\1\0\0\0\0\0\1\0",
    "name that is none": b"\6\1\0\0\0\0\0\0\1\3\2..\0\1",
}


# -- the handshake


@pytest.mark.parametrize(("hello", "data"), HELLOS.values(), ids=HELLOS)
def test_bridge_reads_the_hello_that_the_agent_encodes(hello: Hello, data: bytes) -> None:
    assert encode_hello(hello) == data
    check_read(read_hello, data, hello)


@pytest.mark.parametrize("data", NO_HELLOS.values(), ids=NO_HELLOS)
def test_what_is_no_hello_is_refused(data: bytes) -> None:
    check_refused(read_hello, data, ProtocolError)


def test_first_byte_is_no_other_protocols() -> None:
    first = tunnel.MAGIC[0]
    assert first not in (4, 5, 0x16, 0x0D) and not chr(first).isascii()


def test_agent_reads_what_the_bridge_answers() -> None:
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
)
def test_answer_of_no_bridge_is_refused(read: Callable[[Any], Any], data: bytes) -> None:
    check_refused(read, data, ProtocolError)


def test_proof_is_hmac_of_all_that_was_said() -> None:
    """Written down anew from the manual page."""
    work = Hello(tunnel.WORK, "home", NONCE, SESSION)
    signed = b"netproxy tunnel 1 A\1\4home" + NONCE + OTHER + SESSION
    assert (
        tunnel.agent_proof(TOKEN, work, OTHER) == hmac.new(TOKEN, signed, hashlib.sha256).digest()
    )
    control = Hello(tunnel.CONTROL, "home", NONCE)
    signed = b"netproxy tunnel 1 B\0\4home" + NONCE + OTHER + SESSION
    assert (
        tunnel.bridge_proof(TOKEN, control, OTHER, SESSION)
        == hmac.new(TOKEN, signed, hashlib.sha256).digest()
    )


def test_no_proof_is_good_for_anything_else() -> None:
    """Hazard 123: another token, name, kind, nonce of either side, session or role has another proof."""
    hello = Hello(tunnel.WORK, "home", NONCE, SESSION)
    proofs = [
        tunnel.agent_proof(TOKEN, hello, OTHER),
        tunnel.agent_proof(TOKEN + b"!", hello, OTHER),
        tunnel.agent_proof(TOKEN, hello._replace(name="hom"), OTHER),
        tunnel.agent_proof(TOKEN, hello._replace(kind=tunnel.CONTROL), OTHER),
        tunnel.agent_proof(TOKEN, hello._replace(nonce=OTHER), OTHER),
        tunnel.agent_proof(TOKEN, hello, NONCE),
        tunnel.agent_proof(TOKEN, hello._replace(session=bytes(16)), OTHER),
        tunnel.bridge_proof(TOKEN, hello, OTHER, SESSION),
    ]
    assert len(set(proofs)) == len(proofs)
    assert tunnel.same(proofs[0], proofs[0]) and not tunnel.same(proofs[0], proofs[1])


# -- capsules


def check_message(kind: int, value: bytes) -> None:
    data = tunnel.encode(kind, value)
    check_read(read_message, data, Message(kind, value))
    assert next_message(data + b"more") == (Message(kind, value), len(data))
    assert all(next_message(data[:cut]) is None for cut in range(len(data)))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 4096])
def test_message_is_read_as_it_comes(size: int) -> None:
    check_message(tunnel.PING, bytes(size))


def test_kinds_have_these_numbers() -> None:
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
    ] == list(range(0x4E5401, 0x4E540A))


@pytest.mark.parametrize("length", [4097, 1 << 16, 1 << 32, (1 << 62) - 1])
def test_longer_message_is_refused_as_soon_as_its_length_is_there(length: int) -> None:
    """Hazard 123: a frame of 2^32 bytes."""
    data = encode_varint(tunnel.PING) + encode_varint(length)
    check_refused(read_message, data, ProtocolError)
    with pytest.raises(ProtocolError):
        next_message(data)
    assert next_message(data[:-1]) is None


def test_register_and_its_answer() -> None:
    services = [Service("tcp", 8022), Service("udp", 53), Service("tcp", 65535)]
    value = next_message(tunnel.encode_register(services, True))[0].value
    assert value == b"\1\6\x1f\x56\x11\0\x35\6\xff\xff"
    assert parse_register(value) == (services, True)
    assert parse_register(b"\0") == ([], False)
    outcomes = [
        (services[0], tunnel.SERVED),
        (services[1], tunnel.NOT_ALLOWED),
        (services[2], tunnel.CANNOT_LISTEN),
    ]
    assert parse_registered(next_message(tunnel.encode_registered(outcomes))[0].value) == outcomes
    most = [Service("tcp", port) for port in range(1, tunnel.SERVICES_LIMIT + 1)]
    assert parse_register(next_message(tunnel.encode_register(most, False))[0].value) == (
        most,
        False,
    )
    assert (
        len(next_message(tunnel.encode_registered([(one, 0) for one in most]))[0].value)
        <= tunnel.MESSAGE_LIMIT
    )


@pytest.mark.parametrize(
    "value", [b"", b"\0\6", b"\0\6\0", b"\0\6\0\1\0", b"\0\7\0\1", b"\0" + b"\6\0\1" * 1001]
)
def test_what_is_no_register_is_refused(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_register(value)


@pytest.mark.parametrize("value", [b"\6", b"\6\0\1", b"\7\0\1\0", b"\6\0\1\0\6"])
def test_what_is_no_registered_is_refused(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_registered(value)


def test_numbers() -> None:
    for number in (0, 63, 64, 1 << 40):
        message = next_message(tunnel.encode_number(tunnel.WANT, number))[0]
        assert message.kind == tunnel.WANT and tunnel.parse_number(message.value) == number
    for value in (b"", b"\x40"):
        with pytest.raises(ProtocolError):
            tunnel.parse_number(value)


@pytest.mark.parametrize(("opening", "value"), OPENINGS.values(), ids=OPENINGS)
def test_agent_reads_the_opening_that_the_bridge_encodes(opening: Opening, value: bytes) -> None:
    assert encode_open(opening) == tunnel.encode(tunnel.OPEN, value)
    assert parse_open(value) == opening
    for cut in range(len(value)):
        with pytest.raises(ProtocolError):
            parse_open(value[:cut])


@pytest.mark.parametrize("value", NO_OPENINGS.values(), ids=NO_OPENINGS)
def test_what_is_no_opening_is_refused(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_open(value)


def test_every_reason_is_told() -> None:
    for reason in Reason:
        assert tunnel.parse_refuse(next_message(tunnel.encode_refuse(reason))[0].value) is reason
    assert tunnel.parse_refuse(b"\x3f") is Reason.GENERAL  # of a version to come


@given(strategies.binary(max_size=200))
def test_whatever_comes_is_read_or_refused(data: bytes) -> None:
    """Never another error than ProtocolError."""
    parsers: list[Callable[[bytes], Any]] = [
        parse_open,
        parse_register,
        parse_registered,
        tunnel.parse_number,
        tunnel.parse_refuse,
        next_message,
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
    framing, memory = AddressedDatagrams(), bytearray(data)
    try:
        found = framing.find(memory, 0, len(memory))
        if found and found[2] is not None:
            assert 0 <= found[0] <= found[1] <= len(memory)
            framing.parse(found[2])
    except ProtocolError:
        pass


# -- datagrams of an exit

DATAGRAMS = {
    "IPv4": (Address("192.0.2.1", 53), b"\1\xc0\0\2\1\0\x35"),
    "IPv6": (Address("2001:db8::1", 53), b"\4\x20\1\x0d\xb8" + bytes(11) + b"\1\0\x35"),
    "name": (Address("printer.lan", 9100), b"\3\x0bprinter.lan\x23\x8c"),
}


@pytest.mark.parametrize("size", [0, 1, 40, 1200, 65507])
@pytest.mark.parametrize(("target", "raw"), DATAGRAMS.values(), ids=DATAGRAMS)
def test_datagram_is_found_where_it_lies(target: Address, raw: bytes, size: int) -> None:
    framing = AddressedDatagrams()
    assert framing.encode(target) == raw and framing.parse(raw) == target
    prefix = framing.prefix(raw, size)
    assert prefix == b"\0" + encode_varint(1 + len(raw) + size) + b"\2" + raw
    memory = bytearray(b"before" + prefix + bytes(size) + b"behind")
    at, end = 6, 6 + len(prefix) + size
    assert framing.find(memory, at, len(memory)) == (6 + len(prefix), end, raw)
    for cut in {*range(at, min(end, at + 60)), end - 1}:
        assert framing.find(memory, at, cut) is None


def test_what_is_nothing_for_us_is_skipped() -> None:
    framing = AddressedDatagrams()
    for data in (
        b"\1\3abc",
        b"\0\3\0ab",
        b"\0\1\4",
    ):  # another capsule, contexts that nobody agreed on
        assert framing.find(bytearray(data), 0, len(data))[1:] == (len(data), None)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0",
        b"\0\1\2",
        b"\0\2\2\1",
        b"\0\3\2\2\0",
        b"\0\7\2\1\0\0\0\0\0",
        b"\0" + encode_varint(1 << 32),
        b"\0" + encode_varint(65775),
        b"\0" + encode_varint(8 + 65508) + b"\2\1" + bytes(6 + 65508),
    ],
)
def test_datagram_that_cannot_be_ends_the_stream(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        AddressedDatagrams().find(bytearray(data), 0, len(data))


def test_name_that_is_none_is_no_address() -> None:
    with pytest.raises(HostError):
        AddressedDatagrams().parse(b"\3\2..\0\1")


# -- the page for others


def test_example_of_the_manual_is_what_we_speak() -> None:
    """Every line "agent: hex" and "bridge: hex" of man/netproxy-tunnel.7, with its token and nonces."""
    lines = re.findall(r"^(agent|bridge): ([0-9a-f ]+)$", MANUAL.read_text(), re.MULTILINE)
    said = [(who, bytes.fromhex(text)) for who, text in lines]
    control = Hello(tunnel.CONTROL, "home", NONCE)
    work = Hello(tunnel.WORK, "home", OTHER, SESSION)
    service = Service("tcp", 8022)
    assert said == [
        ("agent", encode_hello(control)),
        ("bridge", tunnel.encode_challenge(OTHER)),
        ("agent", tunnel.agent_proof(TOKEN, control, OTHER)),
        (
            "bridge",
            tunnel.encode_welcome(
                Welcome(tunnel.bridge_proof(TOKEN, control, OTHER, SESSION), SESSION)
            ),
        ),
        ("agent", tunnel.encode_register([service], False)),
        ("bridge", tunnel.encode_registered([(service, tunnel.SERVED)])),
        ("bridge", tunnel.encode(tunnel.PING, bytes(range(8)))),
        ("agent", tunnel.encode(tunnel.PONG, bytes(range(8)))),
        ("agent", encode_hello(work)),
        ("bridge", tunnel.encode_challenge(NONCE)),
        ("agent", tunnel.agent_proof(TOKEN, work, NONCE)),
        (
            "bridge",
            tunnel.encode_welcome(
                Welcome(tunnel.bridge_proof(TOKEN, work, NONCE, SESSION), SESSION)
            ),
        ),
        ("bridge", encode_open(Opening("tcp", CLIENT, service))),
        ("agent", tunnel.encode_accept()),
    ]
