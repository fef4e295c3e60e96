"""Accounts: what a flow may use of the limits of its user, its client and its listener.

A flow opens its account before it is dialled and closes it at its end.  While it runs, the
account's paces say how many bytes each direction may carry.
"""

from __future__ import annotations

from netproxy.errors import FlowRefused, Reason
from netproxy.typed import TYPE_CHECKING, Mapping, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.flows import Flow, LiveFlow

UNLIMITED = 1 << 62
"""The mark of a direction without a limit."""
SESSION_LIMIT = "session limit"
_REASONS: Mapping[str, str] = {
    "connections": "connection limit of the user",
    "connection_rate": "connection rate of the user",
}


def limit_reason(key: str) -> str:
    """Return the reason of what a limit refuses, by the limit's key in the configuration."""
    return _REASONS.get(key.rpartition(".")[2], SESSION_LIMIT)


def refused_by(key: str) -> FlowRefused:
    """Return the refusal of a flow by a limit, named by its key in the configuration."""
    return FlowRefused(Reason.LIMIT, said=limit_reason(key), decided=key)


class UserUsage(Protocol):
    """What users have moved, as limits need it.  Thread: any; never blocks."""

    def moved(self, user: str, up: int, down: int) -> None:
        """Add bytes that a user has moved now, client to target and target to client."""

    def used_up(self, user: str, quotas: Sequence[int | None]) -> bool:
        """Return whether a quota of a user is used up: of today, this month or in total."""

    def is_due(self, now: float) -> bool:
        """Return whether running flows must tell now what they have moved; monotonic seconds."""


class SharedGauge(Protocol):
    """Counts what all worker processes have at the moment.  Thread: any; never blocks."""

    def add(self, amount: int, client: str) -> None:
        """Add to what this process has of a client (its host); `amount` may be negative."""

    def sum(self) -> int:
        """Return what all processes have."""

    def of_client(self, client: str) -> int:
        """Return what all processes have of a client."""


class Pace(Protocol):
    """How many bytes one direction of a flow may carry.  One thread at a time uses it."""

    mark: int
    """The direction may carry bytes until its own count of them reaches this number."""
    lease: int
    """A read that begins before the mark may carry up to this many bytes.  Those beyond the mark
    belong to the next lease, which the limits have counted."""

    def renew(self, moved: int) -> int:
        """Return how many bytes may be carried now, 0 if none.  `moved`: the count so far.

        Call it when the count has reached `mark`.  Never blocks.
        """

    def delay(self) -> float:
        """Return the seconds after which renew() may return more."""

    def decided(self) -> str:
        """Return the key of the limit that has refused more, for records."""


class Account(Protocol):
    """One flow's part of the limits it falls under.  Thread: any."""

    @property
    def up(self) -> Pace:
        """The pace from client to target."""

    @property
    def down(self) -> Pace:
        """The pace from target to client."""

    def attach(self, live: LiveFlow) -> None:
        """Note the flow, which runs from now on."""

    def close(self) -> None:
        """Count the flow out.  Calls after the first do nothing."""


class Accounts(Protocol):
    """Opens accounts.  Thread: any; never blocks."""

    def open(self, flow: Flow, is_new: bool = True) -> Account:
        """Count a flow in.  Raises FlowRefused: LIMIT if it exceeds a limit, DENIED if its user
        or its client gets nothing.

        `is_new`: it counts as a new connection or session.
        """

    def reached(self, user: str) -> str:
        """Return the key of the limit of UDP sessions that a user has reached, "" if none."""
