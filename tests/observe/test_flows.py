"""The registry of flows: the running ones, the totals, and which ones are killed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow, Record, Traffic
from netproxy.observe import flows as flows_module
from netproxy.observe.flows import OTHER, Flows, TotalKey, describe_flows
from netproxy.observe.incidents import ENDED, FAILED, Incidents

TARGET = Address("192.0.2.1", 443)


class FakeFlow:
    """A LiveFlow that has carried what the test says."""

    def __init__(
        self, network: str = "tcp", user: str = "", upstream: str = "direct", listener: str = "main"
    ) -> None:
        self.flow = Flow(network, Address("10.0.0.1", 1234), TARGET, listener, user)
        self.number = 0
        self.dialer: Any = SimpleNamespace(name=upstream)
        self.started = 100.0
        self.carried = Traffic(0, 0)
        self.killed = 0

    def traffic(self) -> Traffic:
        return self.carried

    def idle(self) -> float:
        return 2.5

    def kill(self, ended: str = "killed") -> None:
        self.killed += 1

    def record(self, ended: str = "closed") -> Record:
        return Record(
            self.flow,
            self.dialer.name,
            self.carried.sent,
            self.carried.received,
            1.0,
            ended,
            self.carried.datagrams_sent,
            self.carried.datagrams_received,
            self.number,
        )


@pytest.fixture
def records() -> list[Record]:
    return []


@pytest.fixture
def flows(records: list[Record]) -> Flows:
    return Flows(records.append)


def test_flow_is_live_from_its_beginning_to_its_record(flows: Flows, records: list[Record]) -> None:
    first, second = FakeFlow(), FakeFlow()
    flows.began(first)
    flows.began(second)
    assert (flows.live(), first.number, second.number) == ([first, second], 1, 2)
    flows.finished(first.record())
    assert flows.live() == [second]
    assert records == [first.record()]


def test_numbers_of_several_processes_differ(records: list[Record]) -> None:
    numbers = []
    for start in (1, 2, 3):
        flows = Flows(records.append)
        flows.use_numbers(start, 3)
        for _ in range(3):
            live = FakeFlow()
            flows.began(live)
            numbers.append(live.number)
    assert numbers == [1, 4, 7, 2, 5, 8, 3, 6, 9]


def test_carried_are_the_sums_of_all_totals(flows: Flows) -> None:
    for carried, network in ((Traffic(1, 10), "tcp"), (Traffic(2, 20), "udp")):
        live = FakeFlow(network)
        live.carried = carried
        flows.began(live)
    flows.finished(flows.live()[0].record())
    assert flows.carried() == (3, 30, 1)


def test_totals_include_running_and_ended_flows(flows: Flows) -> None:
    first, second, session = FakeFlow(), FakeFlow(), FakeFlow("udp")
    for live in (first, second, session):
        flows.began(live)
    first.carried, second.carried, session.carried = (
        Traffic(1, 10),
        Traffic(2, 20),
        Traffic(5, 6, 7, 8),
    )
    tcp, udp = TotalKey("tcp", "main", "direct"), TotalKey("udp", "main", "direct")
    before = flows.totals()
    assert before[tcp] == (2, 2, Traffic(3, 30))
    assert before[udp] == (1, 1, Traffic(5, 6, 7, 8))
    flows.finished(first.record())
    flows.finished(session.record())
    assert flows.totals() == {tcp: (2, 1, Traffic(3, 30)), udp: (1, 0, Traffic(5, 6, 7, 8))}


def test_number_of_totals_is_limited_whatever_clients_choose(
    flows: Flows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 117: users, clients and targets are not part of the key."""
    monkeypatch.setattr(flows_module, "TOTALS_LIMIT", 3)
    for at in range(50):
        live = FakeFlow(user=f"user-{at}", upstream=f"upstream-{at}")
        live.flow = live.flow._replace(
            client=Address(f"10.0.0.{at}", at), target=Address(f"t{at}.test", 1)
        )
        flows.began(live, 0.1)
        flows.finished(live.record())
    assert set(flows.totals()) == {
        *(TotalKey("tcp", "main", f"upstream-{at}") for at in range(3)),
        TotalKey("tcp", OTHER, OTHER),
    }
    assert sum(total.flows for total in flows.totals().values()) == 50
    assert set(flows.dial_times()) == {"upstream-0", "upstream-1", "upstream-2", OTHER}
    for at in range(50):
        flows.began(FakeFlow(upstream=f"later-{at}"))
    assert len(flows.totals()) <= 4
    assert sum(total.live for total in flows.totals().values()) == 50


def test_dial_times_are_counted_by_upstream(flows: Flows) -> None:
    for seconds in (0.002, 0.01, 0.3, 7.0):
        flows.began(FakeFlow(), seconds)
    flows.began(FakeFlow())
    histogram = flows.dial_times()["direct"]
    assert histogram.counts == [2, 0, 0, 1, 0, 1]
    assert histogram.sum == pytest.approx(7.312)


def test_flow_that_never_began_is_an_incident_and_no_total() -> None:
    incidents, records = Incidents(), []
    flows = Flows(records.append, incidents)
    flow = Flow("tcp", TARGET, Address("t.test", 1), "main", "")
    name = flows.finished(Record(flow, "office", 0, 0, 0.1, "timed out"))
    (incident,) = incidents.all()
    assert (incident.id, incident.kind, records[0].id) == (name, FAILED, name) and name
    assert not flows.totals()


@pytest.mark.parametrize("decided, kinds", [("", []), ("users.a.limits.quota", [ENDED])])
def test_flow_that_has_lived_is_an_incident_if_something_has_ended_it(
    decided: str, kinds: list[str]
) -> None:
    incidents, records = Incidents(), []
    flows = Flows(records.append, incidents)
    live = FakeFlow()
    flows.began(live)
    name = flows.finished(live.record("quota used up")._replace(decided=decided))
    assert [incident.kind for incident in incidents.all()] == kinds
    assert records[0].id == name and bool(name) == bool(kinds)
    assert len(flows.totals()) == 1


def test_only_wanted_flows_are_killed(flows: Flows) -> None:
    alice, bob = FakeFlow(user="alice"), FakeFlow(user="bob")
    flows.began(alice)
    flows.began(bob)
    assert flows.kill(lambda live: live.flow.user == "bob") == 1
    assert (alice.killed, bob.killed) == (0, 1)
    assert flows.kill(lambda live: live.number == 77) == 0


def test_description_of_a_flow_has_all_its_fields(flows: Flows) -> None:
    live = FakeFlow("udp", "alice")
    live.carried = Traffic(1, 2, 3, 4)
    flows.began(live)
    assert describe_flows(flows.live(), 101.5) == [
        {
            "id": 1,
            "network": "udp",
            "listener": "main",
            "client": "10.0.0.1:1234",
            "user": "alice",
            "target": "192.0.2.1:443",
            "name": "",
            "route": "",
            "upstream": "direct",
            "age": 1.5,
            "idle": 1.5,
            "sent": 1,
            "received": 2,
            "datagrams_sent": 3,
            "datagrams_received": 4,
        }
    ]
