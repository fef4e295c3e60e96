"""Connections and datagrams that rules of the kernel lead here."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from netproxy.handler.transparent import replies
from netproxy.handler.transparent.loops import OwnConnections
from netproxy.handler.transparent.replies import ReplySockets
from netproxy.handler.transparent.tcp import TransparentTcp
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Run
from netproxy.net.datagram import PinnedHeader
from netproxy.observe.metrics import Counters
from tests.support.handlers import Conversation, HandlerDependencies, RecordingLog, check_relay

CLIENT, TARGET = Address("192.0.2.1", 1000), Address("198.51.100.1", 80)


class TestOwnConnections:
    """Hazard 150."""

    def test_connection_that_we_have_made_is_known_when_it_arrives(self) -> None:
        own = OwnConnections()
        assert not own.dials(CLIENT, TARGET)
        assert not own.arrives(CLIENT, TARGET)
        assert own.arrives(CLIENT, TARGET._replace(port=81))
        own.ends(CLIENT, TARGET)
        assert own.arrives(CLIENT, TARGET)

    def test_connection_that_has_arrived_before_is_known_when_it_is_made(self) -> None:
        own = OwnConnections()
        assert own.arrives(CLIENT, TARGET)
        assert own.dials(CLIENT, TARGET)
        own.leaves(CLIENT, TARGET)
        assert not own.dials(CLIENT, TARGET)


class TestTcp:
    def handler(self, dependencies: HandlerDependencies, target: Any, own: bool) -> TransparentTcp:
        return TransparentTcp(
            target,
            dependencies.outbound,
            dependencies.permission,
            lambda network, address: own,
            dependencies.counters,
        )

    def test_target_is_dialled_and_relayed(self) -> None:
        dependencies = HandlerDependencies()
        handler = self.handler(dependencies, lambda stream: TARGET, False)
        with Conversation(handler) as client:
            check_relay(client, dependencies.dialer.target())
        assert dependencies.dialled == [TARGET]

    def test_own_address_is_refused_and_not_dialled(self) -> None:
        """Hazard 149."""
        dependencies = HandlerDependencies()
        with Conversation(self.handler(dependencies, lambda stream: TARGET, True)) as client:
            client.expect_closed()
        assert refused(dependencies) == {"not redirected": 1}
        assert dependencies.untouched()

    def test_connection_that_is_not_tracked_is_refused(self) -> None:
        """Hazard 149."""

        def unknown(stream: object) -> Address:
            raise OSError(errno.ENOENT, "not tracked")

        dependencies = HandlerDependencies()
        with Conversation(self.handler(dependencies, unknown, False)) as client:
            client.expect_closed()
        assert refused(dependencies) == {"not redirected": 1}


def refused(dependencies: HandlerDependencies) -> dict[str, int]:
    """Return the counters of refused requests."""
    return {
        reason: value
        for name, reason, value in dependencies.counters.items()
        if name == "requests_refused"
    }


class FakeSocket:
    def __init__(self, address: Address) -> None:
        self.address, self.closed = address, False
        self.sent: list[tuple[Any, Any]] = []

    def destination(self, target: Address) -> object:
        if ":" in target.host and ":" not in self.address.host:
            raise ValueError
        return target

    def send(self, arena: object, run: Run, destination: object) -> None:
        self.sent.append((run.header, destination))

    def close(self) -> None:
        self.closed = True


class FakeFactory:
    def __init__(self) -> None:
        self.opened: list[FakeSocket] = []
        self.failure: OSError | None = None

    def foreign(self, address: Address) -> FakeSocket:
        if self.failure:
            raise self.failure
        self.opened.append(FakeSocket(address))
        return self.opened[-1]


class TestReplies:
    """Hazard 151."""

    def setup_method(self) -> None:
        self.factory, self.counters = FakeFactory(), Counters()
        self.log = RecordingLog()
        self.sockets = ReplySockets(self.factory, self.counters, self.log)  # type: ignore[arg-type]

    def send(self, source: Address, client: Address = CLIENT) -> None:
        header = PinnedHeader(self.sockets.header(source))
        run = Run([0], 3, 3, header if header.data else None)
        self.sockets.of(client).send(None, run, None)  # type: ignore[arg-type]

    def drops(self) -> dict[str, int]:
        return {reason: value for name, reason, value in self.counters.items() if name == "drops"}

    def test_replies_of_one_source_share_a_socket_and_have_no_header(self) -> None:
        self.send(TARGET)
        self.send(TARGET, Address("192.0.2.2", 7))
        (sock,) = self.factory.opened
        assert sock.address == TARGET
        assert sock.sent == [(None, CLIENT), (None, Address("192.0.2.2", 7))]

    @pytest.mark.parametrize(
        "source",
        [
            *(
                Address(host, 53)
                for host in ("127.0.0.1", "0.0.0.0", "224.0.0.1", "::1", "ff02::1")
            ),
            *(Address("a.example", 53), Address("198.51.100.1", 0), Address("", 53)),
        ],
    )
    def test_source_that_no_other_machine_has_is_dropped_and_counted(self, source: Address) -> None:
        self.send(source)
        assert (self.factory.opened, self.drops()) == ([], {"unusable source": 1})

    def test_source_of_the_other_family_is_dropped(self) -> None:
        self.send(TARGET, Address("2001:db8::1", 5))
        assert self.drops() == {"unusable source": 1}

    def test_idle_socket_is_closed_a_look_after_it_was_taken_out(self) -> None:
        self.sockets.expire(100.0)
        self.send(TARGET)
        assert self.sockets.expire(101.0) == []
        assert self.sockets.expire(101.0 + replies.IDLE_SECONDS) == []
        assert len(self.sockets) == 0
        for close in self.sockets.expire(140.0):
            close()
        assert self.factory.opened[0].closed

    def test_used_socket_is_kept(self) -> None:
        for now in (1.0, 40.0, 80.0):
            self.send(TARGET)
            self.sockets.expire(now)
        assert (len(self.sockets), len(self.factory.opened)) == (1, 1)

    def test_sockets_are_bounded_and_the_oldest_gives_way(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(replies, "LIMIT", 4)
        monkeypatch.setattr(replies, "GONE_LIMIT", 3)
        for port in range(1, 11):
            self.send(TARGET._replace(port=port))
        assert [sock.address.port for sock in self.factory.opened] == [1, 2, 3, 4, 5, 6, 7]
        assert self.drops() == {"no reply socket": 3}
        for close in self.sockets.expire(1.0):
            close()
        assert [sock.address.port for sock in self.factory.opened if sock.closed] == [1, 2, 3]
        self.send(TARGET._replace(port=10))
        assert len(self.sockets) == 4

    def test_address_that_cannot_be_bound_is_logged_and_not_tried_again_at_once(self) -> None:
        self.factory.failure = PermissionError(errno.EACCES, "Permission denied")
        for _ in range(3):
            self.send(TARGET)
        self.factory.failure = None
        self.send(TARGET)
        assert self.drops() == {"no reply socket": 4}
        self.sockets.expire(1.0)
        self.send(TARGET)
        assert len(self.sockets) == 1

    def test_close_closes_all_and_opens_none_any_more(self) -> None:
        self.send(TARGET)
        self.sockets.close()
        self.send(TARGET._replace(port=9))
        assert [sock.closed for sock in self.factory.opened] == [True]
