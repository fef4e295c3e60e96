"""What workers tell each other about announced addresses, in messages that survive JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from netproxy.daemon.listening.notices import AddressNotices, SharedAddress
from netproxy.daemon.workers.messages import Message, MessageError
from netproxy.interfaces.addresses import ActivationAddress, Address
from netproxy.interfaces.networks import NetworkSet
from netproxy.listener.steering import owner
from netproxy.public_address.changes import Observers
from netproxy.public_address.listening import ListeningAddress
from netproxy.public_address.public import PublicAddressDependencies
from tests.support.doubles import Counts
from tests.support.handlers import RecordingLog

WORKERS = 3
AT = Address("0.0.0.0", 1080)
FOUND = Address("203.0.113.5", 40000)
ID = bytes(range(12))


class Worker:
    """A worker as far as it announces addresses: HandOvers, and a daemon with one listener."""

    def __init__(self, index: int, team: list[Worker], address: Address = AT) -> None:
        self.index = index
        self.team = team
        self.is_busy = False
        self.asked: list[tuple[Address, bytes]] = []
        self.answered: list[tuple[bytes, Address | None]] = []
        self.counts = Counts()
        this: Any = self
        sharing = SharedAddress(this, "main", address, self.counts)
        observers = Observers(self._register, RecordingLog(), self.counts)
        dependencies = PublicAddressDependencies(NetworkSet(()), lambda _: False)
        self.found = ListeningAddress("main", observers, dependencies, sharing)
        self.found.stun.ask = self._ask  # type: ignore[method-assign]
        self.found.answered = self._note  # type: ignore[method-assign]
        self.addresses = {("main", address): self.found}
        self.notices = AddressNotices(this, this)

    def _register(self, network: str, address: Address) -> Any:
        return lambda: None

    def _ask(self, server: Address, transaction: bytes) -> bool:
        self.asked.append((server, transaction))
        return True

    def _note(self, transaction: bytes, mapped: Address | None) -> None:
        self.answered.append((transaction, mapped))

    # -- HandOvers and the daemon

    @property
    def others(self) -> list[int]:
        return [worker.index for worker in self.team if worker is not self]

    def is_own(self, worker: int) -> bool:
        return worker == self.index

    def owner_of(self, client: str) -> int:
        return owner(client, WORKERS)

    def tell(self, worker: int, message: Message) -> None:
        if self.team[worker].is_busy:
            raise MessageError("busy")
        received = Message(json.loads(json.dumps(message.fields)))
        self.team[worker].notices.takers()[received.kind](received)

    def found_addresses(self) -> dict[tuple[str, Address], ListeningAddress]:
        return self.addresses


def team_of(address: Address = AT) -> list[Worker]:
    team: list[Worker] = []
    for index in range(WORKERS):
        team.append(Worker(index, team, address))
    return team


def server_of(worker: int) -> Address:
    """Return a server whose answers come to a worker."""
    hosts = (f"192.0.2.{number}" for number in range(1, 255))
    return Address(next(host for host in hosts if owner(host, WORKERS) == worker), 3478)


@pytest.mark.parametrize("worker", range(WORKERS))
def test_worker_that_gets_the_answer_asks_the_server(worker: int) -> None:
    team = team_of()
    assert team[0].found.ask(server_of(worker), ID)
    assert [one.asked for one in team] == [
        [(server_of(worker), ID)] if one.index == worker else [] for one in team
    ]


def test_first_worker_asks_from_an_activation_socket() -> None:
    team = team_of(ActivationAddress("systemd:main", 0))
    team[0].found.ask(server_of(2), ID)
    assert [len(one.asked) for one in team] == [1, 0, 0]


@pytest.mark.parametrize("worker", range(WORKERS))
@pytest.mark.parametrize("mapped", [FOUND, None])
def test_first_worker_is_told_of_an_answer(worker: int, mapped: Address | None) -> None:
    team = team_of()
    team[worker].found.stun.answered(ID, mapped)  # type: ignore[misc]
    assert [one.answered for one in team] == [[(ID, mapped)], [], []]


def test_all_workers_announce_what_the_first_has_found() -> None:
    team = team_of()
    team[0].found.public.seen(False, FOUND, "a")
    assert [one.found.public.current for one in team] == [(FOUND,)] * WORKERS
    team[0].found.public.seen(False, None, "")
    assert [one.found.public.current for one in team] == [()] * WORKERS


def test_worker_that_begins_asks_for_what_is_announced() -> None:
    team = team_of()
    team[0].found.public.seen(False, FOUND, "a")
    team[1] = Worker(1, team)
    team[1].notices.begin()
    assert team[1].found.public.current == (FOUND,)


def test_first_worker_that_begins_takes_nothing_from_the_others() -> None:
    """They announce what they were told, until it has found the same or something else."""
    team = team_of()
    team[0].found.public.seen(False, FOUND, "a")
    team[0] = Worker(0, team)
    team[0].notices.begin()
    team[0].found.public.begin()
    assert team[1].found.public.current == (FOUND,)


def test_notice_of_an_unknown_listener_is_dropped() -> None:
    team = team_of()
    team[1].addresses.clear()
    team[0].found.public.seen(False, FOUND, "a")
    assert team[1].found.public.current == ()
    team[1].notices.begin()


def test_busy_worker_costs_the_notice_alone() -> None:
    team = team_of()
    team[1].is_busy = True
    assert not team[0].found.ask(server_of(1), ID)
    team[0].found.public.seen(False, FOUND, "a")
    assert team[2].found.public.current == (FOUND,)
    assert team[0].counts.of("public_address", "not told to a worker") == 2
    team[0].is_busy = True
    team[2].notices.begin()
