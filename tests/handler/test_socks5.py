"""SOCKS5 connections up to their dial: methods, credentials, requests, and the exact replies."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from netproxy.errors import EndOfStream, LoginUnavailable, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from tests.support.handlers import (
    LOCALHOST,
    SECONDS,
    Conversation,
    HandlerDependencies,
    check_relay,
)
from tests.support.relays import SPS, running
from tests.support.sockets import black_hole, refusing

HELLO, ANONYMOUS = b"\5\1\0", b"\5\0"
HELLO_PASSWORD, PASSWORD = b"\5\1\2", b"\5\2"
NO_METHOD = b"\5\xff"
TARGET = Address("192.0.2.1", 80)
CONNECT = b"\5\1\0\1\xc0\0\2\1\0\x50"
USERS = {"alice": "secret", "u" * 255: "p" * 255}
ALICE, ACCEPTED, FAILED = b"\1\5alice\6secret", b"\1\0", b"\1\1"


def connect_to_name(name: bytes) -> bytes:
    return b"\5\1\0\3" + bytes((len(name),)) + name + b"\0\x50"


def refusal(reply: int) -> bytes:
    return b"\5" + bytes((reply,)) + b"\0\1\0\0\0\0\0\0"


def success(address: Address) -> bytes:
    return b"\5\0\0\1" + bytes(map(int, address.host.split("."))) + address.port.to_bytes(2, "big")


def check_refused(dependencies: HandlerDependencies, sent: bytes, answer: bytes) -> None:
    """Check that a client that sends all at once reads exactly `answer`, then the end."""
    with Conversation(dependencies.socks5()) as client:
        client.send(sent)
        client.expect(answer)
        client.expect_end()


def test_connect_succeeds_with_the_real_bound_address() -> None:
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks5()) as client:
        client.send(HELLO)
        client.expect(ANONYMOUS)
        client.send(CONNECT)
        target = dependencies.dialer.target()
        client.expect(success(Address(*target.getpeername())))
        check_relay(client, target)
    assert dependencies.dialled == [TARGET]
    flow = dependencies.router.flows[0]
    assert flow == Flow("tcp", client.local, TARGET, "test", "")
    record = dependencies.log.records[0]
    assert (record.flow, record.upstream, record.sent, record.received, record.ended) == (
        flow,
        "recording",
        2,
        8,
        "closed",
    )


def test_handshake_that_comes_byte_by_byte_is_served() -> None:
    """Hazard 1."""
    dependencies = HandlerDependencies(USERS, "required")
    with Conversation(dependencies.socks5()) as client:
        client.trickle(HELLO_PASSWORD)
        client.expect(PASSWORD)
        client.trickle(ALICE)
        client.expect(ACCEPTED)
        client.trickle(connect_to_name(b"example.com"))
        with dependencies.dialer.target() as target:
            client.expect(success(Address(*target.getpeername())))
    assert dependencies.dialled == [Address("example.com", 80)]


@pytest.mark.parametrize("auth", ["none", "optional", "required"])
@pytest.mark.parametrize("methods", [b"", b"\1", b"\3\x80\xfe", b"\xff"])
def test_greeting_without_an_acceptable_method_is_refused_with_ff(
    auth: str, methods: bytes
) -> None:
    """Hazard 3."""
    dependencies = HandlerDependencies(USERS, auth)
    check_refused(dependencies, b"\5" + bytes((len(methods),)) + methods + CONNECT, NO_METHOD)
    assert dependencies.untouched()


@pytest.mark.parametrize(
    "auth, methods, chosen",
    [
        ("none", b"\0", 0),
        ("none", b"\2", 0xFF),
        ("none", b"\0\2", 0),
        ("none", b"\2\0", 0),
        ("optional", b"\0", 0),
        ("optional", b"\2", 2),
        ("optional", b"\0\2", 2),
        ("optional", b"\2\1", 2),
        ("required", b"\0", 0xFF),
        ("required", b"\2", 2),
        ("required", b"\0\2", 2),
        ("required", b"\0\1", 0xFF),
        ("required", bytes(range(255)), 2),
        ("none", bytes(range(255)), 0),
    ],
)
def test_only_an_offered_method_is_selected(auth: str, methods: bytes, chosen: int) -> None:
    """Hazard 4."""
    dependencies = HandlerDependencies(USERS, auth)
    with Conversation(dependencies.socks5()) as client:
        client.send(b"\5" + bytes((len(methods),)) + methods)
        client.expect(b"\5" + bytes((chosen,)))
        if chosen == 0xFF:
            client.expect_end()
    assert dependencies.untouched()


@pytest.mark.parametrize(
    "hello, answer",
    [(HELLO, NO_METHOD), (HELLO_PASSWORD, PASSWORD + FAILED), (b"\5\2\0\2", PASSWORD + FAILED)],
)
def test_request_behind_the_greeting_is_not_served_without_login(
    hello: bytes, answer: bytes
) -> None:
    """Hazard 5."""
    dependencies = HandlerDependencies(USERS, "required")
    check_refused(dependencies, hello + CONNECT, answer)
    assert dependencies.untouched()


def test_request_behind_good_credentials_is_served() -> None:
    dependencies = HandlerDependencies(USERS, "required")
    with Conversation(dependencies.socks5()) as client:
        client.send(HELLO_PASSWORD + ALICE + CONNECT)
        client.expect(PASSWORD + ACCEPTED)
        with dependencies.dialer.target() as target:
            client.expect(success(Address(*target.getpeername())))
    assert dependencies.router.flows[0].user == "alice"


@pytest.mark.parametrize(
    "credentials",
    [b"\5\5alice\6secret", b"\0\5alice\6secret", b"\1\0\6secret", b"\1\5alice\0", b"\1\0\0"],
    ids=["version 5", "version 0", "no user", "no password", "neither"],
)
def test_invalid_credentials_fail(credentials: bytes) -> None:
    """Hazard 6."""
    dependencies = HandlerDependencies({**USERS, "x": "secret"}, "required")
    check_refused(dependencies, HELLO_PASSWORD + credentials, PASSWORD + FAILED)
    assert dependencies.untouched()


def test_credentials_of_255_bytes_each_work() -> None:
    """Hazard 6."""
    dependencies = HandlerDependencies(USERS, "required")
    with Conversation(dependencies.socks5()) as client:
        client.send(HELLO_PASSWORD + b"\1\xff" + b"u" * 255 + b"\xff" + b"p" * 255 + CONNECT)
        client.expect(PASSWORD + ACCEPTED)
        dependencies.dialer.target().close()
    assert dependencies.router.flows[0].user == "u" * 255


@pytest.mark.parametrize(
    "credentials",
    [
        b"\1\5alice\5wrong",
        b"\1\5mallo\6secret",
        b"\1\5Alice\6secret",
        b"\1\5alice\7secret ",
        b"\1\5alice\6secre\0",
        b"\1\2\xff\xfe\6secret",
    ],
)
@pytest.mark.parametrize("auth", ["optional", "required"])
def test_wrong_password_ends_the_connection(auth: str, credentials: bytes) -> None:
    """Hazard 7."""
    dependencies = HandlerDependencies(USERS, auth)
    check_refused(dependencies, HELLO_PASSWORD + credentials + ALICE + CONNECT, PASSWORD + FAILED)
    assert dependencies.untouched()
    assert dependencies.counters.value("authentication", "refused") == 1


def test_login_that_cannot_be_checked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 145."""
    dependencies = HandlerDependencies(USERS, "required")
    monkeypatch.setattr(dependencies.login, "check", unavailable)
    credentials = b"\1\5alice\6secret"
    check_refused(dependencies, HELLO_PASSWORD + credentials + CONNECT, PASSWORD + FAILED)
    assert dependencies.untouched()
    assert not dependencies.log.lines


def unavailable(*_: object) -> str:
    raise LoginUnavailable("no memory to check the password")


def test_login_is_valid_for_its_connection_only() -> None:
    """Hazard 8."""
    dependencies = HandlerDependencies(USERS, "required")
    handler = dependencies.socks5()
    with Conversation(handler) as good:
        good.send(HELLO_PASSWORD + ALICE + CONNECT)
        good.expect(PASSWORD + ACCEPTED)
        with dependencies.dialer.target():
            for sent, answer in (
                (HELLO_PASSWORD + b"\1\5alice\5wrong", PASSWORD + FAILED),
                (HELLO + CONNECT, NO_METHOD),
            ):
                with Conversation(handler) as bad:
                    bad.send(sent)
                    bad.expect(answer)
                    bad.expect_end()
    assert dependencies.dialled == [TARGET]


@pytest.mark.parametrize("command", [0, 4, 0x80, 255])
def test_unknown_command_is_refused_with_07(command: int) -> None:
    """Hazard 9."""
    dependencies = HandlerDependencies()
    check_refused(
        dependencies, HELLO + b"\5" + bytes((command,)) + CONNECT[2:], ANONYMOUS + refusal(7)
    )
    assert dependencies.untouched()


def test_associate_without_udp_is_refused_with_07() -> None:
    dependencies = HandlerDependencies()
    check_refused(dependencies, HELLO + b"\5\3\0\1\0\0\0\0\0\0", ANONYMOUS + refusal(7))


@pytest.mark.parametrize("address_type", [0, 2, 5, 255])
def test_unknown_address_type_is_refused_with_08(address_type: int) -> None:
    """Hazard 9."""
    dependencies = HandlerDependencies()
    check_refused(dependencies, HELLO + b"\5\1\0" + bytes((address_type,)), ANONYMOUS + refusal(8))
    check_refused(
        dependencies,
        HELLO + b"\5\1\0" + bytes((address_type,)) + b"\x0bexample.com\0\x50",
        ANONYMOUS + refusal(8),
    )
    assert dependencies.untouched()


def test_reserved_byte_that_is_not_0_is_accepted() -> None:
    """Hazard 9."""
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks5()) as client:
        client.send(HELLO + b"\5\1\xff" + CONNECT[3:])
        with dependencies.dialer.target() as target:
            client.expect(ANONYMOUS + success(Address(*target.getpeername())))
    assert dependencies.dialled == [TARGET]


@pytest.mark.parametrize(
    "name",
    [
        b"",
        b".".join([b"a" * 63] * 4),
        b"a" * 255,
        b"a\0b",
        b"a\r\nHost: b",
        b"a b",
        b"a..b",
        b".a",
        b"a" * 64 + b".b",
        b"b\xc3\xbccher",
        b"\xff",
        b"a/b",
        b"user@b",
        b"a#b",
        b"a?b",
        b"a\\b",
        b"[::1",
        b"[name]",
        b"1.2.3.4.5",
        b"256.1",
    ],
)
def test_invalid_name_is_refused_with_04_and_not_dialled(name: bytes) -> None:
    """Hazard 10."""
    dependencies = HandlerDependencies()
    check_refused(dependencies, HELLO + connect_to_name(name), ANONYMOUS + refusal(4))
    assert dependencies.untouched()


@pytest.mark.parametrize(
    "name, host",
    [
        (b"127.1", "127.0.0.1"),
        (b"0x7f.1", "127.0.0.1"),
        (b"2130706433", "127.0.0.1"),
        (b"0177.0.0.1", "127.0.0.1"),
        (b"127.0.0.1.", "127.0.0.1"),
        (b"::ffff:127.0.0.1", "127.0.0.1"),
        (b"::FFFF:7f00:1", "127.0.0.1"),
        (b"[::1]", "::1"),
        (b"0:0::1", "::1"),
    ],
)
def test_address_in_a_name_is_routed_and_dialled_as_that_address(name: bytes, host: str) -> None:
    """Hazard 11."""
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks5()) as client:
        client.send(HELLO + connect_to_name(name))
        dependencies.dialer.target().close()
    assert dependencies.dialled == [Address(host, 80)]
    assert dependencies.router.flows[0].target == Address(host, 80)


def test_v4_mapped_address_is_dialled_as_ipv4() -> None:
    """Hazard 11."""
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks5()) as client:
        client.send(HELLO + b"\5\1\0\4" + b"\0" * 10 + b"\xff\xff\x7f\0\0\1" + b"\0\x50")
        dependencies.dialer.target().close()
    assert dependencies.dialled == [Address("127.0.0.1", 80)]


@pytest.mark.parametrize(
    "reason, reply",
    [
        (Reason.REFUSED, 5),
        (Reason.TIMEOUT, 6),
        (Reason.NETWORK_UNREACHABLE, 3),
        (Reason.HOST_UNREACHABLE, 4),
        (Reason.NAME, 4),
        (Reason.DENIED, 2),
        (Reason.UNSUPPORTED, 7),
        (Reason.GENERAL, 1),
        (Reason.AUTHENTICATION, 1),
        (Reason.PROTOCOL, 1),
        (Reason.LOOP, 2),
    ],
)
def test_reply_tells_why_the_dial_failed(reason: Reason, reply: int) -> None:
    """Hazard 14."""
    dependencies = HandlerDependencies(failure=reason)
    check_refused(dependencies, HELLO + CONNECT, ANONYMOUS + refusal(reply))
    assert dependencies.dialled == [TARGET]
    assert [record.ended for record in dependencies.log.records] == [reason.value]
    assert dependencies.counters.value("dial_failures", reason.value) == 1


def test_reply_comes_after_the_dial() -> None:
    """Hazard 15."""
    dependencies = HandlerDependencies()
    dependencies.dialer.gate.clear()
    with Conversation(dependencies.socks5()) as client:
        client.send(HELLO + CONNECT)
        client.expect(ANONYMOUS)
        assert dependencies.dialer.asked.wait(SECONDS)
        assert client.silent()
        dependencies.dialer.gate.set()
        with dependencies.dialer.target() as target:
            client.expect(success(Address(*target.getpeername())))


@pytest.mark.parametrize("ahead", [1, 1000, 40000])
def test_data_behind_the_request_reaches_the_target_once_and_in_order(ahead: int) -> None:
    """Hazard 16."""
    dependencies = HandlerDependencies()
    data = bytes(range(251)) * 400
    with Conversation(dependencies.socks5()) as client:
        client.send(HELLO + CONNECT + data[:ahead])
        client.send(data[ahead:])
        with dependencies.dialer.target() as target:
            client.read(12)
            client.close()
            with target.makefile("rb") as stream:
                assert stream.read() == data


def test_data_behind_a_refused_request_does_not_hide_the_refusal() -> None:
    dependencies = HandlerDependencies(failure=Reason.REFUSED)
    check_refused(dependencies, HELLO + CONNECT + b"x" * 50000, ANONYMOUS + refusal(5))


def test_client_that_leaves_within_its_handshake_dials_nothing() -> None:
    whole = HELLO_PASSWORD + ALICE + CONNECT
    for cut in range(len(whole)):
        dependencies = HandlerDependencies(USERS, "required")
        with Conversation(dependencies.socks5()) as client:
            client.send(whole[:cut])
            client.socket.shutdown(socket.SHUT_WR)
            client.wait()
            assert isinstance(client.raised, EndOfStream)
        assert dependencies.untouched()


@pytest.mark.parametrize("greeting", [b"\4\1\0\0", b"\x06\1\0"])
def test_other_version_is_closed_without_an_answer(greeting: bytes) -> None:
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks5()) as client:
        client.send(greeting)
        client.expect_closed()
    assert dependencies.untouched()


def test_other_version_in_the_request_is_closed_without_a_dial() -> None:
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks5()) as client:
        client.send(HELLO + b"\4" + CONNECT[1:])
        client.expect(ANONYMOUS)
        client.expect_closed()
    assert dependencies.untouched()


def test_client_that_leaves_during_the_dial_leaves_nothing_open() -> None:
    dependencies = HandlerDependencies()
    dependencies.dialer.gate.clear()
    with Conversation(dependencies.socks5()) as client:
        client.send(HELLO + CONNECT)
        client.expect(ANONYMOUS)
        assert dependencies.dialer.asked.wait(SECONDS)
        client.close()
        dependencies.dialer.gate.set()
        with dependencies.dialer.target() as target:
            assert target.recv(1) == b""
    assert len(dependencies.log.records) == 1


def test_reply_has_the_address_of_the_upstream_socket_in_its_family() -> None:
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks5(), "::1", "::1") as client:
        client.send(HELLO + CONNECT)
        with dependencies.dialer.target() as target:
            client.expect(ANONYMOUS + success(Address(*target.getpeername())))
    assert dependencies.router.flows[0].client.host == "::1"


# -- a whole daemon, with its own dialers


@pytest.mark.parametrize(
    "case, reply",
    [("refused", 5), ("timeout", 6), ("unreachable", 3), ("name", 4), ("rules", 2), ("port 0", 5)],
)
def test_failed_dial_of_a_daemon_has_its_reply(
    case: str, reply: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 14."""
    text = SPS + "\ntimeouts: {connect: 200ms}" + ("\ndefault: block" if case == "rules" else "")
    with running(text) as relay, ExitStack() as stack:
        ask = {
            "refused": lambda: connect_to(stack.enter_context(refusing())),
            "port 0": lambda: connect_to(Address(LOCALHOST, 0)),
            "timeout": lambda: connect_to(stack.enter_context(black_hole())),
            "rules": lambda: CONNECT,
            "unreachable": lambda: b"\5\1\0\1\xff\xff\xff\xff\0\x50",
            "name": lambda: connect_to_name(b"nowhere.example"),
        }[case]()
        client = stack.enter_context(socket.create_connection((LOCALHOST, relay.port), SECONDS))
        monkeypatch.setattr("socket.getaddrinfo", no_such_name)
        client.sendall(HELLO + ask)
        with client.makefile("rb") as stream:
            assert stream.read() == ANONYMOUS + refusal(reply)
        monkeypatch.undo()


def connect_to(address: Address) -> bytes:
    return b"\5\1\0" + success(address)[3:]


def no_such_name(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
