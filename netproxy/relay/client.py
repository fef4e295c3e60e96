"""A client endpoint of a NAT table: where its replies go, and which mappings it has.

NatTable guards every attribute with its lock.  The readers of the client's sessions read
`local`, `reply_destination`, `wrap` and `draining` without it; these never change.
"""

from __future__ import annotations

from netproxy.interfaces.fairness import client_key
from netproxy.typed import TYPE_CHECKING, Callable, Hashable, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Destination, ReplySocket
    from netproxy.relay.entry import Key, NatMapping


class DrainingSocket(Protocol):
    """A reply socket that queues what its peer does not take at once."""

    @property
    def waits(self) -> bool:
        """Whether anything is in the queue."""

    def drain(self, given_up: Callable[[], bool]) -> None:
        """Block until the queue has been sent, or until given_up() is true."""


class Client:
    """One client endpoint on one listening socket."""

    __slots__ = (
        "peer",
        "peers",
        "address",
        "share",
        "local",
        "reply_destination",
        "wrap",
        "owner",
        "user",
        "mappings",
        "filtering",
        "draining",
        "waiting",
        "unrouted",
        "bound_ended",
    )

    def __init__(
        self,
        peer: Hashable,
        address: Address,
        local: ReplySocket,
        wrap: Callable[[Address], bytes],
        owner: object,
        user: str = "",
    ) -> None:
        """Describe a client.

        `peer` is its key at the socket `local`.  `wrap` returns the header that precedes a
        reply from a source.  The client's sessions end with `owner` (an association, a
        stream); a client without owner (None) is known as long as it has an entry.  `user`
        is who logged in.
        """
        self.peer = peer
        self.peers: tuple[Hashable, ...] = (peer,)
        """All its keys in the table; the first is `peer`."""
        self.address = address
        self.share = client_key(address.host)
        """The client that its sessions and datagrams count for (interfaces.fairness)."""
        self.local = local
        self.reply_destination: Destination | None = local.reply_destination(peer)
        self.wrap = wrap
        self.owner = owner
        self.user = user
        self.mappings: dict[object, NatMapping] = {}
        """By dialer, or by dialer and target if the mapping is symmetric."""
        self.filtering = ""
        """Which sources may reply; "" if the table's policy decides."""
        self.draining: DrainingSocket | None = None
        """Set if replies leave by a stream."""
        self.waiting = 0
        """Datagrams that wait, in all its entries."""
        self.unrouted: set[Key] = set()
        """Keys of entries in EntryState.ROUTING."""
        self.bound_ended: Callable[[], None] | None = None
        """Set if its address at targets must stay: it has one session, at whose end this is
        called (NatTable.keep_bound)."""


def no_header(source: Address) -> bytes:
    """Return nothing: the `wrap` of a client whose replies do not name their source."""
    return b""
