"""The file of users of gost: a user and a password on each line."""

from __future__ import annotations

from netproxy.ctl.convert.command_lines.logins import Login
from netproxy.ctl.convert.source import ConversionError
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.gost.nodes import Node
    from netproxy.ctl.convert.source import Source

_UNREAD = "nobody can log in: write the users here"
UNKNOWN = Login("change-me", None)
"""The user of a listener whose users are not known: it must not be open."""


def read_users(source: Source, name: str, node: Node) -> list[Login]:
    """Return the users of the file of `secrets`."""
    try:
        [file] = source.included(name)
    except (ConversionError, ValueError) as error:
        text = str(error) if isinstance(error, ConversionError) else f"{name}: is not one file"
        node.lost("secrets", text, _UNREAD)
        return [UNKNOWN]
    users = []
    for line in file.text.splitlines():
        words = line.split(None, 1)
        if words and not words[0].startswith("#"):
            password = words[1].strip() if len(words) > 1 else ""
            users.append(Login(words[0], password, {}, tuple(node.origins("secrets"))))
    return users or [UNKNOWN]
