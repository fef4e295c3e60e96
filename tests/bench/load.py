"""The other ends, each a process of its own, so that neither is what the daemon waits for.

A Sink has the targets: it counts what comes, or sends it back.  Clients have the
associations: they send at a pace, or as fast as it goes.
"""

from __future__ import annotations

import multiprocessing
import select
import signal
import socket
import struct
import time
from typing import Any, Callable, NamedTuple, Sequence

from rig import (
    SOL_UDP,
    UDP_GRO,
    Where,
    can_segment,
    header,
    open_clients,
    readable,
    send_train,
    udp_socket,
)

SIZE = 1200  # bytes of payload
TRAIN = 8  # datagrams that leave in one call, as of a program that sends by UDP_SEGMENT
PAUSE = 0.0001  # seconds between two looks at the clock: few datagrams wait together
NEW = 1200  # sessions opened a second: more than a crowd of people brings
QUIET = 0.05  # seconds without a datagram after which nothing is under way any more
_forked = multiprocessing.get_context("fork")


class Done(NamedTuple):
    sent: int
    received: int
    seconds: float


class Process:
    """A forked process that answers calls of its own methods, one at a time."""

    def __init__(self) -> None:
        self._ours, theirs = _forked.Pipe()
        self._process = _forked.Process(target=self._run, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, name: str, *arguments: Any) -> Any:
        self._ours.send((name, arguments))
        try:
            return self._ours.recv()
        except EOFError:
            raise SystemExit(f"{type(self).__name__} has died") from None

    def stop(self) -> None:
        self._ours.close()
        self._process.join()

    def _run(self, pipe: Any) -> None:
        self._ours.close()
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # the program itself is interrupted, and ends us
        self.pipe = pipe
        self.begin()
        try:
            while True:
                self.serve()
        except (EOFError, ConnectionError):
            pass  # stop()

    def serve(self) -> None:
        """Waits for a call and answers it."""
        name, arguments = self.pipe.recv()
        self.pipe.send(getattr(self, name)(*arguments))

    def begin(self) -> None:
        """In the new process, before the first call."""


class Sink(Process):
    """`targets` is where its sockets listen."""

    def __init__(self, count: int, echo: bool = False) -> None:
        self._sockets = [udp_socket(gro=True) for _ in range(count)]
        self.targets: list[Where] = [sock.getsockname() for sock in self._sockets]
        self._echo = echo
        self._count = 0
        super().__init__()
        for sock in self._sockets:
            sock.close()

    # -- calls

    def echo(self, on: bool) -> None:
        self._echo = on

    def take(self) -> int:
        """How many datagrams have come since the last time."""
        count, self._count = self._count, 0
        return count

    # -- in its process

    def begin(self) -> None:
        self._buffer = bytearray(65536)
        self._view = memoryview(self._buffer)
        self._poll = readable(self._sockets)
        self._poll.register(self.pipe.fileno(), select.EPOLLIN)
        self._by_descriptor = {sock.fileno(): sock for sock in self._sockets}

    def serve(self) -> None:
        for descriptor, _ in self._poll.poll():
            sock = self._by_descriptor.get(descriptor)
            if sock is None:
                super().serve()
            else:
                try:
                    self._drain(sock)
                except OSError:
                    pass  # nothing more there, or an earlier echo was refused

    def _drain(self, sock: socket.socket) -> None:
        buffer, flag = self._buffer, socket.MSG_DONTWAIT
        for _ in range(64):
            length, control, _, peer = sock.recvmsg_into([buffer], 64, flag)
            stride = length
            for level, kind, data in control:
                if (level, kind) == (SOL_UDP, UDP_GRO):
                    stride = struct.unpack_from("=i", data)[0]
            self._count += -(-length // stride) if length else 1
            if self._echo:
                if stride < length:
                    send_train(sock, self._view[:length], stride, peer)
                else:
                    sock.sendto(self._view[:length], peer)


class Clients(Process):
    """Associations with a proxy, or none until open()."""

    # -- calls

    def open(self, server: Where, count: int, targets: Sequence[Where]) -> int:
        """Associations from now on, all of which have sent to each target, so that all of the way is there."""
        self._clients = open_clients(server, count)
        self._sockets = [client.socket for client in self._clients]
        for sock in self._sockets:
            sock.setblocking(False)
        self._poll = readable(self._sockets)
        self._by_descriptor = {sock.fileno(): sock for sock in self._sockets}
        self._targets = len(targets)
        self._singles = [header(target) + bytes(SIZE) for target in targets]
        self._trains = [single * TRAIN for single in self._singles]
        self._can_segment = can_segment()
        return self._paced(self._send_single, 1, NEW, count) + self.open_targets()

    def open_targets(self) -> int:
        """Each has sent to each target."""
        return self._paced(self._send_single, 1, 20_000, len(self._sockets) * self._targets)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._poll.close()

    def run(self, load: str, rate: float, seconds: float) -> Done:
        """`rate` datagrams a second, 0 for as many as go."""
        send, step = {"train": (self._send_train, TRAIN), "burst": (self._send_burst, TRAIN)}.get(
            load, (self._send_single, 1)
        )
        self._received = 0
        started = time.perf_counter()
        if rate:
            sent = self._paced(send, step, rate, int(rate * seconds), load == "echo")
        else:
            sent = 0
            while time.perf_counter() - started < seconds:
                for number in range(sent // step, sent // step + 64):
                    send(number)
                sent += 64 * step
        took = time.perf_counter() - started
        if load == "echo":
            self._receive(QUIET)
        return Done(sent, self._received, took)

    # -- in its process

    def _paced(
        self,
        send: Callable[[int], None],
        step: int,
        rate: float,
        total: int,
        receiving: bool = False,
    ) -> int:
        started, sent, number = time.perf_counter(), 0, 0
        while sent < total:
            due = min(total, int((time.perf_counter() - started) * rate) + 1)
            while sent < due:
                send(number)
                number += 1
                sent += step
            if receiving:
                self._receive(0)
            time.sleep(PAUSE)
        return sent

    def _send_single(self, number: int) -> None:
        """Clients take turns; each has its targets in turn."""
        turn, client = divmod(number, len(self._sockets))
        try:
            self._sockets[client].send(self._singles[(turn + client) % self._targets])
        except OSError:
            pass  # a full buffer is a loss

    def _send_burst(self, number: int) -> None:
        for _ in range(TRAIN):
            self._send_single(number)

    def _send_train(self, number: int) -> None:
        if not self._can_segment:
            self._send_burst(number)
            return
        turn, client = divmod(number, len(self._sockets))
        target = (turn + client) % self._targets
        try:
            send_train(self._sockets[client], self._trains[target], len(self._singles[target]))
        except OSError:
            pass

    def _receive(self, patience: float) -> None:
        """What is there, and what comes within `patience` after that."""
        while ready := self._poll.poll(patience):
            for descriptor, _ in ready:
                sock = self._by_descriptor[descriptor]
                try:
                    while True:
                        sock.recv(65536)
                        self._received += 1
                except OSError:
                    pass
            if not patience:
                return


def settle(sink: Sink) -> int:
    """What the sink has got since it was asked last, once nothing more comes."""
    total = 0
    while True:
        count = sink.call("take")
        if total and not count:
            return total
        total += count
        time.sleep(QUIET)
        if not total and not count:
            return sink.call("take")
