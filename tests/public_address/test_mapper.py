"""Port mappings: asked for, renewed, lost by the router, refused and released."""

from __future__ import annotations

from typing import Callable

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.protocol.port_mapping import nat_pmp, pcp
from netproxy.public_address.dialects import Port
from netproxy.public_address.mapper import POLL_SECONDS, MapperDependencies, PortMapper
from netproxy.public_address.mapping import (
    LIFETIME,
    REFUSED_FLOOR,
    RETRY_LIMIT,
    RETRY_SECONDS,
    WantedPort,
)
from tests.support.doubles import Counts
from tests.support.handlers import RecordingLog
from tests.support.router import OUTSIDE, Router

TCP, UDP, OTHER = Port("tcp", 1080), Port("udp", 1080), Port("tcp", 2080)
KEY = b"key"
AT = "192.168.1.1"


class Follower:
    """Notes the external addresses that it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Port, Address | None]] = []

    def mapped(self, port: Port, external: Address | None) -> None:
        self.told.append((port, external))


class Rig:
    """A mapper, the router that it asks, and the time."""

    def __init__(self, protocol: str = "pcp", *ports: Port) -> None:
        self.router, self.gateway = Router(), AT
        self.log, self.counts, self.follower = RecordingLog(), Counts(), Follower()
        self.now = 1000.0
        self.tasks: list[Callable[[], None]] = []
        self.is_full = False
        self.mapper = PortMapper("", protocol, self._dependencies())
        self.want(*(ports or (TCP, UDP)))

    def _dependencies(self) -> MapperDependencies:
        return MapperDependencies(
            lambda: self.gateway, self.router.connect, self._submit, KEY, self.log, self.counts
        )

    def _submit(self, task: Callable[[], None]) -> bool:
        if not self.is_full:
            self.tasks.append(task)
        return not self.is_full

    def want(self, *ports: Port) -> None:
        self.mapper.want([WantedPort(port, "main", self.follower) for port in ports])
        self.follower.told.clear()

    def pass_time(self, seconds: float) -> None:
        """Let so many seconds pass, for the router too, and ask what is due then."""
        self.now += seconds
        self.router.epoch += int(seconds)
        self.mapper.expire(self.now)
        for _ in self.tasks:
            self.mapper.ask(self.now)
            self.mapper._is_busy = False
        self.tasks.clear()

    def told(self) -> list[tuple[Port, Address | None]]:
        told, self.follower.told = self.follower.told, []
        return told

    def external(self) -> dict[Port, Address | None]:
        return {state.port: state.external for state in self.mapper.states(self.now)}


@pytest.fixture(params=["pcp", "nat-pmp"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


def outside(port: int = 1080) -> Address:
    return Address(OUTSIDE, port)


def test_ports_are_mapped_at_once(rig: Rig) -> None:
    rig.pass_time(0)
    assert rig.router.mappings == {TCP: 1080, UDP: 1080}
    assert rig.told() == [(TCP, outside()), (UDP, outside())]
    assert rig.counts.counts == {("port_mappings", "granted"): 2}
    name = rig.mapper.states(rig.now)[0].how.partition(",")[0]
    assert rig.log.lines == [
        f"listener 'main': {port} is mapped to {OUTSIDE}:1080 ({name}, router {AT})"
        for port in ("tcp port 1080", "udp port 1080")
    ]


def test_external_port_may_be_another_one(rig: Rig) -> None:
    rig.router.shift = 100
    rig.pass_time(0)
    assert rig.told() == [(TCP, outside(1180)), (UDP, outside(1180))]


def test_mapping_is_renewed_at_half_of_its_lifetime_with_the_same_external_port(rig: Rig) -> None:
    rig.router.shift = 100
    rig.pass_time(0)
    rig.told()
    rig.router.requests.clear()
    rig.pass_time(LIFETIME / 2 - 1)
    assert [state.left for state in rig.mapper.states(rig.now)] == [LIFETIME / 2 + 1] * 2
    asked = [request for request in rig.router.requests if _external_port(request)]
    assert asked == []
    rig.pass_time(1)
    asked = [_external_port(request) for request in rig.router.requests]
    assert [port for port in asked if port] == [1180, 1180]
    assert [state.left for state in rig.mapper.states(rig.now)] == [LIFETIME] * 2
    assert rig.told() == []


def _external_port(request: object) -> int:
    if isinstance(request, pcp.Request) and request.mapping is not None:
        return request.mapping.external.port
    return request.external_port if isinstance(request, nat_pmp.MapRequest) else 0


def test_router_decides_the_lifetime(rig: Rig) -> None:
    rig.router.lifetime = 120
    rig.pass_time(0)
    assert [state.left for state in rig.mapper.states(rig.now)] == [120] * 2
    rig.pass_time(59)
    rig.router.requests.clear()
    rig.pass_time(1)
    assert any(_external_port(request) for request in rig.router.requests)


def test_restarted_router_is_asked_for_all_mappings_again(rig: Rig) -> None:
    rig.pass_time(0)
    rig.told()
    rig.router.restart()
    rig.router.shift = 7
    rig.pass_time(POLL_SECONDS)
    assert rig.router.mappings == {TCP: 1087, UDP: 1087}
    assert rig.told() == [(TCP, outside(1087)), (UDP, outside(1087))]
    assert f"the router {AT} has lost its port mappings: they are asked for again" in rig.log.lines
    assert rig.counts.of("port_mappings", "lost by the router") == 1
    assert rig.log.lines[-1].endswith(f"(%s, router {AT}, it was {OUTSIDE}:1080)" % _how(rig))


def _how(rig: Rig) -> str:
    return rig.mapper.states(rig.now)[0].how.partition(",")[0]


def test_router_that_keeps_its_mappings_is_not_asked_again(rig: Rig) -> None:
    rig.pass_time(0)
    rig.router.requests.clear()
    for _ in range(5):
        rig.pass_time(POLL_SECONDS)
    assert len(rig.router.requests) == 5
    assert not any(_external_port(request) for request in rig.router.requests)


def test_new_external_address_is_told_with_the_renewal(rig: Rig) -> None:
    rig.pass_time(0)
    rig.told()
    rig.router.host = "203.0.113.77"
    rig.pass_time(LIFETIME / 2)
    assert rig.told() == [
        (TCP, Address("203.0.113.77", 1080)),
        (UDP, Address("203.0.113.77", 1080)),
    ]
    assert rig.counts.of("port_mappings", "changed") == 2


def test_silent_router_is_asked_again_later_and_told_of_once(rig: Rig) -> None:
    rig.router.silent = True
    rig.pass_time(0)
    assert rig.told() == []
    complaint = f"port 1080 is not mapped: {AT}:5351: no answer ({_how(rig)})"
    assert rig.log.lines == [
        f"listener 'main': {network} {complaint}" for network in ("tcp", "udp")
    ]
    for index in range(12):
        seconds = min(RETRY_SECONDS * 2**index, RETRY_LIMIT)
        rig.pass_time(seconds - 1)
        before = rig.mapper._mappings[TCP].due
        rig.pass_time(1)
        assert rig.mapper._mappings[TCP].due > before
    assert len(rig.log.lines) == 2
    rig.router.silent = False
    rig.pass_time(RETRY_LIMIT)
    assert rig.told() == [(TCP, outside()), (UDP, outside())]


def test_mapping_outlives_a_router_that_is_silent_for_a_while(rig: Rig) -> None:
    rig.pass_time(0)
    rig.told()
    rig.router.silent = True
    rig.pass_time(LIFETIME / 2)
    assert rig.told() == []
    assert rig.external() == {TCP: outside(), UDP: outside()}
    assert "cannot be renewed" in rig.log.lines[-1]
    rig.pass_time(LIFETIME / 2 - 1)
    assert rig.told() == []
    rig.pass_time(RETRY_LIMIT)
    assert rig.told() == [(TCP, None), (UDP, None)]
    assert rig.external() == {TCP: None, UDP: None}


def test_refused_mapping_is_told_with_the_reason(rig: Rig) -> None:
    rig.router.result = 2
    rig.pass_time(0)
    assert rig.mapper.states(rig.now)[0].fault == "refused: not authorized"
    assert "tcp port 1080 is not mapped: refused: not authorized" in rig.log.lines[0]
    assert rig.told() == []


def test_time_of_a_refusal_is_kept_within_bounds() -> None:
    rig = Rig("pcp", TCP)
    rig.router.result, rig.router.result_lifetime = 2, 1
    rig.pass_time(0)
    rig.router.requests.clear()
    rig.pass_time(REFUSED_FLOOR - 1)
    assert rig.router.requests == []
    rig.router.result_lifetime = 1 << 31
    rig.pass_time(1)
    rig.pass_time(1800)
    assert len(rig.router.requests) == 2


def test_mapping_that_is_refused_on_renewal_is_gone(rig: Rig) -> None:
    rig.pass_time(0)
    rig.told()
    rig.router.result = 4 if _how(rig) == "nat-pmp" else 8
    rig.pass_time(LIFETIME / 2)
    assert rig.told() == [(TCP, None), (UDP, None)]
    assert rig.mapper.states(rig.now)[0].fault == "refused: no resources"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_router_without_external_address_is_told_of(host: str) -> None:
    rig = Rig("pcp", TCP)
    rig.router.host = host
    rig.pass_time(0)
    assert rig.mapper.states(rig.now)[0].fault == "refused: the router has no external address"


def test_router_that_grants_no_time_has_refused(rig: Rig) -> None:
    rig.router.lifetime = 0
    rig.pass_time(0)
    assert rig.mapper.states(rig.now)[0].fault == "refused: the router grants no time"
    assert rig.told() == []


def test_router_that_promises_more_than_was_asked_is_not_relied_on(rig: Rig) -> None:
    rig.router.extra = 0x7FFF0000
    rig.pass_time(0)
    assert [state.left for state in rig.mapper.states(rig.now)] == [LIFETIME] * 2
    rig.router.requests.clear()
    rig.pass_time(LIFETIME / 2)
    assert any(_external_port(request) for request in rig.router.requests)


def test_machine_without_default_gateway_waits_for_one(rig: Rig) -> None:
    rig.gateway = ""
    rig.pass_time(0)
    assert rig.mapper.states(rig.now)[0].fault == "there is no default gateway"
    rig.gateway = AT
    rig.pass_time(RETRY_SECONDS)
    assert rig.told() == [(TCP, outside()), (UDP, outside())]


def test_other_gateway_is_asked_anew(rig: Rig) -> None:
    rig.pass_time(0)
    rig.told()
    rig.gateway, rig.router.host = "192.168.2.1", "198.51.100.9"
    rig.router.restart()
    rig.router.epoch = 5_000_000
    rig.pass_time(POLL_SECONDS)
    assert rig.told() == [
        (TCP, None),
        (UDP, None),
        (TCP, Address("198.51.100.9", 1080)),
        (UDP, Address("198.51.100.9", 1080)),
    ]
    assert rig.counts.of("port_mappings", "lost by the router") == 0


def test_router_that_speaks_nat_pmp_alone_is_asked_by_that() -> None:
    rig = Rig("pcp")
    rig.router.protocols = ("nat-pmp",)
    rig.pass_time(0)
    assert rig.told() == [(TCP, outside()), (UDP, outside())]
    assert rig.log.lines[0] == f"the router {AT} speaks nat-pmp, not pcp"
    assert _how(rig) == "nat-pmp"


def test_restarted_daemon_renews_its_mappings() -> None:
    """The nonces must be the same, or the router refuses them until they expire."""
    first = Rig("pcp")
    first.pass_time(0)
    second = Rig("pcp")
    second.router.__dict__.update(first.router.__dict__)
    second.pass_time(0)
    assert second.told() == [(TCP, outside()), (UDP, outside())]
    # Of another port, machine or key the nonce is another one.
    assert len(set(first.router.nonces.values())) == 2


def test_mappings_are_released_at_the_end(rig: Rig) -> None:
    rig.pass_time(0)
    rig.mapper.stop()
    assert rig.router.mappings == {}
    assert rig.log.lines[-2:] == [
        "tcp port 1080 is mapped no more",
        "udp port 1080 is mapped no more",
    ]
    rig.pass_time(LIFETIME)
    assert rig.router.mappings == {}


def test_end_does_not_wait_for_a_silent_router(rig: Rig) -> None:
    rig.pass_time(0)
    rig.router.silent = True
    rig.router.requests.clear()
    rig.mapper.stop()
    assert rig.counts.of("port_mappings", "released") == 0


def test_end_without_mapping_asks_nothing(rig: Rig) -> None:
    rig.mapper.stop()
    assert rig.router.requests == []


def test_port_that_a_reload_removes_is_released(rig: Rig) -> None:
    rig.pass_time(0)
    rig.want(TCP, OTHER)
    rig.pass_time(1)
    assert rig.router.mappings == {TCP: 1080, OTHER: 2080}
    assert rig.told() == [(OTHER, outside(2080))]
    rig.want()
    assert not rig.mapper.is_done
    rig.pass_time(1)
    assert rig.router.mappings == {}
    assert rig.mapper.is_done


def test_port_that_stays_is_told_to_its_new_follower(rig: Rig) -> None:
    rig.pass_time(0)
    fresh = Follower()
    rig.mapper.want([WantedPort(UDP, "main", fresh)])
    assert fresh.told == [(UDP, outside())]


def test_mapping_that_is_granted_after_its_end_is_released(rig: Rig) -> None:
    """A reload, or the end of the daemon, comes while the router is asked."""
    answer = rig.router.answer

    def answer_late(datagram: bytes, client: str = "192.168.1.7") -> bytes | None:
        rig.router.answer = answer  # type: ignore[method-assign]
        rig.mapper.stop()
        return answer(datagram, client)

    rig.router.answer = answer_late  # type: ignore[method-assign]
    rig.pass_time(0)
    assert TCP not in rig.router.mappings
    assert (TCP, outside()) not in rig.told()


def test_full_pool_delays_the_question(rig: Rig) -> None:
    rig.is_full = True
    rig.pass_time(0)
    assert rig.router.requests == []
    rig.is_full = False
    rig.pass_time(1)
    assert rig.told() == [(TCP, outside()), (UDP, outside())]


def test_source_address_that_is_gone_is_a_fault(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(router: str, source: str) -> Router:
        raise DialError(Reason.GENERAL, "192.168.1.1:5351", said="cannot assign")

    rig.mapper._dependencies = rig.mapper._dependencies._replace(connect=connect)
    rig.pass_time(0)
    assert rig.mapper.states(rig.now)[0].fault == "192.168.1.1:5351: cannot assign"
