"""Starts, replaces and stops the control socket and the metrics listener.

Both belong to a configuration: on a reload they are replaced together with everything else,
or not at all.  Thread: main, except where stated.  Modules for servers that are not
configured are never loaded.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Callable, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.admin.control_socket import ControlServer, ReloadRequests
    from netproxy.admin.http_server import HttpServer
    from netproxy.admin.site import Site
    from netproxy.admin.stats import Stats
    from netproxy.admin.view import DaemonView
    from netproxy.config.schema import Config
    from netproxy.interfaces.addresses import Address
    from netproxy.observe.log import Log


class MetricsListener(NamedTuple):
    """The metrics listener, and what answers there."""

    server: HttpServer
    site: Site


class AdminServers(NamedTuple):
    """The servers of one configuration, None for what it does not have."""

    control: ControlServer | None = None
    metrics: MetricsListener | None = None


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
        metrics = self._servers.metrics
        return [] if metrics is None else [("tcp", metrics.server.address)]

    def commit(self) -> None:
        """Put the servers into use, and stop those that are not configured any more."""
        self._admin.replace(self._servers)
        control, metrics = self._servers
        if metrics is not None:
            metrics.site.configure(self._config.metrics.token, self._config.metrics.page)
        if control is not None:
            control.start()

    def discard(self) -> None:
        """Close the servers that were bound for this configuration."""
        self._admin.close_others(self._servers)


class Admin:
    """The control socket and the metrics listener of a daemon."""

    servers: AdminServers
    """Those in use."""

    def __init__(self, daemon: DaemonView, log: Log) -> None:
        self._daemon = daemon
        self._log = log
        self._began = time.monotonic()
        self.servers = AdminServers()
        # Made when they are first needed.  The lock guards _stats.
        self._lock = threading.Lock()
        self._stats: Stats | None = None
        self._reloads: ReloadRequests | None = None

    # -- configurations

    def bind(self, config: Config) -> PreparedServers:
        """Bind the servers that a configuration adds, and start their threads.

        Raises ListenError; then nothing has changed.
        """
        control, metrics = self._control_for(config), None
        try:
            metrics = self._metrics_for(config)
        except BaseException:
            self.close_others(AdminServers(control))
            raise
        return PreparedServers(self, config, AdminServers(control, metrics))

    def replace(self, servers: AdminServers) -> None:
        """Use `servers`, and stop those that are in use now."""
        before, self.servers = self.servers, servers
        if before.control is not None and before.control is not servers.control:
            before.control.stop_accepting()
        if before.metrics is not None and before.metrics is not servers.metrics:
            before.metrics.server.stop()

    def close_others(self, servers: AdminServers) -> None:
        """Close those of `servers` that are not in use."""
        if servers.control is not None and servers.control is not self.servers.control:
            servers.control.stop()
        if servers.metrics is not None and servers.metrics is not self.servers.metrics:
            servers.metrics.server.stop()

    def _control_for(self, config: Config) -> ControlServer | None:
        """Return the control socket in use, if its path is still the same, or a new one."""
        if not config.control:
            return None
        if self.servers.control is not None and self.servers.control.path == config.control:
            return self.servers.control
        # Imported late: many daemons have no control socket.
        from netproxy.admin.commands import Commands, signal_reload
        from netproxy.admin.control_socket import ControlServer, ReloadRequests

        if self._reloads is None:
            self._reloads = ReloadRequests(signal_reload)
        commands = Commands(self._daemon, self, self._reloads, self._log)
        server = ControlServer(config.control, commands.table(), self._log)
        try:
            server.prepare()
        except BaseException:
            server.stop()
            raise
        return server

    def _metrics_for(self, config: Config) -> MetricsListener | None:
        """Return the metrics listener in use, if its address is still the same, or a new one.

        A new one answers at once, so that /readyz tells that the daemon is not ready yet.  It
        asks for the token of its own configuration: the token of the configuration before was
        perhaps for another address, or there was none.
        """
        address, in_use = config.metrics.address, self.servers.metrics
        if address is None:
            return None
        if in_use is not None and in_use.server.configured == address:
            return in_use
        # Imported late: many daemons have no metrics listener.
        from netproxy.admin.http_server import HttpServer
        from netproxy.admin.site import Site

        site = Site(self.stats, self._daemon.counters, self._log)
        site.configure(config.metrics.token, config.metrics.page)
        server = HttpServer(address, site.answer, self._log)
        try:
            server.start()
        except BaseException:
            server.stop()
            raise
        return MetricsListener(server, site)

    def stop(self) -> None:
        """Stop both servers."""
        if self.servers.control is not None:
            self.servers.control.stop()
        if self.servers.metrics is not None:
            self.servers.metrics.server.stop()

    # -- for the daemon

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must be alive."""
        control, metrics = self.servers
        threads = [control.thread] if control is not None else []
        return threads + ([metrics.server.thread] if metrics is not None else [])

    @property
    def stats(self) -> Stats:
        """The statistics.  Thread: any."""
        # Imported late: many daemons are never asked.
        from netproxy.admin.stats import Stats

        with self._lock:
            if self._stats is None:
                self._stats = Stats(self._daemon, self._log, self._began)
            return self._stats

    def begin_reload(self) -> Callable[[Sequence[str]], None]:
        """Note that a reload begins.

        The returned call notes its errors, none for success, and passes them to those who had
        requested it.
        """
        finish = self._reloads.begin() if self._reloads is not None else None

        def finish_reload(errors: Sequence[str]) -> None:
            # Without a server nobody asks for statistics.
            if self.threads:
                self.stats.note_reload(not errors)
            if finish is not None:
                finish(errors)

        return finish_reload
