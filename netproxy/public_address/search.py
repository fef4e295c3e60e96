"""Finds the public address of a listener by STUN, and follows its changes.

In each round all servers are asked, and what they answer is settled together.  The janitor tells
the time; answers come on the thread that reads the socket.  Nothing here blocks.
"""

from __future__ import annotations

import os
import threading

from netproxy.net.address import is_ipv6, is_unspecified
from netproxy.protocol.stun import TRANSACTION_SIZE
from netproxy.public_address.agreement import Agreement, Verdict
from netproxy.typed import TYPE_CHECKING, Callable, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.services import Counter
    from netproxy.public_address.servers import Servers

REFRESH_SECONDS = 25.0
"""Between two rounds.  A round also keeps the mapping of a NAT alive, which only outgoing packets
are sure to do (RFC 4787 REQ-6).  RFC 4787 REQ-5 wants 2 minutes, but home routers with 30 seconds
are common."""
CONFIRM_SECONDS = 2.0
"""Until the round that confirms a change."""
SEND_AGAIN = (1.0, 3.0)
"""Seconds after the first request when it is sent again.  RFC 8489 section 6.2.1 doubles from 0.5 s
and sends seven times, for 39.5 s: the janitor ticks once a second, and the next round comes."""
ANSWER_SECONDS = 7.0
"""After the first request: without an answer until then the server has failed."""
SKIP_LIMIT = 600.0
"""Seconds, at most, that a server is left out which does not answer while others do."""
COUNTER = "stun"
"""The name of the counter; its reasons are events."""


class Asker(Protocol):
    """Sends questions from the socket of the listener: stun_port.StunPort.  Never blocks."""

    def ask(self, server: Address, transaction: bytes) -> bool:
        """Send a Binding request; return False if it cannot be sent."""


class _Question:
    """A question that has no answer yet."""

    __slots__ = ("name", "server", "transaction", "asked", "sent")

    def __init__(self, name: Address, server: Address, now: float) -> None:
        self.name = name
        self.server = server
        self.transaction = os.urandom(TRANSACTION_SIZE)
        self.asked = now
        self.sent = 0
        """How often it was sent."""


class _Failures:
    """How often in turn a server has failed, and until when it is left out."""

    __slots__ = ("count", "until")

    def __init__(self) -> None:
        self.count = 0
        self.until = 0.0


class Search:
    """The public address of one listener and one address family."""

    def __init__(
        self,
        ipv6: bool,
        servers: Servers,
        asker: Asker,
        counter: Counter,
        settled: Callable[[Search, bool], None],
    ) -> None:
        """`settled(search, changed)` is told after each round.  Thread: see the module."""
        self.ipv6 = ipv6
        self._servers = servers
        self._asker = asker
        self._counter = counter
        self._settled = settled
        # Guards all below; nothing is sent or told under it.
        self._lock = threading.Lock()
        self._agreement = Agreement()
        self._questions: dict[bytes, _Question] = {}
        self._answers: dict[Address, Address] = {}
        self._failures: dict[Address, _Failures] = {}
        self._due = 0.0
        self._in_round = False
        # True if another round is to follow the one that runs at once.
        self._is_wanted = False
        self.sources: tuple[Address, ...] = ()
        """The servers that have answered in the last round."""

    @property
    def value(self) -> Address | None:
        """The public address; None before the first answer, port 0 if the port is not known."""
        return self._agreement.value

    def tick(self, now: float) -> None:
        """Send what is due.  Thread: the janitor's, main for the first time."""
        with self._lock:
            if not self._in_round and now >= self._due:
                self._begin(now)
            sends = [question for question in self._questions.values() if _is_due(question, now)]
            for question in sends:
                question.sent += 1
            for question in list(self._questions.values()):
                if now - question.asked >= ANSWER_SECONDS:
                    self._fail(question, "no answer", now)
        for question in sends:
            if not self._asker.ask(question.server, question.transaction):
                with self._lock:
                    self._fail(question, "not sent", now)
        self._settle(now)

    def ask_soon(self) -> None:
        """Begin a round with the next tick, or right after the one that runs.  Thread: main."""
        with self._lock:
            self._due, self._is_wanted = 0.0, True

    def answered(self, transaction: bytes, mapped: Address | None, now: float) -> bool:
        """Take an answer, None for an error; return whether the question is one of this search.

        Thread: any.
        """
        with self._lock:
            question = self._questions.get(transaction)
            if question is None:
                return False
            if mapped is None or not self._is_possible(mapped):
                self._fail(question, "refused", now)
            else:
                del self._questions[transaction]
                self._failures.pop(question.name, None)
                self._answers[question.name] = mapped
        self._settle(now)
        return True

    def _is_possible(self, mapped: Address) -> bool:
        is_of_family = is_ipv6(mapped.host) == self.ipv6
        return is_of_family and mapped.port > 0 and not is_unspecified(mapped.host)

    def _begin(self, now: float) -> None:
        """Begin a round with all servers, without those that fail while others answer."""
        servers = self._servers.of_family(self.ipv6)
        if not servers:
            return
        self._is_wanted = False
        works = [name for name, _ in servers if name not in self._failures]
        self._in_round = True
        for name, server in servers:
            failures = self._failures.get(name)
            if not works or failures is None or failures.until <= now:
                question = _Question(name, server, now)
                self._questions[question.transaction] = question

    def _fail(self, question: _Question, reason: str, now: float) -> None:
        """Note that a server has failed; do nothing if it has answered meanwhile."""
        if self._questions.pop(question.transaction, None) is None:
            return
        failures = self._failures.setdefault(question.name, _Failures())
        failures.count = min(failures.count + 1, 16)
        failures.until = now + min(REFRESH_SECONDS * 2**failures.count, SKIP_LIMIT)
        self._counter.count(COUNTER, reason)
        self._servers.no_answer(question.name, now)

    def _settle(self, now: float) -> None:
        """End the round if all questions are settled; before the first address, with any answer."""
        with self._lock:
            if not self._in_round:
                return
            is_first = self._agreement.value is None and bool(self._answers)
            if self._questions and not is_first:
                return
            verdict = self._agreement.settle(
                {str(name): answer for name, answer in self._answers.items()}
            )
            self.sources = tuple(self._answers)
            if not self._questions:
                self._in_round, self._answers = False, {}
                pause = CONFIRM_SECONDS if verdict is Verdict.UNSURE else REFRESH_SECONDS
                self._due = now + (0.0 if self._is_wanted else pause)
        self._settled(self, verdict is Verdict.CHANGED)


def _is_due(question: _Question, now: float) -> bool:
    """Return whether a question is to be sent, for the first time or again."""
    sent = question.sent
    return not sent or (sent <= len(SEND_AGAIN) and now - question.asked >= SEND_AGAIN[sent - 1])
