"""Load for the UDP benchmarks: clients and targets, each in its own process.

A Sink has the targets: it counts datagrams, or sends them back. Clients have the associations: they
send at a fixed rate, or as fast as they can.
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
    LOOPBACK,
    SOL_UDP,
    UDP_GRO,
    Endpoint,
    can_segment,
    header,
    open_clients,
    readable,
    send_train,
    udp_socket,
)

# Bytes of payload.
SIZE = 1200
# Datagrams of one call with UDP_SEGMENT.
TRAIN = 8
# Seconds between two looks at the clock: short, so that few datagrams are sent at once.
PAUSE = 0.0001
# Sessions opened per second.
NEW = 1200
# Seconds without a datagram after which all have arrived or are lost.
QUIET = 0.05
_forked = multiprocessing.get_context("fork")


class Done(NamedTuple):
    """Datagrams of a measurement and its duration."""

    sent: int
    received: int
    seconds: float


class Process:
    """A forked process that executes calls of its own methods, one at a time."""

    def __init__(self) -> None:
        self._ours, theirs = _forked.Pipe()
        self._process = _forked.Process(target=self._run, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a method in the process. Return its result."""
        self._ours.send((name, arguments))
        try:
            return self._ours.recv()
        except EOFError:
            raise SystemExit(f"{type(self).__name__} has died") from None

    def stop(self) -> None:
        """End the process."""
        self._ours.close()
        self._process.join()

    def _run(self, pipe: Any) -> None:
        self._ours.close()
        # On Ctrl-C the main program ends this process.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.pipe = pipe
        self.begin()
        try:
            while True:
                self.serve()
        except (EOFError, ConnectionError):
            # stop() has closed the pipe.
            pass

    def serve(self) -> None:
        """Wait for a call and execute it."""
        name, arguments = self.pipe.recv()
        self.pipe.send(getattr(self, name)(*arguments))

    def begin(self) -> None:
        """Prepare the new process, before the first call."""


class Sink(Process):
    """A process with UDP targets. `targets` are their addresses."""

    def __init__(
        self,
        count: int,
        echo: bool = False,
        host: str = LOOPBACK,
        make: Callable[..., socket.socket] = socket.socket,
    ) -> None:
        """Bind the targets to `host`. `make` creates sockets, perhaps in another namespace."""
        self._sockets = [udp_socket(True, host, make) for _ in range(count)]
        self.targets: list[Endpoint] = [sock.getsockname() for sock in self._sockets]
        self._echo = echo
        self._count = self._receives = 0
        super().__init__()
        for sock in self._sockets:
            sock.close()

    # -- calls

    def echo(self, on: bool) -> None:
        """Send datagrams back from now on, or not."""
        self._echo = on

    def take(self) -> int:
        """Return the number of datagrams since the last call."""
        count, self._count = self._count, 0
        return count

    def receives(self) -> int:
        """Return the number of receives since the last call: a train is received at once."""
        count, self._receives = self._receives, 0
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
                    # No more datagrams, or an earlier echo was refused.
                    pass

    def _drain(self, sock: socket.socket) -> None:
        buffer, flag = self._buffer, socket.MSG_DONTWAIT
        for _ in range(64):
            length, control, _, peer = sock.recvmsg_into([buffer], 64, flag)
            stride = length
            self._receives += 1
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
    """A process with associations, after open()."""

    # -- calls

    def open(self, server: Endpoint, count: int, targets: Sequence[Endpoint]) -> int:
        """Open associations, and send from each to each target, so that all sessions exist.

        Return the number of datagrams sent.
        """
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
        """Send a datagram from each association to each target. Return their number."""
        return self._paced(self._send_single, 1, 20_000, len(self._sockets) * self._targets)

    def close(self) -> None:
        """Close the associations."""
        for client in self._clients:
            client.close()
        self._poll.close()

    def run(self, load: str, rate: float, seconds: float) -> Done:
        """Send a load at `rate` datagrams per second, or as fast as possible if it is 0."""
        senders = {"train": (self._send_train, TRAIN), "burst": (self._send_burst, TRAIN)}
        send, step = senders.get(load, (self._send_single, 1))
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
        """Send a datagram from the next client to its next target."""
        turn, client = divmod(number, len(self._sockets))
        try:
            self._sockets[client].send(self._singles[(turn + client) % self._targets])
        except OSError:
            # A full buffer loses the datagram.
            pass

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

    def _receive(self, seconds: float) -> None:
        """Receive all datagrams, until none arrives for so many seconds."""
        while ready := self._poll.poll(seconds):
            for descriptor, _ in ready:
                sock = self._by_descriptor[descriptor]
                try:
                    while True:
                        sock.recv(65536)
                        self._received += 1
                except OSError:
                    pass
            if not seconds:
                return


def settle(sink: Sink) -> int:
    """Wait until no more datagrams arrive. Return the number since the last call."""
    total = 0
    while True:
        count = sink.call("take")
        if total and not count:
            return total
        total += count
        time.sleep(QUIET)
        if not total and not count:
            return sink.call("take")
