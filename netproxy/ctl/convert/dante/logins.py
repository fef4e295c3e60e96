"""Who logs in at danted, and how: users of the system, by its passwords or by PAM."""

from __future__ import annotations

import os

from netproxy.ctl.convert.draft.draft import is_user_name
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.dante.statements import Block
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.notes import Notes

LOGINS = ("username", "pam.username", "pam.any", "pam", "bsdauth")
"""Methods with a name and a password."""
PAM_PROGRAMS = ("/usr/lib/netproxy/check-pam", "/usr/share/doc/netproxyd/examples/check-pam")
"""Where the program may be that asks PAM."""
_ASKS_PAM = "the daemon is not root: a PAM module that needs root, such as pam_unix, does not work"
_NOT_KNOWN = (
    "the passwords of the system's users cannot be read: those named here cannot log in yet",
    "write their hashes (netproxyctl hash-password), or auth.command to ask PAM",
)


def set_login(methods: Sequence[str], blocks: Sequence[Block], draft: Draft, notes: Notes) -> None:
    """Set the login of all listeners, and who may log in."""
    used = {*methods, *(word for b in blocks for word in b.words("socksmethod", "method"))}
    named = {word for b in blocks for entry in b.all("user") for word in entry.words if b.passes}
    if not used & set(LOGINS) and not named:
        return
    is_optional = "none" in methods or not set(methods) & set(LOGINS)
    for entry in draft.listeners:
        entry.settings["auth"] = "optional" if is_optional else "required"
        if not is_optional:
            entry.settings.pop("allow_open", None)
    program = next((path for path in PAM_PROGRAMS if os.access(path, os.X_OK)), "")
    if program and any(method.startswith("pam") for method in used):
        draft.put("auth.command", [program])
        notes.changed(None, f"{program} asks PAM for passwords: {_ASKS_PAM}", "look into it")
        return
    for name in sorted(filter(is_user_name, named)) or ["change-me"]:
        draft.user(name, None)
    notes.changed(None, *_NOT_KNOWN)
