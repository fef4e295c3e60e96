"""Checks where a configuration listens: collisions, privileged ports, upstreams that lead back.

Checks the interfaces of binds as well.  Binds nothing and looks no name up; asks the kernel which
addresses and interfaces are this machine's.
"""

from __future__ import annotations

import os
import socket

from netproxy.access.own_sockets import OwnSockets
from netproxy.config.schema import Config, HopConfig, UpstreamConfig
from netproxy.config.tree.problems import Problems
from netproxy.daemon.own_sockets import METRICS, PAC, WantedSocket, sockets_of, wanted_sockets
from netproxy.config.used import fixed_targets, name_servers, used_upstreams
from netproxy.interfaces.addresses import ActivationAddress, Address, UnixAddress, pack_ip
from netproxy.interfaces.networks import any_holds
from netproxy.interfaces.routing import Bind, RouteSelectors
from netproxy.net.address import PRIVILEGED_LIMIT, is_ipv6, is_unspecified
from netproxy.net.local.routes import KernelRoutes
from netproxy.observe.log import Log
from netproxy.typed import Iterator

PORT_START = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
STATUS = "/proc/self/status"
_BIND_SERVICE = 1 << 10
"""CAP_NET_BIND_SERVICE in a set of capabilities."""


def check_ports(config: Config, problems: Problems) -> None:
    """Warn of ports that this process may not bind."""
    low = [
        (listener, address)
        for listener in config.listeners
        for address in listener.addresses
        if 0 < address.port < PRIVILEGED_LIMIT and not isinstance(address, ActivationAddress)
    ]
    if not low or may_bind_any_port():
        return
    start = _first_unprivileged_port()
    for listener, address in low:
        if address.port < start:
            problems.warn(
                f"listen: {address}: ports below {start} need CAP_NET_BIND_SERVICE, "
                "which this process does not have",
                listener.place,
            )


def check_collisions(config: Config, problems: Problems) -> None:
    """Add an error for each socket whose address and port another one takes as well.

    Names are not looked up: a name collides with nothing but itself.
    """
    seen: dict[tuple[str, int], list[WantedSocket]] = {}
    for wanted in sockets_of(config):
        others = seen.setdefault((wanted.network, wanted.address.port), [])
        for other in others:
            if _overlap(wanted.address.host, other.address.host):
                key = {METRICS: "metrics", PAC: "pac.listen"}.get(wanted.owner, "listen")
                problems.add(
                    f"{key}: {wanted.network} {wanted.address} is already used by {other.owner} "
                    f"({other.address})",
                    wanted.place,
                )
                break
        others.append(wanted)


def _overlap(first: str, second: str) -> bool:
    """Return whether two hosts cannot have sockets with the same port.

    "::" stands for both families.
    """
    packed = [pack_ip(host) for host in (first, second)]
    if None in packed:
        return first.lower() == second.lower()
    if packed[0] == packed[1]:
        return True
    hosts = [host for host in (first, second) if is_unspecified(host)]
    return any(is_ipv6(host) for host in hosts) or (
        bool(hosts) and not (is_ipv6(first) or is_ipv6(second))
    )


def may_bind_any_port() -> bool:
    """Return whether this process may bind any port; True if that is not known."""
    try:
        with open(STATUS, encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("CapEff:"):
                    return bool(int(line.split()[1], 16) & _BIND_SERVICE)
    except OSError:
        pass
    return True


def _first_unprivileged_port() -> int:
    try:
        with open(PORT_START, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return PRIVILEGED_LIMIT


def check_loops(config: Config, problems: Problems) -> None:
    """Add an error for each upstream whose first proxy is a listener of this daemon."""
    _check_paths(config, problems)
    # The mark too: policy routing may lead one mark to this machine and another away from it.
    hops = {
        (hop.server, hop.mark): hop
        for upstream in used_upstreams(config)
        for hop in _first(upstream)
    }
    if not hops:
        return
    routes = KernelRoutes(Log("error"))
    own = OwnSockets(routes.is_local)
    own.set(wanted_sockets(config))
    try:
        for (server, mark), hop in hops.items():
            host = "127.0.0.1" if server.host == "localhost" else server.host
            selectors = RouteSelectors(mark)
            if own.holds("tcp", Address(host, server.port), selectors=selectors):
                message = "is a listener of this daemon: connections would come back to it"
                problems.add(f"the upstream {hop.url} {message}", hop.place)
    finally:
        routes.close()


def _check_paths(config: Config, problems: Problems) -> None:
    """Add an error for each UNIX socket of the daemon's own that an upstream or target names."""
    own = {config.control} - {""}
    own |= {
        address.path
        for listener in config.listeners
        for address in listener.addresses
        if isinstance(address, UnixAddress)
    }
    real = set(map(os.path.realpath, own))
    named: list[tuple[str, Address, str]] = [
        (f"the upstream {hop.url}", hop.server, hop.place)
        for upstream in used_upstreams(config)
        for hop in upstream.hops
    ]
    named += [(f"target: {target}", target, place) for target, place in fixed_targets(config)]
    for what, address, place in dict.fromkeys(named):
        if isinstance(address, UnixAddress) and os.path.realpath(address.path) in real:
            problems.add(f"{what} is a socket of this daemon", place)


def check_fake_addresses(config: Config, problems: Problems) -> None:
    """Add an error for each address of the file that is a fake one: nobody can be reached there."""
    fake = config.dns.fake
    hosts = [(f"dns.hosts.{name}", host) for name, hosts in config.dns.hosts for host in hosts]
    hosts += [("dns.servers", server.server.host) for server in name_servers(config)]
    for upstream in used_upstreams(config):
        hosts += [(hop.url, hop.server.host) for hop in upstream.hops]
    for owner, host in dict.fromkeys(hosts):
        if any_holds(fake.networks, host):
            problems.add(f"dns.fake: {host} of {owner} is one of the fake addresses", fake.place)


def check_interfaces(config: Config, problems: Problems) -> None:
    """Warn of each interface in a bind or an announcement that the machine does not have."""
    for bind, place in _binds(config):
        if bind is not None and bind.device and not _has_interface(bind.device):
            # late: only for this
            from netproxy.config.sections.binds import INCOMING
            from netproxy.config.tree.hints import EDITS_LIMIT, suggestion

            hint = suggestion(bind.device, (INCOMING,), EDITS_LIMIT)
            problems.warn(f"bind: there is no interface '{bind.device}'{hint}", place)
    for listener in config.listeners:
        for interface in listener.announced_interfaces:
            if not _has_interface(interface):
                message = f"announce: there is no interface '{interface}' yet"
                problems.warn(message, listener.place)


def _has_interface(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _binds(config: Config) -> Iterator[tuple[Bind | None, str]]:
    """Yield each bind with its place."""
    for listener in config.listeners:
        yield listener.bind, listener.place
    for upstream in used_upstreams(config):
        for hop in upstream.hops:
            yield hop.bind, hop.place
    for user in config.users.values():
        yield user.bind, user.place


def _first(upstream: UpstreamConfig) -> Iterator[HopConfig]:
    """Yield the proxies that this machine itself connects to, those of tunnels left out."""
    for step in upstream.steps[:1]:
        if not isinstance(step, HopConfig):
            for member in step.members:
                yield from _first(member.upstream)
        elif step.server.port and step.scheme != "tunnel":
            yield step
