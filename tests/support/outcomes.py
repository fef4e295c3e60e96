"""A RelayOwner that keeps what relays report."""

from __future__ import annotations

from netproxy.relay.pipe import Outcome, Relay


class Outcomes:
    """`relays` are those that began, `outcomes` those of relays that ended, in order."""

    def __init__(self) -> None:
        self.relays: list[Relay] = []
        self.outcomes: list[Outcome] = []

    def relay_began(self, relay: Relay) -> None:
        self.relays.append(relay)

    def relay_ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
