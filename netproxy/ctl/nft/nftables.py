"""Writes the rules down as a file for nft(8).  Pure."""

from __future__ import annotations

from netproxy.ctl.nft.rules import FAMILIES, MARK, Lead, Rules
from netproxy.typed import Iterator, Sequence

TABLE = "inet netproxy"
_HEAD = """#!/usr/sbin/nft -f
# Leads flows to the transparent listeners of netproxyd.  Written by `netproxyctl nft`.
#   apply:    netproxyctl nft | nft -f -  &&  netproxyctl nft --routes | sh
#   remove:   netproxyctl nft --remove | sh
#   missing:  netproxyctl nft --check
"""


def nftables_text(rules: Rules, routes: Sequence[str]) -> str:
    """Return the file.  `routes`: the commands of ip(8) that belong to it, for its comments."""
    return "\n".join([_HEAD.rstrip(), *_comments(rules, routes), *_table(rules)]) + "\n"


def _comments(rules: Rules, routes: Sequence[str]) -> Iterator[str]:
    for lead in rules.leads:
        yield f"# {lead.network} {lead.family} -> listener '{lead.listener}' ({lead.protocol})"
    if routes:
        yield "# The routes without which tproxy gets nothing (netproxyctl nft --routes):"
        yield from (f"#   {line}" for line in routes)
    for name in rules.names:
        yield f"# The upstream server {name} is known by name only: exclude its address, too,"
        yield "# with --exclude, if this machine's own flows are led (--output)."
    if rules.marks:
        marks = ", ".join(f"{mark:#x}" for mark in rules.marks)
        yield f"# The daemon's own traffic has the mark {marks} (`mark` of its upstreams)."
    else:
        yield "# The daemon's own traffic has no mark (`mark` of its upstreams): it never passes"
        yield "# prerouting, but rules of your own for output must leave it out."


def _table(rules: Rules) -> Iterator[str]:
    yield ""
    yield "# An empty table first, so that the file can be loaded again and again."
    yield f"table {TABLE}"
    yield f"delete table {TABLE}"
    yield f"table {TABLE} {{"
    yield "    # Targets that are left alone: private networks, servers of upstreams, --exclude."
    for family in FAMILIES:
        yield f"    set never_{family} {{"
        yield f"        type {family}_addr"
        yield "        flags interval"
        yield "        auto-merge"
        yield f"        elements = {{ {', '.join(rules.never[family])} }}"
        yield "    }"
    for protocol, kind, priority in (("tproxy", "filter", "mangle"), ("redirect", "nat", "dstnat")):
        leads = [lead for lead in rules.leads if lead.protocol == protocol]
        if leads:
            yield ""
            yield f"    chain lead_{protocol} {{"
            yield f"        type {kind} hook prerouting priority {priority}; policy accept;"
            yield from _indent(_prerouting(rules, leads, protocol))
            yield "    }"
            if rules.output:
                yield ""
                yield from _output(rules, leads, protocol)
    yield "}"


def _prerouting(rules: Rules, leads: Sequence[Lead], protocol: str) -> Iterator[str]:
    loops = rules.output and protocol == "tproxy"
    if rules.interfaces:
        names = [f'"{name}"' for name in rules.interfaces]
        yield "# Only what comes from the LAN" + (
            ", and what the chain of output has marked." if loops else "."
        )
        if loops:
            names.append('"lo"')
        yield f"iifname != {{ {', '.join(names)} }} return"
    if loops:
        yield f'iifname "lo" meta mark != {MARK:#x} return'
    else:
        yield 'iifname "lo" return'
    if not rules.any_client:
        yield "# Only clients that the listeners accept (`clients`)."
        for family, word in (("ipv4", "ip"), ("ipv6", "ip6")):
            networks = rules.clients[family]
            source = f"{word} saddr != {{ {', '.join(networks)} }}"
            condition = source if networks else f"meta nfproto {family}"
            yield f'iifname != "lo" {condition} return'
    yield from _exclusions(rules)
    yield from (_lead(lead) for lead in leads)


def _exclusions(rules: Rules) -> Iterator[str]:
    yield "# Not what is for this machine itself: its own services, and the listeners."
    yield "fib daddr type { local, broadcast, anycast, multicast } return"
    if any(rules.fake.values()):
        yield "# Fake addresses (dns.fake) are led in any case."
    for family, word in (("ipv4", "ip"), ("ipv6", "ip6")):
        fake = ", ".join(rules.fake[family])
        others = f"{word} daddr != {{ {fake} }} " if fake else ""
        yield f"{others}{word} daddr @never_{family} return"


def _lead(lead: Lead) -> str:
    flows = f"meta nfproto {lead.family} meta l4proto {lead.network}"
    if lead.protocol == "redirect":
        return f"{flows} redirect to :{lead.port}"
    word = "ip" if lead.family == "ipv4" else "ip6"
    host = f"[{lead.host}]" if lead.family == "ipv6" and lead.host else lead.host
    return f"{flows} tproxy {word} to {host}:{lead.port} meta mark set {MARK:#x} accept"


def _output(rules: Rules, leads: Sequence[Lead], protocol: str) -> Iterator[str]:
    kind, priority = ("route", "mangle") if protocol == "tproxy" else ("nat", "-100")
    yield "    # Flows of this machine itself (--output), without those of the daemon."
    yield f"    chain own_{protocol} {{"
    yield f"        type {kind} hook output priority {priority}; policy accept;"
    yield from _indent(_output_rules(rules, leads, protocol))
    yield "    }"


def _output_rules(rules: Rules, leads: Sequence[Lead], protocol: str) -> Iterator[str]:
    if rules.marks:
        yield f"meta mark {{ {', '.join(f'{mark:#x}' for mark in rules.marks)} }} return"
    if rules.user is not None:
        yield f"meta skuid {rules.user} return"
    yield "# Answers to the clients of the LAN are no flows of this machine."
    yield "ct direction reply return"
    interfaces = [f'"{name}"' for name in (*rules.interfaces, "lo")]
    yield f"oifname {{ {', '.join(interfaces)} }} return"
    yield from _exclusions(rules)
    for lead in leads:
        if protocol == "redirect":
            yield _lead(lead)
        else:
            flows = f"meta nfproto {lead.family} meta l4proto {lead.network}"
            yield f"{flows} meta mark set {MARK:#x}"


def _indent(lines: Iterator[str]) -> Iterator[str]:
    return (f"        {line}" for line in lines)
