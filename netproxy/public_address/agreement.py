"""Decides which public address to believe, by what STUN servers say of it.  Pure.

A single answer may be wrong: a mapping of the NAT that was about to change, or a server that
lies.  So a change counts once two servers agree about it, or the same is said twice.
"""

from __future__ import annotations

import enum

from netproxy.interfaces.addresses import Address
from netproxy.typed import Mapping, Sequence


class Verdict(enum.Enum):
    """What a round of answers says: SAME, CHANGED, or UNSURE, which another round decides."""

    SAME = "same"
    CHANGED = "changed"
    UNSURE = "unsure"


class Agreement:
    """The address that is believed, of one address family."""

    def __init__(self) -> None:
        self.value: Address | None = None
        """Port 0 if the servers see different ports; None before the first answer."""
        self._candidate: Address | None = None

    def settle(self, answers: Mapping[str, Address]) -> Verdict:
        """Judge the answers of a round, by server.  The first address ever counts at once."""
        if not answers:
            return Verdict.SAME
        said = list(answers.values())
        value = self._combine(said)
        if value == self.value:
            self._candidate = None
            return Verdict.SAME
        alike = sum(answer.host == value.host and value.port in (0, answer.port) for answer in said)
        if self.value is not None and alike < 2 and value != self._candidate:
            self._candidate = value
            return Verdict.UNSURE
        self.value, self._candidate = value, None
        return Verdict.CHANGED

    def _combine(self, said: Sequence[Address]) -> Address:
        """Return one address for all answers of a round.

        If the servers see different hosts, that of before is kept as long as one of them sees it.
        A NAT that gives each server another port tells nothing of the port: it becomes 0.
        """
        hosts = [answer.host for answer in said]
        is_kept = self.value is not None and self.value.host in hosts
        host = self.value.host if self.value is not None and is_kept else hosts[0]
        ports = {answer.port for answer in said if answer.host == host}
        return Address(host, ports.pop() if len(ports) == 1 else 0)
