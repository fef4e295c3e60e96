"""One proxy of an upstream: how it is reached, and errors that name it.

ProxyDialer is the base of all dialers through a proxy; its Hop connects to the proxy through
the dialer before it and runs the handshake within the hop's time.  LoopGuard ends connections
that two proxies send to each other for ever.  Everything runs on the thread that dials.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from netproxy.errors import DeadlineError, DialError, ProtocolError, Reason, StreamError
from netproxy.interfaces.addresses import UNIX_PREFIX, Address, UnixAddress, pack_ip
from netproxy.interfaces.networks import is_loopback
from netproxy.net.connect import tell_step
from netproxy.protocol.proxy_protocol import encode_header
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import PacketConn
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer

LOOP_LIMIT = 64
"""Connections to one target that may wait for one proxy while none is established, if the
client has the proxy's own address.  Two proxies that are each other's upstream look like this;
nobody configures a chain of so many proxies."""
TARGETS_LIMIT = 4096
"""Targets that one LoopGuard counts."""
OWN_FAULTS = frozenset({Reason.AUTHENTICATION, Reason.PROTOCOL})
"""Reasons that a proxy reports about itself; all others are about the target."""
_THIS_MACHINE = Address("127.0.0.1", 0)
"""Where a proxy at a UNIX socket listens, in a PROXY header: it has no address of its own."""


class _TargetCount:
    """Connections to one target."""

    __slots__ = ("waiting", "begun")

    def __init__(self) -> None:
        self.waiting = 0
        self.begun = 0
        """Connections begun since one was established."""


class LoopGuard:
    """Ends connections that go in circles between this proxy and another one.

    SOCKS has no field that shows a loop, so the guard counts connections that wait.
    """

    def __init__(self) -> None:
        # Guards _counts.
        self._lock = threading.Lock()
        self._counts: dict[Address, _TargetCount] = {}

    def enter(self, target: Address) -> None:
        """Count a connection in.  The caller must call leave() unless DialError(LOOP) is raised."""
        with self._lock:
            if target not in self._counts and len(self._counts) >= TARGETS_LIMIT:
                self._counts.clear()
            count = self._counts.setdefault(target, _TargetCount())
            if count.waiting >= LOOP_LIMIT and count.begun >= LOOP_LIMIT:
                raise DialError(Reason.LOOP, str(target))
            count.waiting += 1
            count.begun += 1

    def leave(self, target: Address, established: bool) -> None:
        """Count a connection out that has been established or has failed."""
        with self._lock:
            count = self._counts.get(target)
            if count is None:
                return
            count.waiting -= 1
            if established:
                count.begun = 0
            if count.waiting <= 0:
                del self._counts[target]


class Hop(NamedTuple):
    """One proxy of an upstream and how it is reached."""

    name: str
    """The upstream's name, for records and rules."""
    label: str
    """The proxy's name in errors: "hop 2 of 'office' (http://proxy.example:8080)"."""
    server: Address
    via: Dialer
    """The dialer of the hop before; of the first hop, a direct one or a group."""
    seconds: float
    """The time limit of the handshake, TLS included."""
    user: str = ""
    password: str = ""
    """Never in a message, a name or the log."""
    secure: Callable[[Stream], None] | None = None
    """Makes the TLS handshake; None for a proxy without TLS."""
    guard: LoopGuard | None = None
    send_proxy: str = ""
    """The PROXY header that connections begin with, "v1" or "v2"; "" for none."""

    def __repr__(self) -> str:
        return self.label

    def open(self, flow: Flow, handshake: Callable[[Stream], None], wanted: str = "") -> Stream:
        """Connect to the proxy for a flow and return the stream after the handshake.

        Raises DialError with the hop's label.  `wanted` says, for an error that the handshake
        does not describe, what was asked of the proxy.
        """
        try:
            stream = self.via.dial(flow.to_hop(self.server))
        except DialError as error:
            raise self._unreachable(error) from error
        try:
            stream.limit(self.seconds)
            if self.send_proxy:
                self._send_header(stream, flow)
            if self.secure is not None:
                self.secure(stream)
                tell_step("tls", self.label)
            self._shake_hands(stream, flow, handshake)
            tell_step("hop", f"{self.label} leads to {wanted or flow.target}")
            stream.limit(None)
            return stream
        except BaseException as error:
            stream.close()
            failure = self._failure(error, wanted)
            if failure is None:
                raise
            raise failure from error

    def fixed_for(self, flow: Flow) -> Hop:
        """Return this hop with the members that the groups before it choose for a flow.

        Returns the hop itself if there is no group before it.
        """
        via = self.via.fixed_for(flow.to_hop(self.server, flow.network))
        return self if via is self.via else self._replace(via=via)

    def _send_header(self, stream: Stream, flow: Flow) -> None:
        """Tell the proxy the client's address, before TLS and the proxy's own protocol."""
        server = self.server
        if isinstance(server, UnixAddress):
            server = _THIS_MACHINE
        elif pack_ip(server.host) is None:
            server = stream.peer_address()
        stream.write(encode_header(self.send_proxy, flow.client, server))

    def _shake_hands(self, stream: Stream, flow: Flow, handshake: Callable[[Stream], None]) -> None:
        if self.guard is None or not self._may_be_loop(stream, flow):
            handshake(stream)
            return
        self.guard.enter(flow.target)
        established = False
        try:
            handshake(stream)
            established = True
        finally:
            self.guard.leave(flow.target, established)

    def _may_be_loop(self, stream: Stream, flow: Flow) -> bool:
        """Return whether the client has the proxy's address, so may be that proxy.

        Behind a UNIX socket may be any client of this machine, and the other way round.
        """
        try:
            proxy, client = self.server.host, flow.client.host
            if not isinstance(self.server, UnixAddress):
                proxy = stream.peer_address().host
        except StreamError:
            return False
        is_local = UNIX_PREFIX in (proxy[:5], client[:5])
        return proxy == client or is_local and is_loopback(proxy) and is_loopback(client)

    def _unreachable(self, error: DialError) -> DialError:
        """Return the error of the hops before this one, as a fault of the upstream."""
        if error.hop:
            return error.at_hop(error.hop, upstream=True)
        # The label shows the server already.
        detail = "" if error.detail == str(self.server) else error.detail
        return DialError(
            *(error.reason, detail, error.said, self.label, True),
            decided=error.decided,
            tried=error.tried,
        )

    def _failure(self, error: BaseException, wanted: str) -> DialError | None:
        """Return the DialError for an error of the handshake; None if it is not the proxy's."""
        if isinstance(error, DialError):
            return error.at_hop(self.label, upstream=error.reason in OWN_FAULTS)
        if isinstance(error, DeadlineError):
            return DialError(Reason.TIMEOUT, wanted, hop=self.label, upstream=True)
        if isinstance(error, ProtocolError):
            return DialError(Reason.PROTOCOL, wanted, str(error), self.label, upstream=True)
        if isinstance(error, StreamError):
            return DialError(Reason.GENERAL, wanted, str(error), self.label, upstream=True)
        return None


class ProxyDialer(ABC):
    """Base of the dialers through one proxy."""

    carries: frozenset[str]
    resolves_names: bool
    refusal = Reason.UNSUPPORTED

    def __init__(self, hop: Hop) -> None:
        self.name = hop.name
        self.hop = hop

    @property
    def symmetric(self) -> bool:
        """False, unless the protocol of the proxy has a connection for each target."""
        return False

    @property
    def knows_bound(self) -> bool:
        """False, unless the proxy tells which address targets see."""
        return False

    @abstractmethod
    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target through the proxy.  Raises DialError."""

    @abstractmethod
    def dial_packet(self, flow: Flow) -> PacketConn:
        """Open a packet connection through the proxy.  Raises DialError."""

    @abstractmethod
    def with_via(self, via: Dialer) -> ProxyDialer:
        """Return a dialer like this one that reaches its proxy through `via`."""

    def fixed_for(self, flow: Flow) -> ProxyDialer:
        """Return this upstream with the members that groups before the proxy choose for a flow."""
        hop = self.hop.fixed_for(flow)
        return self if hop is self.hop else self.with_via(hop.via)

    def no_udp(self) -> DialError:
        """Return the error for datagrams that the proxy does not carry."""
        return DialError(Reason.UNSUPPORTED, said=f"{self.hop.label} carries no UDP")


def hop_label(upstream: str, index: int, steps: int, url: str) -> str:
    """Return the name of a hop in errors: step `index` of `steps` of an upstream.

    `upstream` is the name in `upstreams`, "" for none.
    """
    if steps == 1:
        return f"'{upstream}' ({url})" if upstream else url
    name = f" of '{upstream}'" if upstream else ""
    return f"hop {index + 1}{name} ({url})"
