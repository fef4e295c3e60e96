"""The two protocols that ask a router for port mappings, as one interface: PCP and NAT-PMP.

Blocks for the answers of the router.  Thread: that of the caller.
"""

from __future__ import annotations

from netproxy.errors import NetProxyError
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.protocol.port_mapping import nat_pmp, pcp
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Protocol, Sequence, TypeVar

if TYPE_CHECKING:
    Answer = TypeVar("Answer")

REFUSED_SECONDS = 300.0
"""Until a refused mapping is asked for again, if the router does not say when: its owner may have
allowed it meanwhile."""


class MappingRefused(NetProxyError):
    """The router refuses a mapping."""

    def __init__(self, why: str, seconds: float = REFUSED_SECONDS) -> None:
        """`seconds`: until another request may be of use."""
        super().__init__(why)
        self.seconds = seconds


class SpeaksNatPmp(NetProxyError):
    """The router was asked by PCP, and knows NAT-PMP alone (RFC 6887 appendix A)."""


class Exchange(Protocol):
    """Asks the router: net.local.router_socket.RouterSocket."""

    local: str
    """The address that the router sees."""

    def ask(
        self, request: bytes, accept: Callable[[bytes], Answer | None], waits: Sequence[float] = ...
    ) -> Answer:
        """Return the answer that `accept` returns something for.  Blocks.  Raises DialError."""

    def close(self) -> None:
        """Close the socket."""


class Port(NamedTuple):
    """A port of this machine."""

    network: str
    """ "tcp" or "udp"."""
    number: int

    def __str__(self) -> str:
        return f"{self.network} port {self.number}"


class Grant(NamedTuple):
    """A mapping that the router has made."""

    external: Address
    lifetime: int
    """Seconds."""
    epoch: int
    """Seconds since the router has begun, or has lost its mappings."""


class Dialect(Protocol):
    """Makes requests of one protocol."""

    name: str
    tolerance: float
    """The part by which the clock of a router may be faster or slower."""

    def map(self, exchange: Exchange, port: Port, wish: Address, lifetime: int) -> Grant:
        """Ask for a mapping to an external address of a port, or renew it.

        `wish`: the external address that is preferred.  Raises MappingRefused, DialError,
        SpeaksNatPmp.
        """

    def release(self, exchange: Exchange, port: Port, waits: Sequence[float]) -> None:
        """Delete a mapping.  Raises MappingRefused, DialError, SpeaksNatPmp."""

    def epoch(self, exchange: Exchange) -> int:
        """Return the router's epoch.  Raises MappingRefused, DialError, SpeaksNatPmp."""


class Pcp:
    """PCP (RFC 6887)."""

    name = "pcp"
    tolerance = 1 / 16

    def __init__(self, key: bytes) -> None:
        """The nonces are made of `key`, so that a restarted daemon can renew its mappings."""
        self._key = key

    def map(self, exchange: Exchange, port: Port, wish: Address, lifetime: int) -> Grant:
        """Ask for a mapping (Dialect)."""
        mapping = self._mapping(exchange, port, wish)
        response = exchange.ask(
            pcp.encode_request(pcp.Request(exchange.local, lifetime, mapping)), _Match(mapping)
        )
        assert response.mapping is not None  # _Match has seen to it
        return Grant(response.mapping.external, response.lifetime, response.epoch)

    def release(self, exchange: Exchange, port: Port, waits: Sequence[float]) -> None:
        """Delete a mapping (Dialect)."""
        mapping = self._mapping(exchange, port, Address("0.0.0.0", 0))
        request = pcp.encode_request(pcp.Request(exchange.local, 0, mapping))
        exchange.ask(request, _Match(mapping), waits)

    def epoch(self, exchange: Exchange) -> int:
        """Return the router's epoch (Dialect).

        A router that does not know ANNOUNCE tells it with the error.
        """
        request = pcp.encode_request(pcp.Request(exchange.local))
        return exchange.ask(request, _announced).epoch

    def _mapping(self, exchange: Exchange, port: Port, wish: Address) -> pcp.Mapping:
        from _blake2 import blake2s  # late: hashlib costs 1 MiB

        text = f"{exchange.local} {port.network} {port.number}".encode()
        nonce = blake2s(text, key=self._key, digest_size=pcp.NONCE_SIZE).digest()
        return pcp.Mapping(nonce, port.network, port.number, wish)


class _Match:
    """Finds the answer to the request for a mapping among what comes."""

    def __init__(self, mapping: pcp.Mapping) -> None:
        self._mapping = mapping

    def __call__(self, datagram: bytes) -> pcp.Response | None:
        """Return the answer, None for that to another request.

        Raises MappingRefused, ProtocolError, SpeaksNatPmp.
        """
        response = _parse_pcp(datagram)
        if response.mapping is None and response.result == pcp.SUCCESS:
            return None
        if response.mapping is not None and response.mapping[:3] != self._mapping[:3]:
            return None
        if response.result != pcp.SUCCESS:
            why = pcp.RESULTS.get(response.result, f"result {response.result}")
            raise MappingRefused(why, response.lifetime or REFUSED_SECONDS)
        return response


def _announced(datagram: bytes) -> pcp.Response | None:
    response = _parse_pcp(datagram)
    return response if response.mapping is None else None


def _parse_pcp(datagram: bytes) -> pcp.Response:
    """Return a response of PCP.  Raises ProtocolError, SpeaksNatPmp."""
    try:
        return pcp.parse_response(datagram)
    except pcp.OtherVersion as error:
        if error.version == nat_pmp.VERSION:
            raise SpeaksNatPmp(str(error)) from error
        raise


class NatPmp:
    """NAT-PMP (RFC 6886), which has one question at a time, and a question for the address."""

    name = "nat-pmp"
    tolerance = 1 / 8

    def map(self, exchange: Exchange, port: Port, wish: Address, lifetime: int) -> Grant:
        """Ask for a mapping (Dialect)."""
        response = self._ask(exchange, port, wish.port or port.number, lifetime)
        external = Address(self._address(exchange).host, response.external_port)
        return Grant(external, response.lifetime, response.epoch)

    def release(self, exchange: Exchange, port: Port, waits: Sequence[float]) -> None:
        """Delete a mapping (Dialect)."""
        request = nat_pmp.encode_request(nat_pmp.MapRequest(port.network, port.number, 0, 0))
        exchange.ask(request, _MatchNatPmp(port), waits)

    def epoch(self, exchange: Exchange) -> int:
        """Return the router's epoch (Dialect)."""
        return self._address(exchange).epoch

    def _ask(
        self, exchange: Exchange, port: Port, external: int, lifetime: int
    ) -> nat_pmp.MapResponse:
        request = nat_pmp.MapRequest(port.network, port.number, external, lifetime)
        return exchange.ask(nat_pmp.encode_request(request), _MatchNatPmp(port))

    def _address(self, exchange: Exchange) -> nat_pmp.AddressResponse:
        return exchange.ask(nat_pmp.encode_request(nat_pmp.AddressRequest()), _address_response)


class _MatchNatPmp:
    """Finds the answer to the request for a mapping among what comes."""

    def __init__(self, port: Port) -> None:
        self._port = port

    def __call__(self, datagram: bytes) -> nat_pmp.MapResponse | None:
        """Return the answer, None for that to another request.

        Raises MappingRefused, ProtocolError.
        """
        response = nat_pmp.parse_response(datagram)
        if isinstance(response, nat_pmp.AddressResponse):
            return None
        is_same_port = response.internal_port == self._port.number or not response.internal_port
        if response.network != self._port.network or not is_same_port:
            return None
        _check(response.result)
        return response if response.internal_port else None


def _address_response(datagram: bytes) -> nat_pmp.AddressResponse | None:
    response = nat_pmp.parse_response(datagram)
    if not isinstance(response, nat_pmp.AddressResponse):
        return None
    _check(response.result)
    return response


def _check(result: int) -> None:
    if result != nat_pmp.SUCCESS:
        raise MappingRefused(nat_pmp.RESULTS.get(result, f"result {result}"))


def is_usable(external: Address) -> bool:
    """Return whether a router has told an address at which others can reach it."""
    packed = pack_ip(external.host)
    return packed is not None and any(packed) and external.port > 0
