"""Lists of networks, and whether an address is in one.  Pure."""
from __future__ import annotations

from typing import Iterable

from netproxy.interfaces import Network


class NetworkList:
    def __init__(self, networks: Iterable[Network]) -> None:
        self._networks = list(networks)

    def __contains__(self, host: str) -> bool:
        """`host` is a literal address, its scope ignored; a name is in no network."""
        return any(network.holds(host) for network in self._networks)
