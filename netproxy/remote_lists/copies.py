"""The copies of fetched lists, in a folder of their own.

They outlive the daemon, and so does the copy of a list that the configuration does not have any
more, until it is removed here.  Thread: main.
"""

from __future__ import annotations

import os
import re

from netproxy.typed import TYPE_CHECKING, Iterable

if TYPE_CHECKING:
    from netproxy.interfaces.services import Log, RemoteList

FRESH = ".new"
"""What follows the name of a copy while the list is fetched."""
_COPY = re.compile(r"[0-9a-f]{16}-.+")
"""The names that config.remote_lists gives: no other file of a user is removed."""


def remove_unused(folder: str, lists: Iterable[RemoteList], log: Log) -> None:
    """Remove the copies in `folder` of lists that are not among `lists`."""
    used = {path for wanted in lists for path in (wanted.path, wanted.path + FRESH)}
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("cannot look for unused copies of lists in %s: %s", folder, error.strerror)
        return
    for name in names:
        path = f"{folder}/{name}"
        if path in used or not _COPY.fullmatch(name):
            continue
        try:
            os.unlink(path)
        except OSError as error:
            log.warning("cannot remove %s, which no rule uses: %s", path, error.strerror)
        else:
            log.info("removed %s: no rule uses this list any more", path)
