"""What a NAT table is made with: how it behaves, and what it needs of the daemon."""

from __future__ import annotations

from netproxy.relay.table.reply_sources import ENDPOINT_INDEPENDENT
from netproxy.typed import TYPE_CHECKING, Callable, Iterable, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.accounts import Accounts
    from netproxy.interfaces.fairness import FairSubmit
    from netproxy.interfaces.flows import Observer
    from netproxy.interfaces.services import Counter, Log
    from netproxy.net.datagram import ArenaPool
    from netproxy.relay.quota import SessionLimits


class NatPolicy(NamedTuple):
    """How a table behaves as a NAT, in the words of RFC 4787."""

    limits: SessionLimits
    idle_timeout: float = 300.0
    """Seconds, for sessions that have seen both directions (REQ-5)."""
    symmetric: bool = False
    """True for one mapping for each target; otherwise it is endpoint-independent (REQ-1)."""
    filtering: str = ENDPOINT_INDEPENDENT
    """Which sources may reply (REQ-8)."""


class NatDependencies(NamedTuple):
    """What a table and its sessions need of the daemon."""

    arenas: ArenaPool
    dials: FairSubmit
    names: FairSubmit
    """A pool of its own: a name server that does not answer must delay no dial."""
    counter: Counter
    observer: Observer
    accounts: Accounts
    log: Log
    renew_fake: Callable[[str, Iterable[str]], None]  # see FakeRenewals
