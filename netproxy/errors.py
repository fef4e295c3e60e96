"""Every error that NetProxy raises on purpose.

OSError is translated into one of these at the edge (net/ and dialer/direct.py);
everything above deals with this tree alone.  A message never holds a secret.
"""

from __future__ import annotations

import enum
from typing import Final, Iterable


def printable(text: str) -> str:
    """Return the text with \\x, \\u and \\n escapes for everything that is not printable.

    Characters that change the direction of text, or that have no width, are not printable.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


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
        """Return one error with the texts of several, one a line."""
        error = cls("")
        error.args = ("\n".join(map(str, errors)),)
        return error


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
    ) -> None:
        """Describe the failure.

        `detail` names what could not be reached.  `said` tells the reason in the words of the
        proxy or of the kernel, in place of the reason's own text.  `hop` is the label of the
        proxy that failed or that reported the failure.  `upstream` is True if the upstream is
        at fault, not the target: then another upstream may succeed.  `decided` names what of
        this daemon's own configuration has refused the flow; it is for records alone.
        """
        super().__init__()
        self.reason: Final = reason
        self.detail: Final = detail
        self.said: Final = said
        self.hop: Final = hop
        self.upstream: Final = upstream
        self.decided: Final = decided

    def at_hop(self, hop: str, upstream: bool | None = None) -> DialError:
        """Return the same error with the label of a hop.

        `upstream` replaces that field, None keeps it.
        """
        fault = self.upstream if upstream is None else upstream
        return DialError(self.reason, self.detail, self.said, hop, fault, self.decided)

    def decided_by(self, rule: str) -> str:
        """Return what of this daemon's configuration has refused the flow, "" for nothing.

        `rule` is that of the flow's route: the upstream "block" refuses what it gets.
        """
        is_blocked = self.reason is Reason.DENIED and not self.hop
        return self.decided or (rule if is_blocked else "")

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.hop, self.detail, self.said or self.reason.value)))


class FlowRefused(DialError):
    """A limit, a ban or the end of a user's terms refuses a flow before it is dialled.

    `said` is the reason of its record and of its counter: a few words, none from a client.
    """


ReplyTable = dict[Reason, int]
"""The shape of each protocol's table of replies."""
