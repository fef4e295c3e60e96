"""Starts, replaces and stops the control socket, and the listeners for metrics and for browsers.

All belong to a configuration: on a reload they are replaced together with everything else,
or not at all.  Thread: main, except where stated.  Modules for servers that are not
configured are never loaded.
"""

from __future__ import annotations

import threading
import time

from netproxy.errors import ListenError
from netproxy.typed import TYPE_CHECKING, Callable, Iterator, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.admin.content import AdminContent
    from netproxy.admin.control.server import ControlServer, ReloadRequests
    from netproxy.admin.web.http_server import HttpAnswer, HttpServer
    from netproxy.admin.stats.stats import Stats
    from netproxy.config.schema import Config
    from netproxy.interfaces.addresses import Address
    from netproxy.observe.log import Log
    from netproxy.protocol.http1 import HttpRequest


class ConfiguredSite(Protocol):
    """What answers on a listener.  Thread: that of the listener, except configure()."""

    def configure(self, config: Config) -> None:
        """Answer as a configuration says, from now on.  Thread: any."""

    def answer(self, request: HttpRequest, peer: str) -> HttpAnswer:
        """Answer a request of the client with the address `peer`."""


class SiteListener(NamedTuple):
    """A listener for HTTP, and what answers there."""

    server: HttpServer
    site: ConfiguredSite


class AdminServers(NamedTuple):
    """The servers of one configuration, None for what it does not have."""

    control: ControlServer | None = None
    metrics: SiteListener | None = None
    pac: SiteListener | None = None

    @property
    def sites(self) -> Iterator[SiteListener]:
        """The listeners for HTTP."""
        return (listener for listener in (self.metrics, self.pac) if listener is not None)


class PreparedServers:
    """The servers of a configuration that is not in force yet; new ones are bound already.

    A PreparedChange: call commit() or discard() once; neither can fail.
    """

    def __init__(self, admin: Admin, config: Config, servers: AdminServers) -> None:
        self._admin = admin
        self._config = config
        self._servers = servers

    @property
    def sockets(self) -> list[tuple[str, Address]]:
        """The (network, address) of the bound sockets that clients could connect to."""
        return [("tcp", listener.server.address) for listener in self._servers.sites]

    def commit(self) -> None:
        """Put the servers into use, and stop those that are not configured any more."""
        self._admin.replace(self._servers)
        for listener in self._servers.sites:
            listener.site.configure(self._config)
        if self._servers.control is not None:
            self._servers.control.start()

    def discard(self) -> None:
        """Close the servers that were bound for this configuration."""
        self._admin.close_others(self._servers)


class Admin:
    """The control socket and the listeners for HTTP of a daemon."""

    servers: AdminServers
    """Those in use."""

    def __init__(self, content: AdminContent, log: Log) -> None:
        self._content = content
        self._log = log
        self._began = time.monotonic()
        self.servers = AdminServers()
        # Made when they are first needed.  The lock guards _stats and _reloaded.
        self._lock = threading.Lock()
        self._stats: Stats | None = None
        # Whether the last reload was fine, and the time of its end.
        self._reloaded: tuple[bool, float] | None = None
        self._reloads: ReloadRequests | None = None

    # -- configurations

    def bind(self, config: Config) -> PreparedServers:
        """Bind the servers that a configuration adds, and start their threads.

        Raises ListenError; then nothing has changed.
        """
        servers = AdminServers(self._control_for(config))
        try:
            servers = servers._replace(metrics=self._metrics_for(config))
            servers = servers._replace(pac=self._pac_for(config))
        except BaseException:
            self.close_others(servers)
            raise
        return PreparedServers(self, config, servers)

    def replace(self, servers: AdminServers) -> None:
        """Use `servers`, and stop those that are in use now."""
        before, self.servers = self.servers, servers
        if before.control is not None and before.control is not servers.control:
            before.control.stop_accepting()
        for listener in before.sites:
            if listener not in servers.sites:
                listener.server.stop()

    def close_others(self, servers: AdminServers) -> None:
        """Close those of `servers` that are not in use."""
        if servers.control is not None and servers.control is not self.servers.control:
            servers.control.stop()
        for listener in servers.sites:
            if listener not in self.servers.sites:
                listener.server.stop()

    def _control_for(self, config: Config) -> ControlServer | None:
        """Return the control socket in use, if its path is still the same, or a new one."""
        if not config.control:
            return None
        if self.servers.control is not None and self.servers.control.path == config.control:
            return self.servers.control
        # Imported late: many daemons have no control socket.
        from netproxy.admin.commands import signal_reload
        from netproxy.admin.control.server import ControlServer, ReloadRequests

        if self._reloads is None:
            self._reloads = ReloadRequests(signal_reload)
        commands = self._content.commands(self, self._reloads)
        try:
            server = ControlServer(config.control, commands, self._log, config.control_required)
        except ListenError as error:
            if config.control_required:
                raise
            self._log.warning("no control socket: %s (set control: to another path)", error)
            return None
        try:
            server.prepare()
        except BaseException:
            server.stop()
            raise
        return server

    def _metrics_for(self, config: Config) -> SiteListener | None:
        def make() -> ConfiguredSite:
            from netproxy.admin.web.site import Site  # late: many daemons have no metrics listener

            return Site(self.stats, self._content.counters, self._log)

        in_use = self.servers.metrics
        return self._site_for(in_use, ("metrics", config.metrics.address), make, config)

    def _pac_for(self, config: Config) -> SiteListener | None:
        def make() -> ConfiguredSite:
            from netproxy.admin.web.pac import PacSite  # late: few daemons tell browsers

            return PacSite()

        return self._site_for(self.servers.pac, ("pac", config.pac.address), make, config)

    def _site_for(
        self,
        in_use: SiteListener | None,
        wanted: tuple[str, Address | None],
        make: Callable[[], ConfiguredSite],
        config: Config,
    ) -> SiteListener | None:
        """Return the listener in use, if its address is still the same, or a new one.

        `wanted`: the key and the address.  A new one answers at once, so that /readyz tells that
        the daemon is not ready yet.  It asks for the token of its own configuration: that of the
        configuration before was perhaps for another address, or there was none.
        """
        name, address = wanted
        if address is None:
            return None
        if in_use is not None and in_use.server.configured == address:
            return in_use
        from netproxy.admin.web.http_server import HttpServer  # late: as above

        site = make()
        site.configure(config)
        server = HttpServer(name, address, site.answer, self._log)
        try:
            server.start()
        except BaseException:
            server.stop()
            raise
        return SiteListener(server, site)

    def stop(self) -> None:
        """Stop all servers."""
        if self.servers.control is not None:
            self.servers.control.stop()
        for listener in self.servers.sites:
            listener.server.stop()

    # -- for the daemon

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must be alive."""
        control = self.servers.control
        threads = [control.thread] if control is not None else []
        return threads + [listener.server.thread for listener in self.servers.sites]

    @property
    def stats(self) -> Stats:
        """The statistics.  Thread: any."""
        with self._lock:
            if self._stats is None:
                self._stats = self._content.stats(self._began)
                if self._reloaded is not None:
                    self._stats.note_reload(*self._reloaded)
            return self._stats

    def begin_reload(self) -> Callable[[Sequence[str]], None]:
        """Note that a reload begins.

        The returned call notes its errors, none for success, and passes them to those who had
        requested it.
        """
        finish = self._reloads.begin() if self._reloads is not None else None

        def finish_reload(errors: Sequence[str]) -> None:
            # No statistics are made for it: after an upgrade their modules are not loaded.
            with self._lock:
                self._reloaded = outcome = not errors, time.time()
                if self._stats is not None:
                    self._stats.note_reload(*outcome)
            if finish is not None:
                finish(errors)

        return finish_reload
