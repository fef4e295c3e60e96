"""The last refusals and failures: their ids, and which of them are remembered."""

from __future__ import annotations

import re

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Failure, Flow, Record, SeenName
from netproxy.observe.incidents import FAILED, ID_BITS, LIMIT, REFUSED, Incidents

FIELDS = {"reason": "forbidden", "listener": "main", "user": "-", "asked": "a:25", "decided": "x"}


def test_ids_are_short_unique_and_not_those_of_another_run() -> None:
    """Hazard 171."""
    first, second = Incidents(), Incidents()
    names = {first.add(REFUSED, "192.0.2.1", FIELDS) for _ in range(5000)}
    assert len(names) == 5000
    assert all(re.fullmatch(r"[0-9a-hjkmnp-tv-z]{6}", name) for name in names)
    assert len({second.add(REFUSED, "192.0.2.1", FIELDS) for _ in range(50)} & names) < 5


def test_no_two_numbers_of_a_run_have_the_same_id() -> None:
    """The permutation loses nothing: its factor is odd."""
    for _ in range(20):
        assert Incidents()._factor % 2 == 1
    assert ID_BITS % 5 == 0


def test_processes_of_a_daemon_have_ids_of_their_own() -> None:
    """The key is that of the parent; each process has numbers of its own."""
    parent = Incidents(step=3)
    names = [parent.add(REFUSED, "", FIELDS) for _ in range(100)]
    for worker in (1, 2):
        parent.use_numbers(worker)
        parent.begin_in_child()
        assert not parent.all()
        names += [parent.add(REFUSED, "", FIELDS) for _ in range(100)]
    assert len(set(names)) == 300


def test_client_with_most_loses_its_oldest() -> None:
    """Hazard 171."""
    incidents = Incidents()
    victim = incidents.add(REFUSED, "192.0.2.1", FIELDS)
    names = [incidents.add(REFUSED, f"2001:db8::{at:x}", FIELDS) for at in range(LIMIT + 10)]
    left = [incident.id for incident in incidents.all()]
    assert left == [victim, *names[11:]] and len(incidents) == LIMIT


def test_row_of_a_refusal_has_its_fields_and_no_dashes() -> None:
    incidents = Incidents()
    name = incidents.add(REFUSED, "192.0.2.1", FIELDS)
    (row,) = incidents.rows()
    assert (row["id"], row["kind"], row["reason"]) == (name, "refused", "forbidden")
    assert (row["listener"], row["client"], row["user"]) == ("main", "192.0.2.1", "")
    assert (row["asked"], row["decided"], row["rule"]) == ("a:25", "x", "")


@pytest.mark.parametrize("decided", ["", "rules[0]"])
def test_row_of_a_failed_flow_has_hop_and_addresses(decided: str) -> None:
    incidents = Incidents()
    target, found = Address("192.0.2.9", 443), (Address("192.0.2.9", 443),)
    flow = Flow("tcp", Address("10.0.0.9", 41000), target, "main", "alice", found)
    flow = flow._replace(seen=SeenName("a.example", "tls"))
    failure = Failure("timed out", "'office'", (("192.0.2.9:443", "timed out"),))
    record = Record(
        flow, "pool", 0, 0, 1.5, "'office': timed out", rule="rules[0]", member="office"
    )
    incidents.add_flow(record._replace(failure=failure, decided=decided), FAILED)
    (row,) = incidents.rows()
    assert (row["client"], row["user"], row["asked"]) == ("10.0.0.9:41000", "alice", str(target))
    assert (row["name"], row["rule"], row["upstream"]) == ("a.example", "rules[0]", "pool/office")
    assert (row["reason"], row["hop"], row["seconds"]) == ("timed out", "'office'", 1.5)
    assert row["decided"] == (decided or "'office': timed out")
    assert (row["addresses"], row["tried"]) == (["192.0.2.9"], [["192.0.2.9:443", "timed out"]])


def test_incident_before_a_reload_is_outdated() -> None:
    incidents = Incidents()
    incidents.add(REFUSED, "192.0.2.1", FIELDS)
    incidents.note_reload()
    incidents.add(REFUSED, "192.0.2.1", FIELDS)
    assert [row["outdated"] for row in incidents.rows()] == [True, False]
