"""SOCKS5 UDP associations: who may send on a relay port (RFC 1928 section 7).

UDP has no login, so the TCP control connection is the login.  An association admits endpoints
of its client's address and ends with its control connection.  Anybody who can send with that
address may be first, so an association that does not know its client's port admits several
endpoints: each has its own sessions, and none keeps the client out.  If several associations
of one client address wait for their endpoints at once, the relay can only guess which
endpoint belongs to which.  A wrong guess must not cut off a client that is still there, so
guessed endpoints pass to a successor: another association of that address and user.
Used by the threads of control connections and by the reader thread of a relay port.
"""

from __future__ import annotations

import threading

from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.typed import TYPE_CHECKING, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import DatagramSocket
    from netproxy.relay.client import Client

ENDPOINTS_LIMIT = 8
"""Endpoints that an association admits.  A client has one or two sockets.  The spare places give
its replies time to arrive during a flood of forged senders."""
DISPLACED_LIMIT = 64
"""Endpoints of an association that are displaced within a second: each costs a session."""
INHERITED_LIMIT = 16
"""Endpoints that an association may take over.  Clients come and go, and what they leave
behind must be bounded."""


class Association:
    """One UDP ASSOCIATE.  Associations guards all attributes that change."""

    __slots__ = (
        *("client", "hint", "user", "local", "endpoints", "inherited", "guessed", "ended"),
        *("second", "displaced", "stamp", "reached"),
    )

    def __init__(self, client: str, hint: int, user: str, local: DatagramSocket) -> None:
        """Describe an association.

        `client` is the address of the control connection, without port.  `hint` is the port
        that the request named, 0 if it named none.  `local` is the relay socket it may use.
        """
        self.client = client
        self.hint = hint
        self.user = user
        self.local = local
        self.stamp: object = None
        """What tells whether the user's login is still valid (access.permission)."""
        self.reached = UNSPECIFIED_ADDRESS
        """The local address of the control connection."""
        self.endpoints: dict[Address, Client | None] = {}
        """With their clients in the NAT table, None before note(); the first is the oldest."""
        self.inherited: tuple[Address, ...] = ()
        """Endpoints of associations that it succeeds."""
        self.guessed = False
        """True if more than one association could have been meant by an endpoint."""
        self.ended = False
        self.second = self.displaced = 0
        """The current second of the monotonic clock, and the endpoints displaced in it."""

    def local_address(self) -> Address:
        """Return the local address of the control connection."""
        return self.reached

    @property
    def admits_others(self) -> bool:
        """False once the endpoint that the request named has come.

        The client has told the truth about its port then, and nothing else is its own.  Until
        then the port may be wrong, as behind a NAT or from clients that name their target.
        """
        return not self.hint or all(endpoint.port != self.hint for endpoint in self.endpoints)


class Claim(NamedTuple):
    """The association of a datagram."""

    association: Association
    displaced: Client | None = None
    """The client of an endpoint that had to make room; the caller ends it."""
    is_new: bool = False
    """True if the association did not hold the endpoint before: it has no client yet."""


class Transfers(Protocol):
    """Sessions that can pass from one association to another."""

    def transfer(self, owner: object, successor: object) -> None:
        """Give all that belongs to `owner` to its successor.  Must not block."""


class Associations:
    """The live associations of a listener, by client address."""

    def __init__(self) -> None:
        # Guards _live and each association in it.
        self._lock = threading.Lock()
        self._live: dict[str, list[Association]] = {}

    def add(self, association: Association) -> None:
        """Add an association: from now on it can admit endpoints."""
        with self._lock:
            self._live.setdefault(association.client, []).append(association)

    def remove(
        self, association: Association, sessions: Transfers | None = None
    ) -> Association | None:
        """End an association; return its successor, None if its endpoints end with it.

        `sessions` are given to the successor under the lock.  The successor cannot end before
        that: nobody would ever end what came to it later.
        """
        with self._lock:
            association.ended = True
            others = self._live.get(association.client, ())
            rest = [other for other in others if other is not association]
            if rest:
                self._live[association.client] = rest
            else:
                self._live.pop(association.client, None)
            endpoints = association.inherited + tuple(association.endpoints)
            if not association.guessed or not endpoints:
                return None
            successor = _successor(association, rest, len(endpoints))
            if successor is not None:
                successor.inherited += endpoints
                if sessions is not None:
                    sessions.transfer(association, successor)
            return successor

    def claim(self, endpoint: Address, local: DatagramSocket, now: float) -> Claim | None:
        """Return the association of a datagram from `endpoint` on `local`, None if it has none.

        It is, in this order:

        1. the association that holds the endpoint;
        2. the one whose request named its port, whatever endpoints it has;
        3. the newest of that address without an endpoint, preferably one whose request named
           no port;
        4. the newest with room for a further endpoint;
        5. the newest: the endpoint that has the least to lose is displaced.

        By 4 and 5 only an association that `admits_others`, and by 5 at most DISPLACED_LIMIT
        times within a second; `now` is monotonic.
        """
        with self._lock:
            of_client = [
                association
                for association in self._live.get(endpoint.host, ())
                if association.local is local
            ]
            for association in of_client:
                if endpoint in association.endpoints or endpoint in association.inherited:
                    return Claim(association)
            claimed = _named(of_client, endpoint.port) or _guess(of_client) or _further(of_client)
            if claimed is None:
                return None
            displaced = None
            if len(claimed.endpoints) >= ENDPOINTS_LIMIT:
                if _displaces_too_much(claimed, int(now)) and claimed.hint != endpoint.port:
                    return None
                displaced = claimed.endpoints.pop(_weakest(claimed))
            claimed.endpoints[endpoint] = None
            return Claim(claimed, displaced, is_new=True)

    def note(self, association: Association, client: Client) -> None:
        """Note the client in the NAT table of an endpoint that was claimed."""
        with self._lock:
            if client.address in association.endpoints:
                association.endpoints[client.address] = client

    def __len__(self) -> int:
        """Return the number of live associations."""
        with self._lock:
            return sum(map(len, self._live.values()))


def _successor(
    association: Association, others: Sequence[Association], endpoints: int
) -> Association | None:
    """Return the association that takes over so many endpoints, None if there is none."""
    for other in others:
        same_client = other.user == association.user and other.local is association.local
        if other.guessed and same_client and len(other.inherited) + endpoints <= INHERITED_LIMIT:
            return other
    return None


def _named(of_client: Sequence[Association], port: int) -> Association | None:
    """Return the association whose request named this port, which may be forged as 0."""
    named = (association for association in of_client if association.hint == port != 0)
    return next(named, None)


def _guess(of_client: Sequence[Association]) -> Association | None:
    """Return the newest association without an endpoint."""
    free = [association for association in of_client if not association.endpoints]
    if len(free) > 1:
        for association in free:
            association.guessed = True
    return _newest(free)


def _further(of_client: Sequence[Association]) -> Association | None:
    """Return the newest association with room for a further endpoint, else the newest.

    A wrong choice costs little: the endpoint is claimed again when the association has ended.
    """
    others = [association for association in of_client if association.admits_others]
    roomy = [association for association in others if len(association.endpoints) < ENDPOINTS_LIMIT]
    return _newest(roomy or others)


def _newest(associations: Sequence[Association]) -> Association | None:
    """Return the newest of the associations, preferably one whose request named no port.

    An association that named a port probably waits for it; but many clients name a wrong port.
    """
    if not associations:
        return None
    unnamed = (association for association in reversed(associations) if not association.hint)
    return next(unnamed, associations[-1])


def _displaces_too_much(association: Association, second: int) -> bool:
    """Count an endpoint that is to be displaced; return True if there were too many."""
    if association.second != second:
        association.second, association.displaced = second, 0
    association.displaced += 1
    return association.displaced > DISPLACED_LIMIT


def _weakest(association: Association) -> Address:
    """Return the endpoint that has the least to lose; the oldest among equals."""
    return min(association.endpoints, key=lambda endpoint: _weight(association.endpoints[endpoint]))


def _weight(client: Client | None) -> tuple[int, float, int]:
    """Return how much an endpoint would lose: more for replies, then for the time of its use.

    A forged sender outweighs the client only if it uses one port for longer than the client.
    """
    if client is None or not (client.mappings or client.unrouted):
        return 0, 0.0, 0
    # A copy: the NAT table, which has another lock, may change it.
    sessions = [mapping.session for mapping in list(client.mappings.values())]
    replied = any(session.received for session in sessions)
    span = max((session.seen - session.started for session in sessions), default=0.0)
    return 1 + replied, span, sum(session.datagrams_sent for session in sessions)
