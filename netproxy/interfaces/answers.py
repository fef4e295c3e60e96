"""The answers of the control socket and of /status.json: JSON objects, key by key.

admin and tunnel write them; observe, ctl and the status page read them.  Keys are added in
later versions, but none is renamed or removed.  For type checkers only.
"""

from __future__ import annotations

from typing import TypeAlias, TypedDict

JsonObject: TypeAlias = dict[str, object]
"""A JSON object whose keys depend on the command."""


class FlowRow(TypedDict):
    """A connection or UDP session that is running."""

    id: int
    network: str
    """ "tcp" or "udp"."""
    listener: str
    client: str
    """host:port, as `target`."""
    user: str
    target: str
    upstream: str
    age: float
    """Seconds since the flow began."""
    idle: float
    """Seconds since the client's last byte or datagram in either direction."""
    sent: int
    """Bytes, client to target."""
    received: int
    """Bytes, target to client."""
    datagrams_sent: int
    datagrams_received: int


class ListenerRow(TypedDict):
    """A listener of the configuration."""

    name: str
    network: str
    """ "tcp", "udp" or "tcp+udp"."""
    address: str
    """Its addresses, separated by commas."""
    live: int
    """Connections of clients that are open."""
    accepted: int
    """Connections of clients that were admitted since the start."""


class MemberRow(TypedDict):
    """An upstream, or a member of a group."""

    name: str
    state: str
    """ "up", "failing", "down" or "unused"; "-" if nothing is known of the upstream."""
    carries: list[str]
    """Some of "tcp", "udp" and "bind"."""
    live: int
    """Connections and UDP sessions that are running."""
    dialled: int
    """Dials since the start."""
    failed: int
    """Dials that the upstream itself has made fail."""
    latency: float
    """Average seconds of a dial; 0 if not known."""
    error: str
    """The last error; "" for none."""


class GroupRow(TypedDict):
    """A group of upstreams."""

    name: str
    balance: str
    members: list[MemberRow]


class UpstreamRow(MemberRow):
    """An upstream with the groups on its path."""

    groups: list[GroupRow]


class VerdictRow(TypedDict):
    """What `via: auto` has found out about a target."""

    target: str
    upstream: str
    """ "direct" or "upstream"."""
    seconds: int
    """For how long the verdict holds."""


class AgentSessionRow(TypedDict):
    """An agent that is connected to this daemon's bridge."""

    name: str
    client: str
    since: float
    """Seconds since the epoch."""
    rtt: float
    """Seconds of a ping there and back; 0 if not known."""
    exit: bool
    """True if the agent dials any target."""
    streams: int
    """Streams that are running."""
    opened: int
    """Streams that were opened since the agent connected."""
    idle: int
    """Connections of the agent that wait for a stream."""
    ports: list[str]
    """Public ports that are open."""
    refused: dict[str, str]
    """Public ports that are not open, each with the reason."""
    sent: int
    """Bytes on the wire, as `received`."""
    received: int


class OwnAgentRow(TypedDict, total=False):
    """This daemon's own connection to its bridge; without a connection only `tries`."""

    name: str
    connected: bool
    tries: int
    """Failures in a row."""
    since: float
    """Seconds since the epoch."""
    rtt: float
    idle: int
    opened: int
    ports: dict[str, str]
    """The outcome of each port that the agent has asked for."""


class TunnelsAnswer(TypedDict):
    """Both ends of reverse tunnels in this daemon."""

    agents: list[AgentSessionRow]
    agent: OwnAgentRow | None


class Load(TypedDict):
    """What the daemon holds at the moment."""

    connections: int
    """Connections of clients."""
    sessions: int
    """UDP sessions."""
    threads: int
    memory: int
    """Resident bytes; 0 if the kernel does not tell."""


class Directions(TypedDict):
    """Bytes since the start: `up` from clients to targets, `down` from targets to clients."""

    up: int
    down: int


class LimitsRow(TypedDict, total=False):
    """The limits of a user that are in force, without those that there are not."""

    connections: int
    sessions: int
    connection_rate: float
    """New connections and sessions per second."""
    rate_up: int
    """Bytes per second, client to target."""
    rate_down: int
    burst: int
    """Bytes."""


class UserRow(TypedDict):
    """A user who is configured, has running flows or is banned."""

    name: str
    connections: int
    """TCP connections at the moment."""
    sessions: int
    """UDP sessions at the moment."""
    today: Directions
    month: Directions
    total: Directions
    left: int | None
    """Bytes until the first quota is used up; None without a quota."""
    limits: LimitsRow
    refused: str
    """Why the user gets nothing new; "" for a user who does."""


class UsersAnswer(TypedDict):
    """The answer to `users`."""

    at: float
    """Monotonic seconds."""
    users: list[UserRow]


class ClientRow(TypedDict):
    """A client address with running flows or a ban."""

    name: str
    """An IPv4 address or an IPv6 network, such as "2001:db8::/64"."""
    connections: int
    sessions: int
    up: int
    """Bytes while the client had flows, or had them not long ago."""
    down: int
    refused: str


class ClientsAnswer(TypedDict):
    """The answer to `clients`."""

    at: float
    """Monotonic seconds."""
    clients: list[ClientRow]


class UserLimitsAnswer(TypedDict):
    """The answer to `limit`."""

    user: str
    limits: LimitsRow
    overridden: bool
    """True if the limits were set by `limit`."""


class BanRow(TypedDict):
    """A ban in force."""

    kind: str
    """ "user" or "client"."""
    name: str
    until: float | None
    """Seconds since the epoch; None until the daemon ends."""


class BanAnswer(BanRow):
    """The answer to `ban`."""

    ended: int
    """Flows that have been ended."""


class HistoryRow(TypedDict):
    """What flows have moved in the last day."""

    seconds: float
    """Of a period."""
    samples: list[list[int]]
    """[bytes up, bytes down, flows at its end] of each period, the oldest first."""


class ReloadRow(TypedDict):
    """The last reload; the start counts as one."""

    at: float
    """Seconds since the epoch."""
    fine: bool


class StatusAnswer(Load):
    """The answer to `status`."""

    version: str
    state: str
    pid: int
    uptime: float
    """Seconds."""
    log: str
    """The level of the log."""
    reloaded: ReloadRow
    listeners: list[ListenerRow]
    counters: list[list[str | int]]
    """[name, reason, value] each."""
    lines: list[str]
    """What SIGUSR1 writes to the log."""


class TrafficAnswer(Load):
    """The answer to `traffic`, which netproxyctl top asks once a second."""

    at: float
    """Monotonic seconds."""
    state: str
    uptime: float
    bytes: Directions
    drops: int
    """Datagrams that were not forwarded since the start."""
    flows: list[tuple[int, int, int]]
    """Id, bytes sent and bytes received of each flow."""
