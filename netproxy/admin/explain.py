"""What the daemon tells of itself: what a configuration would do with a flow, and how its ways out are.

Pure, but for reading figures and for the names that explain() has looked up.
"""

from __future__ import annotations

import re
from typing import Any, Iterable, Iterator, Mapping

from netproxy.config.schema import Config, GroupConfig, UpstreamConfig
from netproxy.dialer.factory import DialerFactory, udp_warnings
from netproxy.dialer.member import Member
from netproxy.errors import DialError, NetProxyError, ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer
from netproxy.protocol.host import parse_host
from netproxy.router.auto import AutoDialer
from netproxy.router.router import RuleRouter

SOMEBODY = Address("127.0.0.1", 0)  # the client of a flow that names none
# "[tcp|udp] [[user@]client] -> host:port [on listener]"
_FLOW = r"\s*(?:(tcp|udp)\s+)?(?:(?:([^@\s]+)@)?([^@\s>-]\S*)\s+)?->\s*(\S+):(\d{1,5})(?:\s+on\s+(\S+))?\s*\Z"


class FlowError(NetProxyError):
    """What was written is no flow."""


def plan(config: Config, dialers: DialerFactory) -> list[str]:
    """What would listen, and what each way out can carry and by what, or which hop is in the way."""
    asked = ", ".join(
        f"{server.scheme}://{server.server}{server.path}" for server in config.dns.servers
    )
    lines = [
        f"listen {address} {'+'.join(one.network)} {one.protocol} '{one.name}' "
        + (
            f"asks {asked}"
            if one.protocol == "dns"
            else f"out by {(one.upstream or config.default).text}"
        )
        for one in config.listeners
        for address in one.addresses
    ]
    lines += _tunnels(config)
    lines += [f"warning: {text}" for text in udp_warnings(config, dialers)]
    for name, way in [("default", config.default), *config.upstreams.items()]:
        carried, udp = ", ".join(sorted(dialers.dialer(way).carries)) or "nothing", udp_text(way)
        lines.append(
            f"upstream {name}: {way.text} carries {carried}"
            + (f"; {udp}" if udp.startswith("no ") else f" by {udp}" if udp else "")
        )
    return lines


def parse_flow(text: str, listener: str) -> Flow:
    """Of "udp alice@192.168.1.5 -> example.com:443 on main"; all but the target may be left out.  FlowError."""
    match = re.match(_FLOW, text)
    if not match or int(match[5]) > 65535:
        raise FlowError("write a flow as 'udp alice@192.168.1.5 -> example.com:443 on main'")
    try:
        client = Address(parse_host(match[3].encode()), 0) if match[3] else SOMEBODY
        return Flow(
            match[1] or "tcp",
            client,
            Address(parse_host(match[4].encode()), int(match[5])),
            match[6] or listener,
            match[2] or "",
        )
    except ProtocolError as error:
        raise FlowError(str(error)) from error


def explain(
    text: str, router: RuleRouter, dialers: DialerFactory, places: Mapping[str, str]
) -> Iterator[str]:
    """Which rule a flow meets, which way it takes, and whether that carries it; `places` are where it may come in,
    each with why nothing may that rules decide on, or "".  FlowError."""
    flow = parse_flow(text, next(iter(places), ""))
    if flow.listener not in places:
        raise FlowError(
            f"there is no listener '{flow.listener}'; there are {', '.join(places) or 'none'}"
        )
    yield f"flow: {flow.network} {flow.user + '@' if flow.user else ''}{flow.client.host} -> {flow.target} on {flow.listener}"
    if places[flow.listener]:
        yield f"refused: {places[flow.listener]}"
        return
    rule, outcome = router.explain(flow)
    yield f"rule: {rule or 'none matches: the listener has its own way out, or the default is taken'}"
    if isinstance(outcome, DialError):
        yield f"refused: {outcome}"
        return
    dialer, flow = outcome
    config = dialers.config_of(dialer)
    yield f"way out: {_way_text(dialer, dialers, flow)}"
    if (
        isinstance(dialer, AutoDialer)
        and not flow.addresses
        and dialer.known_way(flow) is dialer.direct
    ):
        yield "addresses: looked up when it is dialled" + (
            "" if dialer.pinned_way(flow) else "; the name goes to the upstream as it is"
        )
    elif flow.addresses:
        yield f"addresses: {', '.join(address.host for address in flow.addresses)}"
    elif dialer.carries:
        yield "addresses: the name goes to the proxy as it is"
    carried = flow.network in dialer.carries
    how = udp_text(config) if config and flow.network == "udp" else ""
    yield f"carried: {'yes' if carried else 'no'}{', by ' + how if carried and how else ''}" + (
        "" if carried else f": {dialer.refusal.value}"
    )


def _way_text(dialer: Dialer, dialers: DialerFactory, flow: Flow) -> str:
    """Its name, with its hops; of auto also by which way a connection would be tried now."""
    config = dialers.config_of(dialer)
    if not isinstance(dialer, AutoDialer):
        return dialer.name + (f": {config.text}" if config and config.text != dialer.name else "")
    upstream = _way_text(dialer.upstream, dialers, flow)
    if dialer.known_way(flow) is dialer.upstream:
        return f"auto, now by {upstream}"
    return (
        "auto, now direct"
        if dialer.pinned_way(flow)
        else f"auto, now direct, and where that fails by {upstream}"
    )


def _tunnels(config: Config) -> list[str]:
    bridge, agent = config.tunnel
    lines = []
    for name, one in (bridge.agents if bridge else {}).items():
        ports = [
            f"{Address(port.host, port.first)}{f'-{port.last}' if port.last > port.first else ''}/{port.network}"
            for port in one.ports
        ]
        lines.append(f"agent '{name}' may have {', '.join(ports) or 'no port'}")
    if agent is not None:
        lines.append(
            f"tunnel to {agent.bridge} {'by TLS' if agent.tls else 'without TLS'} as '{agent.name}' out by {agent.upstream.text}"
            + (", an exit" if agent.exit else "")
        )
        lines += [
            f"tunnel's port {one.port}/{one.network} leads to {one.target}"
            for one in agent.services
        ]
    return lines


def udp_text(config: UpstreamConfig) -> str:
    """By what a way out carries datagrams, "" for directly; or, behind "no udp: ", which hop does not."""
    how, lost = _udp(config, "", "")
    return f"no udp: {lost}" if lost else how


def _udp(config: UpstreamConfig, how: str, lost: str) -> tuple[str, str]:
    """By what datagrams are carried, and else what has lost them, behind a way that had them so."""
    for step in config.steps:
        if isinstance(step, GroupConfig):
            found = [_udp(member.upstream, how, lost) for member in step.members]
            how, lost = next((("group", "") for _, without in found if not without), found[0])
        elif step.udp == "none":
            lost = f"{step.url} is told to carry none"
        elif step.udp == "uot":
            how, lost = "UoT", ""
        elif step.scheme.startswith("http"):
            how, lost = "connect-udp", ""
        elif step.scheme == "tunnel":
            how = "tunnel"
        elif step.scheme.startswith("socks5"):
            how, lost = "ASSOCIATE", lost and f"{step.url} must be reached by it, but {lost}"
        elif step.scheme != "direct":
            lost = f"{step.scheme} has none"
    return how, lost


def listening(listeners: Iterable[Any], admissions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each listener of the configuration: its networks, addresses, and the connections that live and that were let in."""
    by_name: dict[str, list[Any]] = {}
    for one in listeners:
        by_name.setdefault(one.name, []).append(one)
    return [
        {
            "name": name,
            "network": "+".join(sorted({one.network for one in sockets})),
            "address": ", ".join(dict.fromkeys(str(one.address) for one in sockets)),
            "live": admissions[name].live if name in admissions else 0,
            "accepted": admissions[name].entered if name in admissions else 0,
        }
        for name, sockets in by_name.items()
    ]


def upstreams(dialers: DialerFactory, ways: Mapping[str, UpstreamConfig]) -> list[dict[str, Any]]:
    """Each way out with its figures, and those of its groups' members."""
    return [
        {
            **_figures(name, way),
            "groups": [
                {
                    "name": group.name,
                    "balance": group.balance,
                    "members": [_figures(member.name, member) for member in group.members],
                }
                for group in groups
            ],
        }
        for name, way, groups in dialers.upstreams(ways)
    ]


def _figures(name: str, way: Dialer) -> dict[str, Any]:
    """Of a way out; one that is simply direct has none."""
    member = way if isinstance(way, Member) else Member(name, way)
    return {
        "name": name,
        "state": member.state if way is member else "-",
        "carries": sorted(way.carries),
        "live": member.live,
        "dialled": member.dialled,
        "failed": member.failed,
        "latency": member.latency,
        "error": member.error,
    }
