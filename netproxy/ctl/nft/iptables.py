"""Writes the rules down as a script of iptables(8), for machines without nft(8).  Pure."""

from __future__ import annotations

from netproxy.ctl.nft.rules import MARK, Lead, Rules
from netproxy.typed import Iterator, Sequence

_PROGRAMS = (("ipv4", "iptables"), ("ipv6", "ip6tables"))
_TABLES = {"tproxy": "mangle", "redirect": "nat"}
_CHAIN, _LEAD, _OUTPUT = _CHAINS = ("NETPROXY", "NETPROXY_LEAD", "NETPROXY_OUTPUT")
"""By interface; what is led; what this machine itself sends."""


def iptables_script(rules: Rules, routes: Sequence[str]) -> str:
    """Return a script that replaces the rules.  `routes`: the commands of ip(8) before them."""
    lines = [
        "#!/bin/sh",
        "# Leads flows to the transparent listeners of netproxyd.  Written by `netproxyctl nft`.",
        "# Remove it all with: netproxyctl nft --iptables --remove | sh",
        *iptables_removal(()),
        "set -e",
        *routes,
    ]
    for family, program in _PROGRAMS:
        for protocol, table in _TABLES.items():
            leads = [
                item for item in rules.leads if (item.protocol, item.family) == (protocol, family)
            ]
            if leads:
                lines += [
                    f"{program} -w -t {table} {text}" for text in _chains(rules, leads, family)
                ]
    return "\n".join(lines) + "\n"


def iptables_removal(routes: Sequence[str]) -> list[str]:
    """Return the commands that remove everything that the script adds.  None of them fails."""
    lines = []
    for _, program in _PROGRAMS:
        for table in _TABLES.values():
            lines.append(f"{program} -w -t {table} -D PREROUTING -j {_CHAIN}")
            lines.append(f"{program} -w -t {table} -D OUTPUT -j {_OUTPUT}")
            lines += [f"{program} -w -t {table} -F {chain}" for chain in _CHAINS]
            lines += [f"{program} -w -t {table} -X {chain}" for chain in _CHAINS]
    return [f"{line} 2>/dev/null || true" for line in (*lines, *routes)]


def _chains(rules: Rules, leads: Sequence[Lead], family: str) -> Iterator[str]:
    is_tproxy = leads[0].protocol == "tproxy"
    loop = f"-i lo -m mark --mark {MARK:#x} " if rules.output and is_tproxy else ""
    sources = [""]
    if not rules.any_client:
        sources = [f"-s {network} " for network in rules.clients[family]]
        if loop:
            sources.append(loop)
    leading = [f"{source}{_target(lead)}" for lead in leads for source in sources]
    yield f"-N {_LEAD}"
    for text in _in_order(rules, family, leading):
        yield f"-A {_LEAD} {text}"
    yield f"-N {_CHAIN}"
    for name in [f"-i {name}" for name in rules.interfaces] or ["! -i lo"]:
        yield f"-A {_CHAIN} {name} -j {_LEAD}"
    if loop:
        yield f"-A {_CHAIN} {loop}-j {_LEAD}"
    yield f"-A PREROUTING -j {_CHAIN}"
    if rules.output:
        yield from _output(rules, leads, family)


def _output(rules: Rules, leads: Sequence[Lead], family: str) -> Iterator[str]:
    """Yield the commands for the flows of this machine itself."""
    yield f"-N {_OUTPUT}"
    leading = []
    for lead in leads:
        marking = f"-p {lead.network} -j MARK --set-mark {MARK:#x}"
        leading.append(marking if lead.protocol == "tproxy" else _target(lead))
    for text in (*_own(rules), *_in_order(rules, family, leading)):
        yield f"-A {_OUTPUT} {text}"
    yield f"-A OUTPUT -j {_OUTPUT}"


def _own(rules: Rules) -> Iterator[str]:
    for mark in rules.marks:
        yield f"-m mark --mark {mark:#x} -j RETURN"
    if rules.user is not None:
        yield f"-m owner --uid-owner {rules.user} -j RETURN"
    yield "-m conntrack --ctdir REPLY -j RETURN"
    for name in (*rules.interfaces, "lo"):
        yield f"-o {name} -j RETURN"


def _in_order(rules: Rules, family: str, leading: Sequence[str]) -> Iterator[str]:
    """Yield the rules that lead flows behind those for what is left alone.

    Flows to fake addresses are led even if these are private.
    """
    broadcast = ("BROADCAST",) if family == "ipv4" else ()
    for kind in ("LOCAL", "ANYCAST", "MULTICAST", *broadcast):
        yield f"-m addrtype --dst-type {kind} -j RETURN"
    for network in rules.fake[family]:
        yield from (f"-d {network} {text}" for text in leading)
    for network in rules.never[family]:
        yield f"-d {network} -j RETURN"
    yield from leading


def _target(lead: Lead) -> str:
    if lead.protocol == "redirect":
        return f"-p {lead.network} -j REDIRECT --to-ports {lead.port}"
    host = f" --on-ip {lead.host}" if lead.host else ""
    return f"-p {lead.network} -j TPROXY{host} --on-port {lead.port} --tproxy-mark {MARK:#x}"
