"""Connects to UNIX sockets: proxies that listen at one, and targets that the configuration names.

Dials run on the thread that asks, and block while a service has too many connections to accept.
"""

from __future__ import annotations

from netproxy.dialer.direct import DIRECT
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import UnixAddress
from netproxy.interfaces.flows import Flow
from netproxy.net.local.unix import connect_unix
from netproxy.net.stream import Stream
from netproxy.typed import NoReturn


class UnixDialer:
    """A dialer for flows whose target is a UNIX socket."""

    name = DIRECT
    carries = frozenset({"tcp"})
    refusal = Reason.UNSUPPORTED
    symmetric = knows_bound = False
    resolves_names = True

    def __init__(self, seconds: float, is_hop: bool) -> None:
        """`seconds` limit a connection.  `is_hop`: the sockets are proxies, which errors name."""
        self._seconds = seconds
        self._is_hop = is_hop

    def fixed_for(self, flow: Flow) -> UnixDialer:
        """Return the dialer itself."""
        return self

    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target.  Raises DialError."""
        target = flow.target
        assert isinstance(target, UnixAddress)
        try:
            stream = Stream(connect_unix(target, self._seconds))
        except DialError as error:
            if self._is_hop:
                raise
            raise error.at_hop(str(target)) from error
        stream.hang_up = 0
        return stream

    def dial_packet(self, flow: Flow) -> NoReturn:
        """Raise DialError(UNSUPPORTED): a UNIX socket carries streams."""
        raise DialError(Reason.UNSUPPORTED, said=f"{flow.target} carries no UDP")
