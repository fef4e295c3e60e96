"""Streams whose framing is agreed on as it goes: both ends register what frames stand for.

Such a framing answers some of the frames that it reads, and has no frame for some addresses.
Answers go by the stream's queue, in front of nothing and dropped by nothing: the stream ends if
too many of them wait.  Both roles are those of framed.py.
"""

from __future__ import annotations

from netproxy.interfaces.datagrams import Framing
from netproxy.interfaces.services import refuse_dropped
from netproxy.net.frames.framed import FramedConn, FramedSocket, FramedStream
from netproxy.typed import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Arena, Batch, Run
    from netproxy.interfaces.services import Counter

ANSWERS_LIMIT = 1 << 13
"""Bytes of answers that wait for the stream: those to some hundred registrations.  The other end
that sends on and reads nothing is no use."""


class AnsweringFraming(Framing, Protocol):
    """A framing that both ends agree on as it goes."""

    def take_answers(self) -> bytes:
        """Return what is to be sent for the frames that find() has read."""

    def takes(self, address: bytes) -> bool:
        """Return whether there are frames for a raw address now.  Thread: any."""


class AnsweringStream(FramedStream):
    """What the two roles share."""

    def __init__(self, stream: Stream, framing: AnsweringFraming, counter: Counter) -> None:
        """Take over a connected stream.  Raises StreamError or DialError."""
        self._answering = framing
        # Bytes of answers since the queue was last empty; guarded by the queue's lock.
        self._waiting_answers = 0
        super().__init__(stream, framing, counter)

    def receive(self, arena: Arena) -> Batch:
        """Return the frames that are there, as FramedStream does, and send the answers."""
        batch = super().receive(arena)
        self.answer()
        return batch

    def answer(self) -> None:
        """Send the answers of the framing.  Never blocks."""
        answers = self._answering.take_answers()
        if not answers or self.closed:
            return
        with self._lock:
            was_empty = not self._queue
            if was_empty:
                self._waiting_answers = 0
                answers = answers[self._write(answers) :]
            self._waiting_answers += len(answers)
            if self._waiting_answers > ANSWERS_LIMIT:
                refuse_dropped(self._counter, "too many answers")
                self.ended = self.failed = True
                self._stream.shutdown()
                return
            self._queue += answers
            begins_to_wait = was_empty and bool(self._queue)
        if begins_to_wait:
            self._watch()

    def _send_frames(self, arena: Arena, run: Run, address: bytes, before: bytes) -> None:
        if self._answering.takes(address):
            super()._send_frames(arena, run, address, before)
        else:
            refuse_dropped(self._counter, "no context", len(run.offsets))


class AnsweringSocket(AnsweringStream, FramedSocket):
    """The stream of a client."""


class AnsweringConn(AnsweringStream, FramedConn):
    """A PacketConn: the stream leads to a proxy."""
