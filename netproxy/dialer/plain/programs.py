"""Starts the programs of upstreams, reaps them, and writes their standard error to the log.

No thread waits for a program: the janitor looks at all of them once a second.  It reads what they
have written to their standard error, reaps those that have ended, and kills those that go on
although their connection is closed.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from netproxy.errors import DialError, Reason
from netproxy.typed import TYPE_CHECKING, Callable, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.services import Log

KILL_SECONDS = 2.0
"""A program whose connection is closed gets SIGTERM, and after this time SIGKILL."""
STOP_SECONDS = 1.0
"""How long stop() waits for programs that were killed."""
ERRORS_SIZE = 65536
"""Bytes that are read from a program's standard error at once, the size of a pipe."""
LINES_LIMIT, LINE_LIMIT = 10, 300
"""Lines of one program that are logged in a second, and characters of a line."""
IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that Python ignores; a program starts with their default actions."""
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
INHERITED = ("HOME", "USER", "LANG")
"""The variables that a program has from the daemon."""


class Programs:
    """The running programs of all upstreams; a table of the janitor.  Thread: any."""

    def __init__(self, log: Log) -> None:
        self._log = log
        # Guards everything below, and signals to programs that may be reaped.
        self._lock = threading.Lock()
        self._running: dict[int, Program] = {}
        """By process number."""
        self._counts: dict[str, int] = {}
        """Programs that run or are being started, by upstream."""
        self._stopped = False

    def start(
        self, upstream: str, arguments: Sequence[str], limit: int
    ) -> tuple[socket.socket, Program]:
        """Start a program; return the socket that is its standard input and output.

        `limit` is the most programs of `upstream` that may run at once.  Raises DialError.
        """
        self._reserve(upstream, limit)
        ours, theirs = None, None
        try:
            ours, theirs = socket.socketpair()
            program = self._spawn(upstream, arguments, theirs.fileno())
        except (OSError, ValueError, NotImplementedError) as error:
            if ours is not None:
                ours.close()
            self._release(upstream)
            why = getattr(error, "strerror", None) or error
            raise DialError(
                Reason.GENERAL, said=f"cannot be started: {why}", hop=upstream, upstream=True
            ) from error
        finally:
            if theirs is not None:
                theirs.close()
        ours.setblocking(False)
        with self._lock:
            self._running[program.number] = program
            if self._stopped:
                program.signal(signal.SIGKILL)
        return ours, program

    def _reserve(self, upstream: str, limit: int) -> None:
        """Count a program that is to be started.  Raises DialError."""
        with self._lock:
            count = self._counts.get(upstream, 0)
        if count >= limit:
            # Those that have ended since the janitor looked.
            self.expire(time.monotonic())
        with self._lock:
            if self._stopped or self._counts.get(upstream, 0) >= limit:
                key = "upstreams.NAME.processes"
                said = f"{limit} programs run already ({key})"
                raise DialError(Reason.LIMIT, said=said, hop=upstream, upstream=True, decided=key)
            self._counts[upstream] = self._counts.get(upstream, 0) + 1

    def _release(self, upstream: str) -> None:
        with self._lock:
            self._forget(upstream)

    def _forget(self, upstream: str) -> None:
        """Count a program out.  Call with the lock held."""
        self._counts[upstream] -= 1
        if not self._counts[upstream]:
            del self._counts[upstream]

    def _spawn(self, upstream: str, arguments: Sequence[str], descriptor: int) -> Program:
        """Start a program in a session of its own, with no signal blocked.  Raises OSError.

        The daemon's threads block the signals that its main thread waits for, and a program
        would inherit that.
        """
        errors, theirs = os.pipe()
        try:
            os.set_blocking(errors, False)
            inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
            number = os.posix_spawn(
                arguments[0],
                list(arguments),
                {**ENVIRONMENT, **inherited},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, descriptor, 0),
                    (os.POSIX_SPAWN_DUP2, descriptor, 1),
                    (os.POSIX_SPAWN_DUP2, theirs, 2),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=IGNORED,
            )
        except BaseException:
            os.close(errors)
            raise
        finally:
            os.close(theirs)
        return Program(self, upstream, number, errors)

    def end(self, program: Program) -> None:
        """Ask a program whose connection is closed to end.  Does not block."""
        with self._lock:
            if program.number in self._running:
                program.kill_at = time.monotonic() + KILL_SECONDS
                program.signal(signal.SIGTERM)

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Log what programs have written, reap those that have ended, and kill those that must."""
        with self._lock:
            running = list(self._running.values())
        for program in running:
            with self._lock:
                if program.number not in self._running:
                    continue
                if program.kill_at is not None and now >= program.kill_at:
                    program.signal(signal.SIGKILL)
                has_ended = program.reap()
                # Read after the end was seen: nothing comes after it.
                text = program.read_errors()
                if has_ended:
                    os.close(program.errors)
                    del self._running[program.number]
                    self._forget(program.upstream)
            self._tell(program, text)
            if has_ended:
                self._tell_end(program)
        return []

    def stop(self) -> None:
        """Kill all programs and wait for their end, for STOP_SECONDS at the most."""
        with self._lock:
            self._stopped = True
            for program in self._running.values():
                program.kill_at = 0.0
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            self.expire(time.monotonic())
            with self._lock:
                if not self._running or time.monotonic() >= deadline:
                    break
            time.sleep(0.01)
        for program in self._running.values():
            os.close(program.errors)
        self._running.clear()

    def __len__(self) -> int:
        """Return the number of programs that have not been reaped."""
        return len(self._running)

    def _tell(self, program: Program, text: str) -> None:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        for line in lines[:LINES_LIMIT]:
            self._log.info("%s: %s", program.upstream, line[:LINE_LIMIT])
        if left := len(lines) - LINES_LIMIT:
            if left > 0:
                self._log.info("%s: %d more lines are left out", program.upstream, left)

    def _tell_end(self, program: Program) -> None:
        if program.kill_at is None and program.status:
            how = f"with status {program.status}"
            if program.status < 0:
                how = f"by signal {-program.status}"
            self._log.limited(
                program.upstream, "%s: the program has ended %s", program.upstream, how
            )


class Program:
    """One running program.  Programs has the lock for everything except end()."""

    __slots__ = ("upstream", "number", "errors", "kill_at", "status", "_programs")

    def __init__(self, programs: Programs, upstream: str, number: int, errors: int) -> None:
        """`errors`: the descriptor of its standard error."""
        self.upstream = upstream
        self.number = number
        """The number of the process and of its group."""
        self.errors = errors
        self.kill_at: float | None = None
        """Monotonic; None while its connection is open."""
        self.status = 0
        """The exit status, or minus the number of the signal; valid once reaped."""
        self._programs = programs

    def end(self) -> None:
        """Ask the program to end: its connection is closed.  Does not block."""
        self._programs.end(self)

    def signal(self, number: int) -> None:
        """Send a signal to the program, which is not reaped, and its group."""
        try:
            os.killpg(self.number, number)
        except (ProcessLookupError, PermissionError):
            # Gone, or a setuid program, which ends by itself.
            pass

    def reap(self) -> bool:
        """Return whether the program has ended; end the rest of its group with it then.

        Until the program is reaped no other process or group can have its number.
        """
        if os.waitid(os.P_PID, self.number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self.signal(signal.SIGKILL)
        _, status = os.waitpid(self.number, 0)
        self.status = os.waitstatus_to_exitcode(status)
        return True

    def read_errors(self) -> str:
        """Return what the program has written to its standard error."""
        try:
            return os.read(self.errors, ERRORS_SIZE).decode("utf-8", "replace")
        except OSError:
            return ""
