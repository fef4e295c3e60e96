"""Lines between the parent and its workers: the parent asks, and a worker answers.

A line is a stream socketpair.  It carries JSON objects as the control socket does; each request
has the key "number", which its answer repeats.  An answer that comes after its deadline is
dropped.  Asking: any thread, and none waits longer than its deadline.  Each line has a thread
that reads the answers.  The worker's end is questions.py.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

from netproxy.admin.control.client import ANSWER_LIMIT
from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.admin.control.client import CommandRequest
    from netproxy.interfaces.answers import JsonValue

ASK_SECONDS = 1.0
"""For a worker to answer."""
STOP_SECONDS = 1.0
"""For the thread that reads answers to end."""
UNANSWERED_LIMIT = 32
"""Questions that one worker may owe answers to: more than there are clients of the control socket.
No more are sent to it."""
CHUNK = 1 << 18
"""Bytes to receive at once: ten thousand flows are a few MiB."""


class Answer(NamedTuple):
    """The outcome of a question."""

    line: WorkerLine
    result: JsonValue = None
    """The answer."""
    refusal: str = ""
    """Why the worker has refused the command; "" if it has not."""
    fault: str = ""
    """What tells that there is no answer, such as "worker 2 does not answer"; "" if there is."""


class Question:
    """A question that has been asked."""

    __slots__ = ("line", "_done", "_answer")

    def __init__(self, line: WorkerLine) -> None:
        self.line = line
        self._done = threading.Event()
        self._answer = Answer(line, fault=f"worker {line.index} does not answer")

    def finish(self, answer: Answer | None) -> None:
        """Note the answer; None: there will be none.  Thread: that of the line."""
        self._answer = answer or self._answer
        self._done.set()

    def answer(self, deadline: float) -> Answer:
        """Wait for the answer until `deadline` (monotonic seconds); return the outcome."""
        self._done.wait(max(0.0, deadline - time.monotonic()))
        return self._answer


class WorkerLine:
    """The parent's end of the line to one worker.  Thread: any."""

    def __init__(self, index: int, sock: socket.socket) -> None:
        """Take over the parent's end; `index` is the worker's number, from 0."""
        self.index = index
        self._socket = sock
        # Serializes sending.
        self._sending = threading.Lock()
        # Guards everything below.
        self._lock = threading.Lock()
        self._number = 0
        # The questions without an answer, also those whose deadline has passed, by number.
        self._unanswered: dict[int, Question] = {}
        # What the worker has not received yet.
        self._unsent = bytearray()
        # Started with the first question: a line may be made before a fork.
        self._thread: threading.Thread | None = None
        self._ended = False

    @property
    def ended(self) -> bool:
        """True if the worker has closed its end, or has sent what is no answer."""
        return self._ended

    def ask(self, request: CommandRequest, seconds: float = ASK_SECONDS) -> Answer:
        """Ask, and wait for the answer for at most `seconds`."""
        deadline = time.monotonic() + seconds
        return self.begin(request, deadline).answer(deadline)

    def begin(self, request: CommandRequest, deadline: float) -> Question:
        """Ask; wait no longer than `deadline` (monotonic seconds) for room to send."""
        # Imported late: a daemon without workers has no lines.
        import json

        question = Question(self)
        with self._lock:
            if self._ended or len(self._unanswered) >= UNANSWERED_LIMIT or not self._is_read():
                question.finish(None)
                return question
            self._number += 1
            self._unanswered[self._number] = question
            self._unsent += json.dumps({**request, "number": self._number}).encode() + b"\n"
        self._send(deadline)
        return question

    def close(self) -> None:
        """Close the line; questions without an answer end at once."""
        self._end()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
        with self._sending:
            self._socket.close()

    def _is_read(self) -> bool:
        """Start the thread if it does not run yet; return whether it runs.  Under the lock."""
        if self._thread is None:
            thread = threading.Thread(target=self._read, name=f"answers-{self.index}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # "can't start new thread"
                return False
            self._thread = thread
        return True

    def _send(self, deadline: float) -> None:
        """Send what is unsent; what is left at `deadline` goes with the next question."""
        if not self._sending.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return
        try:
            while unsent := bytes(self._unsent):
                try:
                    sent = self._socket.send(unsent, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    if not self._has_room(deadline):
                        return
                else:
                    with self._lock:
                        del self._unsent[:sent]
        except OSError:
            self._end()
        finally:
            self._sending.release()

    def _has_room(self, deadline: float) -> bool:
        """Wait until the worker takes more; return False if it does not until `deadline`."""
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            unanswered, self._unanswered = self._unanswered, {}
        for question in unanswered.values():
            question.finish(None)
        # Wakes the thread in recv().
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    # -- the thread

    def _read(self) -> None:
        # OSError: the worker has ended.  The others: what came is no answer.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            for line in read_lines(self._socket, ANSWER_LIMIT):
                self._deliver(line)
        self._end()

    def _deliver(self, line: bytes) -> None:
        """Pass an answer to the question of its number.

        Raises ValueError, TypeError or KeyError if it is none.
        """
        # Imported late, as above.
        import json

        message = json.loads(line)
        if "error" in message:
            answer = Answer(self, refusal=str(message["error"]))
        else:
            answer = Answer(self, message["result"])
        with self._lock:
            question = self._unanswered.pop(message["number"])
        question.finish(answer)


class WorkerLines:
    """The lines to the current workers, one each.  Thread: any."""

    def __init__(self, lines: Sequence[WorkerLine] = ()) -> None:
        # Guards _lines.
        self._lock = threading.Lock()
        self._lines = {line.index: line for line in lines}

    def replace(self, line: WorkerLine) -> None:
        """Use the line to the successor of a worker; the line before is closed."""
        with self._lock:
            before = self._lines.get(line.index)
            self._lines[line.index] = line
        if before is not None:
            before.close()

    def current(self) -> list[WorkerLine]:
        """Return the lines by the numbers of their workers."""
        with self._lock:
            return [self._lines[index] for index in sorted(self._lines)]

    def ask_all(self, request: CommandRequest, seconds: float = ASK_SECONDS) -> list[Answer]:
        """Ask all workers at once; return their answers after `seconds` at the latest."""
        deadline = time.monotonic() + seconds
        questions = [line.begin(request, deadline) for line in self.current()]
        return [question.answer(deadline) for question in questions]

    def close(self) -> None:
        """Close all lines."""
        for line in self.current():
            line.close()


def read_lines(sock: socket.socket, limit: int) -> Iterator[bytes]:
    """Yield the lines that come, until the end.

    Raises OSError, or ValueError for a line of more than `limit` bytes.
    """
    received, searched = bytearray(), 0
    while data := sock.recv(CHUNK):
        received += data
        while (end := received.find(b"\n", searched)) >= 0:
            yield bytes(received[:end])
            del received[: end + 1]
            searched = 0
        searched = len(received)
        if searched > limit:
            raise ValueError("the line is too long")
