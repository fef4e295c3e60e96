"""The routes that lead packets with the mark of a rule TPROXY to this machine, as ip(8) sets them.

Pure.
"""

from __future__ import annotations

from netproxy.ctl.nft.rules import MARK, PREFERENCE
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.nft.rules import Rules

_OPTIONS = {"ipv4": "-4", "ipv6": "-6"}


def add_routes(rules: Rules) -> list[str]:
    """Return the commands that add the routes, and replace those that are there."""
    lines = []
    for family in rules.families("tproxy"):
        program = f"ip {_OPTIONS[family]}"
        lines.append(f"while {program} rule del pref {PREFERENCE} 2>/dev/null; do :; done")
        lines.append(f"{program} rule add pref {PREFERENCE} fwmark {MARK:#x} lookup {MARK}")
        lines.append(f"{program} route replace local default dev lo table {MARK}")
    return lines


def remove_routes(rules: Rules) -> list[str]:
    """Return the commands that remove the routes."""
    lines = []
    for family in rules.families("tproxy"):
        program = f"ip {_OPTIONS[family]}"
        lines.append(f"while {program} rule del pref {PREFERENCE} 2>/dev/null; do :; done")
        lines.append(f"{program} route flush table {MARK} 2>/dev/null")
    return lines
