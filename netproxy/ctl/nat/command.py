"""The command `netproxyctl nat`: asks STUN servers what NAT a machine or an upstream is behind.

From this machine it needs no daemon; through an upstream the daemon asks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys

from netproxy.admin.nat.report import ENDPOINT_INDEPENDENT, Report
from netproxy.admin.control.ask import NotRunning
from netproxy.admin.nat.discovery import SERVERS_LIMIT
from netproxy.admin.nat.exchange import ServerError, parse_server, parse_servers, probe_nat
from netproxy.admin.nat.lifetime import AGES, PORTS, measure_lifetime
from netproxy.admin.nat.sockets import SocketTransport
from netproxy.ctl.account_commands import WrongUsage
from netproxy.ctl.console import lines_text
from netproxy.ctl.nat.wording import Result, needs_relay, report_text
from netproxy.interfaces.addresses import Address
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from netproxy.ctl.top import Ask

FINE, NOT_FOUND, NEEDS_RELAY, NO_UDP, INTERRUPTED = 0, 1, 4, 5, 130
"""Exit statuses; the last is that of a shell for SIGINT."""
_FAMILIES = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
_NO_ROUTE = tuple(
    os.strerror(code).lower()
    for code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL)
)
"""Errors of a machine that does not have the family at all."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = (
        "Exit status: 0 peers can reach each other, 4 most peers need a relay, 5 no UDP, "
        "1 refused or an unknown server, 3 no daemon, 64 usage."
    )
    add = parser.add_argument
    add(
        "--server",
        metavar="HOST[:PORT]",
        dest="servers",
        action="append",
        default=[],
        help="a STUN server (RFC 8489); one with two addresses (RFC 5780), such as coturn, tells "
        "most; may be repeated (default: those in stun of the running daemon's listeners)",
    )
    add("--via", metavar="UPSTREAM", default="", help="ask through an upstream of the daemon")
    add(
        "--lifetime",
        action="store_true",
        help="find out how long an idle mapping is kept as well; takes up to five minutes, and a "
        "server with RESPONSE-PORT (RFC 5780), such as coturn",
    )
    add("--json", action="store_true", help="print the results as JSON")


def run(options: Namespace, ask: Ask) -> int:
    """Carry out the command; return the exit status.

    Raises WrongUsage, and what `ask` raises.
    """
    if options.via and options.lifetime:
        raise WrongUsage("nat: --lifetime is for this machine, not for --via")
    servers = _parse_servers(options.servers or _configured(options, ask))
    try:
        results = _test(options.via, servers, ask)
        if options.lifetime:
            results = [_with_lifetime(result) for result in results]
    except KeyboardInterrupt:
        return INTERRUPTED
    if options.json:
        print(json.dumps([_as_json(result) for result in results], indent=2))
    elif results:
        print("\n\n\n".join(map(report_text, results)))
    return _status(results)


def _test(via: str, servers: Sequence[Address], ask: Ask) -> list[Result]:
    """Return the results of an upstream, or of this machine.  Raises what `ask` raises."""
    if not via:
        return _test_from_here(servers)
    answer = ask("nat", via=via, servers=[str(server) for server in servers])
    return [Result(via, "", Report.from_json(answer))]


def _configured(options: Namespace, ask: Ask) -> Sequence[str]:
    """Return the STUN servers of a running daemon's listeners.

    Raises NotRunning if the daemon is needed anyway.
    """
    try:
        servers: Sequence[str] = ask("known")["stun"]
    except NotRunning:
        if options.via:
            raise
        return ()
    return servers[:SERVERS_LIMIT]


def _parse_servers(texts: Sequence[str]) -> list[Address]:
    """Return the servers in some texts.  Raises WrongUsage."""
    if not texts:
        raise WrongUsage(
            "nat: no server to ask: give --server HOST (a STUN server), or set 'stun' of a listener"
        )
    try:
        return parse_servers(texts)
    except ServerError as error:
        raise WrongUsage(f"nat: --server: {error}") from error


def _test_from_here(servers: Sequence[Address]) -> list[Result]:
    """Test IPv4 and IPv6 from this machine, as far as it and the servers have them.

    Without any, returns an empty list; what went wrong has been printed.
    """
    known = [_resolve(server) for server in servers]
    results = []
    for family, name in _FAMILIES.items():
        addresses = [addresses[family] for addresses in known if family in addresses]
        if not addresses:
            continue
        try:
            transport = SocketTransport(ipv6=family == socket.AF_INET6)
        except OSError as error:
            _warn(f"{name}: {error.strerror}")
            continue
        with contextlib.closing(transport):
            results.append(Result("", name, probe_nat(addresses, transport)))
    # A machine may have sockets of a family that leads nowhere.
    return [result for result in results if not _has_no_route(result.report)] or results


def _with_lifetime(result: Result) -> Result:
    """Return a result with the lifetime of mappings, if it has any."""
    report = result.report
    answered = [row for row in report.servers if row.mapped]
    is_open = report.nat is False and report.filtering == ENDPOINT_INDEPENDENT
    if not answered or is_open:
        return result
    minutes = AGES[-1] // 60
    _warn(f"{result.family}: waiting for mappings to expire: up to {minutes} minutes")
    # A server of RFC 5780 is most likely to have what is needed.
    row = next((row for row in answered if row.second), answered[0])
    with contextlib.closing(SocketTransport(result.family == "IPv6", PORTS)) as transport:
        lifetime = measure_lifetime(parse_server(row.address), transport)
    return result._replace(report=report._replace(lifetime=lifetime))


def _resolve(server: Address) -> dict[int, Address]:
    """Return the first address of a server in each family; tell if there is none."""
    try:
        results = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_DGRAM)
    except OSError as error:
        _warn(f"{server.host}: {error.strerror}")
        return {}
    addresses: dict[int, Address] = {}
    for family, _, _, _, sockaddr in results:
        addresses.setdefault(family, Address(str(sockaddr[0]), server.port))
    return addresses


def _has_no_route(report: Report) -> bool:
    return all(row.error in _NO_ROUTE for row in report.servers)


def _status(results: Sequence[Result]) -> int:
    """Return the exit status: that of the worst result."""
    if not results:
        return NOT_FOUND
    if not all(result.report.works for result in results):
        return NO_UDP
    return NEEDS_RELAY if any(needs_relay(result.report) for result in results) else FINE


def _as_json(result: Result) -> dict[str, object]:
    return {"via": result.via, "family": result.family, **result.report.as_json()}


def _warn(text: str) -> None:
    print(lines_text([f"netproxyctl: {text}"]), file=sys.stderr)
