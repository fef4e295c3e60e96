"""Serves UDP ASSOCIATE (RFC 1928 section 7): the association and its control connection.

All associations of a client live in the process that its datagrams come to.  With several
workers another one may have accepted the control connection.  It hands the connection over with
what it has read; a connection within TLS stays where its keys are, and is relayed.
"""

from __future__ import annotations

from functools import partial

from netproxy.errors import DialError, StreamError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.connections import READABLE, Blocking, Handshake, Steps, Wait
from netproxy.protocol import socks5
from netproxy.typed import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from netproxy.handler.socks.socks5_udp import Socks5UdpRelay
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.services import Counter
    from netproxy.relay.association import Association


class AssociationOwners(Protocol):
    """Knows which worker has the associations of a client.  Thread: any; never blocks."""

    def is_elsewhere(self, client: str) -> bool:
        """Return whether another worker has those of a client address."""

    def hand_over(self, control: Stream, flow: Flow, reached: Address) -> Wait | None:
        """Give a control connection to the worker of its client.

        `reached`: the local address that the client connected to.  Returns what relays the
        connection if it cannot be given, None if it is gone.  Raises DialError.
        """


class Associating:
    """Serves the UDP ASSOCIATE requests of one listening address."""

    def __init__(self, udp: Socks5UdpRelay, counter: Counter) -> None:
        """`udp` has the associations."""
        self._udp = udp
        self._counter = counter
        self.owners: AssociationOwners | None = None
        """None if this process has the associations of all clients."""

    def serve(self, stream: Stream, flow: Flow) -> Steps[Wait | None]:
        """Answer the request of a control connection.

        `flow.target` is the hint of the request.  Raises DialError, which has been counted and
        recorded, and StreamError.
        """
        owners = self.owners
        if owners is not None and owners.is_elsewhere(flow.client.host):
            call = partial(self._hand_over, owners, stream, flow)
        else:
            call = partial(self._associate, stream, flow, None)
        wait: Wait | None = yield Blocking(call)
        return wait

    def take_over(self, stream: Stream, flow: Flow, reached: Address) -> Handshake:
        """Serve a control connection that another worker has handed over."""
        try:
            wait: Wait | None = yield Blocking(partial(self._associate, stream, flow, reached))
            return wait
        except DialError as error:
            stream.reply(socks5.encode_reply(socks5.REPLIES[error.reason], UNSPECIFIED_ADDRESS))
        yield from stream.close_staged()
        return None

    def _associate(self, stream: Stream, flow: Flow, reached: Address | None) -> Wait | None:
        """Open an association; it is closed with its control connection."""
        try:
            association, bound = self._udp.open(flow, reached or stream.local_address())
        except DialError as error:
            self._refuse(flow, error)
            raise
        try:
            stream.reply(socks5.encode_reply(socks5.SUCCEEDED, bound))
        except StreamError:
            self._udp.close(association)
            raise
        return _ControlConnection(self._udp, stream, association).wait()

    def _refuse(self, flow: Flow, error: DialError) -> None:
        decided = error.decided or str(error)
        refusal = flow.refusal("requests_refused", error.why, decided)
        self._counter.refuse(refusal._replace(asked="UDP ASSOCIATE", network="udp"))

    def _hand_over(self, owners: AssociationOwners, stream: Stream, flow: Flow) -> Wait | None:
        """Give the control connection to the worker that has the associations of its client."""
        try:
            return owners.hand_over(stream, flow, stream.local_address())
        except DialError as error:
            self._refuse(flow, error)
            raise


class _ControlConnection:
    """The control connection of an association.  It waits for its end."""

    __slots__ = ("_udp", "_stream", "_association")

    def __init__(self, udp: Socks5UdpRelay, stream: Stream, association: Association) -> None:
        self._udp = udp
        self._stream = stream
        self._association = association

    def wait(self) -> Wait:
        return Wait(((self._stream.socket, READABLE),), None, self._resume)

    def _resume(self, ready: bool) -> Wait | None:
        """Drop what the client sends; close the association at the end of the stream."""
        if ready and self._stream.skip():
            return self.wait()
        self._udp.close(self._association)
        return None
