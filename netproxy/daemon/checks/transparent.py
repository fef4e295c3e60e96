"""Checks what transparent listeners need of the kernel: a capability, a module, a route.

Warns only: rules may be applied after the start.  The start itself fails without the capability.
"""

from __future__ import annotations

import errno
import socket

from netproxy.daemon.checks.sockets import may_bind_any_port
from netproxy.errors import ListenError
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.listeners import TAKEN_MARK
from netproxy.interfaces.routing import RouteSelectors
from netproxy.net.local.routes import KernelRoutes
from netproxy.net.socket_options import SO_ORIGINAL_DST, check_transparent
from netproxy.observe.log import Log
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.config.schema import Config, ListenerConfig
    from netproxy.config.tree.problems import Problems

_ELSEWHERE = {4: "192.0.2.1", 16: "2001:db8::1"}
"""Addresses of no machine (RFC 5737, RFC 3849), by the bytes of an address of the family."""


def check_transparent_listeners(config: Config, problems: Problems) -> None:
    """Warn of what is missing, once for each listener."""
    routes = KernelRoutes(Log("error"))
    try:
        for listener in config.listeners:
            missing = ""
            if listener.protocol == "redirect":
                missing = _missing_module()
            elif listener.protocol == "tproxy":
                missing = _missing_capability(listener) or _missing_route(listener, routes)
            if missing:
                problems.warn(f"protocol: {listener.protocol}: {missing}", listener.place)
    finally:
        routes.close()


def _missing_module() -> str:
    """Return what is missing if the kernel cannot tell where a connection was redirected from."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        try:
            trial.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16)
        except OSError as error:
            if error.errno == errno.ENOPROTOOPT:
                return (
                    "the kernel does not track connections (module nf_conntrack): no rule leads "
                    "connections here yet (netproxyctl nft)"
                )
    return ""


def _missing_capability(listener: ListenerConfig) -> str:
    try:
        check_transparent("", listener.addresses[0])
    except ListenError:
        return "needs CAP_NET_ADMIN, which this process does not have"
    if "udp" in listener.network and not may_bind_any_port():
        return "replies from ports below 1024 need CAP_NET_BIND_SERVICE, which this process lacks"
    return ""


def _missing_route(listener: ListenerConfig, routes: KernelRoutes) -> str:
    """Return what is missing if no route leads packets to us that a rule has marked."""
    selectors = RouteSelectors(TAKEN_MARK)
    for address in listener.addresses:
        packed = pack_ip(address.host)
        elsewhere = Address(_ELSEWHERE[16 if packed and len(packed) == 16 else 4], 9)
        if not routes.is_local("tcp", elsewhere, selectors):
            return (
                f"no route leads packets with the mark {TAKEN_MARK:#x} to this machine "
                "(netproxyctl nft --routes; your own rules may use another mark)"
            )
    return ""
