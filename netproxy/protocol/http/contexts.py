"""The context IDs of a bound stream (bound_udp.py), and the frames of their datagrams.

A context stands for one target or source, or its datagrams begin with an address.  Clients
register contexts with even numbers, proxies with odd ones.  This program's proxy registers none,
its client one: the first context with addresses.  What the other end registers is accepted up
to a limit.  Thread: one calls find(); any calls prefix() and the others meanwhile.
"""

from __future__ import annotations

from netproxy.errors import ProtocolError
from netproxy.interfaces.bounded import BoundedDict
from netproxy.protocol.http import bound_udp
from netproxy.protocol.http.bound_udp import ACK, ASSIGN, CLOSE, VALUE_LIMIT, Assignment
from netproxy.protocol.http.capsule import (
    DATAGRAM,
    UDP_PAYLOAD_LIMIT,
    VARINT_LIMIT,
    VARINT_LONGEST,
    encode_varint,
    parse_varint,
)
from netproxy.typed import TYPE_CHECKING, Callable, Mapping

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address

CONTEXTS_LIMIT = 256
"""Contexts of a stream at a time.  The draft wants a limit; a client of WebRTC has some tens of
targets.  Further registrations are refused, and their datagrams take the context with addresses."""
CLOSED_LIMIT = 1024
"""Closed contexts of a stream that are remembered, to find out that a number is used again."""
FIRST_CONTEXT = 2
"""The context that a client registers for all targets: even, and 0 has a meaning already."""
PAYLOAD_LIMIT = 65507
"""Bytes: the most that UDP over IPv4 carries."""
_DATAGRAM_LIMIT = VARINT_LONGEST + max(bound_udp.ADDRESS_SIZES.values()) + UDP_PAYLOAD_LIMIT
_ALL_TARGETS = b""
"""In place of a raw address: the datagrams of the context begin with an address."""
_NO_CONTEXT = encode_varint(VARINT_LIMIT)
"""A context that nobody registers."""


class BoundCapsules:
    """The framing of a bound stream (net.frames.answering.AnsweringFraming).

    The raw address of a frame is what bound_udp.encode_address() returns.
    """

    payload_limit = PAYLOAD_LIMIT

    def __init__(
        self,
        first: Address | None,
        is_proxy: bool,
        admits: Callable[[Address], bool],
        refused: Callable[[str, str], None],
    ) -> None:
        """Begin a stream; a client registers its context for all targets.

        `first` is the target of the request, for which context 0 stands; None without one.
        `admits(target)` decides about a registration.  `refused(counter, reason)` is told of
        datagrams without their address, and of registrations beyond the limit.
        """
        self._is_proxy = is_proxy
        self._admits, self._refused = admits, refused
        # Raw addresses by context, and encoded contexts by raw address.  The reader replaces and
        # removes items, which others look up meanwhile: each look-up is one step.
        self._addresses: dict[int, bytes] = {}
        self._contexts: dict[bytes, bytes] = {}
        self._closed: BoundedDict[int, None] = BoundedDict(CLOSED_LIMIT)
        self._answers = bytearray()
        self._agreed = True
        self.versions = frozenset(bound_udp.ADDRESS_SIZES)
        """The IP versions of the targets that can be sent to."""
        self.is_closed_to_all = False
        """True once a proxy has closed the context for all targets: nothing more can be sent."""
        if first is not None:
            self._add(0, bound_udp.encode_address(first))
        if not is_proxy:
            self._add(FIRST_CONTEXT, _ALL_TARGETS)
            self._answers += bound_udp.encode_assign(Assignment(FIRST_CONTEXT, None))

    # -- the reader

    def find(self, memory: bytearray, start: int, end: int) -> tuple[int, int, bytes | None] | None:
        """Return as Framing.find(): a datagram of an unknown context has the address None.

        Raises ProtocolError for a malformed capsule, and for context 0 without a target.
        """
        kind = parse_varint(memory, start, end)
        length = parse_varint(memory, kind[1], end) if kind else None
        if not kind or not length:
            return None
        value, finish = length[1], length[1] + length[0]
        if kind[0] == DATAGRAM:
            if length[0] > _DATAGRAM_LIMIT:
                raise ProtocolError("a DATAGRAM capsule is longer than any UDP payload")
            return self._find_payload(memory, value, finish) if finish <= end else None
        if self._agreed and kind[0] in _HANDLERS:
            if length[0] > VALUE_LIMIT:
                raise ProtocolError("a capsule is longer than the registration of a context")
            if finish > end:
                return None
            _HANDLERS[kind[0]](self, bytes(memory[value:finish]))
        return finish, finish, None

    def _find_payload(
        self, memory: bytearray, value: int, finish: int
    ) -> tuple[int, int, bytes | None]:
        context = parse_varint(memory, value, finish)
        if not context:
            raise ProtocolError("a DATAGRAM capsule without a context ID")
        number, payload = context
        raw = self._addresses.get(number)
        if raw == _ALL_TARGETS:
            size = bound_udp.address_size(memory, payload, finish)
            raw = bytes(memory[payload : payload + size]) if size else None
            payload += size
        elif raw is None and not number:
            raise ProtocolError("context 0 in a stream without a target")
        if number in self._addresses and (raw is None or finish - payload > UDP_PAYLOAD_LIMIT):
            self._refused("drops", "malformed")
            return finish, finish, None
        return (value, finish, None) if raw is None else (payload, finish, raw)

    def disagree(self) -> None:
        """Leave the stream to the target of the request: the extension is not in use."""
        self._agreed = False

    def take_answers(self) -> bytes:
        """Return the capsules for the other end that find() has led to."""
        answers = bytes(self._answers)
        self._answers.clear()
        return answers

    def _on_assign(self, value: bytes) -> None:
        context, address = bound_udp.parse_assign(value)
        if context % 2 != (0 if self._is_proxy else 1):
            raise ProtocolError("COMPRESSION_ASSIGN for a context of the other end")
        if context in self._addresses or context in self._closed:
            raise ProtocolError("COMPRESSION_ASSIGN for a context that has been used")
        if address is None and not self._is_proxy:
            raise ProtocolError("a proxy registers no context for all targets")
        raw = _ALL_TARGETS if address is None else bound_udp.encode_address(address)
        # This end registers no address, so that a context for the same one is the other end's.
        if self._contexts.get(raw, b"\0") != b"\0":
            raise ProtocolError("COMPRESSION_ASSIGN for an address that has a context")
        if len(self._addresses) >= CONTEXTS_LIMIT:
            self._refused("requests_refused", "too many contexts")
        elif address is None or (address.port and self._admits(address)):
            self._add(context, raw)
            self._answers += bound_udp.encode_ack(context)
            return
        self._close(context)
        self._answers += bound_udp.encode_close(context)

    def _on_ack(self, value: bytes) -> None:
        if bound_udp.parse_context(value) != FIRST_CONTEXT or self._is_proxy:
            raise ProtocolError("COMPRESSION_ACK for a context that was not registered")

    def _on_close(self, value: bytes) -> None:
        context = bound_udp.parse_context(value)
        if context == FIRST_CONTEXT and not self._is_proxy:
            self.is_closed_to_all = True
            raise ProtocolError("the proxy has closed the context for all targets")
        if context in self._addresses:
            self._close(context)

    def _add(self, context: int, raw: bytes) -> None:
        self._addresses[context] = raw
        self._contexts[raw] = encode_varint(context)

    def _close(self, context: int) -> None:
        self._closed.put(context, None)
        raw = self._addresses.pop(context, None)
        if raw is None:
            return
        self._contexts.pop(raw, None)
        if self._addresses.get(0) == raw:
            self._contexts[raw] = b"\0"

    # -- any thread

    def takes(self, address: bytes) -> bool:
        """Return whether there is a context for a raw address."""
        return address in self._contexts or _ALL_TARGETS in self._contexts

    def prefix(self, address: bytes, size: int) -> bytes:
        """Return what precedes a payload of `size` bytes.

        If the contexts have just been closed the datagram has an unknown one, and is dropped by
        the other end.
        """
        head = self._contexts.get(address)
        if head is None:
            head = self._contexts.get(_ALL_TARGETS, _NO_CONTEXT) + address
        return b"\0%b%b" % (encode_varint(len(head) + size), head)

    def encode(self, target: Address) -> bytes:
        """Return the raw address of a target.

        Raises ValueError for a name, and for an IP version that the proxy does not have.
        """
        raw = bound_udp.encode_address(target)
        if raw[0] not in self.versions and raw not in self._contexts:
            raise ValueError(f"the proxy has no IPv{raw[0]} address")
        return raw

    def parse(self, address: bytes) -> Address:
        """Return the address of a raw one.  Raises ProtocolError."""
        return bound_udp.parse_address(address)


_HANDLERS: Mapping[int, Callable[[BoundCapsules, bytes], None]] = {
    ASSIGN: BoundCapsules._on_assign,
    ACK: BoundCapsules._on_ack,
    CLOSE: BoundCapsules._on_close,
}
