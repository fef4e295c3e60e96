"""A UDP listener: one thread reads batches and hands them to a PacketHandler.

The handler never blocks; whatever it raises is logged and costs that batch only.
"""

from __future__ import annotations

import threading
from typing import Callable

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import PacketHandler
from netproxy.interfaces.services import Counter, Log
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.datagram_socket import DatagramSocket


class UdpListener:
    network = "udp"
    name = ""  # in the configuration; of whoever equips it

    def __init__(
        self,
        address: Address,
        datagrams: UdpSocketFactory,
        counter: Counter,
        log: Log,
        tag: bytes = b"",
    ) -> None:
        """Bound; ListenError.  `handler` is set before start()."""
        self.handler: PacketHandler
        self.local: DatagramSocket = datagrams.listen(address, tag)
        self.address = self.local.address
        self._arena = datagrams.arena()
        self._counter = counter
        self._log = log
        self.thread = threading.Thread(
            target=self._read, name=f"udp-listener {self.address}", daemon=True
        )

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.local.shutdown()
        if self.thread.is_alive():
            self.thread.join()
        self.local.close()

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Nothing here ends; once a second, on the janitor's thread, what the kernel has dropped is counted."""
        self.local.count_overflow()
        return []

    def _read(self) -> None:
        local, arena = self.local, self._arena
        while not local.closed:
            try:
                batch = local.receive_waiting(arena)
                self.handler.handle_packets(
                    batch, local
                )  # looked up now: a reload may have changed it meanwhile
            except Exception:
                self._counter.count("drops", "internal error")
                self._log.exception(f"handling datagrams on {self.address}")
