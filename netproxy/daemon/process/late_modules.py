"""Refuses modules that cannot be loaded while the daemon runs.

Many modules are loaded when they are first needed.  After an upgrade of the package the files on
disk are those of another version, which may not fit what is loaded.  And there may be no descriptor
for a file: then a CannotLoad tells so.  Another thread may take the last descriptor between the
look and the load, which raises an OSError of the interpreter.  Thread: any.
"""

from __future__ import annotations

import os
import sys

import netproxy
from netproxy.errors import CannotLoad, NetProxyError


class PackageReplaced(NetProxyError, ImportError):
    """A module is needed, and the package is not that of the start."""

    def __init__(self) -> None:
        super().__init__("netproxy was upgraded or removed while it runs: restart netproxyd")


class LateModules:
    """Looks at the package before a module is loaded.  A finder of sys.meta_path."""

    def __init__(self) -> None:
        self._file = str(netproxy.__file__)
        self._at_start = self._look()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Leave the module to the other finders.  Raises PackageReplaced, CannotLoad."""
        if name.startswith("netproxy.") and self._look() != self._at_start:
            raise PackageReplaced()
        if name in sys.builtin_module_names:
            return
        try:
            os.close(os.open(self._file, os.O_RDONLY | os.O_CLOEXEC))
        except (FileNotFoundError, NotADirectoryError):
            pass  # the package was removed, or is an archive; the module is not of it
        except OSError as error:
            raise CannotLoad(name, error) from error

    def _look(self) -> tuple[int, ...]:
        """Return what tells the file with the version from that of another package."""
        try:
            status = os.stat(self._file)
        except OSError:
            return ()
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def guard() -> None:
    """Refuse modules of another package from now on."""
    sys.meta_path.insert(0, LateModules())
