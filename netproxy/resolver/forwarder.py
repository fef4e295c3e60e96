"""Which name servers are asked for which names, for our own lookups and for the clients of a dns listener."""
from __future__ import annotations

import time
from socket import AF_INET, AF_INET6, inet_pton
from typing import Container, Mapping, NamedTuple, Sequence

from netproxy.errors import ProtocolError
from netproxy.protocol import dns
from netproxy.resolver.resolver import LOOKUP_SECONDS, Found, LookupFailed
from netproxy.resolver.servers import ServerError, Servers

HOSTS_TTL = 60              # seconds: what the file says may change with a reload
_ADDRESS_SIZES = {dns.A: 4, dns.AAAA: 16}


class Branch(NamedTuple):
    """`servers` are asked for `names`; None: there are no such names."""

    names: Container[str]
    servers: Servers | None


class Forwarder:
    """Immutable; used by the threads of pools."""

    def __init__(self, branches: Sequence[Branch], servers: Servers | None, hosts: Mapping[str, tuple[str, ...]]) -> None:
        """`servers` for what no branch has, None where only branches have any; `hosts`: names and their addresses."""
        self._branches = tuple(branches)
        self._servers = servers
        self._hosts = hosts

    def ask(self, host: str) -> Found:
        """Both kinds of addresses of a name, asked for at once; LookupFailed."""
        branch = self._branch(host)
        if branch.servers is None:
            return Found((), HOSTS_TTL)
        try:
            questions = [dns.Question(host, kind, dns.IN) for kind in (dns.A, dns.AAAA)]
            queries = [dns.encode_query(at, question) for at, question in enumerate(questions)]
            answers = branch.servers.exchange(queries, time.monotonic() + LOOKUP_SECONDS)
            found = [dns.parse_answer(answer, question) for answer, question in zip(answers, questions)]
        except (ServerError, ProtocolError, ValueError) as error:
            raise LookupFailed from error
        if any(answer.code not in (dns.NOERROR, dns.NXDOMAIN) for answer in found) and not any(one.addresses for one in found):
            raise LookupFailed
        addresses = tuple(address for answer in found for address in answer.addresses)
        return Found(addresses, min(answer.ttl for answer in found if answer.addresses or not addresses))

    def answer(self, query: bytes) -> bytes | None:
        """An answer that needs no server: for names in hosts, and for those that are said not to exist.  ProtocolError."""
        question, end = dns.parse_question(query)
        if question.name in self._hosts:
            return _encode_addresses(query, end, self._hosts[question.name], question.kind)
        if self._branch(question.name).servers is None:
            return dns.encode_error(query, dns.NXDOMAIN)
        return None

    def forward(self, query: bytes) -> bytes:
        """The answer of whoever is asked for its name; SERVFAIL where nobody has answered.  ProtocolError."""
        question, _ = dns.parse_question(query)
        servers = self._branch(question.name).servers
        try:
            if servers is not None:
                return servers.exchange([query], time.monotonic() + LOOKUP_SECONDS)[0]
        except ServerError:
            pass
        return dns.encode_error(query, dns.SERVFAIL)

    def close(self) -> None:
        for servers in (self._servers, *(branch.servers for branch in self._branches)):
            if servers is not None:
                servers.close()

    def _branch(self, name: str) -> Branch:
        for branch in self._branches:
            if name in branch.names:
                return branch
        return Branch((), self._servers)


def _encode_addresses(query: bytes, end: int, addresses: Sequence[str], kind: int) -> bytes:
    """An answer with those that are of the kind asked for; none of them is no error."""
    bare = dns.encode_error(query, dns.NOERROR)
    packed = [inet_pton(AF_INET6 if ":" in address else AF_INET, address) for address in addresses]
    wanted = [one for one in packed if len(one) == _ADDRESS_SIZES.get(kind)]
    # each by a pointer to the question's name
    records = b"".join(b"\xc0\x0c%b\0\1%b%b%b" % (kind.to_bytes(2, "big"), HOSTS_TTL.to_bytes(4, "big"),
                                                   len(one).to_bytes(2, "big"), one) for one in wanted)
    return bare[:6] + len(wanted).to_bytes(2, "big") + bare[8:end] + records + bare[end:]
