"""The daemon's tunnels, made when a configuration first needs them.

Most daemons have no tunnel; they never load netproxy.daemon.tunnels.tunnels.  Until the tunnels
are made, everything here answers that there are none.  Thread: main, except dialer() and
what only reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable

from netproxy.config.schema import Config, TunnelConfig

if TYPE_CHECKING:
    from netproxy.daemon.runtime import Runtime
    from netproxy.daemon.tunnels.tunnels import Tunnels
    from netproxy.dialer.factory import DialerFactory
    from netproxy.handler.factory import HandlerDependencies
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

    def dialer(self, agent: str, seconds: float) -> Dialer:
        """Return the dialer of tunnel://AGENT; `seconds` for each connection."""
        return self.obtain().dialer(agent, seconds)

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

    # -- what the running tunnels are asked

    @property
    def live(self) -> int:
        """The connections that have not ended."""
        return self.current.live if self.current is not None else 0

    def dead_thread(self) -> str:
        """Return the name of a thread that must live and does not, "" if all is well."""
        return self.current.dead_thread() if self.current is not None else ""

    def describe(self) -> dict[str, object]:
        """Return the agents that are connected, and the state of the daemon's own agent."""
        if self.current is None:
            return {"agents": [], "agent": None}
        return self.current.describe()

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
