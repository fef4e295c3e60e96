"""The command `netproxyctl nft`: prints the rules for a configuration, which it reads by itself.

Needs no running daemon.
"""

from __future__ import annotations

import os
import sys

from netproxy.config.read import check, read_config
from netproxy.config.tree.load import load_file
from netproxy.config.tree.problems import Problems
from netproxy.ctl.nft.check import findings
from netproxy.ctl.nft.iptables import iptables_removal, iptables_script
from netproxy.ctl.nft.nftables import TABLE, nftables_text
from netproxy.ctl.nft.routes import add_routes, remove_routes
from netproxy.ctl.nft.rules import Rules, RulesError, Wishes, make_rules
from netproxy.errors import ConfigError
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

FINE, MISSING, USAGE, CONFIGURATION = 0, 1, 64, 78
"""Exit statuses; the last two are those of sysexits(3)."""


def add_arguments(parser: ArgumentParser, default_file: str) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add(
        *("-c", "--config"),
        metavar="FILE",
        default=default_file,
        help=f"the daemon's configuration file (default: {default_file})",
    )
    add(
        "--lan",
        metavar="INTERFACE",
        action="append",
        default=[],
        help="an interface whose flows are led, e.g. br-lan; may be repeated (default: all)",
    )
    add(
        "--exclude",
        metavar="NETWORK",
        action="append",
        default=[],
        help="targets that are left alone; may be repeated (private networks always are)",
    )
    add("--output", action="store_true", help="lead the flows of this machine itself as well")
    # The default is the user of the Debian package.
    add(
        "--user",
        metavar="NAME",
        default="_netproxy",
        help="the daemon's user (default: %(default)s)",
    )
    add("--iptables", action="store_true", help="print a script for iptables and ip6tables")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--routes", action="store_true", help="print the commands of ip(8) alone")
    kind.add_argument("--remove", action="store_true", help="print a script that removes it all")
    kind.add_argument("--check", action="store_true", help="print what of it is missing here")


def run(options: Namespace) -> int:
    """Carry out the command; return the exit status."""
    try:
        rules = _read_rules(options)
    except ConfigError as error:
        hint = "" if os.path.exists(options.config) else " (the daemon's file is named with -c)"
        print(f"netproxyctl: {error}{hint}", file=sys.stderr)
        return CONFIGURATION
    except RulesError as error:
        print(f"netproxyctl: {error}", file=sys.stderr)
        return USAGE
    if options.check:
        return _check(rules)
    print(_text(options, rules), end="")
    return FINE


def _read_rules(options: Namespace) -> Rules:
    problems = Problems()
    config = check(read_config(load_file(options.config), problems), problems)
    wishes = Wishes(options.lan, options.exclude, options.user, options.output)
    return make_rules(config, wishes)


def _text(options: Namespace, rules: Rules) -> str:
    if options.routes:
        return "".join(f"{line}\n" for line in add_routes(rules))
    if options.remove and options.iptables:
        return "".join(f"{line}\n" for line in iptables_removal(remove_routes(rules)))
    if options.remove:
        lines = [f"nft delete table {TABLE} 2>/dev/null", *remove_routes(rules), "true"]
        return "".join(f"{line}\n" for line in lines)
    if options.iptables:
        return iptables_script(rules, add_routes(rules))
    return nftables_text(rules, add_routes(rules))


def _check(rules: Rules) -> int:
    """Print what is there and what is missing; return the exit status."""
    if os.geteuid():
        print("netproxyctl: without root, nft(8) may tell nothing", file=sys.stderr)
    status = FINE
    for finding in findings(rules, nftables_text(rules, ())):
        if finding.missing:
            status = MISSING
        print(
            f"missing: {finding.what}: {finding.missing}"
            if finding.missing
            else f"ok:      {finding.what}"
        )
    return status
