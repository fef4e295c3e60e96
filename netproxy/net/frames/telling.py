"""A client's stream that carries messages between its frames of datagrams.  Thread: any."""

from __future__ import annotations

from netproxy.interfaces.services import refuse_dropped
from netproxy.net.frames.framed import QUEUE_LIMIT, FramedSocket


class TellingSocket(FramedSocket):
    """The stream of a client, which is told something now and then."""

    def tell(self, data: bytes) -> None:
        """Send a message behind what waits.  Never blocks.

        A client that reads nothing is told nothing any more.
        """
        with self._lock:
            is_full = len(self._queue) + len(data) > QUEUE_LIMIT
            if not (self.closed or is_full):
                self._queue += data
        if is_full:
            refuse_dropped(self._counter, "stream full")
        else:
            self.flush()
