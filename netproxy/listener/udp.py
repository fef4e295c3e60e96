"""A UDP listener: one thread reads batches and hands them to a PacketHandler.

The handler never blocks; an exception of it is logged and costs that batch only.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
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
    ) -> None:
        """Bind.  `tag` tells the peers of this socket from those of others.

        Raises ListenError.
        """
        self.handler: PacketHandler
        self.local: DatagramSocket = sockets.listen(address, tag)
        self.address = self.local.address
        self._arena = sockets.arena()
        self._counter = counter
        self._log = log
        self.thread = threading.Thread(
            target=self._read, name=f"udp-listener {self.address}", daemon=True
        )

    def start(self) -> None:
        """Start the thread.  Raises RuntimeError if there is none to be had."""
        self.thread.start()

    def stop(self) -> None:
        """Stop the thread and close the socket."""
        self.local.shutdown()
        if self.thread.is_alive():
            self.thread.join()
        self.local.close()

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Count what the kernel has dropped.  Thread: the janitor's, once a second."""
        self.local.count_overflow()
        return []

    def _read(self) -> None:
        local, arena = self.local, self._arena
        while not local.closed:
            try:
                batch = local.receive_waiting(arena)
                # A reload may have changed the handler meanwhile.
                self.handler.handle_packets(batch, local)
            except Exception:
                self._counter.count("drops", "internal error")
                self._log.exception(f"handling datagrams on {self.address}")
