"""Describes a configuration: what it would do with a flow, and the state of its upstreams.

netproxyd --explain prints these lines, netproxyctl asks for them.  Pure, except that
statistics are read and that explain() may wait for a name lookup.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Iterable, Iterator, Mapping, Protocol

from netproxy.admin import sources
from netproxy.config.schema import GroupConfig
from netproxy.dialer.member import Member
from netproxy.errors import DialError, NetProxyError, ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.protocol.host import parse_host
from netproxy.router.auto import AutoDialer

if TYPE_CHECKING:
    from netproxy.access.limits import Admission
    from netproxy.config.schema import Config, HopConfig, UpstreamConfig
    from netproxy.dialer.factory import DialerFactory
    from netproxy.interfaces.answers import ListenerRow, MemberRow, UpstreamRow
    from netproxy.interfaces.routing import Dialer
    from netproxy.router.router import RuleRouter

ANY_CLIENT = Address("127.0.0.1", 0)
"""The client of a flow that names none."""
EXAMPLE = "udp alice@192.168.1.5 -> example.com:443 on main"
# [tcp|udp] [[[user@]client] ->] host:port [on listener]
_FLOW = re.compile(
    r"\s*(?:(tcp|udp)\s+)?(?:(?:(?:([^@\s]+)@)?([^@\s>-]\S*)\s+)?->\s*)?"
    r"([^@\s>]+):([0-9]{1,5})(?:\s+on\s+(\S+))?\s*\Z"
)


class FlowError(NetProxyError):
    """A flow is not written as parse_flow() expects it, or names an unknown listener."""


class BoundListener(Protocol):
    """A listener that is running, as far as listening() needs it."""

    name: str
    """In the configuration; several addresses have one name."""
    network: str
    address: Address


# -- a flow


def parse_flow(text: str, listener: str) -> Flow:
    """Parse "udp alice@192.168.1.5 -> example.com:443 on main".

    All parts except the target may be left out, the arrow as well; `listener` is the default for
    the last one.
    Raises FlowError.
    """
    match = _FLOW.match(text)
    if not match or int(match[5]) > 65535:
        raise FlowError(f"not a flow (expected one such as '{EXAMPLE}')")
    try:
        client = (
            Address(parse_host(match[3].encode(errors="replace")), 0) if match[3] else ANY_CLIENT
        )
        target = Address(parse_host(match[4].encode(errors="replace")), int(match[5]))
    except ProtocolError as error:
        raise FlowError(str(error)) from error
    return Flow(match[1] or "tcp", client, target, match[6] or listener, match[2] or "")


def explain(
    text: str,
    router: RuleRouter,
    dialers: DialerFactory,
    listeners: Mapping[str, str],
    config: Config,
) -> Iterator[str]:
    """Yield which rule and which upstream a flow meets, and whether that carries it, as lines.

    `listeners` are the names that the flow may come in on, each with the reason why no rule
    applies there, or "".  Raises FlowError.
    """
    flow = parse_flow(text, next(iter(listeners), ""))
    if flow.listener not in listeners:
        known = ", ".join(listeners) or "none"
        raise FlowError(f"there is no listener '{flow.listener}' (known: {known})")
    user = f"{flow.user}@" if flow.user else ""
    yield f"flow: {flow.network} {user}{flow.client.host} -> {flow.target} on {flow.listener}"
    if listeners[flow.listener]:
        yield f"refused: {listeners[flow.listener]}"
        return
    rule, outcome = router.explain(flow)
    if not rule.startswith("rules["):
        rule = f"none matches; {rule or 'the upstream of the listener or the default'} applies"
    yield f"rule: {rule}"
    if isinstance(outcome, DialError):
        yield f"refused: {outcome}"
        return
    dialer, flow, _ = outcome
    yield f"upstream: {_upstream_text(dialer, dialers, flow)}"
    if addresses := _addresses_text(dialer, flow):
        yield f"addresses: {addresses}"
    yield from sources.explained(config, dialer, dialers.config_of(dialer), flow)
    yield f"carried: {_carried_text(dialer, dialers.config_of(dialer), flow)}"


def _upstream_text(dialer: Dialer, dialers: DialerFactory, flow: Flow) -> str:
    """Return the name of an upstream with its hops; for auto, the upstreams in their order."""
    config = dialers.config_of(dialer)
    if not isinstance(dialer, AutoDialer):
        return dialer.name + (f": {config.text}" if config and config.text != dialer.name else "")
    upstream = _upstream_text(dialer.upstream, dialers, flow)
    if dialer.preferred_dialer(flow) is dialer.upstream:
        return f"auto, currently through {upstream}"
    if dialer.pinned_dialer(flow):
        return "auto, currently direct"
    return f"auto, currently direct; if that fails, through {upstream}"


def _addresses_text(dialer: Dialer, flow: Flow) -> str:
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
    return "the upstream resolves the name" if dialer.carries else ""


def _carried_text(dialer: Dialer, config: UpstreamConfig | None, flow: Flow) -> str:
    if flow.network not in dialer.carries:
        return f"no: {dialer.refusal.value}"
    how = udp_text(config) if config and flow.network == "udp" else ""
    return f"yes, by {how}" if how else "yes"


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
    if hop.scheme == "tunnel":
        return "tunnel", obstacle
    if hop.scheme.startswith("socks5"):
        # The datagrams of an ASSOCIATE do not go through its TCP connection.
        needs = obstacle and f"{hop.url} must be reached over UDP, but {obstacle}"
        return "ASSOCIATE", needs
    if hop.scheme != "direct":
        return how, f"{hop.scheme} carries none"
    return how, obstacle


# -- the running daemon


def listening(
    listeners: Iterable[BoundListener], admissions: Mapping[str, Admission]
) -> list[ListenerRow]:
    """Return the listeners, one row for each name; `admissions` are by name."""
    by_name: dict[str, list[BoundListener]] = {}
    for listener in listeners:
        by_name.setdefault(listener.name, []).append(listener)
    return [
        {
            "name": name,
            "network": "+".join(sorted({listener.network for listener in of_name})),
            "address": ", ".join(dict.fromkeys(str(listener.address) for listener in of_name)),
            "live": admissions[name].live if name in admissions else 0,
            "accepted": admissions[name].entered if name in admissions else 0,
        }
        for name, of_name in by_name.items()
    ]


def upstreams(dialers: DialerFactory, configs: Mapping[str, UpstreamConfig]) -> list[UpstreamRow]:
    """Return the upstreams with their statistics; `configs` are by name."""
    return [
        {
            **(_member_row(name, dialer) if isinstance(dialer, Member) else _bare(name, dialer)),
            "groups": [
                {
                    "name": group.name,
                    "balance": group.balance,
                    "members": [_member_row(member.name, member) for member in group.members],
                }
                for group in groups
            ],
        }
        for name, dialer, groups in dialers.upstreams(configs)
    ]


def _member_row(name: str, member: Member) -> MemberRow:
    return {
        "name": name,
        "state": member.state,
        "carries": sorted(member.carries),
        "live": member.live,
        "dialled": member.dialled,
        "failed": member.failed,
        "latency": member.latency,
        "error": member.error,
    }


def _bare(name: str, dialer: Dialer) -> MemberRow:
    """Return the row of an upstream that keeps no statistics: direct, block and auto."""
    return {
        "name": name,
        "state": "-",
        "carries": sorted(dialer.carries),
        "live": 0,
        "dialled": 0,
        "failed": 0,
        "latency": 0.0,
        "error": "",
    }
