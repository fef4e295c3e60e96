"""What workers tell each other about the addresses that they announce.

The answers of a STUN server come to one worker, as the datagrams of a client do.  So worker 0,
which decides what is announced, has that worker ask the server.  A worker that begins, or that has
a new configuration, asks for all that is known.  Thread: any; nothing here waits.
"""

from __future__ import annotations

from netproxy.daemon.workers.messages import Message, MessageError, parse_address
from netproxy.interfaces.addresses import ActivationAddress, Address
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.daemon.workers.hand_over import HandOvers
    from netproxy.interfaces.services import Counter
    from netproxy.public_address.listening import ListeningAddress

QUESTION, ANSWER = "stun question", "stun answer"
FOUND, WANTED = "public address", "public addresses wanted"
"""The kinds of messages."""
LEADER = 0
"""The worker that decides."""
COUNTER = "public_address"


class SharedAddress:
    """What the workers tell each other about one address (public_address.listening.Sharing)."""

    def __init__(
        self, hand_overs: HandOvers, listener: str, address: Address, counter: Counter
    ) -> None:
        self._hand_overs = hand_overs
        self._listener = listener
        self._address = address
        self._counter = counter

    @property
    def leads(self) -> bool:
        """True for the worker that decides."""
        return self._hand_overs.is_own(LEADER)

    def ask(self, server: Address, transaction: bytes) -> bool | None:
        """Have the worker ask that gets the server's answers; None if that is this one."""
        # Worker 0 alone has the datagrams of an activation socket.
        is_activated = isinstance(self._address, ActivationAddress)
        worker = LEADER if is_activated else self._hand_overs.owner_of(server.host)
        if self._hand_overs.is_own(worker):
            return None
        fields = {"kind": QUESTION, "server": server, "transaction": transaction.hex()}
        return self._tell(worker, fields)

    def answered(self, transaction: bytes, mapped: Address | None) -> None:
        """Tell the worker that decides of an answer."""
        self._tell(LEADER, {"kind": ANSWER, "transaction": transaction.hex(), "mapped": mapped})

    def publish(self, addresses: Sequence[Address]) -> None:
        """Tell the others what is announced."""
        for worker in self._hand_overs.others:
            self.publish_to(worker, addresses)

    def publish_to(self, worker: int, addresses: Sequence[Address]) -> None:
        """Tell one of the others what is announced."""
        self._tell(worker, {"kind": FOUND, "addresses": list(addresses)})

    def _tell(self, worker: int, fields: Mapping[str, object]) -> bool:
        place = {"listener": self._listener, "address": str(self._address)}
        try:
            self._hand_overs.tell(worker, Message({**fields, **place}))
        except MessageError:
            # The worker is busy: the question is sent again, or it asks when it begins anew.
            self._counter.count(COUNTER, "not told to a worker")
            return False
        return True


class FindsAddresses(Protocol):
    """The daemon, as far as this module needs it."""

    def found_addresses(self) -> Mapping[tuple[str, Address], ListeningAddress]:
        """Return the listening addresses that announce what is found."""


class AddressNotices:
    """Takes what other workers tell.  Thread: that of the inbox, except begin()."""

    def __init__(self, hand_overs: HandOvers, daemon: FindsAddresses) -> None:
        self._hand_overs = hand_overs
        self._daemon = daemon

    def begin(self) -> None:
        """Ask for what is announced, if this worker announces anything that is found."""
        if not self._daemon.found_addresses() or self._hand_overs.is_own(LEADER):
            return
        try:
            fields = {"kind": WANTED, "worker": self._hand_overs.index}
            self._hand_overs.tell(LEADER, Message(fields))
        except MessageError:
            # Worker 0 is busy: it tells of the next change.
            return

    def takers(self) -> Mapping[str, Callable[[Message], None]]:
        """Return what takes messages, by their kind."""
        return {
            QUESTION: self._take_question,
            ANSWER: self._take_answer,
            FOUND: self._take_found,
            WANTED: self._take_wanted,
        }

    def _take_question(self, message: Message) -> None:
        """Ask a server; the answer comes to this worker."""
        if listening := self._listening(message):
            server = parse_address(message.fields["server"])
            listening.stun.ask(server, bytes.fromhex(str(message.fields["transaction"])))

    def _take_answer(self, message: Message) -> None:
        if listening := self._listening(message):
            mapped = message.fields["mapped"]
            transaction = bytes.fromhex(str(message.fields["transaction"]))
            listening.answered(transaction, None if mapped is None else parse_address(mapped))

    def _take_found(self, message: Message) -> None:
        """Announce what worker 0 has found."""
        addresses = message.fields["addresses"]
        if isinstance(addresses, list) and (listening := self._listening(message)):
            listening.public.follow([parse_address(address) for address in addresses])

    def _take_wanted(self, message: Message) -> None:
        """Tell a worker all that is announced."""
        worker = int(str(message.fields["worker"]))
        for listening in self._daemon.found_addresses().values():
            listening.publish_to(worker)

    def _listening(self, message: Message) -> ListeningAddress | None:
        """Return what a message is about; None if this worker has not, or no more, its listener."""
        place = message.fields["listener"], message.fields["address"]
        for (listener, address), listening in self._daemon.found_addresses().items():
            if (listener, str(address)) == place:
                return listening
        return None
