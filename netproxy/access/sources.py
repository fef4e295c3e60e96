"""Where the flows of a listener leave from, as its own bind and those of the users say.

The bind of the user comes before that of the listener.  The dialer of the flow decides: the
bind of its upstream comes before both.  Immutable; any thread.
"""

from __future__ import annotations

from netproxy.interfaces.flows import FlowSource
from netproxy.typed import TYPE_CHECKING, Callable, Mapping

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.routing import Bind


class Sources:
    """The binds that may concern the flows of one listener."""

    __slots__ = ("_default", "_by_user", "_needs_incoming")

    def __init__(
        self, bind: Bind | None, listener: str, users: Mapping[str, Bind], needs_incoming: bool
    ) -> None:
        """`bind` is that of `listener`.

        `needs_incoming`: an upstream, the listener or a user asks for the local address that
        the client connected to.
        """
        self._default = FlowSource(bind, f"bind of listener '{listener}'" if bind else "", "")
        self._by_user = {
            name: FlowSource(of_user, f"users.{name}.bind", "") for name, of_user in users.items()
        }
        self._needs_incoming = needs_incoming

    def of(self, user: str, reached: Callable[[], Address]) -> FlowSource:
        """Return the source of a flow of `user`, "" for none.

        `reached()` returns the local address that the client connected to.
        """
        source = self._by_user.get(user, self._default)
        return source._replace(incoming=reached().host) if self._needs_incoming else source
