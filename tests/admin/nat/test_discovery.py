"""What discovery makes of NATs of every kind, and of servers that tell less than it asks for."""

from __future__ import annotations

import json

import pytest

from netproxy.admin.nat.report import (
    ADDRESS_AND_PORT_DEPENDENT,
    ADDRESS_DEPENDENT,
    DEPENDENT,
    ENDPOINT_INDEPENDENT,
    UNKNOWN,
    Report,
)
from netproxy.admin.nat.exchange import GIVE_UP_SECONDS, probe_nat
from netproxy.interfaces.addresses import Address
from tests.support.stun import (
    FIRST,
    LONE,
    NO_NAT,
    OUTSIDE,
    SECOND,
    Nat,
    Script,
    Server,
    SimulatedNat,
)

KINDS = (ENDPOINT_INDEPENDENT, ADDRESS_DEPENDENT, ADDRESS_AND_PORT_DEPENDENT)
ALONE = Script(second=False)


def report_of(nat: Nat, *servers: Server, knows_local: bool = True) -> Report:
    transport = SimulatedNat(nat, servers, knows_local)
    return probe_nat([server.first for server in servers], transport, transport.clock)


@pytest.mark.parametrize("mapping", KINDS)
@pytest.mark.parametrize("filtering", KINDS)
@pytest.mark.parametrize("hairpin", [True, False])
def test_every_kind_of_nat_is_recognized(mapping: str, filtering: str, hairpin: bool) -> None:
    report = report_of(Nat(mapping, filtering, hairpin), Server())
    assert (report.works, report.nat) == (True, True)
    assert (report.mapping, report.filtering) == (mapping, filtering)
    # Otherwise the mapping towards the server lets nobody else in.
    passes = ENDPOINT_INDEPENDENT in (mapping, filtering)
    assert report.hairpin == (hairpin and passes)
    assert report.unknown == {}
    assert report.port_preserved is False
    assert report.external[0] == f"{OUTSIDE}:40000"
    assert len(report.external) == KINDS.index(mapping) + 1


@pytest.mark.parametrize("filtering", KINDS)
def test_machine_without_nat_is_recognized(filtering: str) -> None:
    report = report_of(NO_NAT._replace(filtering=filtering), Server())
    assert (report.nat, report.mapping, report.filtering) == (
        False,
        ENDPOINT_INDEPENDENT,
        filtering,
    )
    assert report.external == [report.local] == [f"{OUTSIDE}:5000"]
    assert (report.hairpin, report.port_preserved, report.unknown) == (None, None, {})


def test_nat_that_keeps_ports_is_recognized() -> None:
    assert report_of(Nat(preserves=True), Server()).port_preserved is True


def test_upstream_does_not_tell_whether_there_is_a_nat() -> None:
    report = report_of(Nat(hairpin=True), Server(), knows_local=False)
    assert (report.nat, report.port_preserved, report.local) == (None, None, "")
    assert (report.mapping, report.hairpin) == (ENDPOINT_INDEPENDENT, True)


def test_answers_are_attributed_to_servers() -> None:
    report = report_of(Nat(), Server(LONE, script=ALONE), Server())
    lone, main = report.servers
    assert lone == (str(LONE), str(LONE), f"{OUTSIDE}:40000", "", "scripted", 0.0, "")
    assert main.second == str(SECOND)
    # The server that has a second address tells the rest.
    assert report.filtering == ADDRESS_AND_PORT_DEPENDENT


class TestServerWithoutSecondAddress:
    def test_one_tells_the_external_address_alone(self) -> None:
        report = report_of(Nat(hairpin=True), Server(LONE, script=ALONE))
        assert (report.works, report.nat) == (True, True)
        assert report.external == [f"{OUTSIDE}:40000"]
        assert (report.mapping, report.filtering) == (UNKNOWN, UNKNOWN)
        assert set(report.unknown) == {"mapping", "filtering"}
        assert "OTHER-ADDRESS" in report.unknown["filtering"]
        assert report.hairpin is True

    @pytest.mark.parametrize(
        ("mapping", "expected"),
        [
            (ENDPOINT_INDEPENDENT, ENDPOINT_INDEPENDENT),
            (ADDRESS_DEPENDENT, DEPENDENT),
            (ADDRESS_AND_PORT_DEPENDENT, DEPENDENT),
        ],
    )
    def test_two_tell_the_mapping(self, mapping: str, expected: str) -> None:
        servers = [Server(LONE, script=ALONE), Server(FIRST, script=ALONE)]
        report = report_of(Nat(mapping), *servers)
        assert (report.mapping, report.filtering) == (expected, UNKNOWN)
        assert set(report.unknown) == {"filtering"}

    def test_two_on_one_address_do_not_tell_the_mapping(self) -> None:
        servers = [Server(LONE, script=ALONE), Server(LONE._replace(port=5349), script=ALONE)]
        report = report_of(Nat(ADDRESS_DEPENDENT), *servers)
        assert (report.mapping, len(report.external)) == (UNKNOWN, 1)

    @pytest.mark.parametrize(
        "second",
        [
            FIRST._replace(port=3479),
            SECOND._replace(port=3478),
            SECOND._replace(port=0),
            Address("2001:db8::1", 3479),
            Address("127.0.0.1", 3479),
            Address("224.0.0.1", 3479),
        ],
    )
    def test_useless_second_address_is_none(self, second: Address) -> None:
        report = report_of(Nat(), Server(FIRST, second))
        assert "OTHER-ADDRESS" in report.unknown["filtering"]


def test_second_address_that_is_silent_tells_nothing() -> None:
    """Hazard 157.  Such as that of a server that is behind a NAT of its own."""
    script = Script(mute=frozenset({SECOND.host}), origin=False)
    report = report_of(Nat(filtering=ENDPOINT_INDEPENDENT), Server(script=script))
    assert (report.mapping, report.filtering) == (UNKNOWN, UNKNOWN)
    assert set(report.unknown) == {"mapping", "filtering"}
    assert all("does not answer" in why for why in report.unknown.values())


@pytest.mark.parametrize("origin", [True, False])
def test_server_that_ignores_change_requests_tells_no_filtering(origin: bool) -> None:
    """Hazard 157."""
    script = Script(changes=False, origin=origin)
    report = report_of(Nat(filtering=ENDPOINT_INDEPENDENT), Server(script=script))
    assert (report.mapping, report.filtering) == (ENDPOINT_INDEPENDENT, UNKNOWN)
    assert "CHANGE-REQUEST" in report.unknown["filtering"]


def test_server_that_answers_with_errors_shows_that_udp_works() -> None:
    report = report_of(Nat(), Server(script=Script(error=500)))
    assert (report.works, report.external) == (True, ())
    assert report.servers[0].error == "error 500 Server Error"
    assert set(report.unknown) == {"mapping", "filtering", "hairpin"}


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "0.0.0.0", "239.1.1.1", "255.255.255.255", "::", "::1", "ff02::1"]
)
def test_server_leads_no_probe_to_this_machine(host: str) -> None:
    """Hazard 157.  It tells an address of loopback, or of a group, as ours."""

    class Lying(Server):
        def answer(self, at: Address, client: Address, data: bytes) -> tuple[Address, bytes] | None:
            return super().answer(at, Address(host, 53), data)

    transport = SimulatedNat(Nat(hairpin=True), [Lying(script=ALONE)])
    report = probe_nat([FIRST], transport, transport.clock)
    assert {target for _, target in transport.sent} == {FIRST}
    assert (report.works, report.hairpin) == (True, None)
    assert "cannot be ours" in report.unknown["hairpin"]


def test_answer_of_a_server_is_no_hairpinning() -> None:
    """Hazard 157.  The server tells an address of its own as ours."""

    class Lying(Server):
        def answer(self, at: Address, client: Address, data: bytes) -> tuple[Address, bytes] | None:
            return super().answer(at, LONE, data)

    servers = [Lying(script=ALONE), Server(LONE, script=ALONE)]
    transport = SimulatedNat(Nat(), servers)
    report = probe_nat([FIRST], transport, transport.clock)
    assert (report.external, report.hairpin) == ([str(LONE)], False)


def test_silent_server_does_not_disturb() -> None:
    report = report_of(Nat(), Server(LONE, script=Script(mute=frozenset({LONE.host}))), Server())
    assert [server.error for server in report.servers] == ["no answer", ""]
    assert (report.mapping, report.filtering) == (ENDPOINT_INDEPENDENT, ADDRESS_AND_PORT_DEPENDENT)


def test_silence_is_no_udp() -> None:
    transport = SimulatedNat(Nat(), [])
    report = probe_nat([FIRST, LONE], transport, transport.clock)
    assert (report.works, report.external, report.nat) == (False, (), None)
    assert [server.error for server in report.servers] == ["no answer"] * 2
    # Both are asked at once, and no other round follows.
    assert transport.now == 100 + GIVE_UP_SECONDS


def test_several_routes_are_no_independent_mapping() -> None:
    """Another server sees something else, though the first one's addresses see the same."""

    class Routes(SimulatedNat):
        def _external(self, port: int, target: Address) -> Address:
            external = super()._external(port, target)
            if target != LONE:
                return external
            other = external._replace(host="203.0.113.99")
            self._mappings.setdefault((port, "route"), other)
            self._asked.setdefault(other, set())
            return other

    servers = [Server(), Server(LONE, script=ALONE)]
    transport = Routes(Nat(), servers)
    report = probe_nat([FIRST, LONE], transport, transport.clock)
    assert report.mapping == DEPENDENT
    assert report.external == [f"{OUTSIDE}:40000", "203.0.113.99:40000"]


def test_report_is_read_back_from_json() -> None:
    report = report_of(Nat(), Server())
    assert Report.from_json(json.loads(json.dumps(report.as_json()))) == report
