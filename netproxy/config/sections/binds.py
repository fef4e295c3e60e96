"""Reads `bind` and `rotate`: the local address that connections leave from.

An upstream, a user and a listener have these two keys.
"""

from __future__ import annotations

import re

from netproxy.config.tree.node import MapReader
from netproxy.config.units import parse_duration
from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.networks import IpNetwork
from netproxy.interfaces.routing import Bind

INCOMING = "incoming"
ROTATIONS = ("connection", "client", "user", "target")
"""Or a duration."""
PERIOD_FLOOR = 1.0
"""Seconds.  A new address for each connection is `rotate: connection`."""
_UNUSABLE = {
    "0.0.0.0": "the unspecified address",
    "::": "the unspecified address",
    "224.0.0.0/4": "a multicast address",
    "ff00::/8": "a multicast address",
    "255.255.255.255": "the broadcast address",
}
# An expression as text: `re` compiles it when it is first needed, in most daemons never.
# At most 15 characters (IFNAMSIZ), as dev_valid_name() of the kernel accepts them.  Digits and
# dots alone are a mistyped address.
INTERFACE = r"(?![\d.]+\Z)[^\s/:]{1,15}\Z"


def read_bind(section: MapReader) -> Bind | None:
    """Take `bind` and `rotate`; return None without `bind`, or if it has an error."""
    has_rotate = section.has("rotate")
    bind = section.read("bind", parse_bind, None)
    rotate, period = section.read("rotate", _rotation, (ROTATIONS[0], 0.0))
    if has_rotate and (bind is None or bind.prefix is None):
        section.add_error(
            "rotate", "needs a prefix as bind, such as 2001:db8:1::/64", given=("bind",)
        )
    if bind is None or bind.prefix is None:
        return bind
    return bind._replace(rotate=rotate, period=period)


def parse_bind(text: str) -> Bind:
    """Return where an address, a prefix, an interface or "incoming" lets connections leave from.

    Raises ValueError.
    """
    if text == INCOMING:
        return Bind(text, incoming=True)
    if pack_ip(text.partition("/")[0]) is not None:
        network = IpNetwork.parse(text)
        _check_usable(text, network)
        if "/" in text:
            return Bind(text, prefix=network)
        return Bind(text, address=network.address(0))
    if re.match(INTERFACE, text):
        return Bind(text, device=text)
    raise ValueError(f"'{text}' is neither an address, a prefix, an interface nor {INCOMING}")


def _check_usable(text: str, network: IpNetwork) -> None:
    """Raise ValueError if an address, or one of a prefix, is no source of a connection."""
    for unusable, kind in _UNUSABLE.items():
        other = IpNetwork.parse(unusable)
        if network.holds(other.address(0)) or other.holds(network.address(0)):
            verb = "holds" if "/" in text else "is"
            raise ValueError(f"'{text}' {verb} {kind}: no connection can leave from it")


def _rotation(text: str) -> tuple[str, float]:
    """Return the text and its seconds, 0 for a word.  Raises ValueError."""
    if text in ROTATIONS:
        return text, 0.0
    if not text[:1].isdigit():
        raise ValueError(f"'{text}' is neither one of {', '.join(ROTATIONS)} nor a duration")
    period = parse_duration(text)
    if period < PERIOD_FLOOR:
        raise ValueError(f"must be at least {PERIOD_FLOOR:g}s")
    return text, period
