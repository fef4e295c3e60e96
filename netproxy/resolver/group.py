"""Asks several name servers for the same names, one after the other."""

from __future__ import annotations

import time

from netproxy.errors import ProtocolError
from netproxy.protocol import dns
from netproxy.resolver.servers import ServerError, share_of_time
from netproxy.typed import TYPE_CHECKING, Callable, Sequence

if TYPE_CHECKING:
    from netproxy.resolver.servers import NameServer

# Seconds for which a server that has failed is asked last.
REST_SECONDS = 5.0


class NameServerGroup:
    """Several name servers for the same names.

    The first server that answers decides.  A server that has failed is asked last for
    REST_SECONDS.
    """

    def __init__(self, servers: Sequence[NameServer]) -> None:
        self.servers = tuple(servers)
        # Monotonic seconds.  Writes need no lock: any recent value is good enough.
        self._failed_at: dict[NameServer, float] = {}

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        """Exchange messages, as a NameServer does.

        SERVFAIL and REFUSED count as failures; they are returned if no server answers
        anything else.  The text of a ServerError has the failure of each server.
        """
        now = time.monotonic()
        failures: list[str] = []
        order = sorted(
            self.servers,
            key=lambda server: now - self._failed_at.get(server, -REST_SECONDS) < REST_SECONDS,
        )
        refusals: list[bytes] = []
        for number, server in enumerate(order):
            try:
                answers = server.exchange(queries, share_of_time(deadline, len(order) - number))
                if not any(
                    dns.parse_header(answer).rcode in (dns.SERVFAIL, dns.REFUSED)
                    for answer in answers
                ):
                    return answers
                refusals = refusals or answers
                failures.append(f"{server.name}: failed")
            except (ServerError, ProtocolError) as error:
                failures.append(str(error))
            self._failed_at[server] = time.monotonic()
        if refusals:
            return refusals
        raise ServerError("; ".join(failures))

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Remove the idle connections of all servers; return calls that close them."""
        return [close for server in self.servers for close in server.expire(now)]

    def close(self) -> None:
        """Close the idle connections of all servers."""
        for server in self.servers:
            server.close()
