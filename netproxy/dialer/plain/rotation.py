"""Chooses the local address of a flow, as a bind says.

A prefix has a random address for each connection.  An address that stays is a digest of the
client, the user, the target or the period, with a key that is made when the process starts.
Nothing is stored.  Without the key, an address does not tell which client, user, target or period
it was chosen for.  Thread: any.
"""

from __future__ import annotations

import os
import time

from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.networks import IpNetwork
    from netproxy.interfaces.routing import Bind
    from netproxy.net.socket_options import SocketOptions

KEY_BYTES = DIGEST_BYTES = 16
"""128 bits: as many as an IPv6 address has."""
_KEY = os.urandom(KEY_BYTES)


def bound_options(options: SocketOptions, bind: Bind, key: str, flow: Flow) -> SocketOptions:
    """Return socket options with what a bind says for a flow; `key` names the bind in errors."""
    if bind.device:
        return options._replace(device=bind.device)
    address = source_address(bind, flow)
    if not address:
        return options
    label = f"{key}: {address if bind.incoming else bind.text}"
    return options._replace(address=address, freebind=not bind.address, label=label)


def source_address(bind: Bind, flow: Flow) -> str:
    """Return the local address that a bind has for a flow, "" if the system chooses.

    The system chooses if the client's own address is asked for and the flow has no client.
    """
    if bind.prefix is not None:
        return usable_address(bind.prefix, _number(bind, flow))
    if bind.incoming:
        return flow.source.incoming if flow.source is not None else ""
    return bind.address


def usable_address(prefix: IpNetwork, number: int) -> str:
    """Return one of the addresses that a host may have in a prefix; any number stands for one.

    The first address of an IPv6 prefix is that of its routers (RFC 4291 section 2.6.1), except
    of a /127 (RFC 6164).  The first and the last one of an IPv4 prefix are its network and
    broadcast addresses, except of a /31 (RFC 3021).
    """
    count = 1 << prefix.shift
    first, left_out = 0, 0
    if prefix.shift > 1:
        first, left_out = 1, 1 if prefix.size == 16 else 2
    return prefix.address(first + number % (count - left_out))


def _number(bind: Bind, flow: Flow) -> int:
    """Return the number of the flow's address: random, or the same for the same subject."""
    if bind.period:
        return _digest("period", int(time.monotonic() // bind.period))
    rotate = bind.rotate
    if rotate == "connection":
        return int.from_bytes(os.urandom(DIGEST_BYTES), "big")
    if rotate == "target" and flow.network == "tcp":
        return _digest("target", flow.target.host)
    if rotate == "user" and flow.user:
        return _digest("user", flow.user)
    # All targets of a UDP client see one address (RFC 4787 REQ-1, REQ-2).
    return _digest("client", flow.client.host)


def _digest(kind: str, subject: object) -> int:
    from _blake2 import blake2b  # late: few need it.  hashlib would load libcrypto, 4 MiB

    text = f"{kind} {subject}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, key=_KEY, digest_size=DIGEST_BYTES).digest(), "big")
