"""Reads what is served beside the proxy: `metrics`, `status_page`, `control` and `pac`."""

from __future__ import annotations

import re

from netproxy.config.admin_schema import MetricsConfig, PacConfig
from netproxy.config.routing_schema import Place
from netproxy.config.url import HOST_NAME, parse_listen
from netproxy.interfaces.addresses import SOCKET_PATH_LIMIT, ActivationAddress, Address, pack_ip
from netproxy.interfaces.networks import is_loopback
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.config.schema import ListenerConfig
    from netproxy.config.tree.node import MapReader

TOKEN_FLOOR = 16
"""Characters of a metrics token: requests may guess without limit."""
PROTOCOLS = ("sps", "http", "socks5")
"""Listeners that browsers can use."""


def read_metrics(top: MapReader) -> MetricsConfig:
    """Read `metrics`, `metrics_token` and `status_page`."""
    address = top.read("metrics", _single_address, None)
    metrics = MetricsConfig(
        address,
        top.secret("metrics_token", _token),
        top.flag("status_page", False),
        Place(top.place_of("metrics")),
    )
    if metrics.page and not metrics.token:
        message = "needs a metrics_token: the page shows which client talks to which target"
        top.add_error("status_page", message, given=("metrics_token",))
    if (metrics.page or metrics.token) and address is None:
        key = "status_page" if metrics.page else "metrics_token"
        top.add_error(key, "has no listener: set metrics", given=("metrics",))
    if address is not None and not is_loopback(address.host) and not metrics.token:
        message = f"{address} can be reached from other machines: set a metrics_token"
        top.add_error("metrics", message)
    return metrics


def read_metrics_users(top: MapReader, metrics: MetricsConfig) -> bool:
    """Read `metrics_users`."""
    names = top.flag("metrics_users", False)
    if names and metrics.address is None:
        top.add_error("metrics_users", "has no listener: set metrics", given=("metrics",))
    return names


def parse_control(text: str) -> str:
    """Return the path of the control socket, "" for none.  Raises ValueError."""
    if text == "none":
        return ""
    scheme, _, path = text.partition(":")
    if scheme != "unix" or not path.startswith("/") or len(path.encode()) > SOCKET_PATH_LIMIT:
        expected = "(expected unix:/run/netproxy/control.sock or none)"
        raise ValueError(f"'{text}' is not a control socket {expected}")
    return path


def read_pac(section: MapReader, listeners: Sequence[ListenerConfig], are_all: bool) -> PacConfig:
    """Read `pac`; `listeners` are those of the configuration, `are_all` as for check_routes()."""
    if not section.has("listen"):
        section.add_error("listen", "is missing: where browsers ask, such as 192.168.1.1:80")
    pac = PacConfig(
        section.read("listen", _single_address, None),
        section.text("listener"),
        section.read("host", _host, ""),
        section.values("direct", str),
        Place(section.place_of("listen")),
    )
    section.finish()
    if not are_all:
        return pac
    usable = [listener.name for listener in listeners if listener.protocol in PROTOCOLS]
    if pac.listener and pac.listener not in usable:
        names = ", ".join(usable) or "there is none"
        section.add_error("listener", f"no browser can use '{pac.listener}' (usable: {names})")
    elif not usable:
        section.add_error("listen", "there is no listener for browsers: sps, http or socks5")
    return pac


def _host(text: str) -> str:
    if pack_ip(text) is None and not re.match(HOST_NAME, text):
        raise ValueError(f"'{text}' is not an address or a host name")
    return text


def _single_address(text: str) -> Address:
    addresses = parse_listen(text)
    if len(addresses) != 1 or isinstance(addresses[0], ActivationAddress):
        raise ValueError("must be a single port")
    return addresses[0]


def _token(text: str) -> str:
    if len(text) < TOKEN_FLOOR or not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError(
            f"must have at least {TOKEN_FLOOR} letters or digits (openssl rand -hex 16 makes one)"
        )
    return text
