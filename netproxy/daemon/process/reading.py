"""Reads the configuration in a process of its own.

PyYAML and the readers of the sections would take 2 MiB of an idle daemon until the next reload.
The process is forked, loads what is missing, and answers with the configuration, or with what is
wrong.  It holds no descriptor of the daemon: else no peer, and no program that the daemon has
started, would see that one has been closed meanwhile.  At the start the daemon has none, and the
file may be a descriptor that a shell has opened (-c <(...)).
Thread: main.
"""

from __future__ import annotations

import marshal
import os
import select
import signal
import sys
import time

from netproxy.daemon.process.forked import leave_parent
from netproxy.errors import ConfigError, NetProxyError
from netproxy.net import syscalls
from netproxy.typed import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    from typing import NoReturn

    from netproxy.config.schema import Config
    from netproxy.daemon.process.options import Options

ANSWER_SECONDS = 60.0
"""For the whole answer.  A file of the largest size takes a small machine some seconds.  A lock
that another thread has held at the fork, such as that of a module it imports, is never released
in the process: it does not answer then."""
LOOK_SECONDS = 0.5
"""Between two calls of `watch` while the process reads."""
PIECE = 1 << 16
"""Bytes of an answer that are read at once."""
_CONFIG, _ERROR = "config", "error"
"""Kinds of answers: a configuration, or the errors in it."""


class ReadingFailed(NetProxyError):
    """The process that reads the configuration gave no answer: the file may be right."""


def configure(options: Options) -> Config:
    """Return the configuration of the file and of the options.  Raises ConfigError."""
    from netproxy.daemon.process.configuring import configure  # late: see above

    return configure(options)


def _go_on() -> None:
    """Wait for the answer as long as it may take."""


def configure_apart(
    options: Options, watch: Callable[[], None] = _go_on, is_start: bool = False
) -> Config:
    """Return the same, read by another process; by this one if none can be had.

    `is_start`: the daemon has opened nothing yet, and the process keeps what it was given.
    `watch()` is called again and again meanwhile.  It raises an error to give up.
    Raises ConfigError, and ReadingFailed if the process does not answer.
    """
    try:
        reader, writer = os.pipe2(os.O_CLOEXEC)
    except OSError:
        return configure(options)
    try:
        process = os.fork()
    except OSError:  # the limit of processes, or no memory for it
        os.close(reader)
        os.close(writer)
        return configure(options)
    if not process:
        _answer(writer, options, is_start)
    os.close(writer)
    place = options.config or "the command line"
    try:
        answer = _read(reader, place, watch)
    except BaseException as error:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if isinstance(error, OSError):  # no memory
            text = f"{place}: cannot be read: {error.strerror}"
            raise ReadingFailed(text) from error
        raise
    finally:
        os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status < 0:
        want = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
        text = f"{place}: cannot be read: signal {-status} has ended the process that reads it"
        raise ReadingFailed(text + want)
    if status:
        return configure(options)  # a fault: it happens here again, and is reported as any other
    kind, value = marshal.loads(answer)
    if kind == _ERROR:
        raise ConfigError.joined(map(ConfigError, value.split("\n")))
    config: Config = unpack(value)
    return config


def _read(reader: int, place: str, watch: Callable[[], None]) -> bytes:
    """Return what the process writes until its end.  Raises ReadingFailed if that is late."""
    poll, pieces = select.poll(), list[bytes]()
    poll.register(reader, select.POLLIN)
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        if not poll.poll(LOOK_SECONDS * 1000):
            watch()
            continue
        piece = os.read(reader, PIECE)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
    raise ReadingFailed(f"{place}: is not read within {ANSWER_SECONDS:g} seconds")


# -- in the process that reads


def _answer(writer: int, options: Options, is_start: bool) -> NoReturn:
    """Read and answer; end the process without what the daemon does at its end."""
    status = 1
    try:
        if is_start:
            syscalls.die_with_parent()
        else:
            leave_parent({writer})
        try:
            answer = (_CONFIG, pack(configure(options)))
        except NetProxyError as error:
            answer = (_ERROR, str(error))
        # The end of the process closes the pipe: nobody waits for what comes after it.
        with open(writer, "wb", closefd=False) as file:
            file.write(marshal.dumps(answer))
        status = 0
    except BaseException:
        pass  # the status tells
    finally:
        os._exit(status)


# -- a configuration as values that marshal takes


def pack(value: Any) -> Any:
    """Return a value of the schema without classes.  A list stands for an object: class, fields.

    Any: what the fields of the schema are.
    """
    kind = type(value)
    if isinstance(value, tuple):
        fields = map(pack, value)
        return tuple(fields) if kind is tuple else [_name(kind), *fields]
    if isinstance(value, dict):
        return {key: pack(item) for key, item in value.items()}
    if kind is range:
        return [_name(kind), value.start, value.stop, value.step]
    return (
        [_name(kind), str.__str__(value)] if isinstance(value, str) and kind is not str else value
    )


def unpack(value: Any) -> Any:
    """Return what pack() was given.  Any: as there."""
    if isinstance(value, tuple):
        return tuple(map(unpack, value))
    if isinstance(value, dict):
        return {key: unpack(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    module, _, name = value[0].partition(":")
    kind, fields = getattr(sys.modules[module], name), map(unpack, value[1:])
    return tuple.__new__(kind, fields) if issubclass(kind, tuple) else kind(*fields)


def _name(kind: type) -> str:
    return sys.intern(f"{kind.__module__}:{kind.__qualname__}")
