"""What netproxyctl nat prints: the results, and what they mean for peers and for the settings.

Pure.
"""

from __future__ import annotations

import textwrap

from netproxy.admin.nat.report import (
    ADDRESS_AND_PORT_DEPENDENT,
    ADDRESS_DEPENDENT,
    DEPENDENT,
    ENDPOINT_INDEPENDENT,
    NO_ANSWER,
    UNKNOWN,
)
from netproxy.ctl.console import format_table, lines_text
from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple

if TYPE_CHECKING:
    from netproxy.admin.nat.report import Lifetime, Report

WIDTH = 78
"""Columns of paragraphs."""
_SERVER_COLUMNS = ("server", "address", "sees", "second address", "software", "answer")
_DEPENDENT_MAPPINGS = (ADDRESS_DEPENDENT, ADDRESS_AND_PORT_DEPENDENT, DEPENDENT)
_MAPPINGS = {
    ENDPOINT_INDEPENDENT: "all targets see the same address and port",
    ADDRESS_DEPENDENT: "each target's address sees another port",
    ADDRESS_AND_PORT_DEPENDENT: "each target sees another port",
    DEPENDENT: "targets see different ports",
}
_FILTERINGS = {
    ENDPOINT_INDEPENDENT: "anybody may send to an open port",
    ADDRESS_DEPENDENT: "only addresses that were sent to may answer",
    ADDRESS_AND_PORT_DEPENDENT: "only the address and port that was sent to may answer",
}


class Result(NamedTuple):
    """What was result, and the result."""

    via: str
    """The upstream; "" for this machine itself."""
    family: str
    """ "IPv4" or "IPv6"; "" if the upstream has chosen it."""
    report: Report


def needs_relay(report: Report) -> bool:
    """Return whether most peers can be reached through a relay alone."""
    return report.mapping in _DEPENDENT_MAPPINGS


def report_text(result: Result) -> str:
    """Return the results, and their meaning in words."""
    report = result.report
    rows: list[tuple[str, ...]] = [_SERVER_COLUMNS]
    for row in report.servers:
        answer = row.error or f"{row.milliseconds:.1f} ms"
        cells = (row.address, row.mapped, row.second, row.software)
        rows.append((row.server, *(cell or "-" for cell in cells), answer))
    place = f"through upstream '{result.via}'" if result.via else "from this machine"
    head = f"{result.family or 'UDP'} {place}"
    parts = [lines_text([head]), format_table(rows)]
    if report.external:
        parts.append(lines_text(list(_facts(report))))
    parts += [_filled(paragraph) for paragraph in _meaning(result)]
    return "\n\n".join(parts)


def _facts(report: Report) -> Iterator[str]:
    """Yield a line for each result."""
    local = f", local {report.local}" if report.local else ""
    yield f"external address  {', '.join(report.external)}{local}"
    if report.nat is not None:
        yield f"NAT               {_yes(report.nat)}"
    yield f"mapping           {_told(report, 'mapping', report.mapping, _MAPPINGS)}"
    yield f"filtering         {_told(report, 'filtering', report.filtering, _FILTERINGS)}"
    if report.hairpin is not None:
        yield f"hairpinning       {_yes(report.hairpin)}"
    elif "hairpin" in report.unknown:
        yield f"hairpinning       {UNKNOWN}: {report.unknown['hairpin']}"
    if report.port_preserved is not None:
        yield f"ports preserved   {_yes(report.port_preserved)}"
    if report.lifetime is not None:
        yield f"idle mappings     {_lifetime(report.lifetime)}"


def _told(report: Report, name: str, value: str, meanings: dict[str, str]) -> str:
    return f"{value}: {meanings.get(value) or report.unknown.get(name, '')}"


def _lifetime(lifetime: Lifetime) -> str:
    if lifetime.unknown:
        return f"{UNKNOWN}: {lifetime.unknown}"
    if lifetime.expired is None:
        return f"kept for more than {lifetime.alive} seconds"
    if not lifetime.alive:
        return f"kept for less than {lifetime.expired} seconds"
    return f"kept for {lifetime.alive} to {lifetime.expired} seconds"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# -- what it means


def _meaning(result: Result) -> Iterator[str]:
    """Yield paragraphs: what works with which peers, and what to set."""
    report = result.report
    if not report.works:
        yield _no_udp(result)
        return
    if not report.external:
        yield "UDP works, but no server has told an address.  Try another --server."
        return
    yield _peers(report)
    if report.hairpin is False and not report.per_target:
        yield (
            "Two peers behind the same NAT cannot use each other's external address; they need "
            "their local addresses or a relay."
        )
    if report.lifetime is not None and report.lifetime.expired:
        silence = report.lifetime.alive or "a few"
        yield (
            f"A session that is silent for more than {silence} seconds may lose its mapping: "
            "programs should send something more often."
        )
    yield _settings(result)


def _no_udp(result: Result) -> str:
    errors = {row.error for row in result.report.servers} - {NO_ANSWER}
    if errors:
        what = f"No UDP: {', '.join(sorted(errors))}."
    else:
        dropped = f"Upstream '{result.via}'" if result.via else "A firewall"
        what = (
            f"No UDP: no server has answered.  {dropped} drops UDP, or these servers are down: "
            "try another --server."
        )
    if result.via:
        return what
    return (
        f"{what}  Games need another network.  WebRTC needs a relay (TURN) over TCP or TLS.  An "
        "upstream that carries UDP within TCP helps clients of NetProxy: tunnel://, http:// with "
        "connect-udp, or 'udp: uot'."
    )


def _peers(report: Report) -> str:
    """Return how games and WebRTC get along."""
    if needs_relay(report):
        return (
            "Games and WebRTC: strict.  Peers cannot be told which port to send to.  A peer is "
            "reached directly only if it has no NAT, or one that filters by address or not at "
            "all.  All others need a relay (TURN)."
        )
    if report.mapping == UNKNOWN:
        return (
            "Games and WebRTC: UDP works, the rest is unknown.  A server of RFC 5780 (such as "
            "coturn) with two addresses, or a second --server, tells more."
        )
    if report.filtering == ENDPOINT_INDEPENDENT:
        return "Games and WebRTC: open.  Every peer is reached directly, without a relay (TURN)."
    if report.filtering == ADDRESS_DEPENDENT:
        return (
            "Games and WebRTC: moderate.  Every peer that sends as well is reached directly, "
            "without a relay (TURN).  Nobody can be the first to send to a port here."
        )
    moderate = (
        "Games and WebRTC: moderate.  Peers are reached directly if their mapping is "
        "endpoint-independent as well.  Peers with a dependent mapping (many mobile and company "
        "networks) need a relay (TURN)"
    )
    return f"{moderate}{', if filtering is dependent' if report.filtering == UNKNOWN else ''}."


def _settings(result: Result) -> str:
    """Return what to set in the configuration."""
    report, host = result.report, result.report.external[0].rpartition(":")[0]
    host = host.strip("[]")
    if result.via and report.per_target:
        return (
            "This upstream has a connection for each target, with a port of its own.  Clients "
            "that need one port for all peers should leave through another upstream: socks5://, "
            "tunnel://, or 'udp: uot'."
        )
    if result.via:
        return (
            "These results hold for sessions of UDP through this upstream.  'mapping' and "
            "'filtering' in 'udp' of a listener can be stricter, never more open.  Their clients "
            f"are seen as {host}; 'announce' is not concerned."
        )
    if needs_relay(report):
        return (
            "'mapping: endpoint-independent' of a listener cannot help behind this NAT.  Let UDP "
            "leave through an upstream that is seen well: test it with --via.  Clients outside "
            f"need 'announce: {host}' and a forwarded port."
        )
    if report.nat is False:
        firewall = "" if report.filtering == ENDPOINT_INDEPENDENT else _FIREWALL
        return f"There is no NAT: listeners need no 'announce'.{firewall}"
    return (
        "Leave 'mapping' and 'filtering' in 'udp' of a listener as they are.  For clients outside "
        f"set 'announce: {host}', or 'announce: auto' with 'stun', and forward the TCP and UDP "
        "port of the listener to this machine."
    )


_FIREWALL = (
    "  A firewall lets in what was asked for alone: open the listener's UDP port for clients "
    "outside."
)


def _filled(paragraph: str) -> str:
    """Return a paragraph in lines of WIDTH columns."""
    text = lines_text([paragraph])
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, fix_sentence_endings=True)
