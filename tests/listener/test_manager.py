"""ListenerManager: binds all or none, one port number for a group, keeps sockets on a reload."""

from __future__ import annotations

from typing import Any, Callable, Sequence

import pytest

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import Address
from netproxy.listener.manager import PORT_TRIES, ListenerManager, ListenerSpec


class FakeListener:
    """Notes its life in `events`."""

    def __init__(self, network: str, address: Address, events: list[str]) -> None:
        self.network = network
        self.address = address
        self.handler: Any = None
        self._events = events

    def start(self, held: bool = False) -> None:
        assert self.handler, "started before it was configured"
        assert held, "it takes clients before the configuration is in force"
        self._events.append(f"start {self}")

    def begin(self) -> None:
        self._events.append(f"begin {self}")

    def halt(self) -> None:
        pass

    def stop(self) -> None:
        self._events.append(f"stop {self}")

    def __str__(self) -> str:
        return f"{self.network} {self.address.port}"


class Rig:
    """A manager of FakeListeners.

    `taken` are the (network, port) that cannot be bound; port 0 becomes the next of `free`.
    """

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

    def take_events(self) -> list[str]:
        """Return the events since the last call."""
        events, self.events[:] = list(self.events), []
        return events

    def live(self) -> list[str]:
        """Return the running listeners."""
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


class TestBind:
    def test_all_are_bound_before_any_is_started(self, rig: Rig) -> None:
        rig.replace([want("udp", 1), want("tcp", 1), want("tcp", 2)])
        assert rig.take_events() == [
            "bind udp 1",
            "bind tcp 1",
            "bind tcp 2",
            "start udp 1",
            "start tcp 1",
            "start tcp 2",
        ]
        assert rig.live() == ["udp 1", "tcp 1", "tcp 2"]

    def test_none_is_bound_if_one_cannot_be(self, rig: Rig) -> None:
        rig.taken = {("tcp", 3)}
        with pytest.raises(ListenError, match="tcp 127.0.0.1:3"):
            rig.replace([want("tcp", 1), want("udp", 2), want("tcp", 3), want("tcp", 4)])
        assert rig.take_events() == ["bind tcp 1", "bind udp 2", "stop udp 2", "stop tcp 1"]
        assert rig.live() == []

    def test_no_listener_at_all_is_allowed(self, rig: Rig) -> None:
        rig.replace([])
        assert rig.live() == []

    def test_same_address_twice_is_refused(self, rig: Rig) -> None:
        bind: Callable[[str, Address], FakeListener] = rig._bind

        def once(network: str, address: Address) -> FakeListener:
            listener = bind(network, address)
            rig.taken.add((network, address.port))
            return listener

        rig._bind = once  # type: ignore[method-assign]
        with pytest.raises(ListenError):
            rig.replace([want("tcp", 1, "a"), want("tcp", 1, "b")])
        assert rig.live() == []


class TestGroupPort:
    def test_group_has_the_port_the_kernel_chose(self, rig: Rig) -> None:
        rig.replace([want("udp", 0), want("tcp", 0)])
        assert rig.live() == ["udp 40001", "tcp 40001"]

    def test_group_tries_other_ports_if_one_is_busy_for_a_member(self, rig: Rig) -> None:
        rig.taken = {("tcp", 40001), ("tcp", 40002)}
        rig.replace([want("udp", 0), want("tcp", 0)])
        assert rig.live() == ["udp 40003", "tcp 40003"]
        assert rig.take_events()[:4] == [
            "bind udp 40001",
            "stop udp 40001",
            "bind udp 40002",
            "stop udp 40002",
        ]

    def test_group_gives_up_after_port_tries(self, rig: Rig) -> None:
        rig.taken = {("tcp", port) for port in range(40001, 41000)}
        with pytest.raises(ListenError):
            rig.replace([want("udp", 0), want("tcp", 0)])
        events = rig.take_events()
        assert events.count("bind udp 40001") == 1 and len(events) == 2 * PORT_TRIES
        assert rig.live() == []

    def test_two_groups_have_two_ports(self, rig: Rig) -> None:
        rig.replace(
            [want("udp", 0, "a"), want("udp", 0, "b"), want("tcp", 0, "a"), want("tcp", 0, "b")]
        )
        assert sorted(rig.live()) == ["tcp 40001", "tcp 40002", "udp 40001", "udp 40002"]

    def test_network_added_to_a_group_gets_the_port_of_the_kept_socket(self, rig: Rig) -> None:
        rig.replace([want("tcp", 0)])
        rig.replace([want("udp", 0), want("tcp", 0)])
        assert sorted(rig.live()) == ["tcp 40001", "udp 40001"]

    def test_configured_port_is_tried_once(self, rig: Rig) -> None:
        rig.taken = {("tcp", 5)}
        with pytest.raises(ListenError):
            rig.replace([want("udp", 5), want("tcp", 5)])
        assert rig.take_events() == ["bind udp 5", "stop udp 5"]


class TestCommit:
    def test_listeners_that_stay_keep_their_socket_and_get_the_new_handler(self, rig: Rig) -> None:
        rig.replace([want("udp", 1, "old"), want("tcp", 1, "old"), want("tcp", 2, "old")])
        kept = rig.manager.listeners
        rig.take_events()
        specs = [want("tcp", 2, "new"), want("udp", 1, "new"), want("tcp", 1, "new")]
        assert rig.replace(specs) == []
        assert rig.take_events() == []
        assert rig.manager.listeners == [kept[2], kept[0], kept[1]]
        assert {listener.handler for listener in kept} == {"new"}

    def test_new_listeners_start_before_old_ones_stop_in_reverse(self, rig: Rig) -> None:
        rig.replace([want("tcp", 1), want("tcp", 2), want("udp", 3)])
        rig.take_events()
        gone = rig.replace([want("tcp", 2), want("tcp", 4)])
        assert rig.take_events() == ["bind tcp 4", "start tcp 4", "stop udp 3", "stop tcp 1"]
        assert sorted(map(str, gone)) == ["tcp 1", "udp 3"]
        assert rig.live() == ["tcp 2", "tcp 4"]

    def test_same_address_on_another_network_is_another_listener(self, rig: Rig) -> None:
        rig.replace([want("tcp", 1)])
        rig.take_events()
        rig.replace([want("udp", 1)])
        assert rig.take_events() == ["bind udp 1", "start udp 1", "stop tcp 1"]

    def test_failed_bind_leaves_running_listeners_as_they_were(self, rig: Rig) -> None:
        rig.replace([want("tcp", 1, "old"), want("udp", 1, "old")])
        before = rig.manager.listeners
        rig.take_events()
        rig.taken = {("tcp", 9)}
        with pytest.raises(ListenError):
            rig.replace([want("tcp", 1, "new"), want("tcp", 8, "new"), want("tcp", 9, "new")])
        assert rig.take_events() == ["bind tcp 8", "stop tcp 8"]
        assert rig.manager.listeners == before
        assert {listener.handler for listener in before} == {"old"}

    def test_failed_start_leaves_running_listeners_as_they_were(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 94: can't start new thread."""
        rig.replace([want("tcp", 1, "old")])
        before = rig.manager.listeners
        rig.take_events()

        def fail(listener: FakeListener, held: bool) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(FakeListener, "start", fail)
        with pytest.raises(ListenError, match="can't start new thread"):
            rig.replace([want("tcp", 1, "new"), want("tcp", 8, "new")])
        assert rig.take_events() == ["bind tcp 8", "stop tcp 8"]
        assert rig.manager.listeners == before
        assert before[0].handler == "old"

    def test_same_address_twice_is_refused_on_a_reload(self, rig: Rig) -> None:
        rig.replace([want("tcp", 1, "a")])
        rig.taken = {("tcp", 1)}
        with pytest.raises(ListenError):
            rig.replace([want("tcp", 1, "a"), want("tcp", 1, "b")])
        assert rig.live() == ["tcp 1"]

    def test_two_groups_with_port_0_keep_their_sockets(self, rig: Rig) -> None:
        rig.replace([want("tcp", 0, "a"), want("tcp", 0, "b")])
        rig.take_events()
        rig.replace([want("tcp", 0, "a"), want("tcp", 0, "b")])
        assert rig.take_events() == []
        assert rig.live() == ["tcp 40001", "tcp 40002"]

    def test_empty_configuration_stops_all(self, rig: Rig) -> None:
        rig.replace([want("tcp", 1), want("udp", 1)])
        rig.take_events()
        assert len(rig.replace([])) == 2
        assert rig.take_events() == ["stop udp 1", "stop tcp 1"]


class TestTwoPhases:
    """What runs stays as it is from bind() until commit()."""

    def test_bind_starts_new_listeners_and_leaves_the_others(self, rig: Rig) -> None:
        rig.replace([want("tcp", 1, "old"), want("tcp", 2, "old")])
        before = rig.manager.listeners
        rig.take_events()
        bound = rig.manager.bind([want("tcp", 1, "new"), want("tcp", 3, "new")])
        assert rig.take_events() == ["bind tcp 3", "start tcp 3"]
        assert rig.manager.listeners == before
        assert [listener.handler for listener in before] == ["old", "old"]
        assert [listener.handler for listener in bound.fresh] == ["new"]
        assert [str(listener) for listener in bound.listeners] == ["tcp 1", "tcp 3"]
        bound.commit()
        assert rig.take_events() == ["stop tcp 2"]
        assert rig.live() == ["tcp 1", "tcp 3"]
        assert before[0].handler == "new"
        assert bound.gone == [before[1]]

    def test_discard_stops_new_listeners_alone_the_last_first(self, rig: Rig) -> None:
        rig.replace([want("tcp", 1, "old")])
        before = rig.manager.listeners
        rig.take_events()
        bound = rig.manager.bind([want("tcp", 1, "new"), want("tcp", 2, "new")])
        bound.discard()
        assert rig.take_events() == ["bind tcp 2", "start tcp 2", "stop tcp 2"]
        assert rig.manager.listeners == before
        assert before[0].handler == "old"

    def test_all_specs_know_their_listener_before_a_new_one_starts(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An ASSOCIATE may come at once, and needs the socket that the address keeps."""
        rig.replace([want("udp", 1)])
        specs = [want("tcp", 1), want("udp", 1)]
        attached: list[bool] = []

        def start(listener: FakeListener, held: bool) -> None:
            attached.append(all(spec.attached is not None for spec in specs))

        monkeypatch.setattr(FakeListener, "start", start)
        bound = rig.manager.bind(specs)
        assert attached == [True]
        assert [spec.attached for spec in specs] == bound.listeners


class TestStop:
    def test_last_listener_stops_first(self, rig: Rig) -> None:
        rig.replace([want("udp", 1), want("tcp", 1), want("tcp", 2)])
        rig.take_events()
        rig.manager.stop()
        assert rig.take_events() == ["stop tcp 2", "stop tcp 1", "stop udp 1"]
        assert rig.live() == []
        assert rig.manager.stop() == []

    def test_stop_of_one_network_leaves_the_other(self, rig: Rig) -> None:
        rig.replace([want("udp", 1), want("tcp", 1)])
        rig.take_events()
        assert [str(listener) for listener in rig.manager.stop(("tcp",))] == ["tcp 1"]
        assert rig.take_events() == ["stop tcp 1"]
        assert rig.live() == ["udp 1"]


def test_new_listeners_take_nothing_before_they_are_told_to_begin() -> None:
    rig = Rig()
    bound = rig.manager.bind([want("tcp", 1080)])
    bound.commit()
    assert not [event for event in rig.events if event.startswith("begin")]
    bound.begin()
    assert [event for event in rig.events if event.startswith("begin")] == ["begin tcp 1080"]
