"""SOCKS5 UDP associations: who may send on a relay port (RFC 1928 section 7).

UDP has no login, so the TCP control connection is the login.  An association
admits one endpoint, the first that fits, and ends with its control connection.
Where several of one client wait at once, which endpoint is whose can only be
guessed; a guess must not cut off the wrong one, so that such endpoints pass to
another association of that client and user when theirs ends.
Used by the threads of control connections and by the relay port's reader.
"""

from __future__ import annotations

import threading
from typing import Any, Callable

from netproxy.interfaces.addresses import Address


INHERITED_LIMIT = 16  # endpoints an association may take over: clients come and go, and what they leave is bounded


class Association:
    """One ASSOCIATE.  `local` is the relay socket it may use; the rest is Associations' own."""

    __slots__ = ("client", "hint", "user", "local", "endpoint", "inherited", "guessed", "ended")

    def __init__(self, client: str, hint: int, user: str, local: Any) -> None:
        """`client`: the control connection's address, without port; `hint`: the port the request named, 0 for none."""
        self.client = client
        self.hint = hint
        self.user = user
        self.local = local
        self.endpoint: Address | None = None
        self.inherited: tuple[Address, ...] = ()
        self.guessed = False  # its endpoint may be another's: more than one could have been meant
        self.ended = False


Bequeath = Callable[
    [Association, Association], None
]  # what one has that ends, to its heir; must not block


class Associations:
    """Those that live, by client address."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _live and each association in it
        self._live: dict[str, list[Association]] = {}

    def add(self, association: Association) -> None:
        with self._lock:
            self._live.setdefault(association.client, []).append(association)

    def remove(
        self, association: Association, bequeath: Bequeath = lambda association, heir: None
    ) -> Association | None:
        """Ends an association; the one that takes over its endpoints, if there is any.

        That one cannot end before `bequeath` has returned: what came to it later nobody would ever end.
        """
        with self._lock:
            association.ended = True
            rest = [one for one in self._live.get(association.client, ()) if one is not association]
            if rest:
                self._live[association.client] = rest
            else:
                self._live.pop(association.client, None)
            left = (
                *association.inherited,
                *([association.endpoint] if association.endpoint else []),
            )
            if not association.guessed or not left:
                return None
            heir = next(
                (
                    one
                    for one in rest
                    if one.guessed
                    and (one.user, one.local) == (association.user, association.local)
                    and len(one.inherited) + len(left) <= INHERITED_LIMIT
                ),
                None,
            )
            if heir is not None:
                heir.inherited += left
                bequeath(association, heir)
            return heir

    def claim(self, endpoint: Address, local: Any) -> Association | None:
        """The association that a datagram from `endpoint` on socket `local` belongs to; None for a stranger.

        The one that holds the endpoint; else the one whose request named its port, even if a guess has given it
        away; else the newest of those of that address that hold none, those that named no port first.
        """
        with self._lock:
            of_client = [one for one in self._live.get(endpoint.host, ()) if one.local is local]
            for association in of_client:
                if endpoint == association.endpoint or endpoint in association.inherited:
                    return association
            association = _named(of_client, endpoint.port) or _guess(of_client)
            if association is not None:
                association.endpoint = endpoint
            return association

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._live.values()))


def _named(of_client: list[Association], port: int) -> Association | None:
    """The one whose request named this port, unless it holds an endpoint with that port already."""
    return next(
        (
            one
            for one in of_client
            if one.hint == port and (one.endpoint is None or one.endpoint.port != port)
        ),
        None,
    )


def _guess(of_client: list[Association]) -> Association | None:
    free = [one for one in of_client if one.endpoint is None]
    if not free:
        return None
    if len(free) > 1:
        for one in free:
            one.guessed = True
    # one that named a port is probably waiting for just that; but many clients name rubbish
    return next((one for one in reversed(free) if not one.hint), free[-1])
