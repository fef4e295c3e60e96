"""Makes the handlers of listeners whose clients do not name their target.

These are the transparent listeners, and those with a fixed target.
"""

from __future__ import annotations

from netproxy.handler.transparent.tcp import TransparentTcp, addressed_target, redirected_target
from netproxy.interfaces.listeners import AllowedClients
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.config.schema import ListenerConfig
    from netproxy.handler.factory import HandlerDependencies
    from netproxy.handler.outbound import Outbound
    from netproxy.handler.socks.socks5_udp import RelayState
    from netproxy.handler.forward import TcpForward, UdpForward
    from netproxy.handler.transparent.sniffer import Sniffer
    from netproxy.interfaces.connections import Handler
    from netproxy.interfaces.datagrams import PacketHandler

_TARGETS = {"redirect": redirected_target, "tproxy": addressed_target}
"""What tells the target of a connection, by protocol."""


def make_transparent(
    config: ListenerConfig,
    state: RelayState | None,
    dependencies: HandlerDependencies,
    outbound: Outbound,
    permission: Permission,
) -> tuple[Handler, PacketHandler | None]:
    """Return the handlers of a listener, None for datagrams without UDP."""
    is_own, counter = dependencies.is_own, dependencies.counter
    assert is_own is not None  # daemon.build has set it
    target_of = _TARGETS[config.protocol]
    sniffer = _make_sniffer(config)
    handler = TransparentTcp(target_of, outbound, permission, is_own, counter, sniffer)
    if state is None:
        return handler, None
    # late: a listener for TCP alone needs none of it
    from netproxy.handler.transparent.udp import TransparentUdp

    assert state.replies is not None  # daemon.listening.udp_relays has set it
    packets = TransparentUdp(
        dependencies.router,
        state.table,
        state.replies,
        permission,
        AllowedClients(*config.clients),
        is_own,
        counter,
    )
    permission.set_routed([outbound, packets])
    return handler, packets


def make_forward(config: ListenerConfig, outbound: Outbound, permission: Permission) -> TcpForward:
    """Return the handler of a listener that sends all connections to one target."""
    from netproxy.handler.forward import TcpForward  # late: transparent listeners have none

    target = config.target
    assert target is not None  # config.read has seen to it
    sniffer, send_proxy = _make_sniffer(config), config.send_proxy
    return TcpForward(config.name, outbound, target, permission, sniffer, send_proxy)


def make_udp_forward(
    config: ListenerConfig,
    state: RelayState | None,
    dependencies: HandlerDependencies,
    permission: Permission,
) -> UdpForward:
    """Return the handler of a listener that sends all datagrams to one target."""
    from netproxy.handler.forward import UdpForward  # late: transparent listeners have none

    assert state is not None and config.target is not None  # config.read has seen to it
    return UdpForward(
        config.name,
        dependencies.router,
        state.table,
        config.target,
        AllowedClients(*config.clients),
        dependencies.counter,
        permission,
    )


def _make_sniffer(config: ListenerConfig) -> Sniffer | None:
    """Return what finds names in the first bytes; None if the listener does not look at them."""
    if not config.sniff.kinds:
        return None
    from netproxy.handler.transparent.sniffer import Sniffer  # late: its codecs cost memory

    kinds, skipped, by_name = config.sniff
    return Sniffer(frozenset(kinds), skipped, config.target is not None, by_name)
