"""The answers of the control socket and of /status.json: JSON objects, key by key.

admin and tunnel write them; observe, ctl and the status page read them.  Keys are added in
later versions, but none is renamed or removed.  For type checkers only.
"""

from __future__ import annotations

from netproxy.typed import Any, TypeAlias, TypedDict

JsonValue: TypeAlias = Any
"""A value of JSON, such as an answer.  Any: each command has an answer of its own."""
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
    name: str
    """The name in the client's first bytes, or of its DNS query; "" for none."""
    route: str
    """The route of an sni listener: "listeners[0].routes[2]"; "" for none."""
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


class MappingRow(TypedDict):
    """A port that the router is asked to map."""

    network: str
    """ "tcp" or "udp"."""
    port: int
    external: str
    """host:port where others reach it; "" if it is not mapped."""
    how: str
    """The protocol, and the router."""
    left: float
    """Seconds until the mapping ends unless it is renewed."""
    fault: str
    """Why it is not mapped, or not renewed; "" if all is well."""


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
    announced: list[str]
    """The public addresses that `announce: auto` has found, as host:port."""
    mappings: list[MappingRow]
    """The ports of `port_mapping`."""


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
    latency: float | None
    """Average seconds of a dial; None if not known."""
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


class PathRow(TypedDict):
    """The datagram path beside the control connection of a tunnel."""

    up: bool
    """True if datagrams go by it, False if they go by the work connections."""
    rtt: float
    """Seconds; 0 if not known."""
    loss: float
    """The part of this side's packets that is lost, 0 to 1."""
    mtu: int
    """Bytes of the largest packet that is known to pass."""
    sent: int
    """Bytes of packets, as `received`."""
    received: int
    too_long: int
    """Datagrams that a work connection has carried because they do not fit into a packet."""
    flows: int
    """Work connections whose datagrams may go by the path."""


class DirectRow(TypedDict):
    """A direct path between a client and an agent, as one of three sees it."""

    peer: str
    """The other side, host:port as the bridge sees it; of a bridge: the client's user and
    address, and the agent."""
    state: str
    """ "direct" or "relayed"; of a bridge also "trying"."""
    rtt: float
    """Seconds between client and agent, there and back; 0 if not known."""
    flows: int
    """Sessions whose datagrams may go by it."""


class AgentSessionRow(TypedDict):
    """An agent that is connected to this daemon's bridge."""

    name: str
    client: str
    since: float
    """Seconds since the epoch."""
    rtt: float | None
    """Seconds of a ping there and back; None if not known."""
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
    path: PathRow | None
    """None without a datagram path."""


class OwnAgentRow(TypedDict, total=False):
    """This daemon's own connection to its bridge; without a connection only `tries`."""

    name: str
    connected: bool
    tries: int
    """Failures in a row."""
    since: float
    """Seconds since the epoch."""
    rtt: float | None
    idle: int
    opened: int
    ports: dict[str, str]
    """The outcome of each port that the agent has asked for."""
    path: PathRow | None
    direct: list[DirectRow]
    """The direct paths to clients of the bridge."""


class TunnelsAnswer(TypedDict):
    """Both ends of reverse tunnels in this daemon."""

    agents: list[AgentSessionRow]
    agent: OwnAgentRow | None
    direct: list[DirectRow]
    """The direct paths of the bridge's clients, and of this daemon's upstreams."""


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


class WorkerRow(TypedDict):
    """A worker process."""

    index: int
    """From 0."""
    pid: int
    """0 if there is no process at the moment."""
    state: str
    """ "serving", "starting", or "silent" if it does not answer."""
    cpu: float
    """The part of a processor core that it has used lately."""
    memory: int
    """Bytes; memory that processes share counts for each of them in part."""
    connections: int
    sessions: int
    restarts: int
    """Successors that were started in its place."""


class WorkersShown(TypedDict, total=False):
    """What answers have in addition if there are workers."""

    workers: list[WorkerRow]


class StatusAnswer(Load, WorkersShown):
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
    bytes: Directions
    """Since the start, running flows included."""
    events: list[tuple[str, str, int]]
    """What was refused, dropped, not reached and the like since the start: what, why, how often."""
    lines: list[str]
    """What SIGUSR1 writes to the log."""


class IncidentRow(TypedDict):
    """A refusal or a failure that is remembered; texts are "" for what is not known."""

    id: str
    """That of its record."""
    at: float
    """Seconds since the epoch."""
    outdated: bool
    """True if a reload has put another configuration into force since then."""
    kind: str
    """ "refused", "login", "failed" (a flow that never began) or "ended"."""
    reason: str
    listener: str
    client: str
    """Its address; of a flow with the port."""
    user: str
    network: str
    asked: str
    """What the client asked for: a target, or a request."""
    name: str
    """The name that was seen for a target that is an address."""
    decided: str
    """The rule, range, key of a limit, or error that has decided."""
    rule: str
    """The rule that chose the upstream."""
    upstream: str
    hop: str
    """The proxy that failed or that reported the failure."""
    addresses: list[str]
    """The addresses that were looked up for a rule."""
    tried: list[list[str]]
    """The addresses that were dialled, each with its failure."""
    seconds: float
    """How long it took; 0 for a refusal."""


class ExplainedIncident(IncidentRow):
    """An incident with what the configuration in force tells of it."""

    place: str
    """Where what has decided is written, "file:line:column"; "" if unknown, as `rule_place`."""
    rule_place: str
    advice: str
    """What to do; "" if the reason says it."""


class WhyAnswer(TypedDict):
    """The answer to `why`."""

    incidents: list[ExplainedIncident]
    """The oldest first."""
    remembered: int
    """How many incidents are remembered, of whatever kind, in each process at most `limit`."""
    limit: int


class TestStep(TypedDict):
    """A step of a test."""

    step: str
    """One word, such as "rule", "found", "connecting", "hop", "connected" or "answer"."""
    at: float
    """Seconds since the test began."""
    text: str


class TestAnswer(TypedDict):
    """The answer to `test`."""

    fine: bool
    seconds: float
    steps: list[TestStep]
    failure: ExplainedIncident | None
    """Why it has failed; None if it has not."""


class KnownAnswer(TypedDict):
    """The answer to `known`: what of the configuration commands and shells want to know."""

    users: list[str]
    listeners: list[str]
    upstreams: list[str]
    """Those of the section, "direct", and one for each agent."""
    agents: list[str]
    stun: list[str]
    """The STUN servers of all listeners."""


class TrafficAnswer(Load, WorkersShown):
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
