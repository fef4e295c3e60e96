"""The reader of the log stops: the daemon serves on, and tells later what is missing in the log."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import urllib.request
from contextlib import ExitStack
from itertools import count
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.every_protocol import BURST, LOOPBACK, PATIENCE, Clients
from tests.e2e.support import PROCESSES, Netproxyd, wait_for
from tests.support.sockets import Task

pytestmark = [pytest.mark.e2e, pytest.mark.long]

CONNECTIONS, CLIENTS = 10_000 // PROCESSES, 8
DATAGRAMS = 10_000 // PROCESSES
QUEUE = 500
REPORT = re.compile(r' warning msg="records were dropped here.*" records=(\d+) info=(\d+)$')


class Log:
    """A pipe as standard error, which is read from begin() on."""

    def __init__(self) -> None:
        read, self.write = os.pipe()
        self._file = open(read, encoding="utf-8")
        fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, 4096)
        self.lines: list[str] = []

    def begin(self) -> Task:
        self.close_write()
        return Task(self._collect)

    def close_write(self) -> None:
        if self.write >= 0:
            os.close(self.write)
            self.write = -1

    def _collect(self) -> None:
        for line in self._file:
            assert line.endswith("\n")
            self.lines.append(line[:-1])

    def close(self) -> None:
        self.close_write()
        self._file.close()

    def find(self, pattern: str) -> list[str]:
        return [line for line in self.lines if re.search(pattern, line)]

    @property
    def dropped(self) -> int:
        """Return how many records were told to be missing."""
        return sum(int(found[1]) for line in self.lines if (found := REPORT.search(line)))


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    yield log
    log.close()


@pytest.fixture
def clients() -> Iterator[Clients]:
    with ExitStack() as stack:
        yield Clients(stack)


def start(netproxyd: Start, clients: Clients, log: Log) -> Netproxyd:
    return netproxyd(
        config=f"{clients.config}log: {{level: info, queue: {QUEUE}}}\n",
        port=clients.ports["main"],
        log_read=False,
        stdout=log.write,
        stderr=log.write,
    )


def dropped(clients: Clients) -> dict[str, int]:
    """Return what /metrics tells of dropped records, by level."""
    url = f"http://{LOOPBACK}:{clients.ports['metrics']}/metrics"
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        text = answer.read().decode()
    found = re.findall(r'^netproxy_log_records_dropped_total\{reason="(\w+)"\} (\d+)$', text, re.M)
    return {level: int(number) for level, number in found}


def serve_all(clients: Clients) -> None:
    """Make CONNECTIONS connections of all protocols, and exchange datagrams meanwhile."""
    numbers = count()

    def work() -> None:
        while (number := next(numbers)) < CONNECTIONS:
            clients.all[number % len(clients.all)]()

    tasks = [Task(work) for _ in range(CLIENTS)]
    tasks.append(Task(clients.many_datagrams, DATAGRAMS // BURST))
    for task in tasks:
        task.result(PATIENCE)


def test_daemon_serves_while_nobody_reads_its_log(
    netproxyd: Start, clients: Clients, log: Log
) -> None:
    """Hazard 133: 10,000 connections and as many datagrams, on all protocols; half with workers."""
    daemon = start(netproxyd, clients, log)
    serve_all(clients)
    wait_for(
        lambda: dropped(clients).get("info", 0) > CONNECTIONS // 2, PATIENCE, "dropped records"
    )
    assert daemon.answers(PATIENCE)
    reading = log.begin()
    wait_for(lambda: log.dropped, PATIENCE, "the report of what is missing")
    clients.socks5()
    wait_for(lambda: "upstream=direct sent=4" in log.lines[-1], PATIENCE, "a new record")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait(PATIENCE) == 0
    reading.result(PATIENCE)
    assert log.find(" info netproxyd .* serves ") and log.lines[-1].endswith(" info stopped")
    # And that of answers(), the last one, the udp listener's and the association's.
    finished = CONNECTIONS + 4
    assert len(log.find(" info msg=finished ")) + log.dropped == finished
    assert not log.find("Traceback|internal error|has died| error ")


def test_daemon_ends_although_nobody_reads_its_log(
    netproxyd: Start, clients: Clients, log: Log
) -> None:
    """Hazard 133."""
    daemon = start(netproxyd, clients, log)
    while not dropped(clients):
        for _ in range(QUEUE):
            clients.socks4()
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
        daemon.signal(number)
    assert daemon.wait(PATIENCE) == 0
    log.begin().result(PATIENCE)
