"""Logins that each listener has of its own, where netproxyd has the same users for all of them.

A rule refuses the users of other listeners.  If two listeners know one name with two passwords,
the second one is left out, because it would admit the password of the first.
"""

from __future__ import annotations

from netproxy.ctl.convert.draft.draft import is_user_name
from netproxy.typed import TYPE_CHECKING, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Entry, Value
    from netproxy.ctl.convert.notes import Directive, Notes

_TWO_PASSWORDS = (
    "a user of it has another password at a listener above, and all listeners have the same users",
    "give one of the two another name",
)
_OTHERS = "users of the other listeners were not known here"
_WITHOUT_LOGIN = ("tcp", "udp", "dns", "redirect", "tproxy")


class Login(NamedTuple):
    """A user of a listener."""

    name: str
    password: str | None
    """None: not known."""
    settings: Mapping[str, Value] = {}
    """Further keys of the user."""
    origins: Sequence[Directive] = ()


class Logins:
    """The users of all listeners."""

    def __init__(self, draft: Draft, notes: Notes) -> None:
        self._draft, self._notes = draft, notes
        self._passwords: dict[str, str | None] = {}
        self._listeners: list[tuple[Entry, str, tuple[str, ...]]] = []

    def add(self, listener: Entry, name: str, logins: Sequence[Login], origin: Directive) -> bool:
        """Add the users of a listener, () for none; return whether it can have them."""
        usable = [login for login in logins if is_user_name(login.name)]
        for login in logins:
            if login not in usable:
                self._notes.lost(origin, "a user has a name that netproxyd does not take")
        if any(self._passwords.get(user.name, user.password) != user.password for user in usable):
            self._notes.lost(origin, *_TWO_PASSWORDS)
            return False
        for login in usable:
            self._add_user(login)
        if logins and not usable:
            # Without a user the listener would be open.
            usable = [Login("change-me", None)]
            self._add_user(usable[0])
        if usable:
            listener.settings.setdefault("auth", "required")
        self._listeners.append((listener, name, tuple(login.name for login in usable)))
        return True

    def _add_user(self, login: Login) -> None:
        if login.name in self._passwords:
            return
        self._passwords[login.name] = login.password
        entry = self._draft.user(login.name, login.password or None, *login.origins)
        entry.settings.update(login.settings)

    def finish(self) -> None:
        """Open the listeners without users, and refuse users who are those of others."""
        everybody = set(self._passwords)
        for listener, name, users in self._listeners:
            protocol = listener.settings.get("protocol", "sps")
            if protocol in _WITHOUT_LOGIN:
                continue
            if not users and everybody:
                listener.settings["auth"] = "none"
            elif users and everybody - set(users):
                rule = self._draft.rule(
                    {"listener": name, "not": {"user": [*users]}, "via": "block"}
                )
                rule.comments.append(_OTHERS)
