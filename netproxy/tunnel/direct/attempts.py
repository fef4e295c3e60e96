"""Decides when a client and an agent are told to try a direct path: a state machine.

Pure: the owner passes the time, in monotonic seconds, and guards it.
"""

from __future__ import annotations

import enum
import math

from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address

ANSWER_SECONDS = 5.0
"""For an agent to tell that a path is up: the time of an attempt, and some to tell it."""

REST_FIRST, REST_LIMIT = 10.0, 600.0
"""Seconds between two attempts: after the first failure and, doubled with each, in the end.  An
attempt costs each side 15 kB."""

STEADY_SECONDS = 60.0
"""A path that was up for so long has not failed."""

RENEWAL_SECONDS = 3600.0
"""The keys of a path are in use for so long; then an attempt brings other ones."""

Addresses = tuple["Address", "Address"]
"""Those of client and agent, as the bridge sees them."""


class AttemptState(enum.Enum):
    """What the attempts of a pair have come to.

    ========  ===============================  =================================================
    state     meaning                          it ends
    ========  ===============================  =================================================
    WAITING   an address is not known          TRYING as soon as both are
    TRYING    both sides have been told        UP if the agent says so, else RESTING after a while
    RESTING   the last attempt has failed      TRYING after the back-off, or with other addresses
    UP        datagrams go directly            TRYING if the agent says that it is down, and once
                                               an hour for other keys
    ========  ===============================  =================================================
    """

    WAITING = "waiting"
    TRYING = "trying"
    RESTING = "resting"
    UP = "up"


class Attempts:
    """The attempts of one pair."""

    __slots__ = ("state", "failures", "_told", "_since", "_until")

    def __init__(self) -> None:
        self.state = AttemptState.WAITING
        self.failures = 0
        """In a row."""
        self._told: Addresses | None = None
        """The addresses of the last attempt."""
        self._since = -math.inf
        """When the path came up."""
        self._until = -math.inf
        """When the state ends, unless something happens before."""

    def tick(self, now: float, addresses: Addresses | None) -> bool:
        """Return whether both sides are to be told now, with these addresses.

        `addresses`: None if one is not known, or the two cannot reach each other.
        """
        if self.state is AttemptState.TRYING and now >= self._until:
            self._rest(now)
        has_moved = self.state is AttemptState.RESTING and addresses != self._told
        if addresses is None or not (has_moved or now >= self._until):
            return False
        if has_moved:
            self.failures = 0
        self.state, self._told = AttemptState.TRYING, addresses
        self._until = now + ANSWER_SECONDS
        return True

    def reported(self, up: bool, now: float) -> None:
        """Note what the agent says of the path."""
        if up:
            if self.state is not AttemptState.UP:
                self._since, self._until = now, now + RENEWAL_SECONDS
            self.state = AttemptState.UP
        elif self.state is AttemptState.UP:
            if now - self._since >= STEADY_SECONDS:
                self.failures = 0
                # The next attempt begins at once: the NATs may just have forgotten the path.
                self.state, self._until = AttemptState.RESTING, now
            else:
                self._rest(now)

    def _rest(self, now: float) -> None:
        self.state = AttemptState.RESTING
        self._until = now + min(REST_LIMIT, REST_FIRST * 2.0 ** min(self.failures, 16))
        self.failures += 1
