"""What the rules of the kernel must say so that flows come to the transparent listeners.

This module reads it from a configuration; netproxy.ctl.nft.nftables and .iptables write it down.
Pure, except that the numbers of users are looked up.
"""

from __future__ import annotations

import pwd

from netproxy.config.schema import GroupConfig, HopConfig
from netproxy.config.used import name_servers, used_upstreams
from netproxy.interfaces.addresses import ActivationAddress, Address, pack_ip
from netproxy.interfaces.listeners import TAKEN_MARK
from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.config.schema import Config, ListenerConfig, UpstreamConfig
    from netproxy.interfaces.networks import IpNetwork

MARK = TAKEN_MARK
"""The mark of packets that a rule TPROXY has taken is the number of their routing table, too."""
PREFERENCE = 20048
"""Where the rule about the mark stands among the routing rules: before those for all packets."""
FAMILIES = ("ipv4", "ipv6")
NEVER = {
    "ipv4": (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/4", "240.0.0.0/4"),
    ),
    "ipv6": ("::/127", "fc00::/7", "fe80::/10", "ff00::/8"),
}
"""Private networks, and addresses that no router forwards, by family."""


class RulesError(Exception):
    """No rules can be written, in words."""


class Lead(NamedTuple):
    """Flows of one network and one family, and the listener that they are led to."""

    protocol: str
    """ "redirect" or "tproxy"."""
    network: str
    """ "tcp" or "udp"."""
    family: str
    """One of FAMILIES."""
    host: str
    """The listener's address; "" if it listens on all."""
    port: int
    listener: str


class Rules(NamedTuple):
    """Everything that the rules of one configuration say."""

    leads: tuple[Lead, ...]
    interfaces: tuple[str, ...]
    """The interfaces whose flows are led; () for all."""
    clients: dict[str, tuple[str, ...]]
    """The networks whose flows are led, by family."""
    any_client: bool
    """True if all networks may use the listeners."""
    never: dict[str, tuple[str, ...]]
    """The targets that are left alone, by family."""
    fake: dict[str, tuple[str, ...]]
    """The networks of fake addresses, by family, which are led even if they are private."""
    names: tuple[str, ...]
    """Servers of upstreams that are known by name only: no rule can leave them out."""
    marks: tuple[int, ...]
    """The marks of the daemon's own traffic."""
    user: int | None
    """The number of the daemon's user, None if the rules cannot tell the daemon by it."""
    output: bool
    """True if flows of this machine itself are led as well."""

    def has(self, protocol: str) -> bool:
        """Return whether a listener of a protocol gets flows."""
        return any(lead.protocol == protocol for lead in self.leads)

    def families(self, protocol: str) -> list[str]:
        """Return the families of the flows that listeners of a protocol get."""
        return [
            family
            for family in FAMILIES
            if any((lead.protocol, lead.family) == (protocol, family) for lead in self.leads)
        ]


class Wishes(NamedTuple):
    """The options of the command."""

    interfaces: Sequence[str]
    exclude: Sequence[str]
    user: str
    output: bool


def make_rules(config: Config, wishes: Wishes) -> Rules:
    """Return the rules for a configuration.  Raises RulesError."""
    listeners = [item for item in config.listeners if item.protocol in ("redirect", "tproxy")]
    leads = tuple(_leads(listeners))
    if not leads:
        raise RulesError("there is no listener with the protocol redirect or tproxy and a port")
    hops = [hop for upstream in used_upstreams(config) for hop in _first(upstream)]
    servers, names = _servers(config, hops)
    marks = tuple(sorted({hop.mark for hop in hops} - {0}))
    if MARK in marks:
        raise RulesError(f"mark: {MARK:#x} is what the rules use for packets that they have taken")
    user = _user_id(wishes.user)
    dialled = [hop for hop in hops if hop.scheme not in ("block", "tunnel") and not hop.is_local]
    unmarked = [hop.url for hop in dialled if not hop.mark]
    if wishes.output and user is None and unmarked:
        raise RulesError(
            f"--output would lead the daemon's own traffic back to it: set `mark` on all upstreams "
            f"({unmarked[0]} has none), or name the daemon's user with --user"
        )
    networks = [network for item in listeners for network in item.clients.allow.networks]
    never = {family: list(NEVER[family]) for family in FAMILIES}
    for text in (*wishes.exclude, *servers):
        packed = pack_ip(text.partition("/")[0])
        if packed is None:
            raise RulesError(f"--exclude: '{text}' is neither an address nor a network")
        never[FAMILIES[len(packed) == 16]].append(text)
    return Rules(
        leads,
        tuple(wishes.interfaces),
        _by_family(networks),
        any(not item.clients.allow.networks for item in listeners),
        {family: tuple(dict.fromkeys(never[family])) for family in FAMILIES},
        _by_family(config.dns.fake.networks),
        names,
        marks,
        user,
        wishes.output,
    )


def _leads(listeners: Sequence[ListenerConfig]) -> Iterator[Lead]:
    """Yield for each network and family the first listener that serves it."""
    taken = set()
    for listener in listeners:
        for network in listener.network:
            for address in listener.addresses:
                for family, host in _served(address):
                    if (network, family) not in taken and address.port:
                        taken.add((network, family))
                        yield Lead(
                            listener.protocol, network, family, host, address.port, listener.name
                        )


def _served(address: Address) -> Iterator[tuple[str, str]]:
    """Yield the families that a listening address serves, with its host; "" for all hosts."""
    packed = pack_ip(address.host)
    if isinstance(address, ActivationAddress) or packed is None:
        return
    if not any(packed):
        if len(packed) == 16:
            yield "ipv6", ""
        yield "ipv4", ""
    else:
        yield FAMILIES[len(packed) == 16], address.host


def _first(upstream: UpstreamConfig) -> Iterator[HopConfig]:
    """Yield the hops that this machine itself dials."""
    for step in upstream.steps[:1]:
        if isinstance(step, GroupConfig):
            for member in step.members:
                yield from _first(member.upstream)
        else:
            yield step


def _servers(config: Config, hops: Sequence[HopConfig]) -> tuple[list[str], tuple[str, ...]]:
    """Return what the daemon itself connects to: addresses, and names."""
    hosts = [hop.server.host for hop in hops if hop.has_server and not hop.is_local]
    hosts += [server.server.host for server in name_servers(config) if server.upstream is None]
    if config.tunnel.agent is not None:
        hosts.append(config.tunnel.agent.bridge.host)
    hosts = list(dict.fromkeys(hosts))
    literal = [host for host in hosts if pack_ip(host) is not None]
    return literal, tuple(host for host in hosts if host not in literal)


def _by_family(networks: Sequence[IpNetwork]) -> dict[str, tuple[str, ...]]:
    """Return the texts of networks by family, each once."""
    texts = dict.fromkeys(map(str, networks))
    return {
        family: tuple(text for text in texts if FAMILIES[":" in text] == family)
        for family in FAMILIES
    }


def _user_id(name: str) -> int | None:
    """Return the number of the daemon's user.

    None if the machine has no such user, and for root, to whom other programs belong as well.
    """
    try:
        return pwd.getpwnam(name).pw_uid or None
    except KeyError:
        return None
