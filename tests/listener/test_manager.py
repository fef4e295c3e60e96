"""The ListenerManager: binds all or none, one port number for a group, keeps sockets over a reload."""

from __future__ import annotations

from typing import Any, Callable, Sequence

import pytest

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import Address
from netproxy.listener.manager import PORT_TRIES, ListenerManager, ListenerSpec


class FakeListener:
    def __init__(self, network: str, address: Address, events: list[str]) -> None:
        self.network = network
        self.address = address
        self.handler: Any = None
        self._events = events

    def start(self) -> None:
        assert self.handler, "started before it was equipped"
        self._events.append(f"start {self}")

    def stop(self) -> None:
        self._events.append(f"stop {self}")

    def __str__(self) -> str:
        return f"{self.network} {self.address.port}"


class Rig:
    """`taken` are the (network, port) that cannot be bound; port 0 becomes the next of `free`."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.taken: set[tuple[str, int]] = set()
        self.free = iter(range(40001, 50000))
        self.manager: ListenerManager[FakeListener] = ListenerManager(
            {
                "tcp": lambda address: self._bind("tcp", address),
                "udp": lambda address: self._bind("udp", address),
            }
        )

    def _bind(self, network: str, address: Address) -> FakeListener:
        bound = address._replace(port=address.port or next(self.free))
        if (network, bound.port) in self.taken:
            raise ListenError(f"{network} {bound}: Address already in use")
        listener = FakeListener(network, bound, self.events)
        self.events.append(f"bind {listener}")
        return listener

    def replace(self, specs: Sequence[ListenerSpec]) -> list[FakeListener]:
        """Bind and commit; return the listeners that were stopped."""
        bound = self.manager.bind(specs)
        bound.commit()
        return bound.gone

    def did(self) -> list[str]:
        events, self.events[:] = list(self.events), []
        return events

    def live(self) -> list[str]:
        return [str(listener) for listener in self.manager.listeners]


class HandlerSpec(ListenerSpec):
    """Gives its listener a handler, which is a word here."""

    def __init__(self, network: str, address: Address, group: str, handler: str) -> None:
        super().__init__(network, address, group)
        self.handler = handler
        self.attached: FakeListener | None = None

    def attach(self, listener: FakeListener) -> None:
        self.attached = listener

    def configure(self, listener: FakeListener) -> None:
        listener.handler = self.handler


def want(network: str, port: int, handler: str = "handler", group: str = "") -> HandlerSpec:
    return HandlerSpec(network, Address("127.0.0.1", port), group or handler, handler)


@pytest.fixture
def rig() -> Rig:
    return Rig()


class TestStart:
    def test_binds_all_before_it_starts_any(self, rig: Rig) -> None:
        rig.replace([want("udp", 1), want("tcp", 1), want("tcp", 2)])
        assert rig.did() == [
            "bind udp 1",
            "bind tcp 1",
            "bind tcp 2",
            "start udp 1",
            "start tcp 1",
            "start tcp 2",
        ]
        assert rig.live() == ["udp 1", "tcp 1", "tcp 2"]

    def test_binds_none_when_one_cannot_be_bound(self, rig: Rig) -> None:
        rig.taken = {("tcp", 3)}
        with pytest.raises(ListenError, match="tcp 127.0.0.1:3"):
            rig.replace([want("tcp", 1), want("udp", 2), want("tcp", 3), want("tcp", 4)])
        assert rig.did() == ["bind tcp 1", "bind udp 2", "stop udp 2", "stop tcp 1"]
        assert rig.live() == []

    def test_nothing_is_fine(self, rig: Rig) -> None:
        rig.replace([])
        assert rig.live() == []

    def test_the_same_twice_cannot_be_bound(self, rig: Rig) -> None:
        bind: Callable[[str, Address], FakeListener] = rig._bind

        def once(network: str, address: Address) -> FakeListener:
            listener = bind(network, address)
            rig.taken.add((network, address.port))
            return listener

        rig._bind = once  # type: ignore[method-assign]
        with pytest.raises(ListenError):
            rig.replace([want("tcp", 1, "a"), want("tcp", 1, "b")])
        assert rig.live() == []


class TestOnePortForAGroup:
    def test_is_the_one_the_kernel_chose(self, rig: Rig) -> None:
        rig.replace([want("udp", 0), want("tcp", 0)])
        assert rig.live() == ["udp 40001", "tcp 40001"]

    def test_is_another_where_the_first_is_busy_for_the_second(self, rig: Rig) -> None:
        rig.taken = {("tcp", 40001), ("tcp", 40002)}
        rig.replace([want("udp", 0), want("tcp", 0)])
        assert rig.live() == ["udp 40003", "tcp 40003"]
        assert rig.did()[:4] == [
            "bind udp 40001",
            "stop udp 40001",
            "bind udp 40002",
            "stop udp 40002",
        ]

    def test_is_given_up_in_the_end(self, rig: Rig) -> None:
        rig.taken = {("tcp", port) for port in range(40001, 41000)}
        with pytest.raises(ListenError):
            rig.replace([want("udp", 0), want("tcp", 0)])
        events = rig.did()
        assert events.count("bind udp 40001") == 1 and len(events) == 2 * PORT_TRIES
        assert rig.live() == []

    def test_is_not_shared_by_groups(self, rig: Rig) -> None:
        rig.replace(
            [want("udp", 0, "a"), want("udp", 0, "b"), want("tcp", 0, "a"), want("tcp", 0, "b")]
        )
        assert sorted(rig.live()) == ["tcp 40001", "tcp 40002", "udp 40001", "udp 40002"]

    def test_is_that_of_the_socket_kept_when_a_reload_adds_a_network(self, rig: Rig) -> None:
        rig.replace([want("tcp", 0)])
        rig.replace([want("udp", 0), want("tcp", 0)])
        assert sorted(rig.live()) == ["tcp 40001", "udp 40001"]

    def test_a_port_that_was_named_is_not_tried_again(self, rig: Rig) -> None:
        rig.taken = {("tcp", 5)}
        with pytest.raises(ListenError):
            rig.replace([want("udp", 5), want("tcp", 5)])
        assert rig.did() == ["bind udp 5", "stop udp 5"]


class TestReplace:
    def test_keeps_the_sockets_that_stay_and_gives_them_their_new_handler(self, rig: Rig) -> None:
        rig.replace([want("udp", 1, "old"), want("tcp", 1, "old"), want("tcp", 2, "old")])
        kept = rig.manager.listeners
        rig.did()
        assert (
            rig.replace([want("tcp", 2, "new"), want("udp", 1, "new"), want("tcp", 1, "new")]) == []
        )
        assert rig.did() == []
        assert rig.manager.listeners == [kept[2], kept[0], kept[1]]
        assert {listener.handler for listener in kept} == {"new"}

    def test_starts_what_is_new_before_it_stops_what_is_gone_in_reverse(self, rig: Rig) -> None:
        rig.replace([want("tcp", 1), want("tcp", 2), want("udp", 3)])
        rig.did()
        gone = rig.replace([want("tcp", 2), want("tcp", 4)])
        assert rig.did() == ["bind tcp 4", "start tcp 4", "stop udp 3", "stop tcp 1"]
        assert sorted(map(str, gone)) == ["tcp 1", "udp 3"]
        assert rig.live() == ["tcp 2", "tcp 4"]

    def test_the_network_is_part_of_what_stays(self, rig: Rig) -> None:
        rig.replace([want("tcp", 1)])
        rig.did()
        rig.replace([want("udp", 1)])
        assert rig.did() == ["bind udp 1", "start udp 1", "stop tcp 1"]

    def test_changes_nothing_when_one_cannot_be_bound(self, rig: Rig) -> None:
        rig.replace([want("tcp", 1, "old"), want("udp", 1, "old")])
        before = rig.manager.listeners
        rig.did()
        rig.taken = {("tcp", 9)}
        with pytest.raises(ListenError):
            rig.replace([want("tcp", 1, "new"), want("tcp", 8, "new"), want("tcp", 9, "new")])
        assert rig.did() == ["bind tcp 8", "stop tcp 8"]
        assert rig.manager.listeners == before
        assert {listener.handler for listener in before} == {"old"}

    def test_changes_nothing_when_one_cannot_be_started(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 94: can't start new thread."""
        rig.replace([want("tcp", 1, "old")])
        before = rig.manager.listeners
        rig.did()

        def fail(listener: FakeListener) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(FakeListener, "start", fail)
        with pytest.raises(ListenError, match="can't start new thread"):
            rig.replace([want("tcp", 1, "new"), want("tcp", 8, "new")])
        assert rig.did() == ["bind tcp 8", "stop tcp 8"]
        assert rig.manager.listeners == before
        assert before[0].handler == "old"

    def test_the_same_twice_is_refused_as_at_the_start(self, rig: Rig) -> None:
        rig.replace([want("tcp", 1, "a")])
        rig.taken = {("tcp", 1)}
        with pytest.raises(ListenError):
            rig.replace([want("tcp", 1, "a"), want("tcp", 1, "b")])
        assert rig.live() == ["tcp 1"]

    def test_keeps_both_of_two_that_had_any_port(self, rig: Rig) -> None:
        rig.replace([want("tcp", 0, "a"), want("tcp", 0, "b")])
        rig.did()
        rig.replace([want("tcp", 0, "a"), want("tcp", 0, "b")])
        assert rig.did() == []
        assert rig.live() == ["tcp 40001", "tcp 40002"]

    def test_with_nothing_stops_all(self, rig: Rig) -> None:
        rig.replace([want("tcp", 1), want("udp", 1)])
        rig.did()
        assert len(rig.replace([])) == 2
        assert rig.did() == ["stop udp 1", "stop tcp 1"]


class TestStop:
    def test_the_last_first(self, rig: Rig) -> None:
        rig.replace([want("udp", 1), want("tcp", 1), want("tcp", 2)])
        rig.did()
        rig.manager.stop()
        assert rig.did() == ["stop tcp 2", "stop tcp 1", "stop udp 1"]
        assert rig.live() == []
        assert rig.manager.stop() == []

    def test_of_one_network_leaves_the_other(self, rig: Rig) -> None:
        rig.replace([want("udp", 1), want("tcp", 1)])
        rig.did()
        assert [str(listener) for listener in rig.manager.stop(("tcp",))] == ["tcp 1"]
        assert rig.did() == ["stop tcp 1"]
        assert rig.live() == ["udp 1"]
