"""Lists what a configuration has: the lines of netproxyd -t.  Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netproxy.admin import sources
from netproxy.admin.explain import udp_text
from netproxy.interfaces.addresses import Address

if TYPE_CHECKING:
    from netproxy.config.schema import Config, ListenerConfig, PortConfig
    from netproxy.dialer.factory import DialerFactory


def plan(config: Config, dialers: DialerFactory) -> list[str]:
    """Return what would listen, and what each upstream carries and how, as lines."""
    lines = [
        f"listen {address} {listener.accepts} {listener.protocol} '{listener.name}' "
        + _used_by(listener, config)
        + sources.listener_text(listener)
        for listener in config.listeners
        for address in listener.addresses
    ]
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


def _used_by(listener: ListenerConfig, config: Config) -> str:
    """Return what a listener passes its clients on to."""
    if listener.protocol != "dns":
        return f"upstream {(listener.upstream or config.default).text}"
    return "asks " + ", ".join(
        f"{server.scheme}://{server.server}{server.path}" for server in config.dns.servers
    )


def _tunnel_lines(config: Config) -> list[str]:
    bridge, agent = config.tunnel
    lines = []
    for name, allowed in (bridge.agents if bridge else {}).items():
        ports = [_ports_text(ports) for ports in allowed.ports]
        lines.append(f"agent '{name}' may open {', '.join(ports) or 'no port'}")
    if agent is not None:
        tls, is_exit = "with TLS" if agent.tls else "without TLS", ", exit" if agent.exit else ""
        lines.append(
            f"tunnel to {agent.bridge} {tls} as '{agent.name}' upstream {agent.upstream.text}"
            + is_exit
        )
        for service in agent.services:
            lines.append(f"tunnel port {service.port}/{service.network} leads to {service.target}")
    return lines


def _ports_text(ports: PortConfig) -> str:
    last = f"-{ports.last}" if ports.last > ports.first else ""
    return f"{Address(ports.host, ports.first)}{last}/{ports.network}"
