"""The ways to look into a running daemon and to tell it what to do: its control socket and its metrics listener.

Commands run on the control socket's thread; what only the main thread may do is
handed to it by a signal to this process.  bind() and stop() are the main thread's.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any, Callable, Mapping, NamedTuple

from netproxy.config.schema import Config
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import LiveFlow
from netproxy.interfaces.services import DaemonState
from netproxy.observe.log import LEVELS, Log

Request = Mapping[str, Any]
FILTERS: dict[str, Callable[[LiveFlow], str]] = {
    "user": lambda live: live.flow.user,
    "client": lambda live: live.flow.client.host,
    "listener": lambda live: live.flow.listener,
    "upstream": lambda live: live.dialer.name,
    "target": lambda live: live.flow.target.host,
}


class Servers(NamedTuple):
    """The control socket and the metrics listener, each None if the configuration has none."""

    control: Any  # admin.control_socket.ControlServer, loaded late
    web: Any  # admin.http_server.WebServer, loaded late
    site: Any  # admin.site.Site of `web`, loaded late


class PreparedServers:
    """The servers of a new configuration, those that are new bound and started.

    Call commit() or discard() once.
    """

    def __init__(self, admin: Admin, config: Config, servers: Servers, fresh: list[Any]) -> None:
        """`fresh`: those of the servers that were not there before."""
        self._admin = admin
        self._config = config
        self._servers = servers
        self._fresh = fresh
        web = servers.web
        self.sockets: list[tuple[str, Address]] = [("tcp", web.address)] if web is not None else []
        """Network and address of the sockets that no client may be led to."""

    def commit(self) -> None:
        """Stop the servers that are gone, and answer on the control socket from now on.

        A client whose command is running on a control socket that is gone is still answered.
        """
        before = self._admin.servers
        control, web, site = self._servers
        self._admin.replace(self._servers)
        if before.control is not None and before.control is not control:
            before.control.retire()
        if before.web is not None and before.web is not web:
            before.web.stop()
        if site is not None:
            site.configure(self._config.metrics.token, self._config.metrics.page)
        if control in self._fresh:
            control.start()

    def discard(self) -> None:
        """Stop the new servers."""
        for server in self._fresh:
            server.stop()


class Admin:
    def __init__(self, daemon: Any, log: Log) -> None:
        """`daemon`: the daemon, as figures.Subject has it."""
        self._daemon = daemon
        self._began = time.monotonic()
        self._made: Any = None  # figures.Figures
        self._log = log
        self._reloads: Any = None  # observe.control.Reloads
        self._control: Any = None  # observe.control.ControlServer
        self._web: Any = None  # observe.web.WebServer
        self._site: Any = None  # observe.site.Site

    def bind(self, config: Config) -> PreparedServers:
        """Bind and start the servers of a configuration that are not running yet.

        Raises ListenError; then nothing has changed.
        """
        fresh: list[Any] = []
        try:
            control = self._fresh_control(config, fresh)
            web, site = self._fresh_web(config, fresh)
        except BaseException:
            for server in fresh:
                server.stop()
            raise
        return PreparedServers(self, config, Servers(control, web, site), fresh)

    @property
    def servers(self) -> Servers:
        """The servers that are running."""
        return Servers(self._control, self._web, self._site)

    def replace(self, servers: Servers) -> None:
        """Take these for the servers that are running."""
        self._control, self._web, self._site = servers

    def stop(self) -> None:
        for server in (self._control, self._web):
            if server is not None:
                server.stop()

    @property
    def threads(self) -> list[threading.Thread]:
        """Those that must live."""
        return [server.thread for server in (self._control, self._web) if server is not None]

    def begin_reload(self) -> Callable[[list[str]], None]:
        """Before a reload; gives back what is told its errors, none for success, to those who asked for it."""
        tell = self._reloads.begin() if self._reloads is not None else lambda errors: None

        def ended(errors: list[str]) -> None:
            if self.threads:  # somebody may ask
                self.figures.note_reload(not errors)
            tell(errors)

        return ended

    @property
    def figures(self) -> Any:
        if self._made is None:
            from netproxy.admin.stats import Stats  # late: many are never asked for any

            self._made = Stats(self._daemon, self._log, self._began)
        return self._made

    # -- servers

    def _fresh_control(self, config: Config, fresh: list[Any]) -> Any:
        if not config.control or self._control is not None and self._control.path == config.control:
            return self._control if config.control else None
        from netproxy.admin.control_socket import ControlServer, Reloads  # late: many have none

        self._reloads = self._reloads or Reloads(lambda: os.kill(os.getpid(), signal.SIGHUP))
        server = ControlServer(config.control, self._commands(), self._log)
        fresh.append(server)
        server.prepare()
        return server

    def _fresh_web(self, config: Config, fresh: list[Any]) -> tuple[Any, Any]:
        """And its site.  Answers from now on, so that who asks whether the daemon is ready hears that it is not.

        By the token of this configuration: that of the one before may have been for another address, or none.
        """
        address = config.metrics.address
        if address is None or self._web is not None and self._web.wanted == address:
            return (self._web, self._site) if address is not None else (None, None)
        from netproxy.admin.site import Site, Sources  # late: many have none
        from netproxy.admin.http_server import WebServer

        figures = self.figures
        sources = Sources(lambda: self._daemon.state, figures.metrics, figures.page)
        site = Site(
            sources,
            lambda: self._daemon.counters.count("authentication", "metrics token"),
            self._log,
        )
        site.configure(config.metrics.token, config.metrics.page)
        server = WebServer(address, site.answer, self._log)
        fresh.append(server)
        server.start()
        return server, site

    # -- commands

    def _commands(self) -> dict[str, Callable[[Request], Any]]:
        return {
            "status": lambda request: self.figures.status(),
            "upstreams": lambda request: self._daemon.upstreams(),
            "tunnels": lambda request: self._daemon.tunnels(),
            "connections": lambda request: self.figures.flows(_wanted(request, "tcp")),
            "sessions": lambda request: self.figures.flows(_wanted(request, "udp")),
            "flows": lambda request: self.figures.flows(_wanted(request)),
            "traffic": lambda request: self.figures.traffic(),
            "explain": self._explain,
            "verdicts": self._verdicts,
            "kill": self._kill,
            "log": self._set_level,
            "reload": self._reload,
            "drain": self._drain,
        }

    def _kill(self, request: Request) -> dict[str, int]:
        from netproxy.admin.control_socket import CommandError

        if not any(request.get(key) for key in ("ids", *FILTERS)):
            raise CommandError("kill what? an id, or a filter")
        killed = self._daemon.flows.kill(_wanted(request))
        if not killed:
            raise CommandError("no such flow")
        return {"killed": killed}

    def _explain(self, request: Request) -> list[str]:
        return list(self._daemon.explain(str(request.get("flow", ""))))

    def _verdicts(self, request: Request) -> Any:
        """What `via: auto` has found out; with `clear`, forgets it."""
        verdicts = self._daemon.verdicts
        if request.get("clear"):
            return {"cleared": verdicts.clear()}
        return [
            {"target": str(target), "upstream": way, "seconds": round(seconds)}
            for target, way, seconds in verdicts.items()
        ]

    def _set_level(self, request: Request) -> dict[str, str]:
        from netproxy.admin.control_socket import CommandError

        level = request.get("level")
        if level is not None:
            if level not in LEVELS:
                raise CommandError(f"the levels are {', '.join(LEVELS)}")
            self._log.level = level
        return {"level": self._log.level}

    def _reload(self, request: Request) -> dict[str, bool]:
        from netproxy.admin.control_socket import CommandError

        if self._daemon.state != DaemonState.SERVING:
            raise CommandError(f"the daemon is {self._daemon.state}")
        self._reloads.ask()
        return {"reloaded": True}

    def _drain(self, request: Request) -> Any:
        """Answers first: with nothing to wait for, the daemon ends at once.  A second signal would cut off what runs."""
        from netproxy.admin.control_socket import CommandError, Then

        if self._daemon.state == DaemonState.DRAINING:
            raise CommandError("the daemon is draining")
        return Then(
            {"connections": self._daemon.live}, lambda: os.kill(os.getpid(), signal.SIGTERM)
        )


def _wanted(request: Request, network: str = "") -> Callable[[LiveFlow], bool]:
    """What the filters of a request leave."""
    ids = set(request.get("ids") or ())
    tests = [(read, request[key]) for key, read in FILTERS.items() if request.get(key)]

    def wanted(live: LiveFlow) -> bool:
        return (
            (not network or live.flow.network == network)
            and (not ids or live.number in ids)
            and all(read(live) == value for read, value in tests)
        )

    return wanted
