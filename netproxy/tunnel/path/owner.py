"""What both sides do with their paths: find them by connection ID, keep them alive, tell of them.

BridgePaths and AgentPaths derive from PathSet.  Thread: any.
"""

from __future__ import annotations

from netproxy.tunnel.path.keeper import PathKeeper
from netproxy.tunnel.path.table import PathTable
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.services import Counter, Log
    from netproxy.net.datagram import ArenaPool
    from netproxy.tunnel.path.flows import PathFlow
    from netproxy.tunnel.path.keys import Epoch
    from netproxy.tunnel.path.path import Path
    from netproxy.tunnel.path.sealing import MakeCipher


class PathServices(NamedTuple):
    """What paths need of the daemon."""

    make_cipher: MakeCipher | None
    """None if the package of sealing.PACKAGE is missing: there are no paths then."""
    arenas: ArenaPool
    counter: Counter
    log: Log
    is_direct: bool = False
    """True if clients of the bridge may send datagrams directly to this agent."""


class PathSet:
    """Some paths of one side (path.PathOwner)."""

    def __init__(self, services: PathServices) -> None:
        self.services = services
        self.table = PathTable(services.counter)
        self._keeper = PathKeeper(services.log)

    def add(self, path: Path, epoch: Epoch) -> None:
        """Serve a path.  Raises RuntimeError if there is no thread to be had."""
        self.table.add(path, epoch)
        self._keeper.add(path)

    def drop(self, path: Path) -> None:
        """Serve a path no more."""
        self._keeper.remove(path)
        path.close()

    def stop(self) -> None:
        """End the keeper's thread."""
        self._keeper.stop()

    # -- what a path asks for

    def wake(self) -> None:
        """Have the keeper look at all paths."""
        self._keeper.wake()

    def retire(self, epoch: Epoch) -> None:
        """Accept packets of a key no more."""
        self.table.retire(epoch)

    def carried(self, sent: int, received: int, too_long: int) -> None:
        """Count what a path has carried."""
        counted = (
            *(("tunnel_bytes", "sent", sent), ("tunnel_bytes", "received", received)),
            ("tunnel_too_long", "", too_long),
        )
        for name, reason, amount in counted:
            if amount:
                self.services.counter.count(name, reason, amount)

    def renew(self, path: Path) -> None:
        """Do nothing: the bridge's side renews keys."""

    def left_alone(self, path: Path, flow: PathFlow) -> None:
        """Do nothing: the agent's side attaches streams."""

    def agent_moved(self) -> None:
        """Do nothing: the agent's side looks after its connections."""

    def path_changed(self, path: Path, why: str) -> None:
        """Count that a path has come up, gone down or moved, and tell it."""
        event = why if path.up and why else "up" if path.up else "down"
        self.services.counter.count("tunnel_paths", event)
        tells = {"up": "go by UDP", "moved": "go to another address of the agent"}
        said = tells.get(event, f"go by TCP: {why}")
        self.services.log.info("tunnel: datagrams %s %s", self.names(path), said)

    def names(self, path: Path) -> str:
        """Return whose datagrams a path carries, for the log."""
        raise NotImplementedError
