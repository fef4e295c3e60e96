"""Answers to clients that need no server: configured hosts, and special names.

Special names (special_names.py) get the answers of an empty zone, as RFC 6303 section 3 has
it.  Pure; any thread.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_pton

from netproxy.protocol import dns
from netproxy.resolver.special_names import (
    LOCALHOST,
    LOCALHOST_ADDRESSES,
    RESOLVER,
    is_reverse_zone,
    reverse_name,
    special_zone,
)
from netproxy.typed import Iterable, Mapping, NamedTuple, Sequence

# Seconds: a reload may change the hosts of the configuration.
HOSTS_TTL = 60
# Seconds that answers about special names may be kept, those of RFC 6303 section 3.
SPECIAL_TTL = 10800

_NS = 2
# RFC 6303 section 3: RNAME is nobody.invalid; serial, refresh, retry, expire, minimum.
_SOA_TAIL = b"\6nobody\7invalid\0" + b"".join(
    number.to_bytes(4, "big") for number in (1, 3600, 1200, 604800, SPECIAL_TTL)
)
_LOOPBACK_NAMES = frozenset(map(reverse_name, LOCALHOST_ADDRESSES))
# A pointer to the name of the question.
_QUESTION_NAME = b"\xc0\x0c"


class _NewRecord(NamedTuple):
    """A record of an answer."""

    owner: bytes
    rtype: int
    ttl: int
    rdata: bytes

    def encode(self) -> bytes:
        """Encode the record, in class IN."""
        return b"%b%b\0\1%b%b%b" % (
            self.owner,
            self.rtype.to_bytes(2, "big"),
            self.ttl.to_bytes(4, "big"),
            len(self.rdata).to_bytes(2, "big"),
            self.rdata,
        )


class LocalHosts:
    """Answers from the hosts of the configuration.  Immutable."""

    def __init__(self, hosts: Mapping[str, tuple[str, ...]]) -> None:
        """`hosts` are addresses by name."""
        self._hosts = hosts
        # The first name of each address, by the address's own name.
        self._names: dict[str, str] = {}
        for name, addresses in hosts.items():
            # A longer name cannot be sent.
            for address in addresses if len(name) < dns.NAME_LIMIT - 1 else ():
                self._names.setdefault(reverse_name(address), name)

    def answer(self, query: bytes, question: dns.Question, end: int) -> bytes | None:
        """Return the addresses of a host, or the name of an address; None if neither is there.

        `end` is where the question of the query ends.
        """
        addresses = self._hosts.get(question.name)
        if addresses is not None:
            return encode_addresses(query, end, addresses, question.qtype, HOSTS_TTL)
        name = self._names.get(question.name) if question.qtype == dns.PTR else None
        return None if name is None else encode_pointer(query, end, name, HOSTS_TTL)


def special_answer(query: bytes, question: dns.Question, end: int) -> bytes | None:
    """Return the answer about a special name, None for other names.

    `end` is where the question of the query ends.
    """
    name, qtype = question.name, question.qtype
    zone = special_zone(name)
    if zone is None:
        return None
    if zone == LOCALHOST and qtype in dns.ADDRESS_SIZES:
        return encode_addresses(query, end, LOCALHOST_ADDRESSES, qtype, SPECIAL_TTL)
    if name in _LOOPBACK_NAMES and qtype == dns.PTR:
        return encode_pointer(query, end, LOCALHOST, SPECIAL_TTL)
    # The zone's name is the end of the question's name: its labels and the root.
    apex = (0xC000 | end - 4 - (len(zone) + 2)).to_bytes(2, "big")
    soa = _NewRecord(apex, dns.SOA, SPECIAL_TTL, apex + _SOA_TAIL)
    if is_reverse_zone(zone) and name == zone and qtype in (dns.SOA, _NS):
        record = soa if qtype == dns.SOA else _NewRecord(apex, _NS, SPECIAL_TTL, apex)
        return _encode(query, end, dns.NOERROR, [record])
    is_own_name = is_reverse_zone(zone) and (name == zone or name in _LOOPBACK_NAMES)
    exists = is_own_name or zone in (LOCALHOST, RESOLVER)
    return _encode(query, end, dns.NOERROR if exists else dns.NXDOMAIN, [], [soa])


def encode_addresses(
    query: bytes, end: int, addresses: Sequence[str], qtype: int, ttl: int
) -> bytes:
    """Encode an answer with the addresses of the type asked for, which may be none."""
    packed = [inet_pton(AF_INET6 if ":" in address else AF_INET, address) for address in addresses]
    size = dns.ADDRESS_SIZES.get(qtype)
    records = [
        _NewRecord(_QUESTION_NAME, qtype, ttl, rdata) for rdata in packed if len(rdata) == size
    ]
    return _encode(query, end, dns.NOERROR, records)


def encode_pointer(query: bytes, end: int, name: str, ttl: int) -> bytes:
    """Encode an answer with the name of an address."""
    record = _NewRecord(_QUESTION_NAME, dns.PTR, ttl, dns.encode_name(name))
    return _encode(query, end, dns.NOERROR, [record])


def _encode(
    query: bytes,
    end: int,
    code: int,
    answers: Sequence[_NewRecord],
    authorities: Sequence[_NewRecord] = (),
) -> bytes:
    """Encode an answer to a query whose question ends at `end`."""
    empty = dns.encode_error(query, code)
    counts = len(answers).to_bytes(2, "big") + len(authorities).to_bytes(2, "big")
    records: Iterable[_NewRecord] = (*answers, *authorities)
    body = b"".join(record.encode() for record in records)
    return empty[:6] + counts + empty[10:end] + body + empty[end:]
