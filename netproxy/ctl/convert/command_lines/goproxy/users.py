"""The users of goproxy: "user:password:connections:rate:upstream", in options or in a file."""

from __future__ import annotations

from netproxy.ctl.convert.command_lines.logins import Login
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.goproxy.options import Options
    from netproxy.ctl.convert.command_lines.goproxy.parents import Parents
    from netproxy.ctl.convert.draft.draft import Value

_UNKNOWN = Login("change-me", None)
_RATE = "is the rate of all connections of a user together, rather than of each"
_SERVICE = (
    "the service is asked in another way than that of auth.url",
    "adapt it, and write auth: {url: ...} (docs/USERS.md)",
)


def read_users(options: Options, parents: Parents) -> list[Login]:
    """Return the users of a command; [] if clients need no login."""
    users = [_user(text, "-a", options, parents) for text in options.texts("-a")]
    for name in ("-F", "--auth-file"):
        if options.has(name):
            lines = options.elements(name)
            users += [_user(line, name, options, parents) for line in lines or []]
            users += [_UNKNOWN] if not users else []
    if options.has("--auth-url"):
        options.lost("--auth-url", *_SERVICE)
        users += [_UNKNOWN] if not users else []
    return users


def _user(text: str, option: str, options: Options, parents: Parents) -> Login:
    name, password, connections, rate, upstream = (text.strip().split(":", 4) + [""] * 4)[:5]
    limits: dict[str, Value] = {}
    if connections.isdigit() and int(connections):
        limits["connections"] = int(connections)
    if rate.isdigit() and int(rate):
        limits["rate"] = f"{int(rate) * 8}bit/s"
        options.changed(option, _RATE)
    settings: dict[str, Value] = {"limits": limits} if limits else {}
    if upstream.strip():
        settings["upstream"] = parents.upstream_of_url(upstream.strip(), option)
    return Login(name, password, settings, tuple(options.origins(option)))
