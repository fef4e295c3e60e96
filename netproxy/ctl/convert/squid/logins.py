"""The logins of squid: auth_param with the helper that checks names and passwords."""

from __future__ import annotations

from netproxy.ctl.convert.terms.conditions import ANY_USER
from netproxy.typed import TYPE_CHECKING, Collection, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.squid.lines import Line

# Reads the two lines that netproxyd writes, asks the helper in squid's way, and tells its answer.
_ASK = (
    "IFS= read -r user; IFS= read -r password; "
    """e() { printf %s "$1" | sed 's/%/%25/g;s/ /%20/g'; }; """
    """printf '%s %s\\n' "$(e "$user")" "$(e "$password")" | "$0" "$@" | grep -q ^OK"""
)
_HELPER = (
    "the same helper as squid's checks passwords: it must stay installed, and its files must be "
    "readable for the daemon's user",
    "or write users with hashes (netproxyctl hash-password)",
)
_NO_HELPER = (
    "no helper checks passwords: nobody can log in",
    "write users with hashes (netproxyctl hash-password)",
)
_TUNING = ("children", "realm", "credentialsttl", "casesensitive", "utf8", "concurrency")


def set_helper(lines: Sequence[Line], users: Collection[str], draft: Draft, notes: Notes) -> None:
    """Set the check of logins.  `users`: those that rules name, "*" for anybody."""
    helper: list[str] = []
    for line in lines:
        scheme, key, *rest = (*line.words, "", "")
        if scheme != "basic":
            why = f"{scheme} is not offered: clients log in by Basic"
            notes.lost(line.directive, why)
        elif key == "program":
            helper = [word for word in rest if word]
            notes.carried(line.directive)
            if users and helper:
                command: list[Value] = ["/bin/sh", "-c", _ASK, *helper]
                draft.put("auth.command", command, line.directive)
                notes.changed(line.directive, *_HELPER)
        elif key in _TUNING:
            notes.unneeded(line.directive, "is about the helper's processes, or a text")
        else:
            notes.lost(line.directive, "is not supported")
    if users and not helper:
        for name in sorted(set(users) - {ANY_USER}) or ["change-me"]:
            draft.user(name, None)
        notes.changed(None, *_NO_HELPER)
