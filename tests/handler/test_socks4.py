"""SOCKS4 and SOCKS4a connections: what is dialled, and the exact bytes of the reply."""

from __future__ import annotations

import pytest

from netproxy.errors import LimitError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from tests.support.handlers import Conversation, HandlerDependencies, check_relay
from tests.support.sockets import SECONDS

TARGET = Address("192.0.2.1", 80)
CONNECT = b"\x04\x01\x00\x50\xc0\x00\x02\x01user\0"
REJECTED = b"\0\x5b\0\0\0\0\0\0"
USERS = {"alice": "secret"}


def connect_to_name(name: bytes, user: bytes = b"") -> bytes:
    """Return a SOCKS4a CONNECT to port 80 of a name."""
    return b"\x04\x01\x00\x50\0\0\0\1" + user + b"\0" + name + b"\0"


def granted(address: Address) -> bytes:
    return b"\0\x5a" + address.port.to_bytes(2, "big") + bytes(map(int, address.host.split(".")))


def check_rejected(dependencies: HandlerDependencies, request: bytes) -> None:
    with Conversation(dependencies.socks4()) as client:
        client.send(request)
        client.expect(REJECTED)
        client.expect_end()


def test_connect_is_granted_with_the_real_bound_address() -> None:
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks4()) as client:
        client.send(CONNECT)
        target = dependencies.dialer.target()
        client.expect(granted(Address(*target.getpeername())))
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


def test_request_that_comes_byte_by_byte_is_served() -> None:
    """Hazard 1."""
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks4()) as client:
        client.trickle(connect_to_name(b"example.com", b"user"))
        with dependencies.dialer.target() as target:
            client.expect(granted(Address(*target.getpeername())))
    assert dependencies.dialled == [Address("example.com", 80)]


@pytest.mark.parametrize(
    "name",
    [
        b"",
        b"a" * 64,
        b"a b",
        b"a\r\nb",
        b"a..b",
        b"a/b",
        b"a@b",
        b"b\xc3\xbccher.example",
        b".".join([b"a" * 63] * 4),
        b"1.2.3.4.5",
        b"256.1",
    ],
)
def test_invalid_name_is_rejected_and_not_dialled(name: bytes) -> None:
    """Hazard 10."""
    dependencies = HandlerDependencies()
    check_rejected(dependencies, connect_to_name(name))
    assert dependencies.untouched()


@pytest.mark.parametrize(
    "name", [b"127.1", b"0x7f.1", b"[::ffff:127.0.0.1]", b"::ffff:127.0.0.1", b"2130706433"]
)
def test_address_in_a_name_is_dialled_as_that_address(name: bytes) -> None:
    """Hazard 11."""
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks4()) as client:
        client.send(connect_to_name(name))
        dependencies.dialer.target().close()
    assert dependencies.dialled == [Address("127.0.0.1", 80)]
    assert dependencies.router.flows[0].target == Address("127.0.0.1", 80)


@pytest.mark.parametrize(
    "head", [b"\x04\x01\x00\x50\xc0\x00\x02\x01", b"\x04\x01\x00\x50\0\0\0\1\0"]
)
def test_string_without_its_nul_ends_the_connection_at_the_limit(head: bytes) -> None:
    """Hazard 12: no further byte comes, and the handler does not wait for it."""
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks4()) as client:
        client.send(head + b"a" * 1024)
        client.expect_closed()
        client.wait()
        assert isinstance(client.raised, LimitError)
    assert dependencies.untouched()


def test_user_id_of_255_bytes_is_read() -> None:
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks4()) as client:
        client.send(CONNECT[:8] + b"u" * 255 + b"\0")
        dependencies.dialer.target().close()
    assert dependencies.dialled == [TARGET]


def test_name_is_resolved_by_the_dialer() -> None:
    """Hazard 13."""
    dependencies = HandlerDependencies()
    with Conversation(dependencies.socks4()) as client:
        client.send(connect_to_name(b"Example.COM", b"user"))
        dependencies.dialer.target().close()
    assert dependencies.dialled == [Address("example.com", 80)]


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x04\x01\x00\x50\0\0\0\0\0", connect_to_name(b"0.0.0.0"), connect_to_name(b"0")],
)
def test_target_0_0_0_0_is_rejected(request_bytes: bytes) -> None:
    """Hazard 13."""
    dependencies = HandlerDependencies()
    check_rejected(dependencies, request_bytes)
    assert dependencies.untouched()


@pytest.mark.parametrize("reason", list(Reason))
def test_failed_dial_is_rejected_and_recorded(reason: Reason) -> None:
    """Hazard 14."""
    dependencies = HandlerDependencies(failure=reason)
    check_rejected(dependencies, CONNECT)
    assert dependencies.dialled == [TARGET]
    assert [record.ended for record in dependencies.log.records] == [reason.value]
    assert dependencies.counters.value("dial_failures", reason.value) == 1


def test_reply_comes_after_the_dial() -> None:
    """Hazard 15."""
    dependencies = HandlerDependencies()
    dependencies.dialer.gate.clear()
    with Conversation(dependencies.socks4()) as client:
        client.send(CONNECT)
        assert dependencies.dialer.asked.wait(SECONDS)
        assert client.silent()
        dependencies.dialer.gate.set()
        with dependencies.dialer.target() as target:
            client.expect(granted(Address(*target.getpeername())))


def test_data_behind_the_request_reaches_the_target_once_and_in_order() -> None:
    """Hazard 16."""
    dependencies = HandlerDependencies()
    data = bytes(range(256)) * 256
    with Conversation(dependencies.socks4()) as client:
        client.send(CONNECT + data[:1000])
        client.send(data[1000:])
        with dependencies.dialer.target() as target:
            client.read(8)
            client.close()
            with target.makefile("rb") as stream:
                assert stream.read() == data


@pytest.mark.parametrize("command", [0, 3, 255])
def test_unknown_command_is_rejected(command: int) -> None:
    dependencies = HandlerDependencies()
    check_rejected(dependencies, b"\x04" + bytes((command,)) + CONNECT[2:])
    assert dependencies.untouched()


def test_client_that_leaves_within_its_request_dials_nothing() -> None:
    for cut in range(len(CONNECT)):
        dependencies = HandlerDependencies()
        with Conversation(dependencies.socks4()) as client:
            client.send(CONNECT[:cut])
            client.close()
        assert dependencies.untouched()


def test_data_behind_a_rejected_request_does_not_hide_the_rejection() -> None:
    dependencies = HandlerDependencies(failure=Reason.REFUSED)
    check_rejected(dependencies, CONNECT + b"GET / HTTP/1.1\r\n\r\n" * 100)
    assert dependencies.dialled == [TARGET]


@pytest.mark.parametrize("auth, served", [("none", True), ("optional", True), ("required", False)])
def test_listener_that_requires_a_password_rejects_socks4(auth: str, served: bool) -> None:
    dependencies = HandlerDependencies(USERS, auth)
    if served:
        with Conversation(dependencies.socks4()) as client:
            client.send(CONNECT)
            dependencies.dialer.target().close()
        assert dependencies.router.flows[0].user == ""
    else:
        check_rejected(dependencies, CONNECT)
        check_rejected(dependencies, CONNECT.replace(b"user", b"alice"))
        assert dependencies.untouched()
