"""Makes the dialers of upstreams that are programs, and keeps the programs of all configurations.

Main thread only, except stop().
"""

from __future__ import annotations

import os

from netproxy.errors import ConfigError
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.config.schema import HopConfig
    from netproxy.dialer.plain.programs import Programs
    from netproxy.interfaces.routing import Dialer
    from netproxy.interfaces.services import Expirable, Log

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where programs are looked for, whatever the environment of the daemon says."""


class CommandFactory:
    """Makes the dialers of programs.  Their programs run on after a reload."""

    def __init__(self, log: Log, register: Callable[[Expirable], None]) -> None:
        """`register` makes the janitor look through a table."""
        self._log = log
        self._register = register
        # Made with the first dialer: few configurations have one.
        self._programs: Programs | None = None

    def dialer(self, config: HopConfig, upstream: str) -> Dialer:
        """Return a dialer of its own for a step of an upstream.

        Raises ConfigError if the program cannot be run.
        """
        from netproxy.dialer.plain.command import CommandDialer  # late: see __init__()
        from netproxy.dialer.plain.programs import Programs

        path = find_program(config.command[0])
        if not path:
            message = f"command: {config.command[0]} is not a program that can be run"
            raise ConfigError(message, config.place)
        if self._programs is None:
            self._programs = Programs(self._log)
            self._register(self._programs)
        label = f"'{upstream}' ({config.url})" if upstream else config.url
        command = (path, *config.command[1:])
        return CommandDialer(
            upstream or config.url, label, command, config.processes, self._programs
        )

    def stop(self) -> None:
        """Kill the programs that still run, and start no more."""
        if self._programs is not None:
            self._programs.stop()


def find_program(name: str) -> str:
    """Return the path of a program, "" if it is not found or may not be run."""
    paths = [name] if "/" in name else [f"{folder}/{name}" for folder in PATH.split(":")]
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), "")
