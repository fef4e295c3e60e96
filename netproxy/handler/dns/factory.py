"""Makes the handler of a dns listener."""

from __future__ import annotations

from netproxy.handler.dns.handler import DnsHandler
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.handler.factory import DnsDependencies
    from netproxy.interfaces.listeners import AllowedClients
    from netproxy.interfaces.services import Counter


def make_dns(
    dns: DnsDependencies, clients: AllowedClients, counter: Counter, permission: Permission
) -> DnsHandler:
    """Return the handler, which remembers its answers if there is a memory."""
    parts = (dns.source, dns.cache, clients, dns.submit, dns.arenas, counter, permission)
    if dns.memory is None:
        return DnsHandler(*parts)
    # late: few listeners remember
    from netproxy.handler.dns.remembering import RememberingDnsHandler

    handler = RememberingDnsHandler(*parts)
    handler.memory = dns.memory
    return handler
