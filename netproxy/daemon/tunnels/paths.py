"""Makes what the datagram paths of tunnels need.  Thread: main."""

from __future__ import annotations

from functools import partial

from netproxy.daemon.checks.modules import has_module
from netproxy.listener.steering import identifier
from netproxy.protocol.tunnels.path import ID_SIZE
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.daemon.runtime import Runtime
    from netproxy.tunnel.path.bridge import BridgePaths
    from netproxy.tunnel.path.owner import PathServices


def path_services(runtime: Runtime) -> PathServices:
    """Return what paths need; without python3-cryptography it has no cipher."""
    # late: few tunnels have paths
    from netproxy.tunnel.path.owner import PathServices
    from netproxy.tunnel.path.sealing import MODULE, PACKAGE, load_cipher

    make_cipher = load_cipher()
    if make_cipher is None and has_module(MODULE):
        # A module that is missing has a warning of the configuration.
        runtime.log.warning(
            "tunnel: datagrams go by TCP: this %s has no ChaCha20-Poly1305", PACKAGE
        )
    arenas = runtime.datagrams.arenas
    return PathServices(make_cipher, arenas, runtime.counters, runtime.log)


def bridge_paths(runtime: Runtime) -> BridgePaths:
    """Return the bridge's side of paths, whose connection IDs lead to this process."""
    from netproxy.tunnel.path.bridge import BridgePaths  # late: as above

    return BridgePaths(path_services(runtime), partial(_identifier, runtime))


def _identifier(runtime: Runtime) -> bytes:
    """Return a connection ID that leads to this process; it may have been forked since."""
    workers = runtime.hand_overs
    place = (0, 1) if workers is None else (workers.index, 1 + len(workers.others))
    return identifier(ID_SIZE, *place)
