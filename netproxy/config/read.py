"""Reads a configuration: from the raw tree to the schema.

Calls the readers of the sections in the order in which they need each other, and reads the
small sections itself.  Collects all errors before any of them is raised.  Binds, resolves and
writes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netproxy.config.sections.listeners import ListenerReader
from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.config.schema import (
    AuthConfig,
    Config,
    LogConfig,
    MetricsConfig,
    PenaltyConfig,
    Place,
    TimeoutsConfig,
    TunnelConfig,
    UpstreamConfig,
    UserConfig,
)
from netproxy.config.sections.upstreams import UpstreamReader
from netproxy.config.url import parse_listen
from netproxy.errors import ConfigError
from netproxy.interfaces.addresses import ActivationAddress, Address
from netproxy.interfaces.flows import TUNNEL_AGENT
from netproxy.interfaces.networks import is_loopback

if TYPE_CHECKING:
    from netproxy.config.sections.tunnels import TunnelReader

SOCKET_PATH_LIMIT = 107
"""Bytes of a path: sockaddr_un holds 108, with the NUL at the end."""
TOKEN_FLOOR = 16
"""Characters of a metrics token: requests may guess without limit."""


def read_config(root: Node, problems: Problems) -> Config:
    """Return the configuration of a tree.  If `problems` has errors it must not be used."""
    problems.hide_values_of(root)
    return _ConfigReader(problems).read(MapReader(root, "", problems))


def check(config: Config, problems: Problems) -> Config:
    """Return the same configuration.  Raises ConfigError with all errors, one a line."""
    if problems.errors:
        raise ConfigError.joined(problems.errors)
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
        listeners = ListenerReader(upstreams, has_logins, self._problems).read(
            top.items("listeners")
        )
        if tunnels is None and any(listener.protocol == "tunnel" for listener in listeners):
            # Reports that the bridge is missing.
            tunnels = self._tunnels(top)
        bridge = tunnels.read_listener(listeners) if tunnels else None
        config = Config(
            listeners=listeners + ((bridge,) if bridge else ()),
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
            batching=_batching(top.mapping("udp")),
            splice=_splice(top.mapping("tcp")),
            control=top.read("control", _control, ""),
            metrics=_metrics(top),
        )
        config = config._replace(metrics_users=_metrics_users(top, config.metrics))
        config = self._with_dns(top, config, upstreams)
        config = self._with_rules(top, config, upstreams)
        top.finish()
        return config._replace(warnings=tuple(self._problems.warnings))

    # -- sections that many configurations lack: the late import of a module saves 0.1 MiB

    def _tunnels(self, top: MapReader) -> TunnelReader:
        from netproxy.config.sections.tunnels import TunnelReader

        return TunnelReader(top.mapping("tunnel"), self._problems)

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

    def _with_dns(self, top: MapReader, config: Config, upstreams: UpstreamReader) -> Config:
        listeners = [listener for listener in config.listeners if listener.protocol == "dns"]
        if not listeners and not top.has("dns"):
            return config
        from netproxy.config.sections.dns import DnsReader

        reader = DnsReader(upstreams, self._problems)
        return config._replace(dns=reader.read(top.mapping("dns"), listeners))

    def _with_rules(self, top: MapReader, config: Config, upstreams: UpstreamReader) -> Config:
        if not (top.has("rules") or top.has("auto") or top.has("destinations")):
            return config
        from netproxy.config.sections.rules import RuleReader, read_auto, read_destinations

        names = frozenset({TUNNEL_AGENT} | {listener.name for listener in config.listeners})
        users = None if config.auth.is_set else config.users
        reader = RuleReader(upstreams, names, users, self._problems)
        config = config._replace(rules=reader.read(top.items("rules")))
        if top.has("auto"):
            config = config._replace(auto=read_auto(top.mapping("auto")))
        if top.has("destinations"):
            section = top.mapping("destinations")
            config = config._replace(destinations=read_destinations(section))
        return config


# -- small sections


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
    log = LogConfig(
        section.choice("level", ("debug", "info", "warning", "error"), "info"),
        section.choice("format", ("text", "json"), "text"),
        section.flag("access", True),
        section.whole("queue", LogConfig().queue),
    )
    section.finish()
    return log


def _batching(section: MapReader) -> str:
    batching = section.choice("batching", ("auto", "mmsg", "trains", "single"), "auto")
    section.finish()
    return batching


def _splice(section: MapReader) -> bool:
    splice = section.flag("splice", True)
    section.finish()
    return splice


def _metrics(top: MapReader) -> MetricsConfig:
    address = top.read("metrics", _single_address, None)
    metrics = MetricsConfig(
        address,
        top.secret("metrics_token", _token),
        top.flag("status_page", False),
        Place(top.place_of("metrics")),
    )
    if metrics.page and not metrics.token:
        message = "needs a metrics_token: the page shows which client talks to which target"
        top.add_error("status_page", message)
    if (metrics.page or metrics.token) and address is None:
        key = "status_page" if metrics.page else "metrics_token"
        top.add_error(key, "has no listener: set metrics")
    if address is not None and not is_loopback(address.host) and not metrics.token:
        message = f"{address} can be reached from other machines: set a metrics_token"
        top.add_error("metrics", message)
    return metrics


def _metrics_users(top: MapReader, metrics: MetricsConfig) -> bool:
    names = top.flag("metrics_users", False)
    if names and metrics.address is None:
        top.add_error("metrics_users", "has no listener: set metrics")
    return names


def _control(text: str) -> str:
    if text == "none":
        return ""
    scheme, _, path = text.partition(":")
    if scheme != "unix" or not path.startswith("/") or len(path.encode()) > SOCKET_PATH_LIMIT:
        expected = "(expected unix:/run/netproxy/control.sock or none)"
        raise ValueError(f"'{text}' is not a control socket {expected}")
    return path


def _single_address(text: str) -> Address:
    addresses = parse_listen(text)
    if len(addresses) != 1 or isinstance(addresses[0], ActivationAddress):
        raise ValueError("must be a single port")
    return addresses[0]


def _token(text: str) -> str:
    if len(text) < TOKEN_FLOOR or not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError(
            f"must have at least {TOKEN_FLOOR} letters or digits (openssl rand -hex 16 makes one)"
        )
    return text
