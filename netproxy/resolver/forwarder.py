"""Which name servers are asked for which names, for our own lookups and for the clients of a dns listener."""

from __future__ import annotations

import time
from socket import AF_INET, AF_INET6, inet_pton
from typing import Callable, Container, Mapping, NamedTuple, Sequence

from netproxy.errors import ProtocolError
from netproxy.protocol import dns
from netproxy.resolver.resolver import LOOKUP_SECONDS, Found, LookupFailed, ask_system
from netproxy.resolver.servers import ServerError, Servers

HOSTS_TTL = 60  # seconds: what the file says may change with a reload
_ADDRESS_SIZES = {dns.A: 4, dns.AAAA: 16}


class Branch(NamedTuple):
    """`servers` are asked for `names`; None: there are no such names."""

    names: Container[str]
    servers: Servers | None


class Forwarder:
    """Immutable; used by the threads of pools."""

    def __init__(
        self,
        branches: Sequence[Branch],
        servers: Servers | None,
        hosts: Mapping[str, tuple[str, ...]],
    ) -> None:
        """`servers` for what no branch has: None leaves that to the system, which cannot do it for clients.

        `hosts`: names and their addresses, for clients alone: our own lookups have looked there before.
        """
        self._branches = tuple(branches)
        self._others = Branch((), servers)
        self._hosts = hosts

    def ask(self, host: str) -> Found:
        """Both kinds of addresses of a name, asked for at once; LookupFailed."""
        branch = self._branch(host)
        if branch.servers is None:
            return ask_system(host) if branch is self._others else Found((), HOSTS_TTL)
        deadline = time.monotonic() + LOOKUP_SECONDS
        try:
            questions = [dns.Question(host, kind, dns.IN) for kind in (dns.A, dns.AAAA)]
            found = _ask(branch.servers, questions, True, deadline)
            if all(answer.code in (dns.FORMERR, dns.NOTIMP) for answer in found):
                found = _ask(branch.servers, questions, False, deadline)  # RFC 6891 section 6.2.2
        except (ServerError, ProtocolError, ValueError) as error:
            raise LookupFailed from error
        if any(answer.code not in (dns.NOERROR, dns.NXDOMAIN) for answer in found) and not any(
            one.addresses for one in found
        ):
            raise LookupFailed
        addresses = tuple(address for answer in found for address in answer.addresses)
        return Found(
            addresses, min(answer.ttl for answer in found if answer.addresses or not addresses)
        )

    def answer(self, query: bytes) -> bytes | None:
        """An answer that needs no server: for names in hosts, and for those that are said not to exist.  ProtocolError."""
        question, end = dns.parse_question(query)
        if question.name in self._hosts and question.klass == dns.IN:
            return _encode_addresses(query, end, self._hosts[question.name], question.kind)
        branch = self._branch(question.name)
        if branch.servers is None:
            return dns.encode_error(query, dns.REFUSED if branch is self._others else dns.NXDOMAIN)
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

    def expire(self, now: float) -> list[Callable[[], None]]:
        """For the janitor: connections to servers that nobody has used for a while."""
        return [close for servers in self._asked() for close in servers.expire(now)]

    def close(self) -> None:
        for servers in self._asked():
            servers.close()

    def _asked(self) -> list[Servers]:
        return [
            branch.servers
            for branch in (self._others, *self._branches)
            if branch.servers is not None
        ]

    def _branch(self, name: str) -> Branch:
        for branch in self._branches:
            if name in branch.names:
                return branch
        return self._others


def _ask(
    servers: Servers, questions: Sequence[dns.Question], edns: bool, deadline: float
) -> list[dns.Answer]:
    """ServerError, ProtocolError; ValueError for a name that cannot be sent."""
    queries = [dns.encode_query(at, question, edns) for at, question in enumerate(questions)]
    return [
        dns.parse_answer(answer, question)
        for answer, question in zip(servers.exchange(queries, deadline), questions)
    ]


def _encode_addresses(query: bytes, end: int, addresses: Sequence[str], kind: int) -> bytes:
    """An answer with those that are of the kind asked for; none of them is no error."""
    bare = dns.encode_error(query, dns.NOERROR)
    packed = [inet_pton(AF_INET6 if ":" in address else AF_INET, address) for address in addresses]
    wanted = [one for one in packed if len(one) == _ADDRESS_SIZES.get(kind)]
    # each by a pointer to the question's name
    records = b"".join(
        b"\xc0\x0c%b\0\1%b%b%b"
        % (kind.to_bytes(2, "big"), HOSTS_TTL.to_bytes(4, "big"), len(one).to_bytes(2, "big"), one)
        for one in wanted
    )
    return bare[:6] + len(wanted).to_bytes(2, "big") + bare[8:end] + records + bare[end:]
