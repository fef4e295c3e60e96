"""Tells what of the rules is missing on this machine.

Asks nft(8), ip(8) and /proc; changes nothing.
"""

from __future__ import annotations

import subprocess

from netproxy.ctl.nft.nftables import TABLE
from netproxy.ctl.nft.rules import MARK, PREFERENCE
from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.nft.rules import Rules

SECONDS = 10
"""How long a program may take to answer."""
_FORWARDING = {
    "ipv4": "/proc/sys/net/ipv4/ip_forward",
    "ipv6": "/proc/sys/net/ipv6/conf/all/forwarding",
}


class Finding(NamedTuple):
    """One thing that the rules need."""

    what: str
    missing: str
    """What is missing and what to do; "" if it is there."""


def findings(rules: Rules, text: str) -> Iterator[Finding]:
    """Yield what the rules need.  `text`: the file for nft(8)."""
    code, _, error = _run(["nft", "-c", "-f", "-"], text)
    yield Finding("the kernel takes the rules", "" if not code else _first(error))
    code, _, _ = _run(["nft", "list", "table", *TABLE.split()])
    missing = "" if not code else "apply them: netproxyctl nft | nft -f -"
    yield Finding(f"the table {TABLE} is loaded", missing)
    for family in rules.families("tproxy"):
        option = "-6" if family == "ipv6" else "-4"
        hint = "add them: netproxyctl nft --routes | sh"
        _, output, _ = _run(["ip", option, "rule", "show", "pref", str(PREFERENCE)])
        is_there = f"fwmark {MARK:#x}" in output
        yield Finding(f"{family} rule for the mark {MARK:#x}", "" if is_there else hint)
        _, output, _ = _run(["ip", option, "route", "show", "table", str(MARK)])
        yield Finding(f"{family} route in the table {MARK}", "" if "local" in output else hint)
    for family in dict.fromkeys(lead.family for lead in rules.leads):
        yield Finding(f"{family} is forwarded", _forwarding(_FORWARDING[family]))


def _forwarding(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            is_on = file.read().strip() != "0"
    except OSError as error:
        return f"{path}: {error.strerror}"
    key = path.removeprefix("/proc/sys/").replace("/", ".")
    return "" if is_on else f"sysctl -w {key}=1"


def _run(command: Sequence[str], text: str = "") -> tuple[int, str, str]:
    """Return the exit status, the output and the errors of a program."""
    try:
        process = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", f"{command[0]}: {error}"
    return process.returncode, process.stdout, process.stderr


def _first(error: str) -> str:
    """Return the first line of an error."""
    return error.strip().partition("\n")[0] or "nft has failed"
