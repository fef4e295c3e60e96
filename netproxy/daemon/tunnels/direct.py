"""Makes what direct paths between clients and agents need.  Thread: main."""

from __future__ import annotations

from functools import partial

from netproxy.daemon.tunnels.connector import dial_datagrams
from netproxy.daemon.tunnels.paths import path_services
from netproxy.dialer.web.http import HttpDialer
from netproxy.tunnel.direct.bridge import DirectOffers, DirectServices
from netproxy.tunnel.direct.client import DirectClient
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.daemon.runtime import Runtime
    from netproxy.dialer.hop import ProxyDialer
    from netproxy.interfaces.answers import DirectRow
    from netproxy.tunnel.path.bridge import BridgePaths
    from netproxy.tunnel.control.sessions import AgentSessions


class DirectUpstreams:
    """The upstreams whose datagrams may go directly to agents behind them."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # The set's own calls are atomic.
        self._clients: set[DirectClient] = set()
        """Those that are in use."""

    def with_direct(self, plain: ProxyDialer) -> ProxyDialer:
        """Return a dialer like `plain` whose datagrams may go directly to agents."""
        assert isinstance(plain, HttpDialer)  # config.sections.hops has seen to it
        services, submit = path_services(self._runtime), self._runtime.dials
        dial = partial(dial_datagrams, plain.hop)
        return plain.with_direct(DirectClient(services, submit, dial, self))

    def add(self, client: DirectClient) -> None:
        """Look after a client that has its first request (tunnel.direct.client.ClientKeeper)."""
        self._clients.add(client)
        self._runtime.janitor.register(client)

    def remove(self, client: DirectClient) -> None:
        """Forget a client that has none."""
        self._runtime.janitor.unregister(client)
        self._clients.discard(client)

    def describe_direct(self) -> list[DirectRow]:
        """Return the direct paths of all upstreams, for netproxyctl."""
        return [row for client in list(self._clients) for row in client.describe()]

    def stop(self) -> None:
        """End all direct paths."""
        for client in list(self._clients):
            client.close()


def direct_offers(runtime: Runtime, paths: BridgePaths, sessions: AgentSessions) -> DirectOffers:
    """Return the bridge's part in direct paths."""
    has_quota = runtime.standing.has_quota
    return DirectOffers(DirectServices(paths, sessions, has_quota, runtime.counters))
