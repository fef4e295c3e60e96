"""SOCKS5 UDP associations: who may send on a relay port (RFC 1928 section 7).

UDP has no login, so the TCP control connection is the login.  An association admits one
endpoint, the first that fits, and ends with its control connection.  If several associations
of one client address wait for their endpoints at once, the relay can only guess which
endpoint belongs to which.  A wrong guess must not cut off a client that is still there, so
guessed endpoints pass to a successor: another association of that address and user.
Used by the threads of control connections and by the reader thread of a relay port.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import DatagramSocket

INHERITED_LIMIT = 16
"""Endpoints that an association may take over.  Clients come and go, and what they leave
behind must be bounded."""


class Association:
    """One UDP ASSOCIATE.  Associations guards all attributes that change."""

    __slots__ = ("client", "hint", "user", "local", "endpoint", "inherited", "guessed", "ended")

    def __init__(self, client: str, hint: int, user: str, local: DatagramSocket) -> None:
        """Describe an association.

        `client` is the address of the control connection, without port.  `hint` is the port
        that the request named, 0 if it named none.  `local` is the relay socket it may use.
        """
        self.client = client
        self.hint = hint
        self.user = user
        self.local = local
        self.endpoint: Address | None = None
        self.inherited: tuple[Address, ...] = ()
        """Endpoints of associations that it succeeds."""
        self.guessed = False
        """True if more than one association could have been meant by its endpoint."""
        self.ended = False


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
        """Add an association: from now on it can admit an endpoint."""
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
            endpoints = association.inherited
            if association.endpoint is not None:
                endpoints += (association.endpoint,)
            if not association.guessed or not endpoints:
                return None
            successor = _successor(association, rest, len(endpoints))
            if successor is not None:
                successor.inherited += endpoints
                if sessions is not None:
                    sessions.transfer(association, successor)
            return successor

    def claim(self, endpoint: Address, local: DatagramSocket) -> Association | None:
        """Return the association of a datagram from `endpoint` on `local`, None if it has none.

        It is the association that holds the endpoint; else the one whose request named its
        port, even if a guess has given it another endpoint; else the newest of that address
        without an endpoint, preferably one whose request named no port.
        """
        with self._lock:
            of_client = [
                association
                for association in self._live.get(endpoint.host, ())
                if association.local is local
            ]
            for association in of_client:
                if endpoint == association.endpoint or endpoint in association.inherited:
                    return association
            claimed = _named(of_client, endpoint.port) or _guess(of_client)
            if claimed is not None:
                claimed.endpoint = endpoint
            return claimed

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
    """Return the association whose request named this port.

    One that already holds an endpoint with that port is not meant.
    """
    for association in of_client:
        endpoint = association.endpoint
        if association.hint == port and (endpoint is None or endpoint.port != port):
            return association
    return None


def _guess(of_client: Sequence[Association]) -> Association | None:
    """Return the newest association without an endpoint."""
    free = [association for association in of_client if association.endpoint is None]
    if not free:
        return None
    if len(free) > 1:
        for association in free:
            association.guessed = True
    # A request that named a port probably waits for that one; but many clients name rubbish.
    unnamed = (association for association in reversed(free) if not association.hint)
    return next(unnamed, free[-1])
