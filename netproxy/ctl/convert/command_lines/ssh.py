"""An SSH server as an upstream: ssh(1) runs for each connection, without asking for anything."""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Value

DIFFERENT = "ssh(1) runs for each connection; the host key of the server must be known"
NO_PASSWORD = "ssh(1) takes no password from a file"
_PORT = "22"


def ssh_command(host: str, port: str, user: str, key: str) -> list[Value]:
    """Return the words of `command` of an upstream."""
    words = ["ssh", "-o", "BatchMode=yes"]
    words += ["-i", key] if key else []
    words += ["-p", port] if port not in ("", _PORT) else []
    words += ["-l", user] if user else []
    # The daemon replaces %h and %p.
    return [*(word.replace("%", "%%") for word in words), "-W", "[%h]:%p", host]
