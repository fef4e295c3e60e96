"""A port that a listener wants to be open in the router, and what the router has granted."""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.public_address.dialects import Grant, Port

LIFETIME = 3600
"""Seconds of a mapping: what a daemon that was killed leaves open is closed within an hour."""
RETRY_SECONDS, RETRY_LIMIT = 3.0, 900.0
"""Until a mapping without an answer is asked for again: RFC 6887 section 8.1.1 begins with 3 s and
doubles up to 1,024 s."""
REFUSED_FLOOR, REFUSED_LIMIT = 30.0, 1800.0
"""Bounds of the time that a router names with a refusal: RFC 6887 section 7.4 has up to 30
minutes."""
RENEW_FLOOR = 4.0
"""Seconds: the least between two renewals (RFC 6887 section 11.2.1)."""


class MappingFollower(Protocol):
    """Wants to know the external address of a port.  Thread: main, or a pool's."""

    def mapped(self, port: Port, external: Address | None) -> None:
        """Note the external address that a port has now, None for no mapping."""


class WantedPort(NamedTuple):
    """A port that a listener wants to be mapped."""

    port: Port
    listener: str
    """Its name, for records."""
    follower: MappingFollower


class MappingState(NamedTuple):
    """The state of a mapping, for people."""

    listener: str
    port: Port
    external: Address | None
    how: str
    """ "pcp" or "nat-pmp", and the router."""
    left: float
    """Seconds until the mapping ends."""
    fault: str
    """Why there is no mapping, or why it is not renewed; "" if all is well."""


class Mapping:
    """The mapping of a port.  The lock of its PortMapper guards it."""

    __slots__ = ("wanted", "grant", "due", "fault", "_ends", "_failures")

    def __init__(self, wanted: WantedPort) -> None:
        self.wanted = wanted
        self.grant: Grant | None = None
        self.due = 0.0
        """Monotonic seconds when the router is asked for it, or for its renewal."""
        self.fault = ""
        """As in MappingState."""
        self._ends = 0.0
        self._failures = 0

    @property
    def external(self) -> Address | None:
        """The address at which others reach the port; None if there is no mapping."""
        return self.grant.external if self.grant is not None else None

    def granted(self, grant: Grant, now: float) -> None:
        """Note that the router has made or renewed the mapping."""
        # A router that promises more than was asked for is not relied on.
        lifetime = min(grant.lifetime, LIFETIME)
        self.grant = grant
        self._ends = now + lifetime
        # Half of the lifetime: RFC 6887 section 11.2.1, RFC 6886 section 3.3.
        self.due = now + max(RENEW_FLOOR, lifetime / 2)
        self.fault, self._failures = "", 0

    def refused(self, fault: str, seconds: float, now: float) -> None:
        """Note that the router has refused it, and wants to be asked in some seconds again."""
        self.fault, self.grant = fault, None
        self.due = now + min(max(REFUSED_FLOOR, seconds), REFUSED_LIMIT)

    def failed(self, fault: str, now: float) -> None:
        """Note that the router has not answered; a mapping lasts until its end nevertheless."""
        self.fault = fault
        self.due = now + min(RETRY_SECONDS * 2**self._failures, RETRY_LIMIT)
        # No greater exponent is of use.
        self._failures = min(self._failures + 1, 16)
        if now >= self._ends:
            self.grant = None

    def lost(self, now: float) -> None:
        """Note that the router may have forgotten the mapping: it is asked for now."""
        self.due = now

    def left(self, now: float) -> float:
        """Return the seconds until the mapping ends, 0 if there is none."""
        return max(0.0, self._ends - now) if self.grant is not None else 0.0
