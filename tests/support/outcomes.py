"""A RelayOwner that keeps what relays report."""

from __future__ import annotations

from netproxy.relay.pipe import Outcome


class Outcomes:
    """`outcomes` are those of relays that ended, in order."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def relay_ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
