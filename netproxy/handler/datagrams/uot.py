"""Serves UDP over TCP: a client's connection to the name of UoT."""

from __future__ import annotations

from netproxy.errors import DialError, EndOfStream, ProtocolError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.net.stream import complete
from netproxy.protocol import uot
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.handler.datagrams.stream_udp import StreamUdpRelay
    from netproxy.interfaces.connections import Stream, Wait
    from netproxy.interfaces.flows import Flow


def serve_uot(relay: StreamUdpRelay, stream: Stream, flow: Flow, reply: bytes) -> Wait | None:
    """Accept a connection to the name of UoT with `reply` and serve its datagrams.

    Raises EndOfStream or StreamError if the client leaves.
    """
    stream.write(reply)
    request = uot.UotRequest(False, UNSPECIFIED_ADDRESS)
    try:
        if flow.target.host != uot.MAGIC_V1:
            request = complete(uot.read_request(stream))
    except EndOfStream:
        raise
    except ProtocolError as error:
        relay.counter.refuse(flow.refusal("connections_refused", "no UoT request", error))
        # The stream is open, and UoT has no message for an error: a reset says it.
        stream.reset()
        return None
    if not request.connected:
        return relay.serve_all(stream, flow, uot.Frames(), uot.encode_address)
    flow = flow._replace(network="udp", target=request.target)
    try:
        return relay.serve_one(stream, flow, uot.Frames(request.target), b"")
    except DialError:  # counted and recorded
        stream.reset()
        return None
