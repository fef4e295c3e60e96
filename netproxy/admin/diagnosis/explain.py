"""Describes what a configuration would do with a flow.

netproxyd --explain prints these lines, netproxyctl asks for them.  Pure, except that explain() may
wait for a name lookup.
"""

from __future__ import annotations

from netproxy.admin.diagnosis import sources
from netproxy.admin.diagnosis.flow_text import FlowError, parse_flow
from netproxy.config.schema import GroupConfig
from netproxy.errors import DialError
from netproxy.interfaces.addresses import pack_ip
from netproxy.router.auto import AutoDialer
from netproxy.typed import TYPE_CHECKING, Iterator, Mapping, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.config.schema import Config, HopConfig, ListenerConfig, UpstreamConfig
    from netproxy.dialer.factory import DialerFactory
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer
    from netproxy.router.router import RuleRouter

_FALLBACKS = {
    "listener": "the upstream of the listener",
    "default": "the default",
    "": "the upstream of the listener or the default",
}
"""What applies if no rule matches, by Route.rule; "" if the rules could not be asked."""


class TunnelStates(Protocol):
    """What is known of connected agents."""

    def obstacle(self, agent: Address) -> str | None:
        """Return why a dial through the agent would fail at once, "" if it would not.

        None if it is not known.
        """


# -- a flow


class AskedPlan(NamedTuple):
    """What a flow is explained with."""

    config: Config
    router: RuleRouter
    dialers: DialerFactory
    tunnels: TunnelStates


def explain(text: str, plan: AskedPlan, listeners: Mapping[str, str]) -> Iterator[str]:
    """Yield which rule and which upstream a flow meets, and whether that carries it, as lines.

    `listeners` are the names that the flow may come in on, each with the reason why no rule
    applies there, or "".  Raises FlowError.
    """
    config, router, dialers, _ = plan
    asked = parse_flow(text).on_default_listener(config, listeners)
    flow = asked.flow
    if flow.listener not in listeners:
        known = ", ".join(listeners) or "none"
        raise FlowError(f"there is no listener '{flow.listener}' (known: {known})")
    user = f"{flow.user}@" if flow.user else ""
    assumed = f" (assumed: {', '.join(asked.assumed)})" if asked.assumed else ""
    parties = f"{flow.network} {user}{flow.client.host} -> {flow.target}"
    yield f"flow: {parties} on {flow.listener}{assumed}"
    if listeners[flow.listener]:
        yield f"refused: {listeners[flow.listener]}"
        return
    listener = next((other for other in config.listeners if other.name == flow.listener), None)
    if flow.user and listener is not None:
        login = _login_text(flow.user, listener, config)
        yield from [login] if login else []
        if listener.auth != "none" and login:
            return
        flow = flow._replace(user="" if login else flow.user)
    if listener is not None and listener.routes:
        from netproxy.admin.diagnosis import port_routes  # late: few listeners have routes

        text, led = port_routes.explained(flow, listener)
        yield text
        if led is None:
            return
        flow, via, place = led
        if via is not None:
            router = router.through(place, dialers.dialer(via))
    try:
        written, flow = flow.target, router.named(flow)
    except DialError as error:
        yield f"refused: {error}"
        return
    if flow.target is not written:
        yield f"name: {flow.target.host} (fake address {written.host})"
    rule, outcome = router.explain(flow)
    yield f"rule: {rule_text(rule)}"
    if isinstance(outcome, DialError):
        decided = outcome.decided and f" (decided: {outcome.decided})"
        yield f"refused: {outcome}{decided}"
        return
    dialer, flow, _ = outcome
    yield f"upstream: {upstream_text(dialer, dialers, flow)}"
    if addresses := addresses_text(dialer, flow):
        yield f"addresses: {addresses}"
    yield from sources.explained(config, dialer, dialers.config_of(dialer), flow)
    yield f"carried: {_carried_text(dialer, flow, plan)}"


def rule_text(rule: str) -> str:
    """Return what decides, of RuleRouter.explain(), for people."""
    if rule.startswith("rules["):
        return rule
    return f"none matches; {_FALLBACKS.get(rule, rule)} applies"


def upstream_text(dialer: Dialer, dialers: DialerFactory, flow: Flow) -> str:
    """Return the name of an upstream with its hops; for auto, the upstreams in their order."""
    config = dialers.config_of(dialer)
    if not isinstance(dialer, AutoDialer):
        return dialer.name + (f": {config.text}" if config and config.text != dialer.name else "")
    upstream = upstream_text(dialer.upstream, dialers, flow)
    if dialer.preferred_dialer(flow) is dialer.upstream:
        return f"auto, currently through {upstream}"
    if dialer.pinned_dialer(flow):
        return "auto, currently direct"
    return f"auto, currently direct; if that fails, through {upstream}"


def addresses_text(dialer: Dialer, flow: Flow) -> str:
    """Return which addresses would be dialled; "" if nothing would be."""
    if (
        isinstance(dialer, AutoDialer)
        and not flow.addresses
        and dialer.preferred_dialer(flow) is dialer.direct
    ):
        pinned = dialer.pinned_dialer(flow)
        return "looked up when dialled" + ("" if pinned else "; the upstream resolves the name")
    if flow.addresses:
        return ", ".join(address.host for address in flow.addresses)
    if pack_ip(flow.target.host) is not None:
        return flow.target.host
    return "the upstream resolves the name" if dialer.carries else ""


def _login_text(user: str, listener: ListenerConfig, config: Config) -> str:
    """Return what becomes of a login, "" if the user is known or may be."""
    if listener.auth == "none":
        return f"login: not asked for on {listener.name}: the flow has no user"
    if user in config.users or config.auth.is_set:
        return ""
    return f"refused: there is no user '{user}': the login fails"


def _carried_text(dialer: Dialer, flow: Flow, plan: AskedPlan) -> str:
    config = plan.dialers.config_of(dialer)
    if flow.network not in dialer.carries:
        return f"no: {dialer.refusal.value}"
    how = udp_text(config) if config and flow.network == "udp" else ""
    obstacle, agent = _through_agents(config, plan.tunnels) if config else ("", "")
    if obstacle:
        return f"no: {obstacle}"
    condition = f", if agent '{agent}' is connected" if agent else ""
    return (f"yes, by {how}" if how else "yes") + condition


def _through_agents(config: UpstreamConfig, tunnels: TunnelStates) -> tuple[str, str]:
    """Return why an upstream leads nowhere without an agent, and an agent that it needs.

    Each is "" if there is none; of a group all members must need one.
    """
    for step in config.steps:
        if isinstance(step, GroupConfig):
            ways = [_through_agents(member.upstream, tunnels) for member in step.members]
            obstacle, agent = ways[0] if all(map(any, ways)) else ("", "")
        elif step.scheme == "tunnel":
            state = tunnels.obstacle(step.server)
            obstacle, agent = state or "", step.server.host if state is None else ""
        else:
            continue
        if obstacle or agent:
            return obstacle, agent
    return "", ""


# -- UDP through an upstream


def udp_text(config: UpstreamConfig) -> str:
    """Return how an upstream carries datagrams, "" for directly.

    If it does not carry any, return "no udp: " and the hop that does not.
    """
    how, obstacle = _udp_path(config, "", "")
    return f"no udp: {obstacle}" if obstacle else how


def _udp_path(config: UpstreamConfig, how: str, obstacle: str) -> tuple[str, str]:
    """Return how datagrams are carried, and which hop prevents it ("" for none).

    `how` and `obstacle` are the same for the hops before this upstream.
    """
    for step in config.steps:
        if isinstance(step, GroupConfig):
            paths = [_udp_path(member.upstream, how, obstacle) for member in step.members]
            some_carry = any(not member_obstacle for _, member_obstacle in paths)
            how, obstacle = ("group", "") if some_carry else paths[0]
        else:
            how, obstacle = _udp_through(step, how, obstacle)
    return how, obstacle


def _udp_through(hop: HopConfig, how: str, obstacle: str) -> tuple[str, str]:
    """Return the same as _udp_path(), behind one more hop."""
    if hop.udp == "none":
        return how, f"{hop.url} is configured to carry none"
    if hop.udp == "uot":
        return "UoT", ""
    if hop.scheme.startswith("http"):
        return "connect-udp", ""
    if hop.scheme == "tunnel" and hop.server.port:
        return how, f"{hop.url} is a service for TCP"
    if hop.scheme == "tunnel":
        return "tunnel", obstacle
    if hop.scheme.startswith("socks5"):
        # The datagrams of an ASSOCIATE do not go through its TCP connection.
        if hop.is_local:
            return "ASSOCIATE", f"{hop.url} is a UNIX socket, which carries no datagrams"
        needs = obstacle and f"{hop.url} must be reached over UDP, but {obstacle}"
        return "ASSOCIATE", needs
    if hop.scheme != "direct":
        return how, f"{hop.scheme} carries none"
    return how, obstacle
