"""Checks where flows go: listeners whose upstream cannot serve them, rules that never match."""

from __future__ import annotations

from netproxy.config.schema import Config
from netproxy.config.tree.problems import Problems
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.dialer.factory import DialerFactory


def check_udp(config: Config, dialers: DialerFactory, problems: Problems) -> None:
    """Warn of each listener that accepts UDP but whose upstream carries none.

    And of an agent that is to send its bridge datagrams through such an upstream.
    """
    agent = config.tunnel.agent
    if agent is not None and agent.datagrams:
        if "udp" not in dialers.dialer(agent.upstream).carries:
            problems.warn(
                f"tunnel.agent.datagrams: the upstream {agent.upstream.text} carries no UDP: "
                "datagrams go by TCP",
                agent.place,
            )
    for listener in config.listeners:
        upstream = listener.upstream or config.default
        if "udp" not in listener.network or listener.protocol in ("dns", "tunnel"):
            continue
        if "udp" not in dialers.dialer(upstream).carries:
            problems.warn(
                f"listener '{listener.name}' accepts UDP, but its upstream carries none: "
                f"{upstream.text}",
                listener.place,
            )


def check_routes(config: Config, problems: Problems) -> None:
    """Warn of each route of an sni listener that can never match, because of earlier ones."""
    # late: few configurations have routes
    from netproxy.router.port_routes.factory import unreachable_routes

    for listener in config.listeners:
        for route, earlier in unreachable_routes(listener.routes):
            message = f"can never match: {earlier.path} at {earlier.place} takes its connections"
            problems.warn(f"{route.path}: {message}", route.place)


def check_rules(config: Config, problems: Problems) -> None:
    """Warn of each rule that can never match, because of earlier ones or for want of names.

    Only the flows of listeners that look for TLS have the name that `sni` compares.
    """
    from netproxy.router.factory import unreachable_rules  # late: few configurations have rules

    for rule, earlier in unreachable_rules(config.rules):
        number = rule.text.partition(" ")[0]
        message = f"can never match: {earlier.text} at {earlier.place} takes all of its flows"
        problems.warn(f"{number}: {message}", rule.place)
    if not any("tls" in other.sniff.kinds or other.routes for other in config.listeners):
        for rule in filter(lambda rule: rule.conditions.sni, config.rules):
            number = rule.text.partition(" ")[0]
            message = "can never match: no listener has sniff: [tls] or the protocol sni"
            problems.warn(f"{number}.sni: {message}", rule.place)
