"""What the running configuration permits the clients of a listener.

A connection or an association outlives the configuration that it began with.  Open targets
continue.  Each new target and each new HTTP request is checked here first.  After a reload, the
Permission objects of earlier configurations apply the new configuration.
Datagrams to known targets never ask.  Thread: any; commit() is called by the main thread.
"""

from __future__ import annotations

from netproxy.interfaces.fairness import client_key
from netproxy.errors import DialError, Reason
from netproxy.interfaces.listeners import CLIENT_NOT_ALLOWED, decided_by
from netproxy.interfaces.services import Refusal
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, Protocol, Sequence

if TYPE_CHECKING:
    from weakref import WeakSet

    from netproxy.access.accounts.standing import Standing
    from netproxy.access.login import Login
    from netproxy.access.sources import Sources
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.listeners import AllowedClients
    from netproxy.interfaces.routing import Router
    from netproxy.interfaces.services import Counter

LISTENER_REMOVED = "listener removed"
LOGIN_REQUIRED = "login required"
USER_REMOVED = "user removed"
PASSWORD_CHANGED = "password changed"


class Routed(Protocol):
    """A handler that chooses upstreams with `router`."""

    router: Router


class Permission:
    """What the running configuration allows the clients of one listener."""

    __slots__ = (
        *("listener", "login", "sources", "_clients", "_routed", "_counter", "_standing"),
        *("_removed", "__weakref__"),
    )

    def __init__(
        self,
        listener: str,
        login: Login,
        clients: AllowedClients,
        counter: Counter,
        standing: Standing,
    ) -> None:
        """`login` is used by the handlers of the listener and follows as well."""
        self.listener = listener
        self.login = login
        self.sources: Sources | None = None
        """Where new flows leave from; None if no configured bind concerns them."""
        self._clients = clients
        self._routed: Sequence[Routed] = ()
        self._counter = counter
        self._standing = standing
        self._removed = False

    def set_routed(self, routed: Sequence[Routed]) -> None:
        """Have these handlers of the listener follow as well."""
        self._routed = routed

    def stamp(self, user: str) -> object:
        """Return a value that stays equal while the login of `user` is valid."""
        return self.login.stamp(user)

    def refusal(self, flow: Flow) -> str:
        """Return why the client of a flow gets nothing new, "" if it does."""
        client = flow.client.host
        if self._removed or not self._clients.everybody:
            if refusal := self._address_refusal(client):
                return refusal
        standing = self._standing
        if standing.restricts and (refusal := standing.refusal(flow.user, client_key(client))):
            return refusal
        login, user = self.login, flow.user
        if not user:
            return LOGIN_REQUIRED if login.required else ""
        if login.offered:
            running = login.stamp(user)
            if running != flow.stamp:
                if running is not None:
                    return PASSWORD_CHANGED
                return "" if login.is_granted(user, flow.stamp) else USER_REMOVED
        return ""

    def check(self, flow: Flow, asked: Callable[[], str] | None = None) -> None:
        """Raise DialError, counted and recorded, if a request for a flow is refused.

        `asked` returns what the client asked for; None: for the flow's target.
        """
        if refusal := self.refusal(flow):
            decided = self._decided_by(refusal, flow.client.host, flow.user)
            refused = flow.refusal("requests_refused", refusal, decided)
            if asked is not None:
                refused = refused._replace(asked=asked())
            error = DialError(Reason.DENIED, said=refusal)
            raise error.recorded_as(self._counter.refuse(refused))

    def refuses(self, flow: Flow, datagrams: int) -> bool:
        """Return whether a new flow is refused; count and record its datagrams then."""
        refusal = self.refusal(flow)
        if refusal:
            decided = self._decided_by(refusal, flow.client.host, flow.user)
            refused = flow.refusal("drops", refusal, decided)
            self._counter.refuse(refused, datagrams)
        return bool(refusal)

    def check_client(self, client: str) -> None:
        """Raise DialError, counted, if a client address gets nothing new for any user."""
        if refusal := self._client_refusal(client):
            decided = self._decided_by(refusal, client)
            refused = Refusal("requests_refused", refusal, self.listener, client, "", decided)
            error = DialError(Reason.DENIED, said=refusal)
            raise error.recorded_as(self._counter.refuse(refused))

    def _client_refusal(self, client: str) -> str:
        return self._address_refusal(client) or self._standing.refusal("", client_key(client))

    def _address_refusal(self, client: str) -> str:
        if self._removed:
            return LISTENER_REMOVED
        return CLIENT_NOT_ALLOWED if self._clients.refused_by(client) else ""

    def _decided_by(self, refusal: str, client: str, user: str = "") -> str:
        """Return the key of the configuration that has decided a refusal."""
        if refusal == CLIENT_NOT_ALLOWED:
            return self._clients.refused_by(client)
        return decided_by(refusal, user)

    def follow(self, newer: Permission | None, router: Router) -> None:
        """Permit from now on what `newer` does; None if the listener has been removed.

        `router` chooses the upstreams of everything that is new.
        """
        self._removed = newer is None
        if newer is not None:
            self._clients = newer._clients
            self.sources = newer.sources
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
