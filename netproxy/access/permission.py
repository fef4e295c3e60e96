"""What the running configuration permits the clients of a listener.

A connection or an association outlives the configuration that it began with.  What it has
open goes on; everything new that it asks for, a target or an HTTP request, is asked for here
first.  A reload has the permissions of the configurations before follow the new one.
Datagrams to known targets never ask.  Thread: any; commit() is called by the main thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping, Protocol, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.listeners import DECIDED_BY
from netproxy.interfaces.services import Refusal

if TYPE_CHECKING:
    from weakref import WeakSet

    from netproxy.access.login import Login
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.networks import HostSet
    from netproxy.interfaces.routing import Router
    from netproxy.interfaces.services import Counter

LISTENER_REMOVED = "listener removed"
CLIENT_NOT_ALLOWED = "client not allowed"
LOGIN_REQUIRED = "login required"
USER_REMOVED = "user removed"
PASSWORD_CHANGED = "password changed"


class Routed(Protocol):
    """What asks a router for each new flow."""

    router: Router


class Permission:
    """What the clients of one listener may do today."""

    __slots__ = ("listener", "login", "_clients", "_routed", "_counter", "_removed", "__weakref__")

    def __init__(
        self,
        listener: str,
        login: Login,
        clients: HostSet | None,
        routed: Sequence[Routed],
        counter: Counter,
    ) -> None:
        """`login` and `routed` are used by the handlers of the listener and follow as well.

        `clients` None: every client may come.
        """
        self.listener = listener
        self.login = login
        self._clients = clients
        self._routed = routed
        self._counter = counter
        self._removed = False

    def stamp(self, user: str) -> object:
        """Return what tells later whether the login of `user` is still valid."""
        return self.login.stamp(user)

    def refusal(self, client: str, user: str, stamp: object) -> str:
        """Return why a client address gets nothing new, "" if it does.

        `user` is who has logged in, with the stamp of that time; "" without a login.
        """
        if refusal := self._client_refusal(client):
            return refusal
        login = self.login
        if not user:
            return LOGIN_REQUIRED if login.required else ""
        if login.offered:
            today = login.stamp(user)
            if today != stamp:
                return USER_REMOVED if today is None else PASSWORD_CHANGED
        return ""

    def refuses(self, flow: Flow, stamp: object, datagrams: int) -> bool:
        """Return whether a flow is refused today; count and record its datagrams then.

        `stamp`: of the flow's user, from the time of the login.
        """
        refusal = self.refusal(flow.client.host, flow.user, stamp)
        if refusal:
            refused = flow.refusal("drops", refusal, DECIDED_BY.get(refusal, ""))
            self._counter.refuse(refused, datagrams)
        return bool(refusal)

    def check_client(self, client: str) -> None:
        """Raise DialError, counted, if a client address gets nothing new, whoever logs in."""
        if refusal := self._client_refusal(client):
            refused = Refusal("requests_refused", refusal, self.listener, client)
            self._counter.refuse(refused._replace(decided=DECIDED_BY.get(refusal, refusal)))
            raise DialError(Reason.DENIED, refusal)

    def _client_refusal(self, client: str) -> str:
        if self._removed:
            return LISTENER_REMOVED
        if self._clients is not None and client not in self._clients:
            return CLIENT_NOT_ALLOWED
        return ""

    def follow(self, newer: Permission | None, router: Router) -> None:
        """Permit from now on what `newer` does; None if the listener has been removed.

        `router` chooses the upstreams of everything that is new.
        """
        self._removed = newer is None
        if newer is not None:
            self._clients = newer._clients
            self.login.follow(newer.login)
        for routed in self._routed:
            routed.router = router


class Permissions:
    """The permissions of all configurations that have been in force, as long as they are used."""

    def __init__(self) -> None:
        self._newest: Sequence[Permission] = ()
        # Made by the first reload: weakref costs 0.1 MiB.
        self._followers: WeakSet[Permission] | None = None

    def commit(self, permissions: Sequence[Permission], router: Router) -> None:
        """Have the permissions of earlier configurations follow these, by listener."""
        before, self._newest = self._newest, permissions
        if self._followers is None:
            if not before:
                return
            from weakref import WeakSet  # late: see __init__()

            self._followers = WeakSet()
        self._followers.update(before)
        newest: Mapping[str, Permission] = {
            permission.listener: permission for permission in permissions
        }
        for follower in list(self._followers):
            follower.follow(newest.get(follower.listener), router)
