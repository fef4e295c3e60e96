"""Checks where flows go: listeners whose upstream cannot serve them, rules that never match."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netproxy.config.schema import Config
from netproxy.config.tree.problems import Problems

if TYPE_CHECKING:
    from netproxy.dialer.factory import DialerFactory


def check_udp(config: Config, dialers: DialerFactory, problems: Problems) -> None:
    """Warn of each listener that accepts UDP but whose upstream carries none."""
    for listener in config.listeners:
        upstream = listener.upstream or config.default
        if "udp" not in listener.network or listener.protocol == "dns":
            continue
        if "udp" not in dialers.dialer(upstream).carries:
            problems.warn(
                f"listener '{listener.name}' accepts UDP, but its upstream carries none: "
                f"{upstream.text}",
                listener.place,
            )


def check_rules(config: Config, problems: Problems) -> None:
    """Warn of each rule that can never match because an earlier one takes all its flows."""
    from netproxy.router.factory import unreachable_rules  # late: few configurations have rules

    for rule, earlier in unreachable_rules(config.rules):
        number = rule.text.partition(" ")[0]
        message = f"can never match: {earlier.text} at {earlier.place} takes all of its flows"
        problems.warn(f"{number}: {message}", rule.place)
