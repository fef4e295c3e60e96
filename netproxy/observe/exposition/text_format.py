"""Metrics in the text format of Prometheus (version 0.0.4).

All names begin with netproxy_, except the process_ metrics; units are base units.  Labels are
listener, upstream, reason, direction and the bound of a histogram: names that clients can
choose (users, targets) never make a series, except users if `metrics_users` is on.  Pure.
"""

from __future__ import annotations

from netproxy.typed import (
    TYPE_CHECKING,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Sequence,
)

if TYPE_CHECKING:
    from netproxy.interfaces.answers import MemberRow, UpstreamRow, UserRow
    from netproxy.observe.flows import FlowTotal, TotalKey
    from netproxy.observe.metrics import Histogram
    from netproxy.observe.process import ProcessUse

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
COUNTER_METRICS = {
    "accept_errors": (
        "accept_errors_total",
        "Connections that could not be accepted, by system error.",
    ),
    "authentication": ("authentication_failures_total", "Refused logins, by reason."),
    "connections": ("connection_faults_total", "Client connections ended by a fault, by reason."),
    "connections_refused": (
        "connections_refused_total",
        "Client connections closed before they were served, by reason.",
    ),
    "dial_failures": ("dial_failures_total", "Failed connections to targets, by reason."),
    "drops": ("datagrams_dropped_total", "Datagrams that were not forwarded, by reason."),
    "icmp": ("icmp_errors_total", "ICMP errors for datagrams that were sent, by reason."),
    "log_dropped": (
        "log_records_dropped_total",
        "Log records that could not be written in time, by level.",
    ),
    "lookups": ("lookup_failures_total", "Names that could not be resolved, by reason."),
    "port_mappings": ("port_mapping_events_total", "Events of port mappings, by kind."),
    "public_address": (
        "public_address_events_total",
        "Events of the addresses that listeners announce, by kind.",
    ),
    "queries": (
        "dns_queries_total",
        "Queries to DNS listeners that the cache has not answered, by outcome.",
    ),
    "requests_refused": (
        "requests_refused_total",
        "Requests that were refused without a dial, by reason.",
    ),
    "reply_sockets": (
        "reply_sockets_evicted_total",
        "Sockets for replies of transparent listeners that were closed for others, by reason.",
    ),
    "stun": ("stun_failures_total", "Questions to STUN servers without an answer, by reason."),
    "sessions_evicted": ("udp_sessions_ended_total", "UDP sessions that have ended, by reason."),
    "tunnel_handshakes": (
        "tunnel_handshakes_total",
        "Handshakes of tunnel agents with this bridge, by outcome.",
    ),
    "tunnel_bytes": ("tunnel_path_bytes_total", "Bytes of UDP packets of tunnels, by direction."),
    "tunnel_direct": (
        "tunnel_direct_events_total",
        "Direct paths between clients and agents: what has happened to them, by event.",
    ),
    "tunnel_paths": (
        "tunnel_path_events_total",
        "Datagram paths of tunnels: what has happened to them, by event.",
    ),
    "tunnel_too_long": (
        "tunnel_path_left_out_total",
        "Datagrams that work connections have carried, because no packet holds them.",
    ),
    "tunnel_refused": (
        "tunnel_openings_refused_total",
        "Requests of this agent's bridge that were refused, by reason.",
    ),
}
"""Metric and help text of each name in observe.metrics.Counters."""
COUNTED_ELSEWHERE = {
    ("bytes", "up"),
    ("bytes", "down"),
    ("connections", "accepted"),
    ("sessions_opened", ""),
}
"""Counters whose values other metrics show by listener."""
_LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Sample(NamedTuple):
    """One line of a metric."""

    labels: Mapping[str, str]
    value: float
    suffix: str = ""
    """Follows the name: "_bucket"."""


class Family(NamedTuple):
    """One metric with all its samples."""

    name: str
    """Without the prefix netproxy_."""
    kind: str
    """COUNTER, GAUGE or HISTOGRAM."""
    help: str
    samples: Sequence[Sample]


def render(families: Iterable[Family]) -> bytes:
    """Return the text of the families that have samples."""
    lines: list[str] = []
    for family in families:
        name = family.name if family.name.startswith("process_") else f"netproxy_{family.name}"
        if family.samples:
            lines += [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}"]
        for sample in family.samples:
            labels = ",".join(
                f'{key}="{value.translate(_LABEL_ESCAPES)}"' for key, value in sample.labels.items()
            )
            in_braces = f"{{{labels}}}" if labels else ""
            lines.append(f"{name}{sample.suffix}{in_braces} {sample.value:.15g}")
    return "\n".join([*lines, ""]).encode("utf-8", "backslashreplace")


def single(name: str, kind: str, text: str, value: float, **labels: str) -> Family:
    """Return a family with one sample; `text` is its help."""
    return Family(name, kind, text, [Sample(labels, value)])


def counter_families(counters: Iterable[tuple[str, str, int]]) -> list[Family]:
    """Return what Counters.items() holds, one family for each name."""
    samples: dict[str, list[Sample]] = {}
    for name, reason, value in counters:
        if (name, reason) not in COUNTED_ELSEWHERE:
            labels = {"reason": reason} if reason else {}
            samples.setdefault(name, []).append(Sample(labels, value))
    families = []
    for name, of_name in samples.items():
        metric, text = COUNTER_METRICS.get(name) or (f"{name}_total", "Counted by reason.")
        families.append(Family(metric, COUNTER, text, of_name))
    return families


def flow_families(totals: Mapping[TotalKey, FlowTotal]) -> list[Family]:
    """Return what flows have carried, by listener and upstream."""
    tcp = {key: total for key, total in totals.items() if key.network == "tcp"}
    udp = {key: total for key, total in totals.items() if key.network == "udp"}
    return [
        *_totals_of("tcp_flows", "Connections to targets", tcp),
        _by_direction("tcp_bytes_total", "Bytes of connections to targets.", tcp, _bytes),
        *_totals_of("udp_sessions", "UDP sessions", udp),
        _by_direction("udp_bytes_total", "Bytes of UDP sessions.", udp, _bytes),
        _by_direction("udp_datagrams_total", "Datagrams of UDP sessions.", udp, _datagrams),
    ]


def _totals_of(name: str, what: str, totals: Mapping[TotalKey, FlowTotal]) -> Iterator[Family]:
    begun = [Sample(_labels(key), total.flows) for key, total in totals.items()]
    live = [Sample(_labels(key), total.live) for key, total in totals.items()]
    yield Family(f"{name}_total", COUNTER, f"{what} since the start.", begun)
    yield Family(name, GAUGE, f"{what} that are running.", live)


def _by_direction(
    name: str,
    text: str,
    totals: Mapping[TotalKey, FlowTotal],
    amounts: Callable[[FlowTotal], tuple[int, int]],
) -> Family:
    """Return a family with two samples for each key; `amounts` gives the values up and down."""
    samples = []
    for key, total in totals.items():
        for direction, amount in zip(("up", "down"), amounts(total), strict=True):
            samples.append(Sample({**_labels(key), "direction": direction}, amount))
    return Family(name, COUNTER, text, samples)


def _labels(key: TotalKey) -> dict[str, str]:
    return {"listener": key.listener, "upstream": key.upstream}


def _bytes(total: FlowTotal) -> tuple[int, int]:
    return total.traffic.sent, total.traffic.received


def _datagrams(total: FlowTotal) -> tuple[int, int]:
    return total.traffic.datagrams_sent, total.traffic.datagrams_received


def dial_family(histograms: Mapping[str, Histogram]) -> Family:
    """Return how long dials have taken, by upstream."""
    samples = []
    for upstream, histogram in histograms.items():
        cumulative = 0
        bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
        for bound, count in zip(bounds, histogram.counts, strict=True):
            cumulative += count
            samples.append(Sample({"upstream": upstream, "le": bound}, cumulative, "_bucket"))
        samples += [
            Sample({"upstream": upstream}, histogram.sum, "_sum"),
            Sample({"upstream": upstream}, cumulative, "_count"),
        ]
    return Family("dial_seconds", HISTOGRAM, "Time to connect to targets.", samples)


def upstream_families(upstreams: Iterable[UpstreamRow]) -> list[Family]:
    """Return the state of upstreams; a member of a group has the label group/member."""
    rows: dict[str, MemberRow] = {}
    for upstream in upstreams:
        if upstream["state"] != "-":
            rows[upstream["name"]] = upstream
        for group in upstream["groups"]:
            for member in group["members"]:
                rows[f"{group['name']}/{member['name']}"] = member

    def family(name: str, kind: str, text: str, values: Iterable[float | None]) -> Family:
        labelled = zip(rows, values, strict=True)
        samples = [
            Sample({"upstream": label}, value) for label, value in labelled if value is not None
        ]
        return Family(f"upstream_{name}", kind, text, samples)

    members = list(rows.values())
    states = [member["state"] for member in members]
    works = [None if state == "unused" else state == "up" for state in states]
    unused = [state == "unused" for state in states]
    live = [member["live"] for member in members]
    dialled = [member["dialled"] for member in members]
    failed = [member["failed"] for member in members]
    latency = [member["latency"] for member in members]
    failures_text = "Dials that failed because of the upstream."
    return [
        family("up", GAUGE, "1 if the upstream works, else 0; absent while it is unused.", works),
        family("unused", GAUGE, "1 until the upstream is first dialled or checked.", unused),
        family("flows", GAUGE, "Connections and UDP sessions that are running.", live),
        family("dials_total", COUNTER, "Dials.", dialled),
        family("dial_failures_total", COUNTER, failures_text, failed),
        family("latency_seconds", GAUGE, "Moving average of the time of a dial.", latency),
    ]


def user_families(users: Iterable[UserRow]) -> list[Family]:
    """Return what users use, by name."""
    moved, connections, sessions = [], [], []
    for row in users:
        user, total = row["name"], row["total"]
        moved += [
            Sample({"user": user, "direction": "up"}, total["up"]),
            Sample({"user": user, "direction": "down"}, total["down"]),
        ]
        connections.append(Sample({"user": user}, row["connections"]))
        sessions.append(Sample({"user": user}, row["sessions"]))
    return [
        Family("user_bytes_total", COUNTER, "Bytes that users have moved.", moved),
        Family("user_connections", GAUGE, "Connections of users to targets.", connections),
        Family("user_sessions", GAUGE, "UDP sessions of users.", sessions),
    ]


def process_families(started: float, use: ProcessUse) -> list[Family]:
    """Return what the kernel knows about the processes; `started` in seconds since the epoch.

    What the kernel does not tell is left out.
    """
    limit = use.max_descriptors
    families = [
        single("process_start_time_seconds", GAUGE, "Start of the process.", started),
        single("process_cpu_seconds_total", COUNTER, "Processor time used.", use.cpu),
        single("process_max_fds", GAUGE, "Limit of open descriptors.", limit),
    ]
    if use.memory:
        text = "Memory in use."
        families.append(single("process_resident_memory_bytes", GAUGE, text, use.memory))
    if use.descriptors:
        text = "Open descriptors."
        families.append(single("process_open_fds", GAUGE, text, use.descriptors))
    return families
