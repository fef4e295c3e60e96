"""Decides which name servers are asked for which names.

Serves our own lookups and the clients of a dns listener.  Clients get answers without a server
from the configured hosts, for the names that are blocked, for special names
(special_names.py) that no rule has, and for the names with fake addresses.
"""

from __future__ import annotations

import time

from netproxy.errors import ProtocolError
from netproxy.protocol import dns
from netproxy.resolver.local_answers import HOSTS_TTL, LocalHosts, special_answer
from netproxy.resolver.resolver import LOOKUP_SECONDS, LookupFailed, LookupResult, ask_system
from netproxy.resolver.servers import ServerError
from netproxy.resolver.special_names import has_no_address
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.networks import HostSet
    from netproxy.interfaces.services import Counter
    from netproxy.resolver.client_names.fake_addresses import FakeAddresses
    from netproxy.resolver.group import NameServerGroup


class ForwardingRule(NamedTuple):
    """Names, and the servers that are asked for them."""

    names: HostSet
    servers: NameServerGroup | None
    """None: the names do not exist."""


class DnsForwarder:
    """Asks name servers by rules.  Immutable; its methods run on pool threads."""

    def __init__(
        self,
        rules: Sequence[ForwardingRule],
        servers: NameServerGroup | None,
        hosts: Mapping[str, tuple[str, ...]],
        counter: Counter,
        fakes: FakeAddresses | None = None,
    ) -> None:
        """Ask by the first rule that has the name, else `servers`.

        Without `servers` the system is asked for our own lookups, and clients are refused.
        `hosts` are addresses by name, for clients only: our own lookups use them earlier.
        `counter` counts what answer() has answered.  `fakes`: the fake addresses, for clients.
        """
        self._counter = counter
        self._rules = tuple(rules)
        self._others = ForwardingRule((), servers)
        self._hosts = LocalHosts(hosts)
        self._fakes = fakes

    def ask(self, host: str) -> LookupResult:
        """Look up both kinds of addresses of a name.  Blocks.  Raises LookupFailed."""
        rule = self._rule(host)
        if rule is self._others and has_no_address(host):
            return LookupResult((), HOSTS_TTL)
        if rule.servers is None:
            return ask_system(host) if rule is self._others else LookupResult((), HOSTS_TTL)
        deadline = time.monotonic() + LOOKUP_SECONDS
        try:
            questions = [dns.Question(host, qtype, dns.IN) for qtype in (dns.A, dns.AAAA)]
            answers = _ask(rule.servers, questions, True, deadline)
            # RFC 6891 section 6.2.2: a server that cannot read EDNS is asked without it.
            if all(answer.rcode in (dns.FORMERR, dns.NOTIMP) for answer in answers):
                answers = _ask(rule.servers, questions, False, deadline)
        except (ServerError, ProtocolError, ValueError) as error:
            raise LookupFailed from error
        addresses = tuple(address for answer in answers for address in answer.addresses)
        failed = any(answer.rcode not in (dns.NOERROR, dns.NXDOMAIN) for answer in answers)
        if failed and not addresses:
            raise LookupFailed
        ttl = min(answer.ttl for answer in answers if answer.addresses or not addresses)
        return LookupResult(addresses, ttl)

    def answer(self, query: bytes, client: str) -> bytes | None:
        """Return the answer to a client (its host) if it needs no server, else None.

        Raises ProtocolError for a query without exactly one question, and QueryRefused.
        """
        question, end = dns.parse_question(query)
        is_internet, fakes = question.qclass == dns.IN, self._fakes
        answer = self._hosts.answer(query, question, end) if is_internet else None
        rule = self._rule(question.name)
        if answer is None and fakes is not None and is_internet:
            answer = fakes.reverse_answer(query, question, end, client)
        if answer is None and rule is self._others and is_internet:
            answer = special_answer(query, question, end)
        outcome = "local"
        if answer is None and rule.servers is None:
            blocked = rule is not self._others
            outcome = "blocked" if blocked else "no name servers"
            answer = dns.encode_error(query, dns.NXDOMAIN if blocked else dns.REFUSED)
        if answer is None and fakes is not None and is_internet:
            answer, outcome = fakes.answer(query, question, end, client), "fake"
        if answer is not None:
            self._counter.count("queries", outcome)
        return answer

    def forward(self, query: bytes, seconds: float = LOOKUP_SECONDS) -> bytes:
        """Return the servers' answer to a client, SERVFAIL if none has answered in `seconds`.

        Blocks.  Raises ProtocolError for a query without exactly one question.
        """
        question, _ = dns.parse_question(query)
        servers = self._rule(question.name).servers
        try:
            if servers is not None:
                return servers.exchange([query], time.monotonic() + seconds)[0]
        except ServerError:
            pass
        return dns.encode_error(query, dns.SERVFAIL)

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Remove idle connections to servers; return calls that close them, for the janitor."""
        return [close for servers in self._groups() for close in servers.expire(now)]

    def close(self) -> None:
        """Close the idle connections to all servers."""
        for servers in self._groups():
            servers.close()

    def _groups(self) -> list[NameServerGroup]:
        rules = (self._others, *self._rules)
        return [rule.servers for rule in rules if rule.servers is not None]

    def _rule(self, name: str) -> ForwardingRule:
        for rule in self._rules:
            if name in rule.names:
                return rule
        return self._others


def _ask(
    servers: NameServerGroup, questions: Sequence[dns.Question], edns: bool, deadline: float
) -> list[dns.AddressAnswer]:
    """Ask all questions at once.

    Raises ServerError, ProtocolError, and ValueError for a name that cannot be sent.
    """
    queries = [dns.encode_query(id, question, edns) for id, question in enumerate(questions)]
    answers = servers.exchange(queries, deadline)
    return [
        dns.parse_answer(answer, question)
        for answer, question in zip(answers, questions, strict=True)
    ]
