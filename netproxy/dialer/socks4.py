"""The way out through a SOCKS4 proxy.  A user is told as its user id; there are no passwords, and no UDP."""

from __future__ import annotations

from typing import Sequence

from netproxy.dialer.direct import TargetResolver
from netproxy.dialer.hop import Hop
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import Stream, complete
from netproxy.protocol import socks4


class Socks4Dialer:
    """`reach` finds where names are (socks4); None leaves them to the proxy (socks4a)."""

    carries = frozenset({"tcp"})
    refusal = Reason.UNSUPPORTED
    symmetric = False

    def __init__(self, hop: Hop, reach: TargetResolver | None) -> None:
        self.name = hop.name
        self._hop = hop
        self.resolves_names = reach is None
        self._reach = reach

    def dial(self, flow: Flow) -> Stream:
        target = flow.target if self._reach is None else _ipv4(self._reach.addresses(flow))
        if ":" in target.host:
            raise DialError(
                Reason.UNSUPPORTED, f"{self._hop.label}: {flow.target}", "SOCKS4 knows IPv4 alone"
            )
        return self._hop.open(flow, lambda stream: self._connect(stream, target))

    def fixed_for(self, flow: Flow) -> Socks4Dialer:
        return self._hop.fixed_for(self, flow)

    def dial_packet(self, flow: Flow) -> None:
        raise DialError(Reason.UNSUPPORTED, said=f"{self._hop.label} carries no UDP")

    def _connect(self, stream: Stream, target: Address) -> None:
        stream.write(socks4.encode_request(socks4.CONNECT, target, self._hop.user.encode()))
        reply, _ = complete(socks4.read_reply(stream))
        if reply != socks4.GRANTED:
            raise DialError(socks4.REASONS.get(reply, Reason.GENERAL), str(target))


def _ipv4(addresses: Sequence[Address]) -> Address:
    """The first of IPv4, else the first."""
    return next((one for one in addresses if len(pack_ip(one.host) or b"") == 4), addresses[0])
