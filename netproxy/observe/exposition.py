"""Figures in the text format of Prometheus (version 0.0.4).

Names begin with netproxy_, units are base units, labels are listener, upstream,
reason, direction and the bound of a histogram; what clients, users or targets are
called makes no series.  Pure.
"""

from __future__ import annotations

import os
import resource
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

from netproxy.observe.flows import Key, Total
from netproxy.observe.metrics import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
# What is counted by reason (observe.metrics.Counters), and what it is called here
COUNTED = {
    "accept_errors": (
        "accept_errors_total",
        "Connections that could not be accepted, by the system's error.",
    ),
    "authentication": ("authentication_failures_total", "Logins that were refused."),
    "connections": ("connection_faults_total", "Connections of clients that ended by a fault."),
    "connections_refused": (
        "connections_refused_total",
        "Connections that were closed before they were served.",
    ),
    "dial_failures": ("dial_failures_total", "Connections to targets that failed."),
    "drops": ("datagrams_dropped_total", "Datagrams that were not forwarded."),
    "icmp": ("icmp_errors_total", "ICMP errors about datagrams that were sent."),
    "lookups": ("lookup_failures_total", "Names that could not be resolved."),
    "queries": ("dns_queries_total", "Queries to dns listeners, by what became of them."),
    "sessions_evicted": ("udp_sessions_ended_total", "UDP sessions that have ended."),
    "tunnel_handshakes": (
        "tunnel_handshakes_total",
        "Handshakes of tunnels' agents with this bridge, by what became of them.",
    ),
    "tunnel_refused": (
        "tunnel_openings_refused_total",
        "What this agent's bridge asked for and did not get.",
    ),
}
ELSEWHERE = {
    ("bytes", "up"),
    ("bytes", "down"),
    ("connections", "accepted"),
    ("sessions_opened", ""),
}  # told by listener
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Sample(NamedTuple):
    labels: Mapping[str, str]
    value: float
    suffix: str = ""  # behind the name: "_bucket"


class Family(NamedTuple):
    """One metric; `name` is without the prefix, but for those of the process."""

    name: str
    kind: str
    help: str
    samples: Sequence[Sample]


def render(families: Iterable[Family]) -> bytes:
    """Those that have a sample."""
    lines = []
    for family in families:
        name = family.name if family.name.startswith("process_") else f"netproxy_{family.name}"
        if family.samples:
            lines += [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}"]
        for sample in family.samples:
            labels = ",".join(
                f'{key}="{value.translate(_ESCAPES)}"' for key, value in sample.labels.items()
            )
            lines.append(
                f"{name}{sample.suffix}{{{labels}}} {sample.value:.15g}"
                if labels
                else f"{name}{sample.suffix} {sample.value:.15g}"
            )
    return "\n".join([*lines, ""]).encode("utf-8", "backslashreplace")


def single(name: str, kind: str, text: str, value: float, **labels: str) -> Family:
    return Family(name, kind, text, [Sample(labels, value)])


def counted(items: Iterable[tuple[str, str, int]]) -> list[Family]:
    """What Counters hold."""
    found: dict[str, Family] = {}
    for name, reason, value in items:
        if (name, reason) in ELSEWHERE:
            continue
        metric, text = COUNTED.get(name) or (f"{name}_total", "Counted by reason.")
        family = found.setdefault(name, Family(metric, COUNTER, text, []))
        family.samples.append(Sample({"reason": reason} if reason else {}, value))  # type: ignore[attr-defined]
    return list(found.values())


def totals(by_key: Mapping[Key, Total]) -> list[Family]:
    """What flows have carried."""
    found = []
    for network, flows, what in (
        ("tcp", "tcp_flows", "Connections to targets"),
        ("udp", "udp_sessions", "UDP sessions"),
    ):
        mine = {key: total for key, total in by_key.items() if key.network == network}
        labels = {key: {"listener": key.listener, "upstream": key.upstream} for key in mine}
        found += [
            Family(
                f"{flows}_total",
                COUNTER,
                f"{what} that have begun, by their way out.",
                [Sample(labels[key], total.flows) for key, total in mine.items()],
            ),
            Family(
                flows,
                GAUGE,
                f"{what} that live.",
                [Sample(labels[key], total.live) for key, total in mine.items()],
            ),
            Family(
                f"{network}_bytes_total",
                COUNTER,
                f"Bytes of {what[0].lower() + what[1:] if network == 'tcp' else what}.",
                [
                    Sample({**labels[key], "direction": way}, amount)
                    for key, total in mine.items()
                    for way, amount in (
                        ("up", total.traffic.sent),
                        ("down", total.traffic.received),
                    )
                ],
            ),
        ]
        if network == "udp":
            found.append(
                Family(
                    "udp_datagrams_total",
                    COUNTER,
                    "Datagrams of UDP sessions.",
                    [
                        Sample({**labels[key], "direction": way}, amount)
                        for key, total in mine.items()
                        for way, amount in (
                            ("up", total.traffic.datagrams_sent),
                            ("down", total.traffic.datagrams_received),
                        )
                    ],
                )
            )
    return found


def dials(by_way: Mapping[str, Histogram]) -> Family:
    samples = []
    for way, histogram in by_way.items():
        below = 0
        for bound, count in zip(
            [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"], histogram.counts
        ):
            below += count
            samples.append(Sample({"upstream": way, "le": bound}, below, "_bucket"))
        samples += [
            Sample({"upstream": way}, histogram.sum, "_sum"),
            Sample({"upstream": way}, below, "_count"),
        ]
    return Family(
        "dial_seconds", HISTOGRAM, "Time that connections to targets took to be made.", samples
    )


def upstreams(ways: Iterable[Mapping[str, Any]]) -> list[Family]:
    """Ways out, and the members of groups as group/member; as report.upstreams tells of them."""
    found: dict[str, Mapping[str, Any]] = {}
    for way in ways:
        if way["state"] != "-":
            found[way["name"]] = way
        for group in way["groups"]:
            found.update(
                {f"{group['name']}/{member['name']}": member for member in group["members"]}
            )

    def family(name: str, kind: str, text: str, value: Any) -> Family:
        return Family(
            f"upstream_{name}",
            kind,
            text,
            [Sample({"upstream": label}, value(one)) for label, one in found.items()],
        )

    return [
        family(
            "up",
            GAUGE,
            "Whether a way out works, as far as is known.",
            lambda one: one["state"] in ("up", "unused"),
        ),
        family("flows", GAUGE, "Connections and UDP sessions that live.", lambda one: one["live"]),
        family("dials_total", COUNTER, "Dials.", lambda one: one["dialled"]),
        family(
            "dial_failures_total",
            COUNTER,
            "Dials that failed by a fault of the way out.",
            lambda one: one["failed"],
        ),
        family(
            "latency_seconds",
            GAUGE,
            "Moving average of the time of a dial.",
            lambda one: one["latency"],
        ),
    ]


def resident() -> int:
    """Bytes of memory in use, 0 where the kernel does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def process(start: float) -> list[Family]:
    """What the kernel knows of this process; nothing of what it does not tell.  `start`: seconds since the epoch."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = [
        single("process_start_time_seconds", GAUGE, "When the process started.", start),
        single(
            "process_cpu_seconds_total",
            COUNTER,
            "Time that the process has computed.",
            used.ru_utime + used.ru_stime,
        ),
    ]
    if memory := resident():
        found.append(single("process_resident_memory_bytes", GAUGE, "Memory in use.", memory))
    try:
        found.append(
            single("process_open_fds", GAUGE, "Open descriptors.", len(os.listdir("/proc/self/fd")))
        )
    except OSError:
        pass
    found.append(
        single(
            "process_max_fds",
            GAUGE,
            "Descriptors that may be open.",
            resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        )
    )
    return found
