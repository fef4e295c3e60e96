"""Checks a login with a program.

The program gets two lines on its standard input, the name and the password, and nothing of them
in its arguments or environment.  It ends with status 0 for yes or 1 for no, and may write a JSON
object to its standard output.  Every other end is a failure.  At the deadline the program and
all of its process group are killed.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import contextmanager

from netproxy.access.external.checker import Verdict
from netproxy.errors import LoginUnavailable
from netproxy.typed import TYPE_CHECKING, Iterator, Mapping, Sequence

if TYPE_CHECKING:
    from netproxy.access.login import Credentials
    from netproxy.interfaces.services import Log

OUTPUT_LIMIT, ERRORS_LIMIT, LINE_LIMIT = 8192, 2048, 200
"""Bytes of the program's output, and of its standard error, of which more is dropped; bytes of a
line in the log: so much shorter that a password which the limit has cut is not in the line."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
YES, NO = 0, 1
REAP_SECONDS = 1.0
"""A program that was killed ends within this time, unless a disk holds it up."""
FIRST_PAUSE, LONGEST_PAUSE = 0.0005, 0.05
"""Seconds between two looks whether a program that has closed its output has ended."""
IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that Python ignores; a program starts with their default actions."""


class CommandChecker:
    """A Checker that runs a program.  Thread: any."""

    def __init__(self, command: Sequence[str], log: Log) -> None:
        self._command = tuple(command)
        self._name = os.path.basename(self._command[0])
        self._log = log
        # Guards _running, _unreaped and _stopped.
        self._lock = threading.Lock()
        self._running: set[int] = set()
        """The programs that write their answer.  None of them has been reaped, so that its number
        stays the number of its group."""
        self._unreaped: list[_Program] = []
        """Programs that were killed and had not ended in time."""
        self._stopped = False

    def stop(self) -> None:
        """Kill the programs that run, and those that are started from now on."""
        with self._lock:
            self._stopped = True
            for number in self._running:
                _kill_group(number)

    def check(self, credentials: Credentials, deadline: float) -> Verdict:
        """Run the program; blocks.  Raises LoginUnavailable."""
        program = self._start(credentials)
        try:
            program.write(b"%b\n%b\n" % (credentials.user.encode(), credentials.password))
            with self._killable(program.number):
                output, errors = self._read(program, deadline)
            if not program.wait(deadline):
                raise LoginUnavailable(f"{self._name} has not ended in time")
        finally:
            self._end(program)
        self._tell(errors, credentials.password)
        status = program.status
        if status not in (YES, NO):
            how = f"with status {status}" if status >= 0 else f"by signal {-status}"
            raise LoginUnavailable(f"{self._name} has ended {how}")
        return Verdict(status == YES, output.decode("utf-8", "replace").strip())

    def _start(self, credentials: Credentials) -> _Program:
        environment = {
            "PATH": PATH,
            "LANG": "C.UTF-8",
            "NETPROXY_CLIENT": credentials.client,
            "NETPROXY_LISTENER": credentials.listener,
        }
        with self._lock:
            self._unreaped = [program for program in self._unreaped if not program.has_ended()]
        try:
            return _Program(self._command, environment)
        except (OSError, ValueError, NotImplementedError) as error:
            why = getattr(error, "strerror", None) or error
            raise LoginUnavailable(f"{self._name} cannot be started: {why}") from error

    @contextmanager
    def _killable(self, number: int) -> Iterator[None]:
        """Let stop() kill a program meanwhile."""
        with self._lock:
            self._running.add(number)
            if self._stopped:
                _kill_group(number)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(number)

    def _read(self, program: _Program, deadline: float) -> tuple[bytes, bytes]:
        """Return what the program writes, until it has closed its output.

        Raises LoginUnavailable.
        """
        streams = {program.output: bytearray(), program.errors: bytearray()}
        output, errors = streams.values()
        poll = select.poll()
        for descriptor in streams:
            poll.register(descriptor, select.POLLIN)
        left = len(streams)
        while left:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                raise LoginUnavailable(f"{self._name} has not ended in time")
            for descriptor, _ in poll.poll(seconds * 1000):
                data = os.read(descriptor, OUTPUT_LIMIT)
                if not data:
                    poll.unregister(descriptor)
                    left -= 1
                streams[descriptor] += data
                del errors[ERRORS_LIMIT:]
                if len(output) > OUTPUT_LIMIT:
                    raise LoginUnavailable(f"{self._name} writes more than {OUTPUT_LIMIT} bytes")
        return bytes(output), bytes(errors)

    def _end(self, program: _Program) -> None:
        """Close the pipes of a program; kill it and its group, and reap it, unless it has ended."""
        program.close()
        if program.has_ended():
            return
        _kill_group(program.number)
        if not program.wait(time.monotonic() + REAP_SECONDS):
            # It is reaped before another program starts.
            with self._lock:
                self._unreaped.append(program)

    def _tell(self, errors: bytes, password: bytes) -> None:
        """Write the first line of the program's errors to the log, at level debug."""
        line = errors.strip().partition(b"\n")[0]
        if not line:
            return
        # Programs may show their input, whole or in pieces: the whole output is looked through.
        if password in errors:
            line = b"(left out: it has the password)"
        text = line[:LINE_LIMIT].decode("utf-8", "replace")
        self._log.debug("auth: %s says: %s", self._name, text)


class _Program:
    """A program that runs in a session of its own, and its pipes.

    posix_spawn() starts it with no signal blocked.  The daemon's threads block the signals that
    its main thread waits for, and a program would inherit that: SIGTERM would not end it.
    subprocess can reset the mask only through preexec_fn, which may deadlock in a process with
    threads.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Raises OSError and others if the program cannot be started."""
        self.status = 0
        """The exit status, or minus the number of the signal; valid once has_ended()."""
        self._is_reaped = False
        pipes: list[int] = []
        try:
            for _ in range(3):
                pipes += os.pipe()
            theirs = (pipes[0], pipes[3], pipes[5])
            self.number = os.posix_spawn(
                command[0],
                list(command),
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, descriptor, number)
                    for number, descriptor in enumerate(theirs)
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=IGNORED,
            )
        except BaseException:
            for descriptor in pipes:
                os.close(descriptor)
            raise
        for descriptor in theirs:
            os.close(descriptor)
        self._input, self.output, self.errors = pipes[1], pipes[2], pipes[4]

    def write(self, data: bytes) -> None:
        """Send the program its input, which fits into a pipe; the program need not read it."""
        try:
            os.write(self._input, data)
        except BrokenPipeError:
            pass
        os.close(self._input)
        self._input = -1

    def has_ended(self) -> bool:
        """Return whether the program has ended; reap it then."""
        if not self._is_reaped:
            number, status = os.waitpid(self.number, os.WNOHANG)
            if number:
                self._is_reaped, self.status = True, os.waitstatus_to_exitcode(status)
        return self._is_reaped

    def wait(self, deadline: float) -> bool:
        """Return whether the program has ended, at the deadline at the latest."""
        pause = FIRST_PAUSE
        while not self.has_ended():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
        return True

    def close(self) -> None:
        """Close the pipes."""
        for descriptor in (self._input, self.output, self.errors):
            if descriptor >= 0:
                os.close(descriptor)


def _kill_group(number: int) -> None:
    """Kill a program that has not been reaped, with its group, which has the same number."""
    try:
        os.killpg(number, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # Gone, or a setuid program, which ends by itself.
        pass
