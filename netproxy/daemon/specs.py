"""What the listener manager is to bind for a plan, and what each listener gets then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netproxy.listener.manager import ListenerSpec

if TYPE_CHECKING:
    from netproxy.access.limits import Admission
    from netproxy.config.schema import ListenerConfig
    from netproxy.handler.factory import ListenerHandler
    from netproxy.interfaces.addresses import Address
    from netproxy.listener.tcp import TcpListener
    from netproxy.listener.udp import UdpListener


class TcpSpec(ListenerSpec):
    """The TCP listener of one address."""

    def __init__(
        self,
        config: ListenerConfig,
        address: Address,
        handlers: ListenerHandler,
        admission: Admission,
        handshake: float,
    ) -> None:
        """`admission`: of all addresses of the listener.  `handshake`: seconds for a handshake."""
        super().__init__("tcp", address, f"{config.name} {address}")
        self._name = config.name
        self._handlers = handlers
        self._admission = admission
        self._handshake = handshake
        self._handshakes = config.limits.handshakes

    def configure(self, listener: TcpListener) -> None:
        """Give a listener its handler and limits."""
        listener.name = self._name
        handler = self._handlers.handler
        assert handler is not None  # config.read has seen to it that the protocol has connections
        listener.configure(handler, self._admission, self._handshake, self._handshakes)


class UdpSpec(ListenerSpec):
    """The UDP listener of one address."""

    def __init__(self, config: ListenerConfig, address: Address, handlers: ListenerHandler) -> None:
        super().__init__("udp", address, f"{config.name} {address}")
        self._name = config.name
        self._handlers = handlers

    def attach(self, listener: UdpListener) -> None:
        """Tell the relay its socket: the TCP listener of the address may accept before commit()."""
        if self._handlers.udp is not None:
            self._handlers.udp.shared = listener.local

    def configure(self, listener: UdpListener) -> None:
        """Give a listener its handler."""
        listener.name = self._name
        packets = self._handlers.packets
        assert packets is not None  # config.read has seen to it that the protocol has datagrams
        listener.handler = packets
