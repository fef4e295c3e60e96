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
import subprocess
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Iterator, Sequence

from netproxy.access.external.checks import Verdict
from netproxy.errors import LoginUnavailable

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


class CommandChecker:
    """A Checker that runs a program.  Thread: any."""

    def __init__(self, command: Sequence[str], log: Log) -> None:
        self._command = tuple(command)
        self._name = os.path.basename(self._command[0])
        self._log = log
        # Guards _running and _stopped.
        self._lock = threading.Lock()
        self._running: set[int] = set()
        """The programs that write their answer.  None of them has been reaped, so that its number
        stays the number of its group."""
        self._stopped = False

    def stop(self) -> None:
        """Kill the programs that run, and those that are started from now on."""
        with self._lock:
            self._stopped = True
            for number in self._running:
                _kill_group(number)

    def check(self, credentials: Credentials, deadline: float) -> Verdict:
        """Run the program; blocks.  Raises LoginUnavailable."""
        process = self._start(credentials)
        try:
            _write(process, b"%b\n%b\n" % (credentials.user.encode(), credentials.password))
            with self._killable(process):
                output, errors = self._read(process, deadline)
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise LoginUnavailable(f"{self._name} has not ended in time") from error
        finally:
            _end(process)
        self._tell(errors, credentials.password)
        if status not in (YES, NO):
            how = f"with status {status}" if status >= 0 else f"by signal {-status}"
            raise LoginUnavailable(f"{self._name} has ended {how}")
        return Verdict(status == YES, output.decode("utf-8", "replace").strip())

    def _start(self, credentials: Credentials) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": PATH,
            "LANG": "C.UTF-8",
            "NETPROXY_CLIENT": credentials.client,
            "NETPROXY_LISTENER": credentials.listener,
        }
        try:
            return subprocess.Popen(
                self._command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            why = getattr(error, "strerror", None) or error
            raise LoginUnavailable(f"{self._name} cannot be started: {why}") from error

    @contextmanager
    def _killable(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Let stop() kill a program meanwhile."""
        with self._lock:
            self._running.add(process.pid)
            if self._stopped:
                _kill_group(process.pid)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(process.pid)

    def _read(self, process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bytes]:
        """Return what the program writes, until it has closed its output.

        Raises LoginUnavailable.
        """
        assert process.stdout is not None and process.stderr is not None
        streams = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
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


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    """Send a program its input, which fits into a pipe; a program need not read it."""
    assert process.stdin is not None
    try:
        process.stdin.write(data)
    except BrokenPipeError:
        pass
    process.stdin.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes of a program; kill it and its group, and reap it, unless it was reaped."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    if process.returncode is None:
        _kill_group(process.pid)
        try:
            process.wait(REAP_SECONDS)
        except subprocess.TimeoutExpired:
            # Python reaps it before it starts another program.
            pass


def _kill_group(number: int) -> None:
    """Kill a program that has not been reaped, with its group, which has the same number."""
    try:
        os.killpg(number, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # Gone, or a setuid program, which ends by itself.
        pass
