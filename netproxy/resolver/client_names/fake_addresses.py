"""Fake addresses: what dns listeners answer in place of the addresses of names.

A flow to a fake address is a flow to its name; so rules decide by the name, and the upstream
resolves it.  No server is asked when a client asks for such a name.
Thread: any; nothing here blocks.
"""

from __future__ import annotations

import time

from netproxy.errors import ProtocolError, QueryRefused
from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.flows import is_public
from netproxy.protocol import dns
from netproxy.protocol.host import parse_host
from netproxy.resolver.local_answers import encode_addresses, encode_pointer
from netproxy.resolver.special_names import parse_reverse_name
from netproxy.typed import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.networks import HostSet, IpNetwork
    from netproxy.resolver.client_names.fake_table import FakeTable

TTL = 10
"""Seconds: a restart forgets the addresses, and clients ask again soon.  A query costs little."""
SPARED = 16
"""The first addresses of a network, which interfaces may have.  The last one is spared as well."""
_TYPES = frozenset((dns.A, dns.AAAA, dns.SVCB, dns.HTTPS))
"""The types that lead a client to addresses: SVCB and HTTPS have hints of them (RFC 9460)."""
_INFRASTRUCTURE = ".arpa"
"""No servers have names below; clients learn from ipv4only.arpa about their network."""


class FakeNames(NamedTuple):
    """The names that have fake addresses."""

    names: HostSet | None = None
    """None: all public names."""
    exceptions: HostSet = ()

    def has(self, name: str) -> bool:
        """Return whether a name has fake addresses."""
        if name in self.exceptions:
            return False
        if self.names is not None:
            return name in self.names
        return is_public(name) and not name.endswith(_INFRASTRUCTURE)


class FakeAddresses:
    """The fake addresses of one configuration.  interfaces.routing.FakeAddresses."""

    def __init__(self, networks: Sequence[IpNetwork], names: FakeNames, table: FakeTable) -> None:
        """`networks`: at most one of each family."""
        self.networks = tuple(networks)
        self._names = names
        self._table = table
        kinds = {4: dns.A, 16: dns.AAAA}
        self._by_type = {kinds[network.size]: network for network in networks}
        self._count = min((capacity(network) for network in networks), default=0)

    def name(self, host: str, client: str) -> str | None:
        """Return the name of a fake address that a flow of a client uses, "" if it has none.

        Returns None for everything that is no fake address.
        """
        number = self._number(host)
        return None if number is None else self._table.name(number, client, time.monotonic())

    def answer(self, query: bytes, question: dns.Question, end: int, client: str) -> bytes | None:
        """Return the answer to a client, None if the name has no fake addresses.

        `end` is where the question of the query ends.  Raises QueryRefused.
        """
        if question.qtype not in _TYPES:
            return None
        try:
            name = parse_host(question.name.encode("ascii"))
        except ProtocolError:
            return None
        if pack_ip(name) is not None or not self._names.has(name):
            return None
        network = self._by_type.get(question.qtype)
        if network is None:
            # No records: with them, a browser would use the addresses of their hints.
            return encode_addresses(query, end, (), question.qtype, TTL)
        number = self._table.number(name, client, time.monotonic(), self._count)
        if number is None:
            raise QueryRefused("no fake address left", f"dns.fake {network}")
        address = network.address(SPARED + number)
        return encode_addresses(query, end, (address,), question.qtype, TTL)

    def reverse_answer(
        self, query: bytes, question: dns.Question, end: int, client: str
    ) -> bytes | None:
        """Return the answer to the query for the name of a fake address, None for other queries.

        Only clients that have asked for the name learn it.  `end`: as for answer().
        """
        address = parse_reverse_name(question.name)
        number = self._number(address) if address else None
        if number is None:
            return None
        name = self._table.name_asked(number, client)
        if not name:
            return dns.encode_error(query, dns.NXDOMAIN)
        if question.qtype != dns.PTR:
            return dns.encode_error(query, dns.NOERROR)
        return encode_pointer(query, end, name, TTL)

    def _number(self, host: str) -> int | None:
        """Return the number of a fake address, negative for a spared one; None for any other."""
        packed = pack_ip(host)
        if packed is None:
            return None
        value = int.from_bytes(packed, "big")
        for size, prefix, shift in self.networks:
            if len(packed) == size and value >> shift == prefix:
                return value - (prefix << shift) - SPARED
        return None


def capacity(network: IpNetwork) -> int:
    """Return how many fake addresses a network has; less than 1 if it is too small."""
    return (1 << network.shift) - SPARED - 1
