"""What the dialers through another proxy share: reaching it, and saying which hop failed why."""
from __future__ import annotations

from copy import copy
from typing import Any, Callable, NamedTuple

from netproxy.errors import DeadlineError, DialError, ProtocolError, Reason, StreamError
from netproxy.interfaces import Address, Dialer, Flow
from netproxy.net.stream import Stream

# These a proxy says of itself; with any other it speaks of the target.
OWN_FAULTS = frozenset({Reason.AUTHENTICATION, Reason.PROTOCOL})


class Hop(NamedTuple):
    """One proxy on the way: where it is and how it is reached."""

    name: str               # of the way out, in records and rules
    label: str              # of this proxy, in errors: "hop 2 of 'office' (http://proxy.example:8080)"
    server: Address
    via: Dialer             # the hop before it, in the end a direct one
    seconds: float          # for the proxy's handshake
    user: str = ""
    password: str = ""      # in no message, name or log
    secure: Callable[[Stream], None] | None = None      # the TLS handshake with it, where it has one

    def __repr__(self) -> str:
        return self.label

    def open(self, flow: Flow, greet: Callable[[Stream], None], wanted: str = "") -> Stream:
        """A stream to the proxy on which `greet` has made the wanted connection.

        DialError names the hop and, where it broke off, what was `wanted` of it.
        """
        try:
            stream = self.via.dial(flow.to_hop(self.server))
        except DialError as error:
            if not error.hop:
                error.hop, error.detail = self.label, "" if error.detail == str(self.server) else error.detail
            error.upstream = True
            raise
        try:
            stream.limit(self.seconds)
            if self.secure is not None:
                self.secure(stream)
            greet(stream)
            stream.limit(None)
            return stream
        except BaseException as error:
            stream.close()
            if (translated := self._translate(error, wanted)) is error:
                raise
            raise translated from error

    def pinned(self, dialer: Any, flow: Flow) -> Any:
        """`dialer`, which has this hop as `_hop`, or one like it by the way that groups before the hop have chosen."""
        via = self.via.pinned(flow.to_hop(self.server, flow.network))
        if via is self.via:
            return dialer
        other = copy(dialer)
        other._hop = self._replace(via=via)
        return other

    def _translate(self, error: BaseException, wanted: str) -> BaseException:
        """An error of the proxy's or the connection to it, with the hop's name."""
        failure = error
        if isinstance(error, DeadlineError):
            failure = DialError(Reason.TIMEOUT, wanted)
        elif isinstance(error, ProtocolError):
            failure = DialError(Reason.PROTOCOL, wanted, str(error))
        elif isinstance(error, StreamError):
            failure = DialError(Reason.GENERAL, wanted, str(error))
        if isinstance(failure, DialError):
            failure.hop = self.label
            failure.upstream = failure is not error or failure.reason in OWN_FAULTS
        return failure
