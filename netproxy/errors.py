"""Every error that NetProxy raises on purpose.

OSError is translated into one of these at the edge (net/ and dialer/direct.py);
everything above deals with this tree alone.  A message never holds a secret.
"""

import enum


class NetProxyError(Exception):
    """The root: whoever catches this has caught every error of ours."""


class ConfigError(NetProxyError):
    """What the user wrote cannot be used; `place` says where ("file:line:column" or an option)."""

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(f"{place}: {message}" if place else message)


class ListenError(NetProxyError):
    """A socket could not be bound; the message names the address."""


class ProtocolError(NetProxyError):
    """A peer sent bytes that its protocol does not allow."""


class EndOfStream(ProtocolError):
    """The peer closed where more bytes were due; `partial` tells whether it had begun to send them."""

    def __init__(self, message: str, partial: bool) -> None:
        super().__init__(message)
        self.partial = partial


class LimitError(ProtocolError):
    """A separator did not come within the bytes that it may take."""


class StreamError(NetProxyError):
    """The transport under a stream failed (reset, unreachable)."""


class DeadlineError(StreamError):
    """A stream did not deliver, or did not take, in the time it had."""


class Reason(enum.Enum):
    """Why a dial failed.  Each protocol has one literal table from here to its reply."""

    GENERAL = "failed"
    DENIED = "not allowed by the rules"
    NETWORK_UNREACHABLE = "network unreachable"
    HOST_UNREACHABLE = "host unreachable"
    NAME = "name not resolved"
    REFUSED = "connection refused"
    TIMEOUT = "timed out"
    UNSUPPORTED = "not supported on this way out"
    AUTHENTICATION = "the upstream refused the credentials"
    PROTOCOL = "the upstream broke its protocol"
    LOOP = "the connection would come back here"


class DialError(NetProxyError):
    """A target or an upstream could not be reached; `reason` says why, `detail` where.

    `said`: the same in the words of who said so.  `hop` is the proxy on the way that failed, or that told of it;
    `upstream` says that it was at fault, and not the target.
    """

    def __init__(self, reason: Reason, detail: str = "", said: str = "") -> None:
        super().__init__()
        self.reason = reason
        self.detail = detail
        self.said = said
        self.hop = ""
        self.upstream = False

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.hop, self.detail, self.said or self.reason.value)))


ReplyTable = dict[Reason, int]  # the shape of each protocol's table of replies
