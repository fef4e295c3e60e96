"""A router that speaks PCP, NAT-PMP or both, as far as a test says; it moves no packet.

answer() is pure but for the mappings, so that a test asks it directly (ask(), in the place of a
socket) or over a socket (serve()).
"""

from __future__ import annotations

import socket
from typing import Any, Callable, Sequence

from netproxy.errors import DialError, ProtocolError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.protocol.port_mapping import nat_pmp, pcp
from netproxy.public_address.dialects import Port
from tests.support.datagram_server import DatagramServer

OUTSIDE = "203.0.113.5"
INSIDE = "192.168.1.7"


class Router:
    """The mappings of a router, by port, with their external ports."""

    def __init__(self, protocols: Sequence[str] = ("pcp", "nat-pmp")) -> None:
        self.protocols = protocols
        self.host = OUTSIDE
        self.epoch = 1000
        self.lifetime = 3600
        self.extra = 0
        """Seconds that it promises beyond what was asked for."""
        self.result = 0
        """The result of all requests."""
        self.result_lifetime = 0
        self.silent = False
        self.shift = 0
        """What is added to a port for its external one."""
        self.mappings: dict[Port, int] = {}
        self.nonces: dict[Port, bytes] = {}
        self.requests: list[Any] = []

    def restart(self) -> None:
        """Lose all mappings."""
        self.mappings.clear()
        self.nonces.clear()
        self.epoch = 0

    def answer(self, datagram: bytes, client: str = INSIDE) -> bytes | None:
        """Return the answer to a request, None for none."""
        if self.silent:
            return None
        if datagram[0] == pcp.VERSION:
            if "pcp" not in self.protocols:
                return bytes((0, 0x80 | datagram[1], 0, 1)) + self.epoch.to_bytes(4, "big")
            return self._answer_pcp(pcp.parse_request(datagram), client)
        return self._answer_nat_pmp(nat_pmp.parse_request(datagram))

    def _answer_pcp(self, request: pcp.Request, client: str) -> bytes:
        self.requests.append(request)
        mapping, result = request.mapping, self.result
        if mapping is None:
            return pcp.encode_response(pcp.Response(result, 0, self.epoch))
        port = Port(mapping.network, mapping.internal_port)
        if request.client != client:
            result = pcp.ADDRESS_MISMATCH
        elif self.nonces.get(port, mapping.nonce) != mapping.nonce:
            result = pcp.NOT_AUTHORIZED
        if result:
            response = pcp.Response(result, self.result_lifetime, self.epoch, mapping)
            return pcp.encode_response(response)
        external = self._map(port, mapping.external.port, request.lifetime)
        self.nonces[port] = mapping.nonce
        if not request.lifetime:
            del self.nonces[port]
        lifetime = min(request.lifetime, self.lifetime) + self.extra
        granted = mapping._replace(external=Address(self.host, external))
        return pcp.encode_response(pcp.Response(0, lifetime, self.epoch, granted))

    def _answer_nat_pmp(self, request: nat_pmp.AddressRequest | nat_pmp.MapRequest) -> bytes:
        self.requests.append(request)
        if isinstance(request, nat_pmp.AddressRequest):
            response = nat_pmp.AddressResponse(self.result, self.epoch, self.host)
            return nat_pmp.encode_response(response)
        port = Port(request.network, request.internal_port)
        external, lifetime = 0, 0
        if not self.result:
            external = self._map(port, request.external_port, request.lifetime)
            lifetime = min(request.lifetime, self.lifetime) + self.extra
        return nat_pmp.encode_response(
            nat_pmp.MapResponse(
                self.result, self.epoch, request.network, port.number, external, lifetime
            )
        )

    def _map(self, port: Port, wish: int, lifetime: int) -> int:
        if not lifetime:
            self.mappings.pop(port, None)
            return 0
        external = self.mappings.setdefault(port, (wish or port.number) + self.shift)
        return external

    # -- in the place of a socket (public_address.dialects.Exchange)

    local = INSIDE

    def connect(self, router: str, source: str) -> Router:
        return self

    def ask(
        self, request: bytes, accept: Callable[[bytes], Any], waits: Sequence[float] = ()
    ) -> Any:
        answer = self.answer(request)
        try:
            accepted = None if answer is None else accept(answer)
        except ProtocolError:
            accepted = None
        if accepted is None:
            raise DialError(Reason.TIMEOUT, "192.168.1.1:5351", said="no answer")
        return accepted

    def close(self) -> None:
        """Do nothing."""


class RouterServer(DatagramServer):
    """Serves a router on a UDP socket, until it is closed."""

    def __init__(self, router: Router, sock: socket.socket) -> None:
        """Take over a bound socket."""
        self._router = router
        super().__init__(sock)

    def take(self, datagram: bytes, sockaddr: Any) -> None:
        """Answer a request, unless the router is silent."""
        answer = self._router.answer(datagram, sockaddr[0])
        if answer is not None:
            self.socket.sendto(answer, sockaddr)
