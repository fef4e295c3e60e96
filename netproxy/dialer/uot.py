"""UDP over TCP (UoT version 2) through any proxy whose far end understands it: one stream for all targets of a client."""

from __future__ import annotations

from copy import copy
from typing import Any

from netproxy.errors import DialError, Reason, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer
from netproxy.interfaces.services import Counter
from netproxy.net.framed import FramedConn
from netproxy.net.stream import Stream
from netproxy.protocol import uot

PORT = 443  # beside the name, where it means nothing; one that rules of proxies let pass
# what a proxy answers that knows no UoT: it has looked the name up, or would have connected to it
_UNKNOWN = (
    Reason.NAME,
    Reason.HOST_UNREACHABLE,
    Reason.NETWORK_UNREACHABLE,
    Reason.REFUSED,
    Reason.GENERAL,
)


class UotDialer:
    refusal = Reason.UNSUPPORTED
    symmetric = False

    def __init__(self, plain: Dialer, carrier: Dialer, counter: Counter) -> None:
        """`plain` dials TCP; `carrier` is the same way, but leaves every name to the proxy."""
        self.name = plain.name
        self.carries = plain.carries | {"udp"}
        self.dial = plain.dial
        self.resolves_names = plain.resolves_names
        self._plain = plain
        self._carrier = carrier
        self._counter = counter

    def fixed_for(self, flow: Flow) -> UotDialer:
        plain: Any = self._plain.fixed_for(flow)
        if plain is self._plain:
            return self
        carrier: Any = copy(self._carrier)
        carrier._hop = carrier._hop._replace(via=plain._hop.via)
        return UotDialer(plain, carrier, self._counter)

    def dial_packet(self, flow: Flow) -> FramedConn:
        stream = self._open(flow)
        try:
            stream.write(uot.encode_request(uot.UotRequest(False, flow.target)))
            return FramedConn(stream, uot.Frames(), self._counter)
        except StreamError as error:
            stream.close()
            raise DialError(Reason.GENERAL, self.name, str(error)) from error

    def _open(self, flow: Flow) -> Stream:
        try:
            return self._carrier.dial(flow.to_hop(Address(uot.MAGIC, PORT)))
        except DialError as error:
            if not error.upstream and error.reason in _UNKNOWN:
                error.said = f"no UoT there ({error.said or error.reason.value})"
                error.detail = ""
            raise
