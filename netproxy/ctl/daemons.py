"""Finds the daemon to ask: at the default places of its control socket, else among the processes.

Processes are only looked at to tell what is wrong.  Those of other users may be hidden.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from pathlib import Path

from netproxy.admin.control.ask import NotRunning
from netproxy.admin.control.places import default_paths
from netproxy.typed import Iterator, NamedTuple, Sequence

PROC = Path("/proc")
PROBE_SECONDS = 2.0
"""For the kernel to queue us at a socket: a daemon that accepts nobody has a queue that is full."""
SHOWN = 3
"""Processes to name in an error."""
NAME = "netproxyd"
NOT_SERVING = frozenset(("-t", "--check", "--explain", "-V", "--version", "-h", "--help"))
_LISTENS = 0x10000
"""The flag __SO_ACCEPTCON of /proc/net/unix."""


class Process(NamedTuple):
    """A netproxyd that runs."""

    pid: int
    command: str
    sockets: Sequence[str]
    """The paths of UNIX sockets that it listens on."""


def find_socket() -> str:
    """Return the path of the first default socket at which a daemon accepts.

    Raises NotRunning, which tells where it looked and what to do.
    """
    paths = default_paths(os.environ, os.geteuid())
    denied = ""
    for path in paths:
        fault = _probe(path)
        if not fault:
            return path
        if fault in (errno.EACCES, errno.EPERM):
            denied = denied or path
    if denied:
        raise NotRunning(f"{denied}: permission denied; the daemon belongs to another user")
    processes = list(running())
    if not processes:
        places = " and ".join(paths)
        raise NotRunning(f"not running: nothing answers at {places}, and no netproxyd was found")
    raise NotRunning("\n".join(map(_describe, processes[:SHOWN])))


def _probe(path: str) -> int:
    """Return 0 if somebody accepts at a path, else the number of the error."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno or errno.ETIMEDOUT
    return 0


def _describe(process: Process) -> str:
    head = f"netproxyd runs as process {process.pid} ({process.command}), but "
    if process.sockets:
        places = " or ".join(process.sockets)
        return f"{head}not with a default control socket: use -s {places}"
    return f"{head}has no control socket: set control: in its configuration"


def running() -> Iterator[Process]:
    """Yield the daemons among the processes that this user may see; workers are not told apart."""
    daemons = {}
    for folder in PROC.iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            words = _words(folder)
            if is_netproxyd(words):
                daemons[int(folder.name)] = words
    listening = _listening() if daemons else {}
    for pid, words in sorted(daemons.items()):
        if _parent(pid) not in daemons:
            yield Process(pid, " ".join(words), list(_sockets(pid, listening)))


def is_netproxyd(words: Sequence[str]) -> bool:
    """Return whether a command line is that of a daemon: netproxyd, or python3 -m netproxy."""
    program, rest = os.path.basename(words[0]), list(words[1:])
    if program.startswith("python"):
        while rest and rest[0].startswith("-") and rest[0] != "-m":
            del rest[0]
        if rest[:2] == ["-m", "netproxy"]:
            program, rest = NAME, rest[2:]
        elif rest:
            program, rest = os.path.basename(rest[0]), rest[1:]
    return program == NAME and rest[:1] != ["ctl"] and not NOT_SERVING.intersection(rest)


def _words(folder: Path) -> list[str]:
    try:
        command = (folder / "cmdline").read_bytes()
    except OSError:
        # It has ended, or is hidden.
        return [""]
    return command.decode("utf-8", "replace").rstrip("\0").split("\0")


def _parent(pid: int) -> int:
    try:
        # The name of the program may have blanks and parentheses.
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _listening() -> dict[str, str]:
    """Return the paths of the UNIX sockets that are listened on, by inode."""
    try:
        lines = (PROC / "net/unix").read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}
    # Num RefCount Protocol Flags Type St Inode Path
    rows = (line.split(None, 7) for line in lines[1:])
    return {row[6]: row[7] for row in rows if len(row) == 8 and int(row[3], 16) & _LISTENS}


def _sockets(pid: int, listening: dict[str, str]) -> Iterator[str]:
    """Yield the paths that a process listens on; none if its descriptors are hidden."""
    folder = PROC / str(pid) / "fd"
    try:
        targets = [os.readlink(folder / name) for name in os.listdir(folder)]
    except OSError:
        return
    for target in targets:
        match = re.fullmatch(r"socket:\[(\d+)\]", target)
        if match and match[1] in listening:
            yield listening[match[1]]
