"""The agent's session with its bridge: a control connection, work connections, datagram paths.

With datagram paths a session outlives its connections: its paths and flows go on while the agent
connects again, and the next control connection resumes it.  Thread: the agent's, unless said.
"""

from __future__ import annotations

import time

from netproxy.protocol import tunnel
from netproxy.tunnel.control.connection import ControlConnection
from netproxy.tunnel.streams.chunks import can_carry_chunks
from netproxy.typed import TYPE_CHECKING, Mapping

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.protocol.tunnel import BridgePort
    from netproxy.tunnel.path.agent import AgentPaths
    from netproxy.tunnel.path.dependencies import PathSocketDialer
    from netproxy.tunnel.pool import WorkPool


class BridgeSession:
    """A session with the bridge."""

    def __init__(
        self, identifier: bytes, control: Stream, pool: WorkPool, paths: AgentPaths | None
    ) -> None:
        """Begin with a control connection after its handshake.

        `identifier`: as the bridge has told; it is secret.  `paths`: None to ask for none.
        """
        self.identifier = identifier
        self.control = ControlConnection(control)
        self.pool = pool
        self.paths = pool.paths = paths
        self.is_direct = paths is not None and paths.services.is_direct
        """True if clients of the bridge may send datagrams directly."""
        if paths is not None and self.is_direct:
            from netproxy.tunnel.direct.end import DirectEnd  # late: few agents have direct paths

            paths.direct = DirectEnd(paths, self.send)
        self.since = time.time()
        # The bridge is told that it may reuse work connections.
        self.reuses = can_carry_chunks(control)
        self.is_resumable = False
        """True once the bridge has told so, until either side has said that it closes."""
        self.is_connected = True
        """False while the control connection is lost, and the agent dials another one."""
        self.outcomes: Mapping[BridgePort, int] = {}
        """Of the registered services, as the bridge has told (keys of tunnel.OUTCOMES)."""

    def resume(self, control: Stream, pool: WorkPool, dial: PathSocketDialer) -> None:
        """Go on with another control connection, and work connections of the new address.

        `dial` is for the paths' next socket.  Opened work connections go on as they can.
        """
        before, self.control = self.control, ControlConnection(control)
        before.stream.close()
        self.pool.end()
        pool.paths, self.pool = self.paths, pool
        self.is_connected = True
        if self.paths is not None:
            self.paths.resume(dial)

    def send(self, data: bytes) -> None:
        """Send messages on the control connection that there is now.  Thread: any."""
        self.control.send(data)

    def close(self) -> None:
        """End everything but the streams that run."""
        self.pool.end()
        if self.paths is not None:
            self.paths.close()
        self.control.stream.close()

    def describe(self) -> dict[str, object]:
        """Return the state for netproxyctl.  Thread: any."""
        return {
            "since": self.since,
            "rtt": self.control.rtt or None,
            **self.pool.describe(),
            "path": self.paths.describe() if self.paths is not None else None,
            "direct": self.pool.describe_direct(),
            "ports": {
                str(service): tunnel.reason_text(tunnel.OUTCOMES, outcome)
                for service, outcome in self.outcomes.items()
            },
        }
