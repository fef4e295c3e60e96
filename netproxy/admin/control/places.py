"""Where the control socket is if no configuration names it.

netproxyd makes the first of these places that it may use, netproxyctl asks at all of them.
"""

from __future__ import annotations

import os

from netproxy.interfaces.addresses import SOCKET_PATH_LIMIT
from netproxy.typed import Mapping, NamedTuple

SYSTEM_SOCKET = "/run/netproxy/control.sock"
USER_SOCKET = "netproxy/control.sock"
"""Below the runtime directory of the user."""
USER_FOLDERS = "/run/user"
"""Has the runtime directories of users, by their numbers, where systemd or elogind makes them."""

FOLDER_MODE = 0o755
"""The socket itself is for its owner alone; the runtime directory of a user is, too."""


class DefaultControl(NamedTuple):
    """The control socket of a daemon whose configuration names none."""

    path: str = ""
    """ "" if there is no place for it."""
    required: bool = False
    """True if the daemon does not start without it."""


def default_control(environ: Mapping[str, str], user: int, alone: bool) -> DefaultControl:
    """Return where a daemon of this user makes its socket.

    `alone` is True if the command line names no configuration: without a service manager only
    such a daemon has a default, because others may be several daemons of one user.
    """
    # Of several directories, with colons between them, the first.
    folder = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if folder:
        return DefaultControl(f"{folder}/control.sock", required=True)
    if not alone:
        return DefaultControl()
    return DefaultControl(next(filter(_may_make, default_paths(environ, user)), ""))


def default_paths(environ: Mapping[str, str], user: int) -> list[str]:
    """Return the paths of the system and of a user, the likelier one first.

    That of root is the system's: the runtime directory of root ends with its last session.
    """
    own = f"{environ.get('XDG_RUNTIME_DIR') or f'{USER_FOLDERS}/{user}'}/{USER_SOCKET}"
    return [SYSTEM_SOCKET, own] if user == 0 else [own, SYSTEM_SOCKET]


def make_folder(path: str) -> None:
    """Make the folder of a default socket, if it is missing.  Raises OSError."""
    os.makedirs(os.path.dirname(path), FOLDER_MODE, exist_ok=True)


def _may_make(path: str) -> bool:
    """Return whether this process may make a file there, or its folder.

    The folder, or the one above, belongs to this user: the runtime directory of another user may
    have come with sudo.
    """
    folder = os.path.dirname(path)
    if not path.startswith("/") or len(path.encode()) > SOCKET_PATH_LIMIT:
        return False
    if not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    try:
        owner = os.stat(folder).st_uid
    except OSError:
        return False
    return owner == os.geteuid() and os.access(folder, os.W_OK | os.X_OK)
