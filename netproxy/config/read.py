"""Reads a configuration: from the raw tree to the schema.

Calls the readers of the sections in the order in which they need each other, and reads the
small sections itself.  Collects all errors before any of them is raised.  Binds, resolves and
writes nothing.
"""

from __future__ import annotations

import os

from netproxy.config.admin import parse_control, read_metrics, read_metrics_users, read_pac
from netproxy.config.remote_lists import ListReader
from netproxy.config.sections.listeners import ListenerReader
from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.config.schema import (
    AuthConfig,
    Config,
    ListenerConfig,
    LogConfig,
    PacConfig,
    PenaltyConfig,
    Place,
    TimeoutsConfig,
    TunnelConfig,
    UpstreamConfig,
    UserConfig,
)
from netproxy.config.sections.upstreams import UpstreamReader
from netproxy.interfaces.flows import TUNNEL_AGENT
from netproxy.interfaces.services import NO_ACCESS_FILE, AccessFileName
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.config.sections.tunnel.tunnels import TunnelReader

WORKERS_LIMIT = 64
"""Processes: each opens all listeners, and has a table of 1.3 MiB in the ledger."""
ACCESS_FORMATS = ("text", "json", "clf", "squid")
"""The values of log.access_format."""


def read_config(root: Node, problems: Problems) -> Config:
    """Return the configuration of a tree.  If `problems` has errors it must not be used."""
    problems.hide_values_of(root)
    return _ConfigReader(problems).read(MapReader(root, "", problems))


def check(config: Config, problems: Problems) -> Config:
    """Return the same configuration.  Raises ConfigError with all errors, one a line."""
    problems.check()
    return config


class _ConfigReader:
    def __init__(self, problems: Problems) -> None:
        self._problems = problems

    def read(self, top: MapReader) -> Config:
        # Upstreams may use the names of a bridge's agents, and its listener comes last.
        tunnels = self._tunnels(top) if top.has("tunnel") else None
        agents = tunnels.agents if tunnels else {}
        upstreams = UpstreamReader(top.mapping("upstreams").rest(), self._problems, agents)
        named = upstreams.read_all()
        # A file without users lets nobody in: the listeners need a login all the same.
        has_file = top.has("users_file")
        users = self._users(top, upstreams) if top.has("users") or has_file else {}
        default = top.take("default")
        timeouts = _timeouts(top.mapping("timeouts"))
        auth = self._auth(top, timeouts) if top.has("auth") else AuthConfig()
        has_logins = bool(users) or has_file or auth.place != ""
        reader = ListenerReader(upstreams, has_logins, self._problems)
        listeners = reader.read(top.items("listeners"))
        self._listeners_are_known = reader.are_all_known
        if tunnels is None and any(listener.protocol == "tunnel" for listener in listeners):
            # Reports that the bridge is missing.
            tunnels = self._tunnels(top)
        listeners = tunnels.with_listeners(listeners) if tunnels else listeners
        if any(listener.routes for listener in listeners):
            self._check_routes(listeners)
        config = Config(
            listeners=listeners,
            upstreams=named,
            tunnel=tunnels.read(upstreams) if tunnels else TunnelConfig(),
            default=upstreams.read(default, "default") if default else UpstreamConfig(),
            geoip_database=top.path_of("geoip_database"),
            geoip_place=Place(top.place_of("geoip_database")),
            users=users,
            state=top.path_of("state"),
            state_place=Place(top.place_of("state")),
            penalty=self._penalty(top) if top.has("penalty") else PenaltyConfig(),
            end_on_removal=top.flag("end_on_removal", False),
            auth=auth,
            timeouts=timeouts,
            log=_log(top.mapping("log")),
            workers=top.read("workers", _workers, 1),
            batching=_batching(top.mapping("udp")),
            splice=_splice(top.mapping("tcp")),
            control=top.read("control", parse_control, ""),
            metrics=read_metrics(top),
            pac=read_pac(top.mapping("pac"), listeners, reader.are_all_known)
            if top.has("pac")
            else PacConfig(),
        )
        config = config._replace(metrics_users=read_metrics_users(top, config.metrics))
        lists = _lists(config, self._problems)
        config = self._with_dns(top, config, upstreams, lists)
        config = self._with_rules(top, config, upstreams, lists)
        config = config._replace(lists=lists.lists, lists_folder=lists.folder)
        top.finish()
        return config._replace(warnings=tuple(self._problems.warnings))

    # -- sections that many configurations lack: the late import of a module saves 0.1 MiB

    def _tunnels(self, top: MapReader) -> TunnelReader:
        from netproxy.config.sections.tunnel.tunnels import TunnelReader

        return TunnelReader(top.mapping("tunnel"), self._problems)

    def _check_routes(self, listeners: tuple[ListenerConfig, ...]) -> None:
        from netproxy.config.sections.listener.routes import check_routes

        check_routes(listeners, self._listeners_are_known, self._problems)

    def _users(self, top: MapReader, upstreams: UpstreamReader) -> dict[str, UserConfig]:
        from netproxy.config.sections.users import read_users

        users = read_users(top.mapping("users"), upstreams, self._problems)
        if top.has("users_file"):
            path = top.path_of("users_file")
            if not path:
                top.add_error("users_file", "is empty")
                return users
            from netproxy.config.sections.users_file import UsersFileReader

            places = {name: user.place for name, user in users.items()}
            reader = UsersFileReader(upstreams, places, self._problems)
            users |= reader.read(path, top.place_of("users_file"))
        return users

    def _penalty(self, top: MapReader) -> PenaltyConfig:
        from netproxy.config.sections.users import read_penalty

        return read_penalty(top.mapping("penalty"))

    def _auth(self, top: MapReader, timeouts: TimeoutsConfig) -> AuthConfig:
        from netproxy.config.sections.auth import read_auth

        return read_auth(top.mapping("auth"), timeouts)

    def _with_dns(
        self, top: MapReader, config: Config, upstreams: UpstreamReader, lists: ListReader
    ) -> Config:
        listeners = [listener for listener in config.listeners if listener.protocol == "dns"]
        if not listeners and not top.has("dns"):
            return config
        from netproxy.config.sections.dns import DnsReader

        reader = DnsReader(upstreams, lists, self._problems)
        return config._replace(dns=reader.read(top.mapping("dns"), listeners))

    def _with_rules(
        self, top: MapReader, config: Config, upstreams: UpstreamReader, lists: ListReader
    ) -> Config:
        if not (top.has("rules") or top.has("auto") or top.has("destinations")):
            return config
        from netproxy.config.sections.rules import RuleReader, read_auto, read_destinations

        names = frozenset({TUNNEL_AGENT} | {listener.name for listener in config.listeners})
        known = names if self._listeners_are_known else None
        users = None if config.auth.is_set else config.users
        reader = RuleReader(upstreams, known, users, lists, self._problems)
        config = config._replace(rules=reader.read(top.items("rules")))
        if top.has("auto"):
            config = config._replace(auto=read_auto(top.mapping("auto")))
        if top.has("destinations"):
            section = top.mapping("destinations")
            config = config._replace(destinations=read_destinations(section))
        return config


# -- small sections


def _lists(config: Config, problems: Problems) -> ListReader:
    """Return the reader of lists; their copies are in the folder that the usage is kept in."""
    folder = config.state or os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return ListReader(folder, problems)


def _timeouts(section: MapReader) -> TimeoutsConfig:
    defaults = TimeoutsConfig()
    timeouts = TimeoutsConfig(
        section.duration("handshake", defaults.handshake),
        section.duration("connect", defaults.connect),
        section.duration("tcp_idle", defaults.tcp_idle),
        section.duration("half_close", defaults.half_close),
        section.duration("drain", defaults.drain),
    )
    section.finish()
    return timeouts


def _log(section: MapReader) -> LogConfig:
    """Read the section."""
    log = LogConfig(
        section.choice("level", ("debug", "info", "warning", "error"), "info"),
        section.choice("format", ("text", "json"), "text"),
        section.flag("access", True),
        section.whole("queue", LogConfig().queue),
    )
    log = log._replace(file=_access_file(section, log))
    section.finish()
    return log


def _access_file(section: MapReader, log: LogConfig) -> AccessFileName:
    form = section.choice("access_format", ACCESS_FORMATS, log.format)
    if not section.has("file"):
        if section.has("access_format"):
            section.add_error("access_format", "has no file: set log.file (such as /dev/stdout)")
        return NO_ACCESS_FILE
    path = section.path_of("file")
    if not path:
        section.add_error("file", "is empty")
    elif not log.access:
        section.add_error("file", "gets nothing, because log.access is false")
    return AccessFileName(path, form, Place(section.place_of("file")))


def _workers(text: str) -> int:
    if text == "auto":
        return min(len(os.sched_getaffinity(0)), WORKERS_LIMIT)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= WORKERS_LIMIT):
        raise ValueError(f"'{text}' is not a number of processes (1 to {WORKERS_LIMIT}, or auto)")
    return int(text)


def _batching(section: MapReader) -> str:
    batching = section.choice("batching", ("auto", "mmsg", "trains", "single"), "auto")
    section.finish()
    return batching


def _splice(section: MapReader) -> bool:
    splice = section.flag("splice", True)
    section.finish()
    return splice
