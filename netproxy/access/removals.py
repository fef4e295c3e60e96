"""Ends what users have open whose login is not valid any more (`end_on_removal`).

After a reload their new targets and requests are refused anyway (access.permission).  Here their
flows end, and the client connections that they logged in with: tunnels, associations, streams of
datagrams, kept HTTP connections.
"""

from __future__ import annotations

from netproxy.access.permission import PASSWORD_CHANGED, USER_REMOVED
from netproxy.typed import TYPE_CHECKING, Iterable, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.access.external.logins import ExternalLogins
    from netproxy.access.checks.known_users import KnownUsers
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import LiveFlow


class ClientConnection(Protocol):
    """A connection of a client."""

    @property
    def stream(self) -> Stream:
        """Its stream, which knows the login."""

    def end_because(self, why: str) -> None:
        """End soon, for a reason of interfaces.listeners.DECIDED_BY."""


class Removed(NamedTuple):
    """The numbers of what has ended."""

    flows: int
    connections: int


def end_removed(
    users: KnownUsers,
    flows: Iterable[LiveFlow],
    connections: Iterable[ClientConnection],
    external: ExternalLogins | None = None,
) -> Removed:
    """End the flows and connections of users who are not in `users` with the same password.

    Those that the `external` check has accepted, and not refused since, go on.
    """
    ended, closed = 0, 0
    # First: the record of a flow says why it ends, not that its client has left.
    for live in flows:
        if why := _removal(users, live.flow.user, live.flow.stamp, external):
            live.kill(why)
            ended += 1
    for connection in connections:
        login = connection.stream.login
        if login is not None and (why := _removal(users, *login, external)):
            connection.end_because(why)
            closed += 1
    return Removed(ended, closed)


def _removal(users: KnownUsers, user: str, stamp: object, external: ExternalLogins | None) -> str:
    """Return why a login is not valid any more, "" if it is; `user` is "" for none."""
    if not user or (running := users.stamp(user)) == stamp:
        return ""
    if running is None and external is not None and external.answers.is_valid(user, stamp):
        return ""
    return USER_REMOVED if running is None else PASSWORD_CHANGED
