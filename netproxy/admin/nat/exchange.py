"""Sends the probes of NAT behaviour discovery, and again, and waits for what comes back.

A transport sends and receives; it has two local ports.  Thread: one, which blocks for
GIVE_UP_SECONDS a round at the most.
"""

from __future__ import annotations

import os
import time

from netproxy.admin.nat.discovery import SERVERS_LIMIT, Outcome, discover
from netproxy.errors import NetProxyError, ProtocolError
from netproxy.protocol import stun
from netproxy.protocol.host import parse_host
from netproxy.interfaces.addresses import Address
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.admin.nat.discovery import Probe
    from netproxy.admin.nat.report import Report

SEND_SECONDS = (0.5, 1.5, 3.5)
"""When a probe is sent again, from the start of its round: RFC 8489 section 6.2.1 with a timeout
of 500 ms and fewer repeats, because what is filtered never comes."""
GIVE_UP_SECONDS = 4.5
"""The end of a round."""


class ServerError(NetProxyError):
    """A server is not written as parse_server() expects it."""


class SendError(NetProxyError):
    """A datagram cannot be sent; the message tells why."""


class Arrival(NamedTuple):
    """A datagram that has come, or an error that the network has reported."""

    port: int
    """The local port."""
    source: Address
    """Its sender; of an error, where the datagram was sent that has caused it."""
    data: bytes
    error: str = ""
    """The error, "" for a datagram."""


class Transport(Protocol):
    """Some local ports, by their numbers from 0."""

    @property
    def per_target(self) -> bool:
        """True if each target has a connection of its own: some upstreams carry UDP so."""

    def local(self, target: Address) -> Sequence[Address | None]:
        """Return the local address of each port towards a target, None if it is not known."""

    def send(self, port: int, target: Address, data: bytes) -> None:
        """Send a datagram.  Raises NetProxyError, such as SendError."""

    def receive(self, seconds: float) -> Arrival | None:
        """Wait for at most `seconds`; return what has come, None if nothing has."""


def parse_server(text: str) -> Address:
    """Return the server "host", "host:port" or "[v6]:port".  Raises ServerError."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.endswith("]")) or text.endswith("]"):
        host, port = text, str(stun.PORT)
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise ServerError(f"'{text}' is not a server (expected HOST or HOST:PORT)")
    try:
        return Address(parse_host(host.encode("ascii", "replace")), int(port))
    except ProtocolError as error:
        raise ServerError(f"'{text}' is not a server: {error}") from error


def parse_servers(texts: object) -> list[Address]:
    """Return 1 to SERVERS_LIMIT servers, each once.  Raises ServerError."""
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ServerError("servers: not a list of texts")
    if not 0 < len(texts) <= SERVERS_LIMIT:
        raise ServerError(f"expected 1 to {SERVERS_LIMIT} servers")
    return list(dict.fromkeys(map(parse_server, texts)))


def probe_nat(
    servers: Sequence[Address], transport: Transport, clock: Callable[[], float] = time.monotonic
) -> Report:
    """Ask STUN servers about the NAT of a transport; return what was found out.

    Blocks for three rounds.  `servers`: at least one.
    """
    rounds = discover(servers, transport.local(servers[0]))
    probes = next(rounds)
    try:
        while True:
            probes = rounds.send(Round(transport, clock).run(probes))
    except StopIteration as stop:
        report: Report = stop.value
        return report._replace(per_target=transport.per_target)


def is_request(datagram: bytes) -> bool:
    """Return whether a message of STUN is a Binding request."""
    return int.from_bytes(datagram[:2], "big") == stun.REQUEST


class Round:
    """Probes that are sent at the same times."""

    def __init__(self, transport: Transport, clock: Callable[[], float]) -> None:
        self._transport = transport
        self._clock = clock
        self._started = clock()
        # By transaction ID, in the order of the probes.
        self._waiting: dict[bytes, Probe] = {}
        self._outcomes: dict[bytes, Outcome] = {}

    def run(self, probes: Sequence[Probe]) -> list[Outcome]:
        """Return the outcomes of probes."""
        order = [os.urandom(stun.TRANSACTION_SIZE) for _ in probes]
        self._waiting = dict(zip(order, probes, strict=True))
        self._send()
        # An upstream may have taken its time to connect.
        self._started = self._clock()
        for send_at in SEND_SECONDS:
            self._receive(send_at)
            self._send()
        self._receive(GIVE_UP_SECONDS)
        return [self._outcomes.get(transaction, Outcome()) for transaction in order]

    def _send(self) -> None:
        for transaction, probe in list(self._waiting.items()):
            request = stun.BindingRequest(transaction, *probe[2:])
            try:
                self._transport.send(probe.port, probe.target, stun.encode_request(request))
            except NetProxyError as error:
                self._finish(transaction, Outcome(error=str(error)))

    def _receive(self, until: float) -> None:
        """Take what comes until some seconds of the round have passed, or nothing is missing."""
        while self._waiting and (left := self._started + until - self._clock()) > 0:
            arrival = self._transport.receive(left)
            if arrival is None:
                continue
            if arrival.error:
                self._note_error(arrival)
            elif stun.is_message(arrival.data):
                self._note(arrival)

    def _note(self, arrival: Arrival) -> None:
        """Note an answer, or our own request; anything else is not for us."""
        transaction = arrival.data[8 : stun.HEADER_SIZE]
        probe = self._waiting.get(transaction)
        if probe is None:
            return
        response = None
        # Our own request has no meaning where it was sent from.  At another port, the NAT has led
        # it there: nobody else knows the transaction ID.
        if arrival.port == probe.port or not is_request(arrival.data):
            try:
                response = stun.parse_response(arrival.data)
            except ProtocolError:
                return
        seconds = self._clock() - self._started
        self._finish(transaction, Outcome(response, arrival.source, arrival.port, seconds, ""))

    def _note_error(self, arrival: Arrival) -> None:
        for transaction, probe in list(self._waiting.items()):
            if (probe.port, probe.target) == (arrival.port, arrival.source):
                self._finish(transaction, Outcome(error=arrival.error))

    def _finish(self, transaction: bytes, outcome: Outcome) -> None:
        del self._waiting[transaction]
        self._outcomes[transaction] = outcome
