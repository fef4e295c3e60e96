"""What NAT behaviour discovery has found out: the answer of the control socket, and of the command.

Pure.
"""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.answers import JsonObject, JsonValue

ENDPOINT_INDEPENDENT = "endpoint-independent"
ADDRESS_DEPENDENT = "address-dependent"
ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"
DEPENDENT = "dependent"
"""Mapping: one of the two before, and nothing tells which."""
UNKNOWN = "unknown"
NO_ANSWER = "no answer"


class ServerReport(NamedTuple):
    """What one server has told."""

    server: str
    address: str
    """Where its answer came from, "" without one."""
    mapped: str
    """The address that it has seen; "" without an answer."""
    second: str
    """Its other address, "" for none."""
    software: str
    milliseconds: float
    error: str
    """Why there is no answer, "" if there is one."""


class Lifetime(NamedTuple):
    """How long a NAT keeps a mapping that is idle."""

    alive: int = 0
    """Seconds after which a mapping was still there; 0 if none was."""
    expired: int | None = None
    """Seconds after which a mapping had expired; None if none had."""
    unknown: str = ""
    """Why nothing is known; "" if something is."""


class Report(NamedTuple):
    """What was found out; the answer of the control socket, too."""

    servers: Sequence[ServerReport]
    works: bool = False
    """True if UDP works: a server has answered."""
    local: str = ""
    """The local address, "" if it is not known: the sockets are those of an upstream."""
    external: Sequence[str] = ()
    """The addresses that servers have seen of one local port, the first server's first."""
    nat: bool | None = None
    """Whether there is a NAT; None if the local address is not known."""
    mapping: str = UNKNOWN
    filtering: str = UNKNOWN
    hairpin: bool | None = None
    port_preserved: bool | None = None
    """Whether external ports are those of the local sockets."""
    per_target: bool = False
    """True if an upstream has a connection for each target: then it is no NAT that was probed."""
    lifetime: Lifetime | None = None
    """How long an idle mapping is kept; None if nobody has asked."""
    unknown: Mapping[str, str] = {}
    """Why "mapping", "filtering" or "hairpin" are unknown."""

    def as_json(self) -> JsonObject:
        """Return it as JSON values."""
        servers = [server._asdict() for server in self.servers]
        lifetime = self.lifetime and self.lifetime._asdict()
        return {**self._asdict(), "servers": servers, "lifetime": lifetime}

    @classmethod
    def from_json(cls, values: Mapping[str, JsonValue]) -> Report:
        """Return what as_json() was made of."""
        servers = [ServerReport(**row) for row in values["servers"]]
        lifetime = Lifetime(**values["lifetime"]) if values["lifetime"] else None
        return cls(**{**values, "servers": servers, "lifetime": lifetime})
