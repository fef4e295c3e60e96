"""A dns listener that remembers which client was told which address for which name.

Answers of every origin are read: cached ones, fixed ones and those of servers.
"""

from __future__ import annotations

import time

from netproxy.errors import ProtocolError
from netproxy.handler.dns.handler import DnsHandler
from netproxy.interfaces.addresses import Address
from netproxy.net.address import from_sockaddr
from netproxy.protocol import dns
from netproxy.protocol.host import parse_host
from netproxy.typed import TYPE_CHECKING, Callable, Hashable

if TYPE_CHECKING:
    from netproxy.handler.dns.waiting import WaitingClient
    from netproxy.interfaces.datagrams import DatagramSocket
    from netproxy.interfaces.routing import NameMemory

LEAST_SECONDS, EXTRA_SECONDS = 60.0, 60.0
"""Many clients keep an answer for a minute at least, and connect a little later."""
MOST_SECONDS = 86400.0
_ADDRESS_TYPES = (dns.A, dns.AAAA)


class RememberingDnsHandler(DnsHandler):
    """A DnsHandler whose answers are remembered.  Set `memory` before it is used."""

    memory: NameMemory

    def _answer_without_server(
        self, query: bytes, now: float, local: DatagramSocket | None, peer: Hashable
    ) -> bytes | None:
        answer = super()._answer_without_server(query, now, local, peer)
        if answer:
            client = peer if local is None else from_sockaddr(local.peer(peer))
            assert isinstance(client, Address)
            remember(self.memory, client.host, answer)
        return answer

    def _ask_later(self, client: WaitingClient) -> None:
        super()._ask_later(_RememberingClient(self.memory, client))

    def _wait_for(self, query: bytes, client: Address) -> bytes:
        answer = super()._wait_for(query, client)
        remember(self.memory, client.host, answer)
        return answer


class _RememberingClient:
    """A WaitingClient whose answer is remembered before it is sent."""

    __slots__ = ("client", "network", "query", "drop", "_memory", "_give")

    def __init__(self, memory: NameMemory, waiting: WaitingClient) -> None:
        self.client, self.network, self.query = waiting.client, waiting.network, waiting.query
        self.drop: Callable[[], None] = waiting.drop
        self._memory = memory
        self._give = waiting.give

    def give(self, answer: bytes) -> None:
        """Take the answer."""
        remember(self._memory, self.client, answer)
        self._give(answer)


def remember(memory: NameMemory, client: str, answer: bytes) -> None:
    """Remember the addresses in an answer; nothing if it has none, or cannot be read."""
    try:
        question, _ = dns.parse_question(answer)
        if question.qtype not in _ADDRESS_TYPES:
            return
        found = dns.parse_answer(answer, question)
        name = parse_host(question.name.encode("ascii"))
    except ProtocolError:
        return
    if found.addresses:
        now = time.monotonic()
        seconds = min(max(found.ttl, LEAST_SECONDS), MOST_SECONDS) + EXTRA_SECONDS
        memory.note(client, found.addresses, name, now + seconds, now)
