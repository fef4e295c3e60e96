"""Selects flows by what a request says of them, and tells requests that can only be mistakes.

Thread: that of the client that asks.
"""

from __future__ import annotations

from netproxy.admin.control.client import CommandError
from netproxy.interfaces.addresses import UNIX_PREFIX, ip_text, pack_ip
from netproxy.interfaces.flows import TUNNEL_AGENT
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.admin.control.client import CommandRequest
    from netproxy.config.schema import Config
    from netproxy.interfaces.flows import LiveFlow

FILTERS = ("user", "client", "listener", "upstream", "target")
"""Keys of a request that select flows by a value; "ids" selects them by number."""
_OWN_UPSTREAMS = ("block", "auto")
_OTHERS = frozenset(("command", "number", "ids"))
"""Other keys of such a request; the parent of workers numbers what it asks them."""


class FlowFilter:
    """The flows that a request is about."""

    def __init__(self, request: CommandRequest, network: str = "") -> None:
        """Read the filters of a request; `network` "" stands for both.

        Raises CommandError for an unknown filter, a value that no flow can have, and if "ids" is
        not a list of numbers.
        """
        for key in request.keys() - _OTHERS - set(FILTERS):
            hint = _suggestion(key, FILTERS) or f" (known: ids, {', '.join(FILTERS)})"
            raise CommandError(f"unknown filter '{key}'{hint}")
        ids = request.get("ids") or ()
        if not isinstance(ids, (list, tuple)) or not all(isinstance(item, int) for item in ids):
            raise CommandError("ids: not a list of numbers")
        self._network = network
        self._ids = frozenset(ids)
        self._values = {key: _value(key, request[key]) for key in FILTERS if key in request}

    def passes(self, live: LiveFlow) -> bool:
        """Return whether a flow is among them."""
        flow = live.flow
        if self._network and flow.network != self._network:
            return False
        if self._ids and live.number not in self._ids:
            return False
        if not self._values:
            return True
        fields = {
            "user": flow.user,
            "client": flow.client.host,
            "listener": flow.listener,
            "upstream": live.dialer.name,
            "target": flow.target.host,
        }
        return all(fields[key] == value for key, value in self._values.items())

    def check_names(self, config: Config) -> None:
        """Raise CommandError if a filter has a name that the configuration has not.

        For filters that no flow has passed: flows may outlive a name.
        """
        from netproxy.admin.listing import known  # late: few requests find nothing

        names = known(config)
        # A port of an agent is a listener; an upstream without a name is its own.
        of_agents = tuple(f"{agent}-" for agent in names["agents"])
        for key, found, unlisted in (
            ("user", names["users"], ("",) if config.auth.is_set else ()),
            ("listener", names["listeners"], (TUNNEL_AGENT, *of_agents)),
            ("upstream", [*names["upstreams"], *_OWN_UPSTREAMS], ()),
        ):
            value = self._values.get(key)
            if value is None or value in found or value.startswith(unlisted) or "://" in value:
                continue
            hint = _suggestion(value, tuple(found)) or f" (known: {', '.join(found) or 'none'})"
            raise CommandError(f"there is no {key} '{value}'{hint}")


def _suggestion(word: str, known: tuple[str, ...]) -> str:
    """Return what a wrong word probably meant, for the end of an error; "" for nothing."""
    from netproxy.config.tree.hints import suggestion  # late: only for errors

    return suggestion(word, known)


def require_filter(request: CommandRequest) -> None:
    """Raise CommandError if a request to kill names no flow."""
    if not any(request.get(key) for key in ("ids", *FILTERS)):
        raise CommandError("nothing to kill: give an id or a filter")


def _value(key: str, value: object) -> str:
    """Return the value of a filter as flows have it.  Raises CommandError."""
    if not isinstance(value, str) or not value:
        raise CommandError(f"{key}: not a text, or empty")
    if key not in ("client", "target"):
        return value
    literal, percent, scope = value.partition("%")
    packed = pack_ip(literal)
    if packed is not None:
        return ip_text(packed) + percent + scope
    if value.startswith(UNIX_PREFIX):
        return value
    if key == "client":
        raise CommandError(f"client: '{value}' is not an address")
    host, colon, port = value.rpartition(":")
    if colon and port.isdigit():
        raise CommandError(f"target: '{value}' has a port: write the host alone, {host}")
    return value.lower()
