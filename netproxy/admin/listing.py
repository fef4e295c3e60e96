"""Lists what a configuration has: the lines of netproxyd -t, and names to complete.  Pure."""

from __future__ import annotations

from itertools import chain

from netproxy.admin.diagnosis import sources
from netproxy.admin.diagnosis.explain import udp_text
from netproxy.interfaces.addresses import Address
from netproxy.typed import TYPE_CHECKING, Iterator

if TYPE_CHECKING:
    from netproxy.config.schema import Config, ListenerConfig, PortConfig, SniRouteConfig
    from netproxy.dialer.factory import DialerFactory
    from netproxy.interfaces.answers import KnownAnswer


def plan(config: Config, dialers: DialerFactory) -> list[str]:
    """Return what would listen, and what each upstream carries and how, as lines."""
    lines = [
        f"listen {address} {listener.accepts} {listener.protocol} '{listener.name}' "
        + _used_by(listener, config)
        + sources.listener_text(listener)
        + _found_text(listener)
        for listener in config.listeners
        for address in listener.addresses
    ]
    if config.dns.fake.networks:
        networks = ", ".join(map(str, config.dns.fake.networks))
        lines.append(f"fake addresses of {networks}")
    lines += [line for listener in config.listeners for line in _route_lines(listener)]
    lines += sources.user_lines(config)
    lines += _tunnel_lines(config)
    for name, upstream in [("default", config.default), *config.upstreams.items()]:
        carried = ", ".join(sorted(dialers.dialer(upstream).carries)) or "nothing"
        udp = udp_text(upstream)
        how = f"; {udp}" if udp.startswith("no ") else f" by {udp}" if udp else ""
        source = sources.upstream_text(upstream)
        leaves = f"; from {source}" if source else ""
        lines.append(f"upstream {name}: {upstream.text} carries {carried}{how}{leaves}")
    return lines


def known(config: Config) -> KnownAnswer:
    """Return the names that commands take, and the STUN servers."""
    agents = list(config.tunnel.bridge.agents if config.tunnel.bridge else ())
    stun = (listener.stun for listener in config.listeners)
    return {
        "users": list(config.users),
        "listeners": [listener.name for listener in config.listeners],
        "upstreams": [*config.upstreams, "direct", *(f"tunnel://{agent}" for agent in agents)],
        "agents": agents,
        "stun": list(dict.fromkeys(map(str, chain.from_iterable(stun)))),
    }


def _route_lines(listener: ListenerConfig) -> Iterator[str]:
    """Yield a line for each route of an sni listener."""
    for route in listener.routes:
        yield f"route {route.path} on '{listener.name}': {conditions_text(route)} {led_to(route)}"


def conditions_text(route: SniRouteConfig) -> str:
    """Return what a route of an sni listener matches."""
    conditions = (
        ("sni", route.sni),
        ("alpn", route.alpn),
        ("host", route.host),
        ("protocol", route.protocol),
    )
    given = [f"{key} {' or '.join(values)}" for key, values in conditions if values]
    return ", ".join(given) or "everything else"


def led_to(route: SniRouteConfig) -> str:
    """Return where a route of an sni listener leads."""
    if route.target is None:
        return f"leads to listener '{route.listener}'"
    via = f" through {route.via.name or route.via.text}" if route.via is not None else ""
    header = f", with a PROXY header {route.send_proxy}" if route.send_proxy else ""
    return f"leads to {route.target}{via}{header}"


def _used_by(listener: ListenerConfig, config: Config) -> str:
    """Return what a listener passes its clients on to."""
    if listener.protocol != "dns":
        return f"upstream {(listener.upstream or config.default).text}"
    return "asks " + ", ".join(
        f"{server.scheme}://{server.server}{server.path}" for server in config.dns.servers
    )


def _found_text(listener: ListenerConfig) -> str:
    """Return what is found for a listener while the daemon runs, "" for nothing."""
    parts = []
    if listener.port_mapping != "off":
        parts.append(f"ports mapped by {listener.port_mapping}")
    if interfaces := listener.announced_interfaces:
        parts.append(f"announces the address of {', '.join(interfaces)}")
    if listener.is_auto and not listener.is_local:
        servers = ", ".join(map(str, listener.stun))
        parts.append("announces its public address" + (f" as seen by {servers}" if servers else ""))
    return "".join(f", {part}" for part in parts)


def _tunnel_lines(config: Config) -> list[str]:
    bridge, agent = config.tunnel
    lines = []
    for name, allowed in (bridge.agents if bridge else {}).items():
        ports = [_ports_text(ports) for ports in allowed.ports]
        lines.append(f"agent '{name}' may open {', '.join(ports) or 'no port'}")
    if agent is not None:
        tls, is_exit = "with TLS" if agent.tls else "without TLS", ", exit" if agent.exit else ""
        datagrams = ", datagrams by UDP" if agent.datagrams else ""
        lines.append(
            f"tunnel to {agent.bridge} {tls} as '{agent.name}' upstream {agent.upstream.text}"
            + is_exit
            + datagrams
        )
        for service in agent.services:
            lines.append(f"tunnel port {service.port}/{service.network} leads to {service.target}")
    return lines


def _ports_text(ports: PortConfig) -> str:
    last = f"-{ports.last}" if ports.last > ports.first else ""
    return f"{Address(ports.host, ports.first)}{last}/{ports.network}"
