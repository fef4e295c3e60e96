"""The commands of the control socket that change what users and clients may do.

They change the limits of a user, and ban.  What they change holds at once, also for running
flows, until the daemon ends.  Thread: that of the client that asks.
"""

from __future__ import annotations

import time

from netproxy.access.accounts.standing import BANNED_CLIENT, BANNED_USER, FOR_EVER
from netproxy.access.accounts.subject import CLIENT, USER, Limits
from netproxy.admin.control.client import PartialAnswer
from netproxy.admin.control.client import CommandError
from netproxy.admin.stats.account_rows import ban_rows, limits_row
from netproxy.config.units import (
    parse_duration,
    parse_frequency,
    parse_rate,
    parse_size,
    parse_whole_limit,
)
from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.fairness import CLIENT_PREFIX, client_key
from netproxy.typed import TYPE_CHECKING, Callable, ContextManager, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.admin.control.client import Command, CommandRequest
    from netproxy.admin.view import AccountsView
    from netproxy.interfaces.answers import BanAnswer, BanRow, JsonValue, UserLimitsAnswer

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


class SpreadAnswers(NamedTuple):
    """What the other processes of the daemon have answered."""

    results: Sequence[JsonValue] = ()
    """The results of those that have carried out the request."""
    warnings: Sequence[str] = ()
    """Which ones have not answered."""


Spread = Callable[["CommandRequest"], SpreadAnswers]
"""Has the other processes of the daemon carry out a request, too."""


def nowhere(request: CommandRequest) -> SpreadAnswers:
    """Return no answers: the daemon has one process.  A Spread."""
    return SpreadAnswers()


class AccountCommands:
    """Carries out requests that change what users and clients may do."""

    def __init__(
        self,
        view: AccountsView,
        note: Callable[..., None],
        guard: ContextManager[object],
        spread: Spread = nowhere,
    ) -> None:
        """`note` writes a record of a change to the log, formatted with %.

        `guard` is held while this process changes: each change of limits begins with those in
        force.
        """
        self._view = view
        self._note = note
        self._guard = guard
        self._spread = spread

    def table(self) -> Mapping[str, Command]:
        """Return the commands by name."""
        return {"limit": self.limit, "ban": self.ban, "unban": self.unban}

    def limit(self, request: CommandRequest) -> PartialAnswer:
        """Change the limits of the key "user" by "settings", texts such as "rate=5Mbit/s".

        With "reset", the configured limits are in force again.  Returns the limits in force.
        """
        user = self._known(_text(request, "user"))
        settings, reset = _settings(request), bool(request.get("reset"))
        if reset and settings:
            raise CommandError("give either limits or a reset, not both")
        with self._guard:
            answer = self._change_limits(user, settings, reset)
        # What a check of logins grants a user is known where the user has logged in.
        others = self._spread(request)
        answer = next(iter(others.results), answer)
        if reset:
            self._note("limits of user %s: as configured", user)
        elif settings:
            self._note("limits of user %s until the next start: %s", user, " ".join(settings))
        return PartialAnswer(answer, others.warnings)

    def _change_limits(self, user: str, settings: Sequence[str], reset: bool) -> UserLimitsAnswer:
        accounts = self._view.accounts
        if reset:
            accounts.override(user, None)
        elif settings:
            changes = parse_limits(settings)
            accounts.override(user, Limits(**{**accounts.limits(user)._asdict(), **changes}))
        return {
            "user": user,
            "limits": limits_row(accounts.limits(user)),
            "overridden": accounts.is_overridden(user),
        }

    def ban(self, request: CommandRequest) -> PartialAnswer | list[BanRow]:
        """Ban the key "name" for the time of the key "for"; without a name, return all bans.

        Returns the ban, and how many flows it has ended.
        """
        if request.get("name") is None:
            with self._guard:
                return ban_rows(self._view)
        name, duration = _text(request, "name"), request.get("for")
        seconds = FOR_EVER if duration is None else _duration(duration)
        with self._guard:
            kind, name, ended = self._ban(name, seconds)
        others = self._spread(request)
        ended += sum(answer["ended"] for answer in others.results)
        how_long = "until the next start" if duration is None else f"for {duration}"
        self._note("banned %s %s %s: %s flows ended", kind, name, how_long, ended)
        until = None if duration is None else time.time() + seconds
        answer: BanAnswer = {"kind": kind, "name": name, "until": until, "ended": ended}
        return PartialAnswer(answer, others.warnings)

    def _ban(self, name: str, seconds: float) -> tuple[str, str, int]:
        """Ban a user or a client; return its kind and name, and the number of ended flows."""
        standing, client = self._view.standing, as_client(name)
        if client:
            kind, name, why = CLIENT, client, BANNED_CLIENT
            standing.ban_client(client, seconds)
        else:
            kind, name, why = USER, self._known(name), BANNED_USER
            standing.ban_user(name, seconds)
        # The janitor ends what is being dialled now.
        flows = self._view.accounts.flows(kind, name)
        for live in flows:
            live.kill(why)
        return kind, name, len(flows)

    def unban(self, request: CommandRequest) -> PartialAnswer:
        """Take the ban of the key "name" back."""
        name = _text(request, "name")
        with self._guard:
            was_banned = self._view.standing.unban(as_client(name) or name)
        others = self._spread(request)
        if not was_banned:
            raise CommandError(f"'{name}' is not banned")
        self._note("unbanned %s", name)
        return PartialAnswer({"unbanned": name}, others.warnings)

    def _known(self, user: str) -> str:
        """Return the name of a user.  Raises CommandError if no such user can log in."""
        config = self._view.config
        # Without users, and with an external check, any name may log in.
        if user not in config.users and config.users and not config.auth.is_set:
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
