"""Users of 3proxy, and what their traffic is limited to."""

from __future__ import annotations

from netproxy.ctl.convert.draft.draft import is_user_name
from netproxy.ctl.convert.threeproxy.entries import read_entry, subject
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Entry, Value
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.threeproxy.lines import Command

_PERIODS = {"D": "day", "M": "month"}
_RATES = {"bandlimin": "rate_down", "bandlimout": "rate_up"}
_NO_SUBJECT = "limits are those of users and listeners, not of clients, targets or times"
_HASHED = (
    "hashes of 3proxy cannot be checked: these users cannot log in yet",
    "make new hashes (netproxyctl hash-password)",
)


def add_users(command: Command, draft: Draft, notes: Notes) -> None:
    """Add the users of a command."""
    notes.carried(command.directive)
    for word in command.words:
        name, colon, rest = word.partition(":")
        kind, _, password = rest.partition(":")
        if not is_user_name(name):
            notes.lost(command.directive, "a user has a name that netproxyd does not take")
            continue
        is_plain = colon and kind.upper() == "CL" and password
        draft.user(name, password if is_plain else None, command.directive)
        if not is_plain:
            notes.lost(command.directive, *_HASHED)


def limit(command: Command, draft: Draft, notes: Notes) -> None:
    """Carry bandlimin, bandlimout, connlim or countin and the like, for users alone."""
    is_count = command.name.startswith("count")
    skipped = 3 if is_count else 2 if command.name == "connlim" else 1
    entry = read_entry(command, True, skipped)
    users = subject(entry)
    known = {name: draft.users[name] for name in users or () if name in draft.users}
    numbers = tuple(command.word(at, "0") for at in range(skipped))
    if users == () and command.name in _RATES and numbers[0].isdigit() and int(numbers[0]):
        for listener in draft.listeners:
            limits = _limits(listener)
            limits["rate"] = f"{numbers[0]}bit/s"
            listener.comes_from(command.directive)
        notes.changed(command.directive, "limits both directions of each listener so far")
        return
    setting = _setting(command.name, list(numbers))
    if not known or len(known) != len(users or ()) or setting is None:
        notes.lost(command.directive, _NO_SUBJECT, "users.NAME.limits, listeners[].limits")
        return
    notes.carried(command.directive)
    for user in known.values():
        limits = _limits(user)
        for key, value in setting.items():
            quota = limits.setdefault("quota", {}) if key == "quota" else None
            if isinstance(quota, dict) and isinstance(value, dict):
                quota |= value
            else:
                limits[key] = value
        user.comes_from(command.directive)
    if len(known) > 1:
        notes.changed(command.directive, "each user has this limit, in 3proxy all of them together")
    if command.name in ("countin", "countout"):
        notes.changed(command.directive, "a quota counts both directions")


def _limits(entry: Entry) -> dict[str, Value]:
    limits = entry.settings.setdefault("limits", {})
    assert isinstance(limits, dict)
    return limits


def _setting(name: str, numbers: list[str]) -> dict[str, Value] | None:
    """Return the limits that the numbers of a command mean; None if there is none like it."""
    if name in _RATES and len(numbers) == 1 and numbers[0].isdigit() and int(numbers[0]) >= 8:
        return {_RATES[name]: f"{numbers[0]}bit/s"}
    if name == "connlim" and len(numbers) == 2 and all(map(str.isdigit, numbers)):
        count, period = map(int, numbers)
        rates = {1: "s", 60: "m", 3600: "h"}
        if not count:
            return None
        if not period:
            return {"connections": count}
        return {"connection_rate": f"{count}/{rates[period]}"} if period in rates else None
    if name.startswith("count") and len(numbers) == 3:
        _, kind, limit_text = numbers
        period_name = _PERIODS.get(kind.upper())
        if period_name and limit_text.isdigit() and int(limit_text):
            return {"quota": {period_name: f"{limit_text}MB"}}
    return None
