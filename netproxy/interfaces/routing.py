"""Upstreams and the decision for one: dialers, routes, names and destinations."""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, Iterable, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from socket import socket as TcpSocket

    from netproxy.errors import Reason
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Descriptor, Stream
    from netproxy.interfaces.datagrams import PacketConn
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.networks import IpNetwork


class Dialer(Protocol):
    """An upstream.  It wraps the dialer of the hop before it, so that a chain needs no engine."""

    name: str
    carries: frozenset[str]
    """Some of "tcp", "udp" and "bind"."""
    refusal: Reason
    """The reason of the DialError for what the upstream does not carry."""
    resolves_names: bool
    """True if the upstream resolves names itself.  Otherwise the flow's addresses are dialled."""

    @property
    def symmetric(self) -> bool:
        """True if a packet connection is for its flow's target alone, as far as is known."""

    @property
    def knows_bound(self) -> bool:
        """True if packet connections may know PacketConn.bound; one for a name may not."""

    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target.  Blocks.  Raises DialError."""

    def dial_packet(self, flow: Flow) -> PacketConn:
        """Open a packet connection for all datagrams of one client.  Blocks.  Raises DialError."""

    def fixed_for(self, flow: Flow) -> Dialer:
        """Return this upstream with the members that its groups choose for the flow.

        Returns the dialer itself if no group is involved.
        """


class NonBlockingDialer:
    """Base of the dialers that can connect without blocking.

    No Protocol: each connection asks isinstance(), on the poller's thread.  For a Protocol that
    looks every attribute up, and Python 3.12 reads the file of the module inspect for it.
    """

    def begin(self, flow: Flow) -> PendingDial | None:
        """Begin to connect; return None if connecting needs blocking work (a name lookup).

        Raises DialError.
        """
        raise NotImplementedError


class PendingDial(Protocol):
    """A TCP connection that is being established; its socket becomes writable when it is settled.

    Call finish() or close() exactly once.
    """

    local: Address | None
    """The local address, once finish() has returned."""

    @property
    def socket(self) -> Descriptor:
        """What to watch."""

    @property
    def left(self) -> float:
        """Seconds until the dial fails with a timeout."""

    def settled(self) -> bool:
        """Return whether the connection has been established or has failed."""

    def finish(self) -> TcpSocket:
        """Return the connected, non-blocking socket.  Raises DialError; TIMEOUT if not settled."""

    def close(self) -> None:
        """Abandon the attempt."""


class Route(NamedTuple):
    """A decision: the upstream, and the flow with the addresses that were looked up for it."""

    dialer: Dialer
    flow: Flow
    rule: str = ""
    """What decided: a rule such as "rules[2]", "users.alice.upstream" for the user's own upstream,
    "listener" for that of the listener, or "default"; "" if there was nothing to decide."""


class UserUpstreams(Protocol):
    """The upstreams of users with their own.  Thread: any; never blocks."""

    def get(self, user: str, /) -> tuple[str, Dialer] | None:
        """Return what Route.rule says and the dialer, None if the user has no upstream."""


class Router(Protocol):
    """Chooses the upstream of a flow.  Thread: any."""

    def named(self, flow: Flow) -> Flow:
        """Return the flow with the name that its client wants, as route() and records need it.

        Never blocks.  Raises FlowRefused for a fake address without a name.
        """

    def route(self, flow: Flow) -> Route:
        """Decide; may block for a name lookup.

        Raises DialError if the target may not be reached or its name is not found.
        """

    def route_without_blocking(self, flow: Flow) -> Route | None:
        """Decide; return None if a name must be looked up first.  Raises DialError."""

    def candidates(self, flow: Flow) -> Iterable[Dialer]:
        """Return all dialers that a flow like this may get, whatever its target."""


class Resolver(Protocol):
    """Looks names up."""

    def resolve(
        self, target: Address, client: str = ..., seconds: float = ...
    ) -> Sequence[Address]:
        """Return the addresses of a target, at least one.

        `client` is the host on whose behalf the name is looked up, "" for NetProxy itself:
        clients have equal shares of the lookups that run at a time.
        Blocks for at most `seconds`.  Raises DialError(NAME or TIMEOUT).
        """

    def known(self, target: Address) -> Sequence[Address] | None:
        """Return cached addresses without blocking, None if the cache has none.

        Raises DialError(NAME) for a name that was recently not found.
        """


class NameMemory(Protocol):
    """Which client was told which address for which name.  Thread: any; never blocks."""

    def note(
        self, client: str, addresses: Sequence[str], name: str, until: float, now: float
    ) -> None:
        """Remember the name of addresses for a client until a time, in monotonic seconds."""

    def find(self, client: str, address: str, now: float) -> str:
        """Return the name that a client last asked for and got an address, "" for none."""


class FakeAddresses(Protocol):
    """The addresses that dns listeners answer in place of those of names."""

    def name(self, host: str, client: str) -> str | None:
        """Return the name of a fake address that a client (its host) uses, "" if it has none.

        Returns None for all other hosts.
        """


class NamedFlows(Protocol):
    """Names for flows to an address."""

    def named(self, flow: Flow) -> Flow:
        """Return the flow with its name, if there is one.  Never blocks.  Raises FlowRefused."""


class DnsSource(Protocol):
    """Where answers come from.  resolver.forwarder.DnsForwarder is the implementation."""

    def answer(self, query: bytes, client: str) -> bytes | None:
        """Return the answer if it needs no server, else None.  `client` is the host that asks.

        Raises ProtocolError, QueryRefused.
        """

    def forward(self, query: bytes, seconds: float) -> bytes:
        """Return the answer of a server, SERVFAIL if none answers within `seconds`.

        Blocks.  Raises ProtocolError.
        """


class DnsCache(Protocol):
    """Cached answers.  resolver.answer_cache.AnswerCache is the implementation.

    A key is that of dns_message.cache_key(); `now` is in monotonic seconds.
    """

    def ready(self, query: bytes, now: float) -> bytes | None:
        """Return a cached answer if it is at hand, without reading the query; else None.

        Takes no lock, as find(): both are called for every datagram.
        """

    def find(self, key: bytes, query: bytes, now: float) -> bytes | None:
        """Return the cached answer to a query with this key, None if there is none."""

    def keep(self, key: bytes, message: bytes, now: float) -> None:
        """Cache an answer for as long as its TTLs allow."""

    def has_stale(self, key: bytes, now: float) -> bool:
        """Return whether there is an answer that may be used if the servers fail."""

    def revive(self, key: bytes, now: float) -> bool:
        """Use a stale answer for a while; return False if there is none."""


class RouteSelectors(NamedTuple):
    """Options of a socket that policy routing looks at; empty: the system's choice."""

    mark: int = 0
    """SO_MARK."""
    device: str = ""
    """The interface (SO_BINDTODEVICE)."""
    source: str = ""
    """The local address."""


ANY_ROUTE = RouteSelectors()
"""The selectors of a socket without options."""


class Bind(NamedTuple):
    """Where connections leave from, as `bind` and `rotate` say: one of the four kinds."""

    text: str
    """As written."""
    address: str = ""
    """A local address."""
    device: str = ""
    """An interface."""
    incoming: bool = False
    """True for the local address that the client connected to."""
    prefix: IpNetwork | None = None
    """A network, of which each flow gets an address."""
    rotate: str = "connection"
    """What gets an address of its own: "connection", "client", "user", "target", or the duration
    as written."""
    period: float = 0.0
    """Seconds of that duration; 0 for none."""

    @property
    def keeps(self) -> bool:
        """True if an address stays with something, and is not random."""
        return self.prefix is not None and self.rotate != "connection"

    def __str__(self) -> str:
        return self.text if self.prefix is None else f"{self.text}, rotate {self.rotate}"


class Nat64(Protocol):
    """Leads to IPv4 targets from a network that has IPv6 only."""

    def translate(
        self, addresses: Sequence[Address], selectors: RouteSelectors, seconds: float
    ) -> Sequence[Address]:
        """Return the addresses to dial in place of these, one for each.

        Returns `addresses` itself if any can be dialled as it is, or the network has no NAT64.
        `selectors`: of the socket that is to connect.  Blocks for at most `seconds`.
        """

    def translate_now(
        self, addresses: Sequence[Address], selectors: RouteSelectors
    ) -> Sequence[Address] | None:
        """Return the same without blocking, None if that needs a lookup."""


class DestinationGuard(Protocol):
    """Decides which addresses may be dialled."""

    def permitted(self, flow: Flow, addresses: Sequence[Address]) -> tuple[Address, ...]:
        """Return the addresses that the flow may be dialled to, at least one.

        Raises DialError(DENIED or LOOP).
        """

    def is_own_port(self, flow: Flow) -> bool:
        """Return whether the daemon listens on the port of the flow's target, on any address."""

    def without_own(
        self, flow: Flow, addresses: Sequence[Address], selectors: RouteSelectors
    ) -> tuple[Address, ...]:
        """Return the addresses that do not lead to the daemon's own sockets, at least one.

        `selectors`: of the socket that is to connect to them.  Raises DialError(LOOP).
        """
