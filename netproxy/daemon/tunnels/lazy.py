"""The daemon's tunnels, made when a configuration first needs them.

Most daemons have no tunnel; they never load netproxy.daemon.tunnels.tunnels.  Until the tunnels
are made, everything here answers that there are none.  Thread: main, except dialer() and
what only reads.
"""

from __future__ import annotations

from netproxy.config.schema import Config, TunnelConfig
from netproxy.typed import TYPE_CHECKING, Iterable, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.answers import DirectRow
    from netproxy.interfaces.datagrams import Introducer
    from netproxy.daemon.runtime import Runtime
    from netproxy.daemon.tunnels.tunnels import Tunnels
    from netproxy.dialer.factory import DialerFactory
    from netproxy.dialer.hop import ProxyDialer
    from netproxy.handler.factory import HandlerDependencies
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.routing import Dialer
    from netproxy.interfaces.services import PreparedChange


class LazyTunnels:
    """Stands for the daemon's Tunnels, which are kept over reloads once they are made."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.current: Tunnels | None = None
        """None until they are made."""

    def obtain(self) -> Tunnels:
        """Return the tunnels; make them if need be.  They do nothing before a commit."""
        if self.current is None:
            from netproxy.daemon.tunnels.tunnels import Tunnels

            self.current = Tunnels(self._runtime)
        return self.current

    def dialer(self, agent: Address, seconds: float) -> Dialer:
        """Return the dialer of tunnel://AGENT or tunnel://AGENT/PORT (Tunnels.dialer)."""
        return self.obtain().dialer(agent, seconds)

    def with_direct(self, plain: ProxyDialer) -> ProxyDialer:
        """Return a dialer whose datagrams may go directly to agents (Tunnels.with_direct)."""
        return self.obtain().with_direct(plain)

    def introducer(self, config: Config) -> Introducer | None:
        """Return what has clients and agents talk directly, None if the bridge does not."""
        bridge = config.tunnel.bridge
        is_direct = bridge is not None and bridge.direct
        return self.obtain().obtain_direct() if is_direct else None

    def check(self, config: Config) -> None:
        """Read the files that the agent's configuration names.  Raises ConfigError."""
        if config.tunnel.agent is not None:
            self.obtain().read(config)

    def prepare(
        self, config: Config, dependencies: HandlerDependencies, dialers: DialerFactory
    ) -> PreparedChange:
        """Prepare the tunnels of a configuration; start the thread of a new agent.

        Raises ConfigError if a file cannot be used, ListenError if no thread can be had.
        """
        if self.current is None and config.tunnel == TunnelConfig():
            return _NoChange()
        return self.obtain().prepare(config, dependencies, dialers)

    def use_listeners(self, listeners: Iterable[object]) -> None:
        """Offer agents datagram paths to those of the listeners that take their packets."""
        if self.current is not None:
            self.current.use_listeners(listeners)

    # -- what the running tunnels are asked

    @property
    def live(self) -> int:
        """The connections that have not ended."""
        return self.current.live if self.current is not None else 0

    def obstacle(self, agent: Address) -> str | None:
        """Return why tunnel://AGENT would fail at once (Tunnels.obstacle)."""
        return self.current.obstacle(agent) if self.current is not None else None

    def dead_thread(self) -> str:
        """Return the name of a thread that must live and does not, "" if all is well."""
        return self.current.dead_thread() if self.current is not None else ""

    def describe(self) -> dict[str, object]:
        """Return the agents that are connected, and the state of the daemon's own agent."""
        if self.current is None:
            return {"agents": [], "agent": None, "direct": []}
        return self.current.describe()

    def direct_paths(self) -> Sequence[DirectRow]:
        """Return the direct paths, as the bridge or as one of the two sides."""
        return self.current.direct_paths() if self.current is not None else ()

    def summary(self) -> Iterable[str]:
        """Return a line for each connected agent, for the log."""
        return self.current.summary() if self.current is not None else ()

    def stop_accepting(self) -> None:
        """Take nothing new; what the tunnels carry goes on."""
        if self.current is not None:
            self.current.stop_accepting()

    def stop(self) -> None:
        """End everything that the tunnels carry."""
        if self.current is not None:
            self.current.stop()


class _NoChange:
    """A PreparedChange that changes nothing."""

    def commit(self) -> None:
        """Do nothing."""

    def discard(self) -> None:
        """Do nothing."""
