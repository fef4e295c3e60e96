"""Datagrams to all targets of a client in one stream through an HTTP proxy, if the proxy agrees.

The request for the first target asks for it (protocol.http.bound_udp).  A proxy that does not know
the extension answers as to every request for connect-udp: the stream is for that target alone.
"""

from __future__ import annotations

import time
from functools import partial

from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.services import refuse_dropped
from netproxy.net.frames.answering import AnsweringConn
from netproxy.protocol.http.bound_udp import address_version
from netproxy.protocol.http.contexts import BoundCapsules
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Arena, Batch
    from netproxy.interfaces.services import Counter

REFUSED_SECONDS = 600.0
"""How long a proxy is not asked again that has not agreed.  Until then each target has a stream of
its own; a proxy that has been updated is found after that time."""


class Agreement:
    """Whether one proxy carries all targets of a client in one stream.  Thread: any."""

    def __init__(self) -> None:
        """Know nothing: the next request asks."""
        self._refused_until = 0.0

    @property
    def is_refused(self) -> bool:
        """True if the proxy has not agreed lately."""
        return time.monotonic() < self._refused_until

    def note_refusal(self) -> None:
        """Note that the proxy does not agree."""
        self._refused_until = time.monotonic() + REFUSED_SECONDS


class BoundConn(AnsweringConn):
    """A PacketConn for all targets that have an address."""

    def __init__(
        self, stream: Stream, first: Address, bound: Sequence[Address], counter: Counter
    ) -> None:
        """Take over a stream that the proxy has agreed to, and register its context.

        `first` is the target of the request, UNSPECIFIED_ADDRESS for none; `bound` are the
        public addresses that the proxy has told.  Raises DialError; then the stream is closed.
        """
        known = None if first == UNSPECIFIED_ADDRESS else first
        framing = BoundCapsules(known, False, _admit, partial(_refuse, counter))
        if bound:
            framing.versions = frozenset(map(address_version, bound))
        super().__init__(stream, framing, counter)
        self.bound = tuple(bound)
        self._contexts = framing
        self.agreement: Agreement | None = None
        """Is told if the proxy takes its agreement back."""
        self.answer()

    def receive(self, arena: Arena) -> Batch:
        """Return the frames that are there, and answer what the proxy registers."""
        batch = super().receive(arena)
        if self._contexts.is_closed_to_all and self.agreement is not None:
            self.agreement.note_refusal()
        return batch


def _admit(target: Address) -> bool:
    """Accept what a proxy registers: it compresses the address of a source."""
    return True


def _refuse(counter: Counter, name: str, reason: str) -> None:
    """Count what is dropped or refused: a datagram, or the registration of a context."""
    refuse_dropped(counter, reason)
