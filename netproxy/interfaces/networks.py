"""IP networks in CIDR notation.  Pure."""

from __future__ import annotations

from typing import Iterable, NamedTuple

from netproxy.interfaces.addresses import V4_MAPPED_PREFIX, pack_ip

_EXPECTED = "(expected an address or CIDR, such as 10.0.0.0/8)"


class IpNetwork(NamedTuple):
    """A network: the first bits of its addresses as a number, and how many bits follow."""

    size: int
    """Bytes of an address: 4 or 16."""
    prefix: int
    shift: int
    """Bits behind the prefix."""

    @classmethod
    def parse(cls, text: str) -> IpNetwork:
        """Parse "10.0.0.0/8" or a single address.

        A network of v4-mapped addresses becomes the network of these IPv4 addresses.
        Raises ValueError for anything else, and if bits behind the prefix are set.
        """
        host, slash, bits_text = text.partition("/")
        packed = pack_ip(host)
        is_number = bits_text.isascii() and bits_text.isdigit() and len(bits_text) < 4
        if packed is None or (slash and not is_number):
            raise ValueError(f"'{text}' is not a valid network {_EXPECTED}")
        shift = len(packed) * 8 - (int(bits_text) if slash else len(packed) * 8)
        value = int.from_bytes(packed, "big")
        if shift < 0 or (value >> shift) << shift != value:
            why = "the prefix is too long, or bits behind it are set"
            raise ValueError(f"'{text}' is not a valid network: {why}")
        if packed.startswith(V4_MAPPED_PREFIX) and shift <= 32:
            return cls(4, (value & 0xFFFFFFFF) >> shift, shift)
        return cls(len(packed), value >> shift, shift)

    def holds(self, host: str) -> bool:
        """Return whether a literal address is in the network.  Its scope is ignored."""
        return any_holds((self,), host)


def any_holds(networks: Iterable[IpNetwork], host: str) -> bool:
    """Return whether a literal address is in one of the networks; a name never is.

    The scope of the address is ignored.
    """
    packed = pack_ip(host.partition("%")[0])
    if packed is None:
        return False
    size, value = len(packed), int.from_bytes(packed, "big")
    return any(
        network.size == size and value >> network.shift == network.prefix for network in networks
    )


class NetworkList:
    """A set of networks, few enough to compare one after the other."""

    def __init__(self, networks: Iterable[IpNetwork]) -> None:
        self._networks = list(networks)

    def __contains__(self, host: str) -> bool:
        """Return whether a literal address is in one of the networks; a name never is."""
        return any_holds(self._networks, host)


_LOOPBACK = (IpNetwork.parse("127.0.0.0/8"), IpNetwork.parse("::1"))


def is_loopback(host: str) -> bool:
    """Return whether a literal address is a loopback address of this machine."""
    return any_holds(_LOOPBACK, host)
