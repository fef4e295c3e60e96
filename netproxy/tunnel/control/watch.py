"""Finds out early that the agent's control connection is dead while its datagram path works.

A TCP connection whose address has gone, or that a NAT has forgotten, tells nothing for a long time.
Thread: the agent's.
"""

from __future__ import annotations

from netproxy.errors import StreamError
from netproxy.net.local.interfaces import has_address
from netproxy.typed import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from netproxy.tunnel.control.connection import ControlConnection

SILENT_SECONDS = 3.0
"""A PING of the control connection that has no answer for so long, while the path has one, means
that the connection is dead: TCP repeats a lost segment several times in this time."""


class PathSigns(Protocol):
    """What the datagram paths know of the network (tunnel.path.agent)."""

    @property
    def last_heard(self) -> float:
        """When the bridge has last asked or answered by a path, in monotonic seconds."""

    def take_moved(self) -> bool:
        """Return whether the bridge has seen the agent move since the last call."""

    def probe(self) -> None:
        """Ask the bridge at once whether the paths that are up work."""


class ControlWatch:
    """Watches one control connection beside the paths of its session."""

    def __init__(self, control: ControlConnection, paths: PathSigns) -> None:
        self._control = control
        self._paths = paths
        self._has_probed = False
        try:
            host = control.stream.local_address().host
        except (OSError, StreamError):
            host = ""
        # An address of a routing domain of its own (VRF) cannot be asked for by any socket.
        self._host = host if host and has_address(host) else ""

    def check(self, now: float) -> None:
        """Raise StreamError if the connection is dead; `now` is in monotonic seconds."""
        if self._host and not has_address(self._host):
            raise StreamError(f"this machine no longer has the address {self._host}")
        if self._paths.take_moved():
            self._control.ping()
        asked = self._control.asked
        if asked is None:
            self._has_probed = False
        elif not self._has_probed:
            self._has_probed = True
            self._paths.probe()
        elif now - asked >= SILENT_SECONDS and self._paths.last_heard > asked:
            raise StreamError(f"silent for {SILENT_SECONDS:g} s, while datagrams pass")
