"""Asks the router of this network something by UDP, and waits for the answer for a moment.

Blocks: for threads that may wait.  The socket is connected, so that only the router's answers
come, and the kernel says at once that the router has nothing at the port.
"""

from __future__ import annotations

import select
import socket
import time

from netproxy.errors import DialError, ProtocolError, Reason
from netproxy.net.address import family_and_sockaddr, from_sockaddr, to_sockaddr
from netproxy.typed import TYPE_CHECKING, Callable, Sequence, TypeVar

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address

Answer = TypeVar("Answer")

ANSWER_LIMIT = 1500
"""Bytes of an answer: no protocol of routers has longer ones."""
WAITS = (0.25, 0.5, 1.0)
"""Seconds after each try.  RFC 6886 begins with 250 ms and doubles; RFC 6887 begins with 3 s,
for servers that are far away.  The router is the next hop: after these its caller tries later."""


class RouterSocket:
    """A UDP socket that is connected to the router.  Thread: one at a time."""

    def __init__(self, router: Address, source: str = "") -> None:
        """Connect; `source`: the local address, "" for the one that the kernel chooses.

        Raises DialError.
        """
        self._router = router
        family, sockaddr = family_and_sockaddr(router)
        try:
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
        except OSError as error:
            raise self._error(error) from error
        try:
            if source:
                self._socket.bind(to_sockaddr(router._replace(host=source, port=0), family))
            self._socket.connect(sockaddr)
            self.local = from_sockaddr(self._socket.getsockname()).host
            """The address that the router sees."""
        except OSError as error:
            self._socket.close()
            raise self._error(error) from error

    def ask(
        self,
        request: bytes,
        accept: Callable[[bytes], Answer | None],
        waits: Sequence[float] = WAITS,
    ) -> Answer:
        """Send a request until an answer comes that `accept` returns something for.

        What it returns None or raises ProtocolError for is no answer to the request, and is
        skipped.  Raises DialError.  Blocks for the sum of `waits` at most.
        """
        for seconds in waits:
            try:
                self._socket.send(request)
                deadline = time.monotonic() + seconds
                while (left := deadline - time.monotonic()) > 0:
                    if not self._wait(left):
                        break
                    answer = self._accepted(accept)
                    if answer is not None:
                        return answer
            except OSError as error:
                raise self._error(error) from error
        raise DialError(Reason.TIMEOUT, str(self._router), said="no answer")

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _accepted(self, accept: Callable[[bytes], Answer | None]) -> Answer | None:
        try:
            return accept(self._socket.recv(ANSWER_LIMIT, socket.MSG_DONTWAIT))
        except BlockingIOError:
            # A datagram with a wrong checksum.
            return None
        except ProtocolError:
            return None

    def _wait(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _error(self, error: OSError) -> DialError:
        refused = isinstance(error, ConnectionRefusedError)
        reason = Reason.REFUSED if refused else Reason.GENERAL
        said = "nothing listens there" if refused else error.strerror or str(error)
        return DialError(reason, str(self._router), said=said)
