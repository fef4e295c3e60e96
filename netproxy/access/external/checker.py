"""What checks a login outside of the daemon, and what it says."""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.access.login import Credentials


class Verdict(NamedTuple):
    """What a program or a service says about a login."""

    allowed: bool
    text: str = ""
    """The JSON object that came with it, "" for none."""


class Checker(Protocol):
    """Asks a program or a service."""

    def check(self, credentials: Credentials, deadline: float) -> Verdict:
        """Return the verdict; blocks until the deadline (monotonic seconds) at most.

        Raises LoginUnavailable, with a text without secrets.
        """

    def stop(self) -> None:
        """End the checks that run: the daemon stops."""
