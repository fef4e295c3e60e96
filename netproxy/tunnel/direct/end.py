"""One end of direct paths, a client or an agent: takes what the bridge offers, and probes.

The paths share the socket by which this side talks to the bridge, because its NAT has a mapping
for that.  Both sides probe at once, for a few seconds, and only the addresses that the bridge has
named.  Thread: any.
"""

from __future__ import annotations

import threading
import time
from functools import partial

from netproxy.errors import DialError, Reason
from netproxy.protocol import tunnel
from netproxy.protocol.tunnels import direct
from netproxy.protocol.tunnels.direct import DirectState
from netproxy.tunnel.direct.flows import AgentFlow, ClientFlow
from netproxy.tunnel.path.dependencies import PathDependencies
from netproxy.tunnel.path.keys import Epoch
from netproxy.tunnel.path.monitor import Tries
from netproxy.tunnel.path.path import Path
from netproxy.tunnel.path.sealing import Opener, Sealer
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.answers import DirectRow
    from netproxy.protocol.tunnel import TunnelMessage
    from netproxy.protocol.tunnels.direct import DirectFlow, DirectOffer
    from netproxy.tunnel.path.agent import AgentPaths
    from netproxy.tunnel.path.flows import PathFlow

TRY_SECONDS = 3.0
"""An attempt lasts so long: the offers to both sides, and some packets each way."""

PROBE_SECONDS = 0.25
"""Between two PINGs of an attempt: the first may be lost, as the other NAT is not open yet."""

REPORT_SECONDS = 10.0
"""Between two reports of the time there and back, for people who ask the bridge."""

PAIRS_LIMIT = 256
"""Pairs of one end: an agent has one for each client."""

FLOWS_LIMIT = 4096
"""Flows of one pair: as many as a session of the bridge has entries."""

COUNTER = "tunnel_direct"
"""What happens to direct paths."""


class DirectEnd:
    """The direct paths of one side (dependencies.DirectPaths, dependencies.PathOwner)."""

    def __init__(self, paths: AgentPaths, report: Callable[[bytes], None] | None = None) -> None:
        """Share the socket of `paths`.

        `report` tells the bridge of changes: the agent does; None for a client.
        """
        self._paths = paths
        self._services = paths.services
        self._report = report
        # Guards all below.
        self._lock = threading.Lock()
        self._pairs: dict[int, Path] = {}
        self._peers: dict[int, Address] = {}
        """The other sides of the pairs, as the bridge sees them."""
        self._next_report = 0.0
        self._closed = False

    # -- what the bridge says

    def obey(self, message: TunnelMessage) -> None:
        """Obey DIRECT_OFFER, DIRECT_FLOW of an agent, or DIRECT_END.  Raises ProtocolError."""
        if message.kind == tunnel.DIRECT_OFFER:
            self._take_offer(direct.parse_offer(message.value))
        elif message.kind == tunnel.DIRECT_FLOW:
            self._take_flow(direct.parse_flow(message.value))
        elif message.kind == tunnel.DIRECT_END:
            self._end(*direct.parse_end(message.value))

    def _take_offer(self, offer: DirectOffer) -> None:
        """Begin an attempt, with new keys; what a path carries goes by the relay meanwhile."""
        make, now = self._services.make_cipher, time.monotonic()
        assert make is not None  # nothing is asked for without
        sealer = Sealer(make(offer.peer_key), offer.peer_id)
        epoch = Epoch(offer.own_id, sealer, Opener(make(offer.own_key)), now)
        with self._lock:
            path = self._pairs.get(offer.pair)
            self._peers[offer.pair] = offer.peer
        if path is None:
            path = self._add(offer.pair, epoch)
            if path is None:
                return
        else:
            path.lead_to(None, "the bridge has sent other keys")
            self._paths.table.add(path, epoch)
            path.use(epoch)
        self._paths.submit(partial(self._lead, path, offer.peer))

    def _add(self, pair: int, epoch: Epoch) -> Path | None:
        tries = Tries(PROBE_SECONDS, PROBE_SECONDS, TRY_SECONDS)
        dependencies = PathDependencies(self, self._services.arenas, True, float("inf"), tries)
        path = Path(pair, epoch, dependencies)
        with self._lock:
            if self._closed or len(self._pairs) >= PAIRS_LIMIT:
                self._services.counter.count(COUNTER, "too many pairs")
                return None
            self._pairs[pair] = path
        try:
            self._paths.add(path, epoch)
        except RuntimeError as error:
            self._services.log.warning("tunnel: no direct path: %s", error)
            self._end(pair)
            return None
        return path

    def _lead(self, path: Path, peer: Address) -> None:
        """Probe an address.  Thread: the dial pool's."""
        origin = self._paths.origin
        try:
            if origin is None:
                raise DialError(Reason.GENERAL, said="no socket")
            remote = origin.lead_to(peer)
        except DialError as error:
            self._services.counter.count(COUNTER, "address refused")
            key, said = ("tunnel direct", str(error)), "tunnel: no direct path to %s: %s"
            self._services.log.limited(key, said, peer, error)
            return
        with self._lock:
            if self._closed or self._pairs.get(path.number) is not path:
                return
        path.lead_to(remote)

    def _take_flow(self, offer: DirectFlow) -> None:
        """Answer a relayed flow directly from now on, as far as the client sends directly."""
        carrier, path = self._paths.path(offer.path), self._pairs.get(offer.pair)
        relayed = carrier.flows.get(offer.path_flow) if carrier is not None else None
        if relayed is None or path is None or len(path.flows) >= FLOWS_LIMIT:
            return
        relayed.shortcut = path.flows.put(AgentFlow(path, offer.flow, relayed, offer.target))
        if relayed.closed:
            # It has ended meanwhile.
            relayed.close()

    def client_flow(self, offer: DirectFlow) -> PathFlow | None:
        """Return the client's side of a flow; None if its pair is not there."""
        path = self._pairs.get(offer.pair)
        if path is None or len(path.flows) >= FLOWS_LIMIT:
            return None
        return path.flows.put(ClientFlow(path, offer.flow))

    def _end(self, pair: int, number: int = 0) -> None:
        """End one flow of a pair, or all of it if `number` is 0."""
        with self._lock:
            path = self._pairs.get(pair) if number else self._pairs.pop(pair, None)
            if not number:
                self._peers.pop(pair, None)
        if path is None:
            return
        if not number:
            self._paths.drop(path)
        elif (flow := path.flows.get(number)) is not None:
            flow.close()

    # -- the socket

    def lose_socket(self) -> None:
        """Send nothing more: the socket has ended."""
        for path in self._all():
            path.lead_to(None)

    def close(self) -> None:
        """End all paths."""
        with self._lock:
            self._closed = True
            paths = list(self._pairs.values())
            self._pairs.clear()
        for path in paths:
            self._paths.drop(path)

    def _all(self) -> list[Path]:
        with self._lock:
            return list(self._pairs.values())

    # -- what a path asks for (dependencies.PathOwner)

    def path_changed(self, path: Path, why: str) -> None:
        """Count that a direct path has come up, gone down or moved, and tell it."""
        event = why if path.up and why else "up" if path.up else "down"
        self._services.counter.count(COUNTER, event)
        tells = {"up": "go directly", "moved": "go directly to another address"}
        said, peer = tells.get(event, f"are relayed: {why}"), self._peers.get(path.number)
        self._services.log.info("tunnel: datagrams from and to %s %s", peer, said)
        if self._report is not None:
            self._report(_encode_state(path))

    def report(self, now: float) -> None:
        """Tell the bridge the time there and back now and then; `now` is in monotonic seconds."""
        if self._report is None or now < self._next_report:
            return
        self._next_report = now + REPORT_SECONDS
        states = b"".join(_encode_state(path) for path in self._all() if path.up)
        if states:
            self._report(states)

    def wake(self) -> None:
        """Have the keeper look at all paths."""
        self._paths.wake()

    def carried(self, sent: int, received: int, too_long: int) -> None:
        """Count what a path has carried."""
        self._paths.carried(sent, received, too_long)

    def retire(self, epoch: Epoch) -> None:
        """Accept packets of a key no more."""
        self._paths.retire(epoch)

    def renew(self, path: Path) -> None:
        """Do nothing: the bridge renews keys."""

    def left_alone(self, path: Path, flow: PathFlow) -> None:
        """Do nothing: flows of direct paths are not held without the relay."""

    def agent_moved(self) -> None:
        """Do nothing: the path to the bridge tells of it as well."""

    # -- for people

    def describe(self) -> list[DirectRow]:
        """Return the direct paths, for netproxyctl."""
        rows: list[DirectRow] = []
        for path in self._all():
            row, peer = path.describe(), str(self._peers.get(path.number, ""))
            state = "direct" if row["up"] else "relayed"
            rows.append({"peer": peer, "state": state, "rtt": row["rtt"], "flows": row["flows"]})
        return rows


def _encode_state(path: Path) -> bytes:
    rtt = path.describe()["rtt"]
    return direct.encode_state(DirectState(path.number, path.up, int(rtt * 1e6)))
