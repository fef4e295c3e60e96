"""Every error that NetProxy raises on purpose, and why files cannot be read.

OSError is translated into one of these at the edge (net/ and dialer/direct.py);
everything above deals with this tree alone.  A message never holds a secret.
"""

from __future__ import annotations

import enum
import errno
import os
import stat

from netproxy.typed import IO, Callable, Final, Iterable, TypeVar

Part = TypeVar("Part")
Made = TypeVar("Made")


def printable(text: str) -> str:
    """Return the text with \\x, \\u and \\n escapes for everything that is not printable.

    Characters that change the direction of text, or that have no width, are not printable.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def cannot_read(error: OSError, path: str) -> str:
    """Return why a file cannot be read; if its permissions forbid it, with what to do.

    Files of /etc belong to root, whose keys and tokens the daemon's group cannot read.
    """
    reason = error.strerror or str(error)
    if error.errno != errno.EACCES:
        return reason
    import grp  # late: few files cannot be read

    number = os.getegid()
    try:
        group = grp.getgrgid(number).gr_name
    except KeyError:
        group = str(number)
    return f"{reason} (as root: chgrp {group} {path} && chmod g+r {path})"


def open_regular(path: str) -> IO[bytes]:
    """Open a file that the configuration names.  Raises OSError, also for a FIFO or a device.

    Opening a FIFO would wait until another process writes into it, perhaps for ever.
    """
    return open(path, "rb", opener=_open_regular)


def check_regular(path: str) -> None:
    """Raise OSError as open_regular(), for files that a library opens by their names."""
    open_regular(path).close()


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(descriptor).st_mode
    # open() itself refuses a directory.
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file", path)


class NetProxyError(Exception):
    """The base class of all errors in this module."""


class ConfigError(NetProxyError):
    """The configuration or the command line has an error."""

    def __init__(self, message: str, place: str = "") -> None:
        """`place` is where the error is: "file:line:column" or an option; "" if unknown.

        The text may repeat what a user has written: it becomes one line that a terminal shows.
        """
        super().__init__(printable(f"{place}: {message}" if place else message))

    @classmethod
    def joined(cls, errors: Iterable[ConfigError]) -> ConfigError:
        """Return one error with the lines of several, each line once."""
        error = cls("")
        lines = (line for given in errors for line in str(given).split("\n"))
        error.args = ("\n".join(dict.fromkeys(lines)),)
        return error


def for_all(make: Callable[[Part], Made], parts: Iterable[Part]) -> list[Made]:
    """Return make(part) for all parts.  Raises ConfigError with the errors of all of them."""
    made: list[Made] = []
    errors: list[ConfigError] = []
    for part in parts:
        try:
            made.append(make(part))
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise ConfigError.joined(errors)
    return made


class CannotLoad(NetProxyError, OSError):
    """A module is needed for the first time, and no file can be opened.  It may succeed later.

    Not an ImportError: the module is there.
    """

    def __init__(self, name: str, error: OSError) -> None:
        super().__init__(error.errno, f"{name} cannot be loaded: {error.strerror}")

    def __str__(self) -> str:
        return str(self.strerror)


class LoginUnavailable(NetProxyError):
    """A password could not be checked; the client is refused, whoever it is."""


class LoginPenalised(NetProxyError):
    """A password was not checked, because logins of the client have failed too often."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: after so long the client may log in again."""
        super().__init__("too many failed logins from this address")
        self.seconds = seconds


class ListenError(NetProxyError):
    """A socket could not be bound; the message names the address."""


class ProtocolError(NetProxyError):
    """A peer sent bytes that its protocol does not allow."""


class EndOfStream(ProtocolError):
    """The peer closed the connection before all expected bytes had come."""

    def __init__(self, message: str, partial: bool) -> None:
        """`partial` is True if some of the expected bytes had come."""
        super().__init__(message)
        self.partial = partial


class LimitError(ProtocolError):
    """A separator was not found within the allowed number of bytes."""


class StreamError(NetProxyError):
    """The transport under a stream failed (reset, unreachable)."""


class DeadlineError(StreamError):
    """A stream could not be read or written before its deadline."""


class ClientLeft(StreamError):
    """The client left while something was done for it."""


class Reason(enum.Enum):
    """Why a dial failed.  Each protocol has one literal table from here to its reply."""

    GENERAL = "failed"
    DENIED = "not allowed by the rules"
    NETWORK_UNREACHABLE = "network unreachable"
    HOST_UNREACHABLE = "host unreachable"
    NAME = "name not resolved"
    REFUSED = "connection refused"
    TIMEOUT = "timed out"
    UNSUPPORTED = "not supported by this upstream"
    AUTHENTICATION = "the upstream refused the credentials"
    PROTOCOL = "the upstream broke its protocol"
    LOOP = "the connection would loop back to this proxy"
    LIMIT = "a limit of this proxy is reached"


_OF_THE_UPSTREAM = {
    Reason.DENIED: "not allowed by the rules of the upstream",
    Reason.LOOP: "the connection would loop back to the upstream",
    Reason.LIMIT: "a limit of the upstream is reached",
}
"""The words of reasons that a proxy has told, where those of Reason speak of this daemon."""
_OF_THE_KERNEL = "not permitted by the kernel of this machine"
OF_OTHERS = (*_OF_THE_UPSTREAM.values(), _OF_THE_KERNEL)
"""Words of DialError.why beside those of Reason."""


class DialError(NetProxyError):
    """A target or an upstream could not be reached.

    The fields are final.  A caller that knows more raises a new error: see at_hop().
    """

    def __init__(
        self,
        reason: Reason,
        detail: str = "",
        said: str = "",
        hop: str = "",
        upstream: bool = False,
        decided: str = "",
        tried: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """Describe the failure.

        `detail` names what could not be reached.  `said` tells the reason in the words of the
        proxy or of the kernel, in place of the reason's own text.  `hop` is the label of the
        proxy that failed or that reported the failure.  `upstream` is True if the upstream is
        at fault, not the target: then another upstream may succeed.  `decided` names what of
        this daemon's own configuration has refused the flow; it is for records alone, and so is
        `tried`: the addresses that were dialled, each with its failure.
        """
        super().__init__()
        self.reason: Final = reason
        self.detail: Final = detail
        self.said: Final = said
        self.hop: Final = hop
        self.upstream: Final = upstream
        self.decided: Final = decided
        self.tried: Final = tried
        self.id = ""
        """The id of its record, which a client may be told; see recorded_as()."""

    def at_hop(self, hop: str, upstream: bool | None = None) -> DialError:
        """Return the same error with the label of a hop.

        `upstream` replaces that field, None keeps it.
        """
        fault = self.upstream if upstream is None else upstream
        return DialError(self.reason, self.detail, self.said, hop, fault, self.decided, self.tried)

    def recorded_as(self, name: str) -> DialError:
        """Return the same error with the id of its record."""
        error = type(self)(
            *(self.reason, self.detail, self.said, self.hop, self.upstream),
            decided=self.decided,
            tried=self.tried,
        )
        error.id = name
        return error

    def decided_by(self, rule: str) -> str:
        """Return what of this daemon's configuration has refused the flow, "" for nothing.

        `rule` is that of the flow's route: the upstream "block" refuses what it gets.
        """
        is_blocked = self.reason is Reason.DENIED and not self.hop and not self.tried
        return self.decided or (rule if is_blocked else "")

    @property
    def why(self) -> str:
        """The reason in words, which tell who has refused: this daemon, its kernel or a proxy."""
        if self.decided:
            return self.reason.value
        if self.reason is Reason.DENIED and self.tried:
            return _OF_THE_KERNEL
        return (self.hop and _OF_THE_UPSTREAM.get(self.reason)) or self.reason.value

    @property
    def ended(self) -> str:
        """How the record of the flow tells the failure; its target stands there already."""
        if self.hop:
            return str(self)
        return (self.reason is Reason.GENERAL and self.said) or self.why

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.hop, self.detail, self.said or self.why)))


class FlowRefused(DialError):
    """A flow is refused before it is dialled.

    A limit, a ban or the end of a user's terms refuses it, or its fake address has no name.
    `said` is the reason of its record and of its counter: a few words, none from a client.
    """


class QueryRefused(NetProxyError):
    """A query of a client of a dns listener is answered with a failure."""

    def __init__(self, reason: str, decided: str) -> None:
        """`reason`: a few words, none from a client.  `decided`: the key that has refused it."""
        super().__init__(reason)
        self.reason: Final = reason
        self.decided: Final = decided


ReplyTable = dict[Reason, int]
"""The shape of each protocol's table of replies."""
