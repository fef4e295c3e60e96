"""The state machine of entries and mappings: every event in every state, and the queues."""

from __future__ import annotations

from typing import Callable

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.relay.client import Client, no_header
from netproxy.relay.entry import Action, Entry, EntryState, MappingState, NatMapping
from netproxy.relay.session import Session
from netproxy.relay.table.reply_sources import ENDPOINT_INDEPENDENT
from tests.support.accounts import free_account
from tests.support.upstreams import FakeDialer, FakeSocket

NOW = 1000.0
LATER = NOW + 2.0
FLOW = Flow("udp", Address("192.0.2.1", 5000), Address("198.51.100.1", 9000), "main", "")
DESTINATION = FakeDialer().dial_packet(FLOW).prepare(FLOW)
ROUTING, DIALLING, PREPARING, FLUSHING, READY, FAILED, GONE = EntryState


class NoTable:
    def end_session(self, session: Session, reason: str) -> None:
        raise AssertionError("no session ends here")


def make_client() -> Client:
    return Client("peer", FLOW.client, FakeSocket(), no_header, None)


def make_mapping(client: Client, state: MappingState) -> NatMapping:
    session = Session(
        client, FLOW, FakeDialer(), ENDPOINT_INDEPENDENT, NOW, NoTable(), free_account()
    )
    mapping = NatMapping(client, "key", session)
    mapping.state = state
    return mapping


def make_entry(state: EntryState, mapping_state: MappingState = MappingState.OPEN) -> Entry:
    """Return an entry that went to `state` by its events, with a mapping in `mapping_state`."""
    entry = Entry(("peer", b"target"), make_client(), FLOW)
    mapping = make_mapping(entry.client, MappingState.CLOSED)
    if state is ROUTING:
        mapping.state = mapping_state
        entry.mapping = mapping
        return entry
    entry.on_routed(FLOW, mapping, NOW)
    if state in (PREPARING, FLUSHING, READY):
        entry.on_dialled()
    if state in (FLUSHING, READY):
        entry.on_prepared(DESTINATION)
    if state is READY:
        entry.on_flushed()
    if state is FAILED:
        entry.on_failed(NOW)
    if state is GONE:
        entry.on_removed("evicted")
    assert entry.state is state
    mapping.state = mapping_state
    return entry


EVENTS: dict[str, Callable[[Entry], object]] = {
    "routed": lambda entry: entry.on_routed(FLOW, entry.mapping, NOW),
    "retry": lambda entry: entry.on_retry(NOW),
    "dialled": lambda entry: entry.on_dialled(),
    "prepared": lambda entry: entry.on_prepared(DESTINATION),
    "flushed": lambda entry: entry.on_flushed(),
    "failed": lambda entry: entry.on_failed(LATER),
    "removed": lambda entry: entry.on_removed("evicted"),
}
# The transitions with an open mapping; every other event leaves the state as it is.
TRANSITIONS = {
    ("routed", ROUTING): PREPARING,
    ("retry", FAILED): PREPARING,
    ("dialled", DIALLING): PREPARING,
    ("prepared", PREPARING): FLUSHING,
    ("flushed", FLUSHING): READY,
    ("failed", DIALLING): FAILED,
    ("failed", PREPARING): FAILED,
    ("failed", FAILED): FAILED,
    **{("removed", state): GONE for state in EntryState},
}


@pytest.mark.parametrize("state", EntryState, ids=lambda state: state.value)
@pytest.mark.parametrize("event", EVENTS)
def test_event_leads_from_state_to_state(event: str, state: EntryState) -> None:
    entry = make_entry(state)
    EVENTS[event](entry)
    assert entry.state is TRANSITIONS.get((event, state), state)


@pytest.mark.parametrize("event, state", [("routed", ROUTING), ("retry", FAILED)])
@pytest.mark.parametrize(
    "mapping_state, becomes, action",
    [
        (MappingState.OPEN, PREPARING, Action.PREPARE),
        (MappingState.DIALLING, DIALLING, Action.NONE),
        (MappingState.CLOSED, DIALLING, Action.DIAL),
    ],
)
def test_entry_takes_the_state_that_its_mapping_asks_for(
    event: str, state: EntryState, mapping_state: MappingState, becomes: EntryState, action: Action
) -> None:
    entry = make_entry(state, mapping_state)
    assert EVENTS[event](entry) is action
    assert entry.state is becomes
    if action is Action.DIAL:
        assert entry.mapping.state is MappingState.DIALLING


def test_entry_fails_with_a_mapping_whose_dial_failed_a_moment_ago() -> None:
    entry = make_entry(ROUTING, MappingState.CLOSED)
    entry.mapping.retry_at = LATER
    assert entry.on_routed(FLOW, entry.mapping, NOW) is Action.NONE
    assert (entry.state, entry.retry_at) == (FAILED, LATER)
    assert entry.on_retry(NOW) is Action.NONE and entry.state is FAILED
    assert entry.on_retry(LATER) is Action.DIAL and entry.state is DIALLING


def test_failure_moves_the_time_of_the_next_attempt() -> None:
    entry = make_entry(FAILED)
    assert entry.on_failed(LATER) and entry.retry_at == LATER
    assert entry.on_retry(NOW) is Action.NONE and entry.state is FAILED


def test_destination_is_set_when_ready_and_stays() -> None:
    entry = make_entry(FLUSHING)
    assert (entry.prepared, entry.destination) == (DESTINATION, None)
    entry.on_flushed()
    assert entry.destination == DESTINATION
    entry.on_removed("evicted")
    assert entry.destination == DESTINATION


@pytest.mark.parametrize("state", EntryState, ids=lambda state: state.value)
def test_datagrams_wait_until_the_entry_is_ready_or_has_failed(state: EntryState) -> None:
    assert make_entry(state).queueing == (state in (ROUTING, DIALLING, PREPARING, FLUSHING))


class TestMapping:
    EVENTS: dict[str, Callable[[NatMapping], object]] = {
        "needed": lambda mapping: mapping.on_needed(NOW),
        "dialled": lambda mapping: mapping.on_dialled(),
        "dial failed": lambda mapping: mapping.on_dial_failed(LATER),
        "removed": lambda mapping: mapping.on_removed(),
    }
    TRANSITIONS = {
        ("needed", MappingState.CLOSED): MappingState.DIALLING,
        ("dialled", MappingState.DIALLING): MappingState.OPEN,
        ("dial failed", MappingState.DIALLING): MappingState.CLOSED,
        **{("removed", state): MappingState.ENDED for state in MappingState},
    }

    @pytest.mark.parametrize("state", MappingState, ids=lambda state: state.value)
    @pytest.mark.parametrize("event", EVENTS)
    def test_event_leads_a_mapping_from_state_to_state(
        self, event: str, state: MappingState
    ) -> None:
        mapping = make_mapping(make_client(), state)
        applied = self.EVENTS[event](mapping)
        assert mapping.state is self.TRANSITIONS.get((event, state), state)
        if event != "removed":
            assert applied == ((event, state) in self.TRANSITIONS)

    def test_mapping_is_not_dialled_again_before_its_time(self) -> None:
        mapping = make_mapping(make_client(), MappingState.DIALLING)
        mapping.on_dial_failed(LATER)
        assert not mapping.on_needed(NOW) and mapping.on_needed(LATER)

    @pytest.mark.parametrize(
        "ports, only_dns", [((53,), True), ((53, 53), True), ((53, 9), False), ((9, 53), False)]
    )
    def test_mapping_knows_whether_it_leads_to_name_servers_only(
        self, ports: tuple[int, ...], only_dns: bool
    ) -> None:
        mapping = make_mapping(make_client(), MappingState.OPEN)
        for number, port in enumerate(ports):
            flow = FLOW._replace(target=FLOW.target._replace(port=port))
            entry = Entry(("peer", number), mapping.client, flow)
            entry.on_routed(flow, mapping, NOW)
        assert mapping.only_dns is only_dns and len(mapping.entries) == len(ports)
