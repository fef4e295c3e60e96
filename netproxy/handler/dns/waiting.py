"""The clients of a dns listener that wait for answers, by question.

A question is asked once for all clients that wait for its answer; it waits in the queue of
the query pool on behalf of each of them.  The room for clients is shared fairly.  Any thread.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict

from netproxy.interfaces.fairness import Claims, FairTable, client_key
from netproxy.net.address import from_sockaddr
from netproxy.protocol import dns_message
from netproxy.typed import TYPE_CHECKING, Callable, Hashable, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.handler.dns.handler import DnsHandler
    from netproxy.interfaces.datagrams import DatagramSocket, Destination

# Clients that wait for answers, some 600 bytes each with their queries.
WAITING_LIMIT = 4096
# Seconds that a connection waits for an answer that another client has asked for: name servers
# have five seconds.
ANSWER_SECONDS = 10.0


def question_key(query: bytes) -> bytes:
    """Return what a query shares with others that may get the same answer.

    Without a cache key it is all but the ID, so that a query that comes back through a
    circle of servers is not asked again.
    """
    key = dns_message.cache_key(query)
    return query[2:] if key is None else key


class WaitingClient(Protocol):
    """A client that waits for the answer to its query.  Neither method blocks."""

    client: str
    """The client's host."""
    network: str
    """ "udp" or "tcp"."""
    query: bytes

    def give(self, answer: bytes) -> None:
        """Take the answer."""

    def drop(self) -> None:
        """Take notice that there will be no answer."""


class WaitingStream:
    """A WaitingClient whose connection's thread waits."""

    __slots__ = ("client", "query", "_answers", "give")
    network = "tcp"

    def __init__(self, client: str, query: bytes) -> None:
        self.client = client
        self.query = query
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.give = self._answers.put

    def drop(self) -> None:
        """Wake the thread."""
        self._answers.put(b"")

    def wait(self) -> bytes:
        """Return the answer, b"" if there is none.  Blocks for at most ANSWER_SECONDS."""
        try:
            return self._answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            return b""


class PendingQuestion:
    """A question that waits for its turn, or is being asked.  PendingQuestions guards it."""

    __slots__ = ("key", "claims", "waiting")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.claims = Claims()
        self.waiting: OrderedDict[WaitingClient, None] = OrderedDict()


class PendingQuestions:
    """The questions that wait or are being asked, and who waits for their answers."""

    def __init__(self, note_drop: Callable[[str, WaitingClient], None]) -> None:
        """`note_drop(reason, client)` counts and records a client that gets no answer."""
        self._note_drop = note_drop
        # Guards everything below, and the questions.
        self._lock = threading.Lock()
        self._questions: dict[bytes, PendingQuestion] = {}
        # The clients that wait, each with its question.
        self._clients: FairTable[tuple[WaitingClient, PendingQuestion]] = FairTable(WAITING_LIMIT)

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self._questions)

    @property
    def waiting(self) -> int:
        """The number of clients that wait."""
        return len(self._clients)

    def join(self, key: bytes, waiting: WaitingClient) -> tuple[PendingQuestion, bool]:
        """Let a client wait for the answer to a question.

        Returns the question, and whether a task that asks it on behalf of the client must be
        submitted.
        """
        client = client_key(waiting.client)
        with self._lock:
            question, yielded = self._add(key, client, waiting)
            is_new_claim = question.claims.add(client)
        self._drop(yielded, "waiting queue full")
        return question, is_new_claim

    def join_now(self, key: bytes, waiting: WaitingClient) -> tuple[PendingQuestion, bool]:
        """Let a client wait for the answer to a question, and ask it at once.

        Returns the question, and whether the caller is the first that asks it.
        """
        with self._lock:
            question, yielded = self._add(key, client_key(waiting.client), waiting)
            is_first = question.claims.begin()
        self._drop(yielded, "waiting queue full")
        return question, is_first

    def begin(self, question: PendingQuestion) -> bool:
        """Return True if the caller is the first that asks a question."""
        with self._lock:
            return question.claims.begin()

    def answer(self, question: PendingQuestion, answer: Callable[[bytes], bytes]) -> None:
        """End a question: give `answer(query)` to all clients that wait."""
        for waiting in self._end(question):
            waiting.give(answer(waiting.query))

    def fail(self, question: PendingQuestion, reason: str) -> None:
        """End a question without an answer."""
        self._drop(self._end(question), reason)

    def drop_claim(self, question: PendingQuestion, client: str, reason: str) -> None:
        """Note that a task of a client was dropped; the question ends with its last task."""
        with self._lock:
            waiting = self._remove(question) if question.claims.drop(client_key(client)) else ()
        self._drop(waiting, reason)

    def _end(self, question: PendingQuestion) -> Sequence[WaitingClient]:
        with self._lock:
            return self._remove(question)

    def _drop(self, clients: Sequence[WaitingClient], reason: str) -> None:
        for waiting in clients:
            self._note_drop(reason, waiting)
            waiting.drop()

    # -- under the lock

    def _add(
        self, key: bytes, client: str, waiting: WaitingClient
    ) -> tuple[PendingQuestion, Sequence[WaitingClient]]:
        """Return the question, and the client that had to yield, if any."""
        question = self._questions.get(key)
        if question is None:
            question = self._questions[key] = PendingQuestion(key)
        question.waiting[waiting] = None
        yielded = self._clients.put(client, (waiting, question))
        if yielded is None:
            return question, ()
        loser, its_question = yielded
        del its_question.waiting[loser]
        return question, (loser,)

    def _remove(self, question: PendingQuestion) -> list[WaitingClient]:
        """Remove a question; return the clients that wait for its answer."""
        del self._questions[question.key]
        for waiting in question.waiting:
            self._clients.remove(client_key(waiting.client), (waiting, question))
        return list(question.waiting)


class DatagramClient:
    """The sender of a query over UDP (a WaitingClient)."""

    __slots__ = ("client", "query", "_handler", "_local", "_destination")
    network = "udp"

    def __init__(
        self,
        handler: DnsHandler,
        query: bytes,
        local: DatagramSocket,
        peer: Hashable,
        destination: Destination | None,
    ) -> None:
        self.client = from_sockaddr(local.peer(peer)).host
        self.query = query
        self._handler = handler
        self._local = local
        self._destination = destination

    def give(self, answer: bytes) -> None:
        """Send the answer.  Thread: a worker's or a connection's."""
        self._handler.send_later(answer, self.query, self._local, self._destination)

    def drop(self) -> None:
        """Do nothing: the client asks again."""


class QueryTask:
    """A question on behalf of one client (interfaces.fairness.ClientTask)."""

    __slots__ = ("client", "_handler", "_question", "_query")

    def __init__(
        self, handler: DnsHandler, question: PendingQuestion, client: WaitingClient
    ) -> None:
        self.client = client.client
        self._handler = handler
        self._question = question
        self._query = client.query

    def run(self) -> None:
        """Ask a server; blocks."""
        self._handler.ask_in_turn(self._question, self._query, self.client)

    def drop(self) -> None:
        """Give up the client's turn."""
        self._handler.give_up(self._question, self.client)


class RefreshTask:
    """A question whose stale answer was given (interfaces.fairness.ClientTask)."""

    __slots__ = ("client", "_handler", "_query")

    def __init__(self, handler: DnsHandler, query: bytes, client: str) -> None:
        self.client = client
        self._handler = handler
        self._query = query

    def run(self) -> None:
        """Ask a server again, which now has all its time; blocks."""
        self._handler.forward(self._query)

    def drop(self) -> None:
        """Do nothing: the stale answer does for now."""
