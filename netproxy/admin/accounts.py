"""The commands of the control socket that are about users and clients.

They list users and clients, change the limits of a user, and ban.  What they change holds at
once, also for running flows, until the daemon ends.  Thread: that of the client that asks.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Callable, Mapping, Sequence

from netproxy.access.accounts.standing import BANNED_CLIENT, BANNED_USER, FOR_EVER
from netproxy.access.accounts.subject import CLIENT, USER, Limits
from netproxy.admin.account_rows import ban_rows, client_rows, limits_row, user_rows
from netproxy.admin.control_socket import CommandError
from netproxy.config.units import (
    parse_duration,
    parse_frequency,
    parse_rate,
    parse_size,
    parse_whole_limit,
)
from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.fairness import CLIENT_PREFIX, client_key

if TYPE_CHECKING:
    from netproxy.admin.control_client import Command, CommandRequest
    from netproxy.admin.view import DaemonView
    from netproxy.interfaces.answers import BanAnswer, BanRow, ClientsAnswer, JsonObject
    from netproxy.interfaces.answers import UserLimitsAnswer, UsersAnswer
    from netproxy.interfaces.services import Log

PREFIX = f"/{CLIENT_PREFIX * 8}"
"""Ends the name of a client that is an IPv6 network."""


Reader = Callable[[str], "int | float | None"]
"""Returns the value of a limit, None for no limit.  Raises ValueError."""
READERS: Mapping[str, Reader] = {
    "connections": parse_whole_limit,
    "sessions": parse_whole_limit,
    "connection_rate": parse_frequency,
    "rate": parse_rate,
    "rate_up": parse_rate,
    "rate_down": parse_rate,
    "burst": parse_size,
}
"""The reader of each limit, as in a user's `limits`; "rate" is short for both directions."""


class AccountCommands:
    """Answers requests about users and clients."""

    def __init__(self, daemon: DaemonView, log: Log) -> None:
        self._daemon = daemon
        self._log = log
        # Held while the limits of a user are changed: each change begins with those in force.
        self._changing = threading.Lock()

    def table(self) -> Mapping[str, Command]:
        """Return the commands by name."""
        return {
            "users": self.users,
            "clients": self.clients,
            "limit": self.limit,
            "ban": self.ban,
            "unban": self.unban,
        }

    def users(self, request: CommandRequest) -> UsersAnswer:
        """Return what users use and have moved."""
        return {"at": time.monotonic(), "users": user_rows(self._daemon)}

    def clients(self, request: CommandRequest) -> ClientsAnswer:
        """Return what clients use."""
        return {"at": time.monotonic(), "clients": client_rows(self._daemon)}

    def limit(self, request: CommandRequest) -> UserLimitsAnswer:
        """Change the limits of the key "user" by "settings", texts such as "rate=5Mbit/s".

        With "reset", the configured limits are in force again.  Returns the limits in force.
        """
        user = self._known(_text(request, "user"))
        settings, accounts = _settings(request), self._daemon.accounts
        if request.get("reset"):
            if settings:
                raise CommandError("give either limits or a reset, not both")
            accounts.override(user, None)
            self._log.info("limits of user %s: as configured", user)
        elif settings:
            changes = parse_limits(settings)
            with self._changing:
                accounts.override(user, Limits(**{**accounts.limits(user)._asdict(), **changes}))
            self._log.info("limits of user %s until the next start: %s", user, " ".join(settings))
        return {
            "user": user,
            "limits": limits_row(accounts.limits(user)),
            "overridden": accounts.is_overridden(user),
        }

    def ban(self, request: CommandRequest) -> BanAnswer | list[BanRow]:
        """Ban the key "name" for the time of the key "for"; without a name, return all bans.

        Returns the ban, and how many flows it has ended.
        """
        if request.get("name") is None:
            return ban_rows(self._daemon)
        name, duration = _text(request, "name"), request.get("for")
        seconds = FOR_EVER if duration is None else _duration(duration)
        standing, client = self._daemon.standing, as_client(name)
        if client:
            kind, name, why = CLIENT, client, BANNED_CLIENT
            standing.ban_client(client, seconds)
        else:
            kind, name, why = USER, self._known(name), BANNED_USER
            standing.ban_user(name, seconds)
        # The janitor ends what is being dialled now.
        flows = self._daemon.accounts.flows(kind, name)
        for live in flows:
            live.kill(why)
        how_long = "until the next start" if duration is None else f"for {duration}"
        self._log.info("banned %s %s %s: %s flows ended", kind, name, how_long, len(flows))
        until = None if duration is None else time.time() + seconds
        return {"kind": kind, "name": name, "until": until, "ended": len(flows)}

    def unban(self, request: CommandRequest) -> JsonObject:
        """Take the ban of the key "name" back."""
        name = _text(request, "name")
        if not self._daemon.standing.unban(as_client(name) or name):
            raise CommandError(f"'{name}' is not banned")
        self._log.info("unbanned %s", name)
        return {"unbanned": name}

    def _known(self, user: str) -> str:
        """Return the name of a user.  Raises CommandError if no such user can log in."""
        daemon = self._daemon
        if user not in daemon.user_names and not daemon.has_any_user:
            raise CommandError(f"unknown user '{user}': the configuration has no such user")
        return user


def parse_limits(settings: Sequence[str]) -> dict[str, int | float | None]:
    """Return the fields of Limits that settings such as "connections=50" change.

    None takes a limit away.  Raises CommandError.
    """
    values: dict[str, int | float | None] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if key not in READERS or not equals:
            raise CommandError(f"'{setting}' is not a limit (expected {'=, '.join(READERS)}=)")
        try:
            values[key] = READERS[key](text)
        except ValueError as error:
            raise CommandError(f"{key}: {error}") from error
    if "rate" in values:
        both = values.pop("rate")
        values = {"rate_up": both, "rate_down": both, **values}
    return values


def as_client(name: str) -> str:
    """Return the client that an address or a network of PREFIX stands for, "" for a user."""
    host = name.removesuffix(PREFIX) if ":" in name else name
    return client_key(host) if pack_ip(host.partition("%")[0]) is not None else ""


def _text(request: CommandRequest, key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str) or not value:
        raise CommandError(f"{key}: not a name")
    return value


def _settings(request: CommandRequest) -> list[str]:
    settings = request.get("settings") or ()
    if not isinstance(settings, (list, tuple)):
        raise CommandError("settings: not a list")
    return [str(setting) for setting in settings]


def _duration(value: object) -> float:
    try:
        seconds = parse_duration(str(value))
    except ValueError as error:
        raise CommandError(f"for: {error}") from error
    if not seconds:
        raise CommandError("for: must be longer than 0 s; unban ends a ban")
    return seconds
