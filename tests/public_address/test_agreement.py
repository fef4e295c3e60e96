"""Which public address is believed, by the answers of each round."""

from __future__ import annotations

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.public_address.agreement import Agreement, Verdict

OLD, NEW, LIE = (Address(host, 1080) for host in ("203.0.113.5", "203.0.113.9", "192.0.2.66"))
SAME, CHANGED, UNSURE = Verdict.SAME, Verdict.CHANGED, Verdict.UNSURE

Round = tuple[dict[str, Address], Verdict, "Address | None"]
"""The answers by server, the verdict on them, and what is believed then."""

CASES: dict[str, list[Round]] = {
    "first answer counts at once": [({"a": OLD}, CHANGED, OLD), ({"a": OLD}, SAME, OLD)],
    "no answer says nothing": [({}, SAME, None), ({"a": OLD}, CHANGED, OLD), ({}, SAME, OLD)],
    "two servers agree": [
        ({"a": OLD, "b": OLD}, CHANGED, OLD),
        ({"a": NEW, "b": NEW}, CHANGED, NEW),
    ],
    "one server says it twice": [
        ({"a": OLD}, CHANGED, OLD),
        ({"a": NEW}, UNSURE, OLD),
        ({"a": NEW}, CHANGED, NEW),
    ],
    "one server says it once": [
        ({"a": OLD}, CHANGED, OLD),
        ({"a": NEW}, UNSURE, OLD),
        ({"a": OLD}, SAME, OLD),
        ({"a": NEW}, UNSURE, OLD),
        ({"a": LIE}, UNSURE, OLD),
    ],
    "silence between does not confirm": [
        ({"a": OLD}, CHANGED, OLD),
        ({"a": NEW}, UNSURE, OLD),
        ({}, SAME, OLD),
        ({"a": NEW}, CHANGED, NEW),
    ],
    "one of two servers lies": [
        ({"a": OLD, "b": OLD}, CHANGED, OLD),
        ({"a": LIE, "b": OLD}, SAME, OLD),
        ({"a": LIE, "b": OLD}, SAME, OLD),
    ],
    "change, and one of two servers lies": [
        ({"a": OLD, "b": OLD}, CHANGED, OLD),
        ({"a": LIE, "b": NEW}, UNSURE, OLD),
        ({"a": LIE, "b": NEW}, CHANGED, LIE),
    ],
    "another port": [
        ({"a": OLD, "b": OLD}, CHANGED, OLD),
        (
            {"a": OLD._replace(port=5000), "b": OLD._replace(port=5000)},
            CHANGED,
            OLD._replace(port=5000),
        ),
    ],
    "each server sees another port": [
        ({"a": OLD._replace(port=1), "b": OLD._replace(port=2)}, CHANGED, OLD._replace(port=0)),
        ({"a": OLD._replace(port=3), "b": OLD._replace(port=4)}, SAME, OLD._replace(port=0)),
        ({"a": OLD, "b": OLD}, CHANGED, OLD),
    ],
}


@pytest.mark.parametrize("rounds", CASES.values(), ids=CASES)
def test_change_counts_once_it_is_confirmed(rounds: list[Round]) -> None:
    agreement = Agreement()
    for answers, verdict, believed in rounds:
        assert (agreement.settle(answers), agreement.value) == (verdict, believed)
