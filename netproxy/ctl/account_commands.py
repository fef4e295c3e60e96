"""Carries out the commands of netproxyctl that are about users and clients."""

from __future__ import annotations

import json
import time

from netproxy.ctl.accounts import (
    ban_text,
    bans_text,
    clients_text,
    rate_clients,
    rate_users,
    sort_clients,
    sort_users,
    user_limits_text,
    users_text,
)
from netproxy.ctl.console import lines_text
from netproxy.errors import NetProxyError
from netproxy.typed import TYPE_CHECKING, Callable, Mapping

if TYPE_CHECKING:
    from argparse import Namespace

    from netproxy.ctl.top import Ask

SECONDS = 1.0
"""Between the two answers whose difference is a rate."""


class WrongUsage(NetProxyError):
    """The command line is wrong; the message says what was expected."""


def _users(options: Namespace, ask: Ask) -> str:
    before = ask("users")
    time.sleep(SECONDS)
    rows = sort_users(rate_users(before, ask("users")), options.sort)[: options.number]
    return json.dumps(rows, indent=2) if options.json else users_text(rows)


def _clients(options: Namespace, ask: Ask) -> str:
    before = ask("clients")
    time.sleep(SECONDS)
    rows = sort_clients(rate_clients(before, ask("clients")), options.sort)[: options.number]
    return json.dumps(rows, indent=2) if options.json else clients_text(rows)


def _limit(options: Namespace, ask: Ask) -> str:
    answer = ask("limit", user=options.user, settings=options.settings, reset=options.reset)
    return json.dumps(answer, indent=2) if options.json else user_limits_text(answer)


def _ban(options: Namespace, ask: Ask) -> str:
    words, duration = options.words, options.duration
    if len(words) == 3 and words[1] == "for" and duration is None:
        words, duration = words[:1], words[2]
    if len(words) > 1 or (duration is not None and not words):
        raise WrongUsage(
            "ban: write USER or ADDRESS, and if it is to end, for DURATION: ban alice for 1h"
        )
    name = words[0] if words else None
    # "for" is a word of Python.
    answer = ask("ban", **{"name": name, "for": duration})
    if options.json:
        return json.dumps(answer, indent=2)
    return ban_text(answer, time.time()) if words else bans_text(answer, time.time())


def _unban(options: Namespace, ask: Ask) -> str:
    return lines_text([f"{ask('unban', name=options.name)['unbanned']}: no longer banned"])


COMMANDS: Mapping[str, Callable[[Namespace, Ask], str]] = {
    "users": _users,
    "clients": _clients,
    "limit": _limit,
    "ban": _ban,
    "unban": _unban,
}
"""Return what is printed.  They raise NotRunning, CommandError or WrongUsage."""
