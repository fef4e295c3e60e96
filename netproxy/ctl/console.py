"""What netproxyctl prints: tables for people, made from the answers of the control socket.  Pure.

Text that strangers have chosen is escaped: it can neither move the cursor nor deceive.
"""

from __future__ import annotations

import time
from operator import itemgetter

from netproxy.observe.escaping import escape
from netproxy.typed import TYPE_CHECKING, Iterator, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.answers import (
        AgentSessionRow,
        FlowRow,
        ListenerRow,
        MemberRow,
        OwnAgentRow,
        DirectRow,
        PathRow,
        StatusAnswer,
        TunnelsAnswer,
        UpstreamRow,
        VerdictRow,
        WorkerRow,
    )

_LISTENER_COLUMNS = ("listener", "network", "address", "live", "accepted")
_UPSTREAM_COLUMNS = (
    *("name", "state", "carries", "live", "dialled", "failed", "latency"),
    "last error",
)
_WORKER_COLUMNS = (
    *("worker", "state", "process", "cpu", "memory", "connections", "sessions"),
    "restarts",
)
_FLOW_COLUMNS = (
    *("id", "listener", "client", "user", "target", "upstream", "age", "idle"),
    *("to target", "to client"),
)
_NAME_COLUMNS = ("name", "route")
_SESSION_COLUMNS = (*_FLOW_COLUMNS, "datagrams")
_TUNNEL_COLUMNS = (
    *("agent", "from", "since", "rtt", "live", "opened", "sent", "received", "datagrams", "ports"),
)
_EVENT_COLUMNS = ("since the start", "why", "how often")
_VERDICT_COLUMNS = ("target", "upstream", "for")
# Columns that begin with the greatest value when they are sorted.
_DESCENDING = ("age", "idle", "sent", "received", "bytes")
_DURATIONS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))

# -- answers


def status_text(answer: StatusAnswer) -> str:
    """Return the state of the daemon, its load, its listeners, and what has happened."""
    reloaded = "" if answer["reloaded"]["fine"] else "; the last reload failed, see the log"
    moved = answer["bytes"]
    head = [
        f"netproxyd {answer['version']} is {answer['state']}, "
        f"up {duration_text(answer['uptime'])}, process {answer['pid']}{reloaded}",
        f"{answer['connections']} connections, {answer['sessions']} UDP sessions, "
        f"{answer['threads']} threads, {amount_text(answer['memory'])} of memory, "
        f"log level {answer['log']}",
        f"{amount_text(moved['up'])} to targets, {amount_text(moved['down'])} to clients",
    ]
    rows: list[Sequence[str]] = [_LISTENER_COLUMNS]
    for row in answer["listeners"]:
        counts = (str(row["live"]), str(row["accepted"]))
        rows.append((row["name"], row["network"], row["address"], *counts))
    workers = answer.get("workers")
    tables = [*([workers_text(workers)] if workers else []), format_table(rows)]
    if lines := [line for row in answer["listeners"] for line in _found_lines(row)]:
        tables.append(lines_text(lines))
    events: list[Sequence[str]] = [_EVENT_COLUMNS]
    events += [(what, why or "-", str(count)) for what, why, count in answer["events"]]
    if len(events) > 1:
        tables.append(format_table(events))
    return "\n\n".join(["\n".join(head), *tables])


def _found_lines(row: ListenerRow) -> Iterator[str]:
    """Yield what was found for a listener: its public addresses, and its mapped ports."""
    # A daemon of an earlier version tells nothing of them.
    for address in row.get("announced", ()):
        yield f"listener '{row['name']}' announces {address}"
    for mapping in row.get("mappings", ()):
        port = f"listener '{row['name']}': {mapping['network']} port {mapping['port']}"
        fault = f"; {mapping['fault']}" if mapping["fault"] else ""
        if mapping["external"]:
            left = f", {duration_text(mapping['left'])} left{fault}"
            yield f"{port} is mapped to {mapping['external']} ({mapping['how']}){left}"
        else:
            yield f"{port} is not mapped ({mapping['how']}){fault}"


def workers_text(workers: Sequence[WorkerRow]) -> str:
    """Return a line for each worker."""
    rows: list[Sequence[str]] = [_WORKER_COLUMNS]
    for row in workers:
        use = (f"{row['cpu']:.0%}", amount_text(row["memory"]))
        counts = (row["connections"], row["sessions"], row["restarts"])
        pid = str(row["pid"] or "-")
        rows.append((str(row["index"]), row["state"], pid, *use, *map(str, counts)))
    return format_table(rows)


def upstreams_text(answer: Sequence[UpstreamRow]) -> str:
    """Return a line for each upstream, followed by the members of its groups."""
    rows: list[Sequence[str]] = [_UPSTREAM_COLUMNS]
    for upstream in answer:
        rows.append(_member_cells(upstream, ""))
        for group in upstream["groups"]:
            is_upstream = group["name"] == upstream["name"]
            if not is_upstream:
                rows.append((f"  {group['name']}", group["balance"], *[""] * 6))
            indent = "  " if is_upstream else "    "
            rows += [_member_cells(member, indent) for member in group["members"]]
    return format_table(rows)


def _member_cells(row: MemberRow, indent: str) -> Sequence[str]:
    latency = f"{row['latency'] * 1000:.1f} ms" if row["latency"] else "-"
    carries = ",".join(row["carries"]) or "-"
    counts = [str(row["live"]), str(row["dialled"]), str(row["failed"])]
    if row["state"] == "-":
        # Nothing is counted there: a 0 would deny the flows that it carries.
        counts = ["-"] * len(counts)
    return (indent + row["name"], row["state"], carries, *counts, latency, row["error"])


def tunnels_text(answer: TunnelsAnswer) -> str:
    """Return a line for each connected agent, for this daemon's own, and for each direct path."""
    agents, own = answer["agents"], answer["agent"]
    lines = []
    if agents or own is None:
        lines.append(format_table([_TUNNEL_COLUMNS, *(_agent_cells(row) for row in agents)]))
    if own is not None:
        lines.append(_own_agent_text(own))
    direct = [*answer.get("direct", ()), *(own.get("direct", ()) if own is not None else ())]
    lines += [escape(f"{row['peer']}: {_direct_text(row)}") for row in direct]
    return "\n".join(lines)


def _direct_text(row: DirectRow) -> str:
    """Return how datagrams go between a client and an agent."""
    rtt = f" {_rtt_text(row['rtt'])}" if row["state"] == "direct" else ""
    return f"{row['state']}{rtt}, {row['flows']} flows"


def _agent_cells(row: AgentSessionRow) -> Sequence[str]:
    refused = [f"{port} ({why})" for port, why in row["refused"].items()]
    ports = ", ".join([*row["ports"], *refused, *(["exit"] if row["exit"] else [])])
    return (
        row["name"],
        row["client"],
        _time_text(row["since"]),
        _rtt_text(row["rtt"]),
        str(row["streams"]),
        str(row["opened"]),
        str(row["sent"]),
        str(row["received"]),
        _path_text(row.get("path")),
        ports or "-",
    )


def _path_text(path: PathRow | None) -> str:
    """Return how datagrams go: by TCP, or by UDP with what is known of the path."""
    if path is None:
        return "tcp"
    moved = f"{amount_text(path['sent'])}/{amount_text(path['received'])}"
    if not path["up"]:
        return f"tcp, udp down, {moved}"
    return f"udp {_rtt_text(path['rtt'])}, {path['loss']:.1%} lost, mtu {path['mtu']}, {moved}"


def _own_agent_text(row: OwnAgentRow) -> str:
    if not row["connected"]:
        return escape(f"agent '{row['name']}': not connected, {row['tries']} failures in a row")
    ports = ", ".join(f"{port} {outcome}" for port, outcome in row["ports"].items())
    return escape(
        f"agent '{row['name']}': connected since {_time_text(row['since'])}, "
        f"{_rtt_text(row['rtt'])}, {row['opened']} opened, {row['idle']} idle; "
        f"datagrams: {_path_text(row.get('path'))}; "
        f"ports: {ports or 'none'}"
    )


def flows_text(answer: Sequence[FlowRow], sessions: bool) -> str:
    """Return a line for each flow; UDP sessions have their datagrams as well.

    Names and routes are columns if any flow has one.
    """
    columns = _SESSION_COLUMNS if sessions else _FLOW_COLUMNS
    has_names = any(row["name"] or row["route"] for row in answer)
    rows: list[Sequence[str]] = [(*columns, *_NAME_COLUMNS) if has_names else columns]
    for row in answer:
        cells = (
            str(row["id"]),
            row["listener"],
            row["client"],
            row["user"] or "-",
            row["target"],
            row["upstream"],
            duration_text(row["age"]),
            duration_text(row["idle"]),
            amount_text(row["sent"]),
            amount_text(row["received"]),
        )
        datagrams = f"{row['datagrams_sent']}/{row['datagrams_received']}"
        names = (row["name"] or "-", row["route"] or "-") if has_names else ()
        rows.append((*cells, *((datagrams,) if sessions else ()), *names))
    return format_table(rows)


def sort_flows(answer: Sequence[FlowRow], column: str) -> list[FlowRow]:
    """Sort flows by one of command_line.SORTS; durations and amounts begin with the greatest."""
    if column == "bytes":
        return sorted(answer, key=_carried, reverse=True)
    return sorted(answer, key=itemgetter(column), reverse=column in _DESCENDING)


def _carried(row: FlowRow) -> int:
    return row["sent"] + row["received"]


def verdicts_text(answer: Sequence[VerdictRow]) -> str:
    """Return a line for each verdict of `via: auto`."""
    rows: list[Sequence[str]] = [_VERDICT_COLUMNS]
    for row in answer:
        rows.append((row["target"], row["upstream"], duration_text(row["seconds"])))
    return format_table(rows)


# -- parts


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns, two blanks apart, and escape all cells; the first row is the head."""
    rows = [[escape(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def lines_text(lines: Sequence[str]) -> str:
    """Return lines as they are printed."""
    return "\n".join(map(escape, lines))


def amount_text(value: float, unit: str = "B") -> str:
    """Return 1234 as "1.2 kB"."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    prefix = 0
    while value >= 999.5 and prefix < len(prefixes) - 1:
        value /= 1000
        prefix += 1
    digits = 1 if prefix and value < 99.95 else 0
    return f"{value:.{digits}f} {prefixes[prefix]}{unit}"


def duration_text(seconds: float) -> str:
    """Return 3661 as "1h1m": the two largest units."""
    for at, (unit, size) in enumerate(_DURATIONS):
        if seconds >= size:
            text = f"{int(seconds // size)}{unit}"
            if at + 1 == len(_DURATIONS):
                return text
            smaller_unit, smaller_size = _DURATIONS[at + 1]
            rest = int(seconds % size // smaller_size)
            return text + (f"{rest}{smaller_unit}" if rest else "")
    return "0s"


def _time_text(seconds: float) -> str:
    """Return seconds since the epoch as local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _rtt_text(seconds: float | None) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds else "-"
