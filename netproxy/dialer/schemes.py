"""The dialers through a proxy, by the scheme of the proxy's URL.

Each protocol's module is imported when the first upstream needs it: together they cost 0.4 MiB,
and many configurations have no upstream.
"""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, Callable, TypeAlias

if TYPE_CHECKING:
    from netproxy.dialer.direct import TargetResolver
    from netproxy.dialer.hop import Hop, ProxyDialer
    from netproxy.interfaces.datagrams import PacketDependencies

    Builder: TypeAlias = Callable[
        [Hop, TargetResolver | None, PacketDependencies, str], ProxyDialer
    ]


def _socks4(
    hop: Hop, target_resolver: TargetResolver | None, dependencies: PacketDependencies, udp: str
) -> ProxyDialer:
    from netproxy.dialer.socks4 import Socks4Dialer

    return Socks4Dialer(hop, target_resolver)


def _socks5(
    hop: Hop, target_resolver: TargetResolver | None, dependencies: PacketDependencies, udp: str
) -> ProxyDialer:
    from netproxy.dialer.socks5 import Socks5Dialer

    return Socks5Dialer(hop, target_resolver, dependencies, udp == "auto")


def _http(
    hop: Hop, target_resolver: TargetResolver | None, dependencies: PacketDependencies, udp: str
) -> ProxyDialer:
    from netproxy.dialer.web.bound_udp import Agreement
    from netproxy.dialer.web.http import HttpDialer

    agreement = Agreement() if udp == "auto" else None
    return HttpDialer(hop, dependencies.counter, udp != "none", agreement=agreement)


BUILDERS: dict[str, Builder] = {
    "socks4": _socks4,
    "socks4a": _socks4,
    "socks5": _socks5,
    "socks5h": _socks5,
    "socks5+tls": _socks5,
    "socks5h+tls": _socks5,
    "http": _http,
    "https": _http,
}
"""Build a dialer from its hop, what looks names up (None: the proxy does), the dependencies of
packet connections, and how the proxy may be asked to carry UDP: "auto", "connect-udp" (a stream
for each target), "none"."""

RESOLVING = frozenset({"socks4", "socks5", "socks5+tls"})
"""Schemes whose target names are looked up here and not by the proxy."""
