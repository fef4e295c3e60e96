"""Notices from worker to worker: ports that one has opened, and the outcomes of logins.

No client of any worker may be led to a port that one of them has opened: that of a tunnel agent,
or the relay port of an association.  A worker that begins asks the others for theirs, and has
them forget those of the worker before.  Failed logins count in all workers, so that a penalty
begins as early as with one.  So do right ones.  Thread: any; nothing here waits.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from functools import partial

from netproxy.access.accounts.subject import Limits
from netproxy.daemon.workers.messages import Message, MessageError, parse_address
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple

if TYPE_CHECKING:
    from netproxy.access.accounts.book import AccountBook
    from netproxy.access.backoff import BackOff
    from netproxy.access.external.answers import Answer
    from netproxy.access.own_sockets import OwnSockets
    from netproxy.daemon.daemon import Daemon
    from netproxy.daemon.workers.hand_over import Grant, HandOvers
    from netproxy.daemon.workers.inbox import Inbox
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.services import Counter, Log

OWN_PORT, OWN_PORT_CLOSED, OWN_PORTS_WANTED = "own port", "own port closed", "own ports wanted"
FAILED_LOGIN, RIGHT_LOGIN, ANSWER = "failed login", "right login", "answer of auth"
GUESSED, CLEARED = "guessed password", "failures cleared"
"""The kinds of messages."""


class _Port(NamedTuple):
    """A port that this worker has opened."""

    network: str
    address: Address
    of_agent: bool


class OwnPorts:
    """The ports of all workers, except those of the configuration."""

    def __init__(self, hand_overs: HandOvers, own: OwnSockets, log: Log) -> None:
        """`own` is what the clients of this worker are kept from."""
        self._hand_overs = hand_overs
        self._own = own
        self._log = log
        self._numbers = itertools.count()
        # Guards all below.
        self._lock = threading.Lock()
        self._opened: dict[int, _Port] = {}
        self._removals: dict[tuple[int, int], Callable[[], None]] = {}
        """Those of other workers, by worker and number."""

    def begin(self) -> None:
        """Ask the others for their ports."""
        self._tell_all({"kind": OWN_PORTS_WANTED})

    def announce(self, network: str, address: Address, of_agent: bool) -> Callable[[], None]:
        """Tell the others of a port; return the call that takes it back."""
        number, port = next(self._numbers), _Port(network, address, of_agent)
        with self._lock:
            self._opened[number] = port
        self._tell_all(_fields(number, port))
        return partial(self._close, number)

    def _close(self, number: int) -> None:
        with self._lock:
            del self._opened[number]
        self._tell_all({"kind": OWN_PORT_CLOSED, "number": number})

    def _tell_all(self, fields: dict[str, object]) -> None:
        for worker in self._hand_overs.others:
            self._tell(worker, fields)

    def _tell(self, worker: int, fields: dict[str, object]) -> None:
        message = Message({**fields, "worker": self._hand_overs.index})
        try:
            self._hand_overs.tell(worker, message)
        except MessageError as error:
            self._log.limited("own ports", "worker %d cannot be told of a port: %s", worker, error)

    # -- takers of an inbox

    def take_opened(self, message: Message) -> None:
        """Keep clients from a port of another worker."""
        fields = message.fields
        address, of_agent = parse_address(fields["address"]), bool(fields["of_agent"])
        removal = self._own.register(str(fields["network"]), address, of_agent)
        with self._lock:
            before = self._removals.pop(_key(message), None)
            self._removals[_key(message)] = removal
        if before is not None:
            before()

    def take_closed(self, message: Message) -> None:
        """Let clients reach a port that another worker has closed."""
        with self._lock:
            removal = self._removals.pop(_key(message), None)
        if removal is not None:
            removal()

    def take_wanted(self, message: Message) -> None:
        """Forget the ports of a worker that begins, and tell it those of this one."""
        worker = int(str(message.fields["worker"]))
        with self._lock:
            gone = [key for key in self._removals if key[0] == worker]
            removals = [self._removals.pop(key) for key in gone]
            opened = list(self._opened.items())
        for removal in removals:
            removal()
        for number, port in opened:
            self._tell(worker, _fields(number, port))


class FailedLogins:
    """The failed logins of all workers and what follows from them (access.backoff.OtherWorkers)."""

    def __init__(self, hand_overs: HandOvers, back_off: BackOff, counter: Counter) -> None:
        """`back_off` has those of this worker, and gets those of the others."""
        self._hand_overs = hand_overs
        self._back_off = back_off
        self._counter = counter
        self.inbox: Inbox
        """Set before the first login."""

    def catch_up(self) -> None:
        """Take what the others have told until now."""
        self.inbox.catch_up()

    def failed(self, host: str) -> None:
        """Tell the others that a login of a client's host has failed."""
        self._tell({"kind": FAILED_LOGIN, "client": host})

    def guessed(self, host: str, user: str) -> None:
        """Tell the others that somebody has guessed at a user's password during a penalty."""
        self._tell({"kind": GUESSED, "client": host, "user": user})

    def succeeded(self, host: str) -> None:
        """Tell the others that a right login has taken failures of a client's host back."""
        self._tell({"kind": CLEARED, "client": host})

    def _tell(self, fields: dict[str, object]) -> None:
        for worker in self._hand_overs.others:
            try:
                self._hand_overs.tell(worker, Message(fields))
            except MessageError:
                # The other worker is busy: it knows one of them less.
                self._counter.count("authentication", f"{fields['kind']} not told to a worker")

    # -- takers of an inbox

    def take_failure(self, message: Message) -> None:
        """Count a failed login of another worker."""
        self._back_off.learn(str(message.fields["client"]), time.monotonic())

    def take_guess(self, message: Message) -> None:
        """Note a guess at a password that another worker has seen."""
        self._back_off.learn_guess(str(message.fields["client"]), str(message.fields["user"]))

    def take_success(self, message: Message) -> None:
        """Take failures back for a right login in another worker."""
        self._back_off.learn_success(str(message.fields["client"]), time.monotonic())


class RightLogins:
    """The logins that were right in any worker: a user waits for one check of the password."""

    def __init__(self, hand_overs: HandOvers, daemon: Daemon, accounts: AccountBook) -> None:
        self._hand_overs = hand_overs
        self._daemon = daemon
        self._accounts = accounts

    def follow(self) -> None:
        """Tell of the logins of the configuration that is in force now."""
        dependencies = self._daemon.dependencies
        dependencies.users.announce = self._announce
        if dependencies.external is not None:
            dependencies.external.answers.announce = self._announce_answer

    def _announce(self, user: str, key: bytes, seen: bytes) -> None:
        self._tell({"kind": RIGHT_LOGIN, "user": user, "key": key.hex(), "seen": seen.hex()})

    def _tell(self, fields: dict[str, object]) -> None:
        for worker in self._hand_overs.others:
            with contextlib.suppress(MessageError):  # the other worker checks for itself
                self._hand_overs.tell(worker, Message(fields))

    def take(self, message: Message) -> None:
        """Remember a login that was right in another worker."""
        user, key, seen = (str(message.fields[name]) for name in ("user", "key", "seen"))
        users = self._daemon.dependencies.users
        users.learn(user, bytes.fromhex(key), bytes.fromhex(seen))

    # -- logins that a program or a service has checked

    def _announce_answer(self, answer: Answer) -> None:
        """Tell the others what the program or service has said, and the limits that it sets."""
        external = self._daemon.dependencies.external
        if external is not None:
            limits = (
                self._accounts.limits(answer.key.user, granted=True) if answer.is_right else None
            )
            self._tell({"kind": ANSWER, "limits": limits, **external.answers.fields(answer)})

    def take_answer(self, message: Message) -> None:
        """Remember what another worker was answered, if this one asks the same.

        Raises KeyError, TypeError, ValueError.
        """
        external, limits = self._daemon.dependencies.external, message.fields["limits"]
        user = external.answers.learn(message.fields) if external is not None else ""
        if user and isinstance(limits, list):
            self._accounts.grant(user, Limits(*limits))

    def granted(self, flow: Flow) -> Grant | None:
        """Return what a program or service has granted to the user of a flow."""
        external, stamp = self._daemon.dependencies.external, flow.stamp
        if external is None or not isinstance(stamp, bytes):
            return None
        return external.answers.upstream(flow.user), self._accounts.limits(flow.user, granted=True)

    def adopt(self, flow: Flow, grant: object) -> None:
        """Grant to the user of a flow what another worker has granted.  Raises TypeError."""
        external, stamp = self._daemon.dependencies.external, flow.stamp
        if external is None or not isinstance(stamp, bytes) or not isinstance(grant, list):
            return
        upstream, limits = grant
        self._accounts.grant(flow.user, Limits(*limits))
        external.answers.adopt(flow.user, stamp, str(upstream))


def _fields(number: int, port: _Port) -> dict[str, object]:
    return {"kind": OWN_PORT, "number": number, **port._asdict()}


def _key(message: Message) -> tuple[int, int]:
    return int(str(message.fields["worker"])), int(str(message.fields["number"]))
