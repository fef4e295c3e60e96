"""A UDP listener: one thread reads batches and hands them to a PacketHandler.

The handler never blocks; an exception of it is logged and costs that batch only.
"""

from __future__ import annotations

import threading

from netproxy.net.udp_sockets import allow_fragments, report_targets
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from socket import socket

    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import PacketHandler
    from netproxy.interfaces.services import Counter, Log
    from netproxy.net.datagram_socket import DatagramSocket
    from netproxy.net.udp_sockets import UdpSocketFactory


class UdpListener:
    """A bound UDP socket and its reader thread.  `handler` is set before start()."""

    network = "udp"
    name = ""
    """The listener's name in the configuration."""

    def __init__(
        self,
        address: Address,
        sockets: UdpSocketFactory,
        counter: Counter,
        log: Log,
        tag: bytes = b"",
        given: socket | None = None,
    ) -> None:
        """Bind, or take over a socket that was bound for this process.

        `tag` tells the peers of this socket from those of others.  Raises ListenError.
        """
        self.handler: PacketHandler
        self.local: DatagramSocket = (
            sockets.listen(address, tag) if given is None else sockets.take_over(given)
        )
        self.address = self.local.address
        self._reports_targets = False
        self._has_fragments = True
        self._arena = sockets.arena()
        self._begun = threading.Event()
        self._counter = counter
        self._log = log
        self.thread = threading.Thread(
            target=self._read, name=f"udp-listener {self.address}", daemon=True
        )

    def report_targets(self, enabled: bool) -> None:
        """Serve datagrams that rules TPROXY of the kernel lead here, or no longer.

        Raises OSError without the capability.
        """
        if enabled != self._reports_targets:
            report_targets(self.local, enabled)
            self._reports_targets = enabled

    def allow_fragments(self, allowed: bool) -> None:
        """Let routers fragment what the socket sends, or no longer."""
        if allowed != self._has_fragments:
            allow_fragments(self.local, allowed)
            self._has_fragments = allowed

    def start(self, held: bool = False) -> None:
        """Start the thread, which reads nothing before begin() if `held`.  Raises RuntimeError."""
        self.thread.start()
        if not held:
            self.begin()

    def begin(self) -> None:
        """Read from now on."""
        self._begun.set()

    def halt(self) -> None:
        """Have the thread end soon."""
        self.local.shutdown()
        self._begun.set()

    def stop(self) -> None:
        """Stop the thread and close the socket."""
        self.halt()
        if self.thread.is_alive():
            self.thread.join()
        self.local.close()

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Count what the kernel has dropped.  Thread: the janitor's, once a second."""
        self.local.count_overflow()
        return []

    def _read(self) -> None:
        self._begun.wait()
        local, arena = self.local, self._arena
        while not local.closed:
            try:
                batch = local.receive_waiting(arena)
                # A reload may have changed the handler meanwhile.
                self.handler.handle_packets(batch, local)
            except Exception:
                self._counter.count("drops", "internal error")
                self._log.exception(f"handling datagrams on {self.address}")
