"""What is served beside the proxy, as configured: metrics, and the file of browsers' settings.

A part of the schema, with every default.  admin.py makes these objects; other rooms import them
from netproxy.config.schema.
"""

from __future__ import annotations

from netproxy.config.routing_schema import Place
from netproxy.interfaces.addresses import Address
from netproxy.typed import NamedTuple


class MetricsConfig(NamedTuple):
    """The HTTP listener for metrics."""

    address: Address | None = None
    """None for no listener."""
    token: str = ""
    """What a request must present; "" for nothing."""
    page: bool = False
    """True if there is a status page."""
    place: Place = Place()

    def __repr__(self) -> str:
        return f"MetricsConfig({self.address!r}, page={self.page!r})"


class PacConfig(NamedTuple):
    """The HTTP listener for browsers that ask for their proxy settings."""

    address: Address | None = None
    """None for no listener."""
    listener: str = ""
    """The name of the listener that browsers shall use; "" for the first one for HTTP or SOCKS5."""
    host: str = ""
    """The host that browsers shall connect to; "" for the one that they have asked."""
    direct: tuple[str, ...] = ()
    """Patterns of names, and networks, that browsers reach without the proxy."""
    place: Place = Place()
