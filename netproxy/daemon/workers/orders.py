"""The orders that the parent gives its workers, and their answers.  Thread: main.

A reload has two phases.  prepare() has each worker bind what is new; then settle() has all of
them put the configuration into force, or discard it.
"""

from __future__ import annotations

import itertools
import pickle
import signal
import time

from netproxy.daemon.workers.messages import DESCRIPTORS_LIMIT, Message, file_in_memory
from netproxy.daemon.workers.sockets import SocketKey, socket_key
from netproxy.errors import ConfigError, ListenError
from netproxy.interfaces.addresses import ActivationAddress
from netproxy.typed import TYPE_CHECKING, Callable, NoReturn, Sequence

if TYPE_CHECKING:
    from netproxy.config.schema import Config
    from netproxy.daemon.workers.groups import SocketGroup
    from netproxy.daemon.workers.processes import WorkerProcess, Workers
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.services import Log
    from netproxy.listener.manager import ListenerSpec

ANSWER_SECONDS = 60.0
"""For a worker to start, and to prepare a reload: lists may be long."""
SETTLE_SECONDS = 10.0
"""For a worker to commit or discard a reload."""
DRAIN_SECONDS = 1.0
"""For a worker to stop accepting."""
KEYS_LIMIT = 1000
"""Addresses in one message, which holds 128 KiB."""
LOOK_SECONDS = 0.2
"""Between two looks whether a worker has died that is waited for."""
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
"""They wait until a reload has ended: it is given up for them."""

KeyedGroup = tuple[SocketKey, "SocketGroup"]
"""A group with the key of its sockets."""


class WorkerOrders:
    """Gives orders to all running workers."""

    def __init__(self, workers: Workers, look: Callable[[], object], log: Log) -> None:
        """`look()` replaces workers that have died: also while others are waited for."""
        self._workers = workers
        self._log = log
        self._look = look
        self._numbers = itertools.count()

    def await_start(self, worker: WorkerProcess) -> None:
        """Wait until a worker serves.  Raises ConfigError or ListenError if it does not."""
        message = self._workers.hear(worker, ANSWER_SECONDS)
        if message is None:
            raise ListenError(f"worker {worker.index} does not start")
        if message.kind == "failed":
            _raise(message)

    def prepare(
        self, config: Config, own: Sequence[tuple[str, Address]], fresh: Sequence[KeyedGroup]
    ) -> None:
        """Have all workers bind what is new; no client may be led to the `own` sockets.

        A worker that dies meanwhile is no obstacle: its successor is asked, too.
        Raises ConfigError or ListenError, also if the daemon is told to stop meanwhile.
        """
        number, asked = next(self._numbers), set[int]()
        with file_in_memory(pickle.dumps((config, own))) as file:
            order = Message({"kind": "prepare", "number": number}, descriptors=[file.fileno()])

            def ask(worker: WorkerProcess) -> None:
                for start in range(0, len(fresh), DESCRIPTORS_LIMIT):
                    part = fresh[start : start + DESCRIPTORS_LIMIT]
                    self._workers.tell_one(worker, _sockets(part, worker.index))
                if self._workers.tell_one(worker, order):
                    asked.add(worker.pid)

            answers = self._collect(number, ANSWER_SECONDS, asked, ask)
        for worker in self._workers.running:
            answer = answers.get(worker.pid)
            if answer is None:
                raise ConfigError(f"worker {worker.index} does not answer")
            if answer.kind == "refused":
                _raise(answer)

    def settle(self, kind: str, gone: Sequence[KeyedGroup]) -> None:
        """Have all workers "commit" or "discard", and close the sockets of `gone`."""
        for start in range(0, len(gone), KEYS_LIMIT):
            keys = [key for key, _ in gone[start : start + KEYS_LIMIT]]
            self._workers.tell(Message({"kind": "gone", "keys": keys}))
        self._order({"kind": kind}, SETTLE_SECONDS)

    def reopen(self) -> None:
        """Have all workers begin a new access file."""
        self._workers.tell(Message({"kind": "reopen"}))

    def drain(self) -> None:
        """Have all workers stop accepting."""
        self._order({"kind": "drain"}, DRAIN_SECONDS)

    def _order(self, fields: dict[str, object], seconds: float) -> None:
        """Give an order to all workers, and wait for those that answer in time."""
        number = next(self._numbers)
        told = self._workers.tell(Message({**fields, "number": number}))
        answers = self._collect(number, seconds, {worker.pid for worker in told})
        for worker in told:
            if worker.pid and worker.pid not in answers and not worker.gone:
                text = "worker %d has not answered to '%s' within %g s, and does it later"
                self._log.warning(text, worker.index, fields["kind"], seconds)

    def _collect(
        self,
        number: int,
        seconds: float,
        asked: set[int],
        ask: Callable[[WorkerProcess], None] | None = None,
    ) -> dict[int, Message]:
        """Return the answers to an order that come within `seconds`, by process.

        `asked`: the processes that have the order.  `ask(worker)` gives it to others, such as
        those that are forked meanwhile.  Late answers to earlier orders are skipped.
        """
        answers: dict[int, Message] = {}
        deadline = time.monotonic() + seconds
        while True:
            for worker in self._workers.running:
                if ask is not None and worker.pid not in asked and not worker.gone:
                    ask(worker)
                while message := self._workers.hear(worker, 0):
                    if message.fields.get("number") == number:
                        answers[worker.pid] = message
            missing = [
                worker
                for worker in self._workers.running
                if worker.pid not in answers and (ask is not None or worker.pid in asked)
            ]
            is_late = time.monotonic() >= deadline or bool(signal.sigpending() & STOP_SIGNALS)
            if is_late or all(worker.gone for worker in missing) and ask is None or not missing:
                return answers
            self._workers.wait_for_any(missing, LOOK_SECONDS)
            if ask is not None:
                self._look()

    def stop(self) -> None:
        """Have all workers end, and wait for it."""
        self._workers.tell(Message({"kind": "stop"}))
        self._workers.stop()


def keys_of(
    pairs: Sequence[tuple[ListenerSpec, SocketGroup]], wanted: Sequence[SocketGroup]
) -> list[KeyedGroup]:
    """Return those groups among `pairs` that are wanted, with the keys of their sockets."""
    return [(key_of(spec, group), group) for spec, group in pairs if group in wanted]


def key_of(spec: ListenerSpec, group: SocketGroup) -> SocketKey:
    """Return the key of the sockets of a group: its address as workers are configured with it."""
    address = spec.address
    if not isinstance(address, ActivationAddress):
        address = address._replace(port=group.address.port)
    return socket_key(spec.network, address)


def _sockets(groups: Sequence[KeyedGroup], index: int) -> Message:
    """Return the message with a worker's sockets of some groups."""
    keys, descriptors = [], []
    for (network, address), group in groups:
        sock = group.sockets[index]
        keys.append((network, address, sock is not None))
        if sock is not None:
            descriptors.append(sock.fileno())
    return Message({"kind": "sockets", "keys": keys}, descriptors=descriptors)


def _raise(message: Message) -> NoReturn:
    """Raise the error that a worker tells of."""
    text = str(message.fields["error"])
    raise ListenError(text) if message.fields["listen"] else ConfigError(text)
