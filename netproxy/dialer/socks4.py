"""The upstream through a SOCKS4 or SOCKS4a proxy.

SOCKS4 has a user id and no password, carries TCP only, and reaches IPv4 addresses only.
"""

from __future__ import annotations

from functools import partial

from netproxy.dialer.hop import Hop, ProxyDialer
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.net.stream import complete
from netproxy.protocol import socks4
from netproxy.typed import TYPE_CHECKING, NoReturn, Sequence

if TYPE_CHECKING:
    from netproxy.dialer.direct import TargetResolver
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer


class Socks4Dialer(ProxyDialer):
    """A dialer through a SOCKS4 proxy."""

    carries = frozenset({"tcp"})

    def __init__(self, hop: Hop, target_resolver: TargetResolver | None) -> None:
        """`target_resolver` looks names up (socks4); None leaves them to the proxy (socks4a)."""
        super().__init__(hop)
        self.resolves_names = target_resolver is None
        self._target_resolver = target_resolver

    def with_via(self, via: Dialer) -> Socks4Dialer:
        """Return a dialer like this one that reaches its proxy through `via`."""
        return Socks4Dialer(self.hop._replace(via=via), self._target_resolver)

    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target.  Raises DialError, UNSUPPORTED for an IPv6 address."""
        resolver = self._target_resolver
        target = flow.target if resolver is None else _prefer_ipv4(resolver.addresses(flow))
        if ":" in target.host:
            raise DialError(
                Reason.UNSUPPORTED,
                f"{self.hop.label}: {flow.target}",
                "SOCKS4 reaches IPv4 addresses only",
            )
        return self.hop.open(flow, partial(self._connect, target))

    def dial_packet(self, flow: Flow) -> NoReturn:
        """Raise DialError(UNSUPPORTED): SOCKS4 has no UDP."""
        raise self.no_udp()

    def _connect(self, target: Address, stream: Stream) -> None:
        stream.write(socks4.encode_request(socks4.CONNECT, target, self.hop.user.encode()))
        reply, _ = complete(socks4.read_reply(stream))
        if reply != socks4.GRANTED:
            raise DialError(socks4.REASONS.get(reply, Reason.GENERAL), str(target))


def _prefer_ipv4(addresses: Sequence[Address]) -> Address:
    """Return the first IPv4 address, or the first address if there is none."""
    for address in addresses:
        if len(pack_ip(address.host) or b"") == 4:
            return address
    return addresses[0]
