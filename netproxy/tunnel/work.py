"""Work connections on the agent's side: each waits until the bridge opens it, dials what it is for, and relays.

While it waits it has no thread.  What the agent's services are, and whether it is an
exit, is asked for each opening anew, so that a reload counts at once.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, NamedTuple

from netproxy.errors import DialError, Reason, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.interfaces.flows import Flow, TUNNEL_AGENT
from netproxy.interfaces.services import Counter
from netproxy.net.stream import Stream
from netproxy.protocol import proxy_protocol, socks5, tunnel
from netproxy.protocol.capsule import Capsules
from netproxy.protocol.tunnel import AddressedDatagrams, Opening, Service
from netproxy.tunnel.control import arrived
from netproxy.tunnel.pool import WorkPool

SPARE_SECONDS = 60.0  # that a connection waits before it may go, where there are more than needed


class Target(NamedTuple):
    """Where a service is."""

    address: Address
    proxy_protocol: bool = False  # whether it is told who comes, by a PROXY header


class Offer(NamedTuple):
    services: Mapping[Service, Target]
    leads_out: bool


class Ways(NamedTuple):
    """handler.connector.Connector and handler.stream_udp.StreamUdpRelay: one that obeys the rules, or one that leads to services."""

    connector: Any
    datagrams: Any


Begin = Callable[
    [Stream, Callable[[], None], Callable[[], "Wait | None"]], None
]  # listener.serving: (stream, ended, go on)


class Work:
    def __init__(self, begin: Begin, counter: Counter) -> None:
        self._begin = begin
        self._counter = counter
        self._offer = Offer({}, False)
        self._local: Ways
        self._out: Ways
        self._live: set[Stream] = set()  # that were opened; set's own calls are atomic

    def configure(self, offer: Offer, local: Ways, out: Ways) -> None:
        """From now on; `local` dials services, `out` what an exit is asked for."""
        self._offer, self._local, self._out = offer, local, out

    @property
    def live(self) -> int:
        return len(self._live)

    def abort(self) -> None:
        for stream in list(self._live):
            stream.shutdown()

    def serve(self, stream: Stream, pool: WorkPool) -> None:
        """Takes a connection over that is welcome."""

        def ended() -> None:
            pool.closed(stream)
            self._live.discard(stream)
            stream.close()

        self._begin(stream, ended, lambda: self._look(stream, pool))

    def _look(self, stream: Stream, pool: WorkPool) -> Wait | None:
        for message in arrived(stream):
            if message.kind == tunnel.OPEN:
                self._live.add(stream)
                pool.opened(stream)
                return self._open(stream, tunnel.parse_open(message.value))
        if pool.ended:
            return None
        return Wait(
            ((stream.socket, READABLE),),
            SPARE_SECONDS,
            lambda ready: self._resume(stream, pool, ready),
            idle=True,
        )

    def _resume(self, stream: Stream, pool: WorkPool, ready: bool) -> Wait | None:
        if not (stream.read_ahead() if ready else not pool.spare(stream)):
            return None
        return self._look(stream, pool)

    def _open(self, stream: Stream, opening: Opening) -> Wait | None:
        try:
            if isinstance(opening.target, Service):
                return self._to_service(stream, opening, opening.target)
            if not self._offer.leads_out:
                raise DialError(Reason.DENIED, "no exit")
            flow = Flow(opening.network, opening.client, opening.target, TUNNEL_AGENT, "")
            if opening.network == "tcp":
                return self._out.connector.open(flow).accept(stream, tunnel.encode_accept())
            self._out.datagrams.permit(flow)
            stream.write(tunnel.encode_accept())
            return self._out.datagrams.serve_all(
                stream, flow, AddressedDatagrams(), socks5.encode_address
            )
        except DialError as error:
            self._counter.count("tunnel_refused", error.reason.value)
            stream.write(tunnel.encode_refuse(error.reason))
            return None

    def _to_service(self, stream: Stream, opening: Opening, service: Service) -> Wait | None:
        target = self._offer.services.get(service)
        if target is None or service.network != opening.network:
            raise DialError(Reason.DENIED, f"no service {service}")
        flow = Flow(opening.network, opening.client, target.address, TUNNEL_AGENT, "")
        if opening.network == "udp":
            return self._local.datagrams.serve_one(
                stream, flow, Capsules(target.address), tunnel.encode_accept()
            )
        passage = self._local.connector.open(flow)
        if target.proxy_protocol:
            try:
                passage.upstream.write(
                    proxy_protocol.encode_v2(opening.client, passage.upstream.peer_address())
                )
            except StreamError as error:
                passage.finish("reset")
                raise DialError(Reason.GENERAL, str(target.address), str(error)) from error
        return passage.accept(stream, tunnel.encode_accept())
