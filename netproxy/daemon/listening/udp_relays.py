"""The UDP side of a plan's listening addresses: associations and a NAT table for each.

An address that a new configuration keeps keeps its associations and sessions.  A listener
with `relay_port` "any" or a range gets a socket for each association from RelayPorts.
Thread: main, except RelayPorts.open().
"""

from __future__ import annotations

import itertools

from netproxy.access.own_sockets import OwnSockets
from netproxy.access.permission import LISTENER_REMOVED
from netproxy.config.schema import Config, ListenerConfig
from netproxy.daemon.runtime import Runtime
from netproxy.errors import DialError, ListenError, Reason
from netproxy.handler.socks.socks5_udp import RelayState, Socks5UdpRelay
from netproxy.interfaces.addresses import Address
from netproxy.listener.udp import UdpListener
from netproxy.net.datagram_socket import DatagramSocket
from netproxy.relay.association import Associations
from netproxy.relay.nat import NatTable
from netproxy.relay.table.policy import NatPolicy
from netproxy.relay.quota import SessionLimits
from netproxy.typed import Iterator

Key = tuple[str, Address]
"""A listener's name and one of its addresses."""


class UdpRelays:
    """What carries the datagrams of a configuration, by listener and address."""

    def __init__(self, config: Config, runtime: Runtime, previous: UdpRelays | None) -> None:
        """Take over what `previous` has for the same listener and address; make the rest."""
        self._config = config
        self._runtime = runtime
        self._numbers: itertools.count[int] = previous._numbers if previous else itertools.count(1)
        self.states: dict[Key, RelayState] = {}
        running = previous.states if previous else {}
        for listener in config.listeners:
            if "udp" in listener.network and listener.protocol not in ("dns", "tunnel"):
                for address in listener.addresses:
                    key = listener.name, address
                    state = running.get(key)
                    if state is None or _has_replies(listener) != (state.replies is not None):
                        state = self._make(listener, address)
                    self.states[key] = state

    def commit(self, previous: UdpRelays) -> None:
        """Apply the new limits, and end the sessions of addresses that are gone."""
        for listener in self._config.listeners:
            for address in listener.addresses:
                if (listener.name, address) in self.states:
                    table = self.states[listener.name, address].table
                    table.set_policy(_policy(listener))
        for key, state in previous.states.items():
            if self.states.get(key) is not state:
                self._runtime.janitor.unregister(state.table)
                state.table.close(LISTENER_REMOVED)
                if state.replies is not None:
                    self._runtime.janitor.unregister(state.replies)
                    state.replies.close()
        for key, state in self.states.items():
            if previous.states.get(key) is not state:
                self._runtime.janitor.register(state.table)
                if state.replies is not None:
                    self._runtime.janitor.register(state.replies)

    def ports(self, relay_port: str) -> RelayPorts:
        """Return the relay ports of a listener whose `relay_port` is "any" or FIRST-LAST."""
        return RelayPorts(self._runtime, _port_range(relay_port), self._numbers)

    def close(self) -> None:
        """End all sessions."""
        for state in self.states.values():
            state.table.close()
            if state.replies is not None:
                state.replies.close()

    def status(self) -> Iterator[str]:
        """Yield a line for each address, for the log."""
        for (name, address), state in self.states.items():
            yield (
                f"udp {name} {address}: associations={len(state.associations)} "
                f"sessions={len(state.table)} entries={len(state.table.entries)}"
            )

    def _make(self, listener: ListenerConfig, address: Address) -> RelayState:
        runtime = self._runtime
        arenas = runtime.datagrams.arenas
        shared = runtime.counting.sessions(f"{listener.name} {address}")
        table = NatTable(_policy(listener), runtime.nat_dependencies(), shared)
        replies = None
        if _has_replies(listener):
            from netproxy.handler.transparent.replies import ReplySockets  # late: for few daemons

            replies = ReplySockets(runtime.datagrams, runtime.counters, runtime.log)
        return RelayState(Associations(), table, arenas, replies)


class RelayPorts:
    """Opens a relay socket for one association, on a port of a range."""

    def __init__(self, runtime: Runtime, ports: range, numbers: itertools.count[int]) -> None:
        """`numbers` are the numbers of all relay sockets of the daemon."""
        self._runtime = runtime
        self._ports = ports
        self._numbers = numbers

    def open(self, relay: Socks5UdpRelay, host: str) -> _RelayPort:
        """Return a started port on `host`, the address that the control connection came to.

        The ports take turns, so that one that was just closed rests.
        Raises DialError if none is free, or no thread can be had.  Thread: any.
        """
        runtime = self._runtime
        number = next(self._numbers)
        for offset in range(len(self._ports)):
            port = self._ports[(number + offset) % len(self._ports)]
            try:
                listener = UdpListener(
                    Address(host, port),
                    runtime.datagrams,
                    runtime.counters,
                    runtime.log,
                    b"%d" % number,
                )
            except ListenError:
                continue
            listener.handler = relay
            port_of_association = _RelayPort(listener, runtime.own)
            try:
                listener.start()
            except RuntimeError as error:  # can't start new thread
                port_of_association.stop()
                raise DialError(Reason.GENERAL, said=str(error)) from error
            return port_of_association
        raise DialError(Reason.GENERAL, said="no relay port is free")


class _RelayPort:
    """The listener of one association (handler.socks.socks5_udp.RelayPort).

    No client is led to it, by whichever address of the machine: what came to it from there
    would have the sender's address of another client.
    """

    def __init__(self, listener: UdpListener, own: OwnSockets) -> None:
        """Register a bound listener as one of the daemon's own sockets."""
        self._listener = listener
        self._unregister = own.register_everywhere("udp", listener.address)

    @property
    def local(self) -> DatagramSocket:
        """The socket that it reads."""
        return self._listener.local

    def stop(self) -> None:
        """Stop and close it."""
        self._listener.stop()
        self._unregister()


def _has_replies(listener: ListenerConfig) -> bool:
    """Return whether replies to its clients leave from the addresses of their targets."""
    return listener.protocol == "tproxy"


def _port_range(relay_port: str) -> range:
    if relay_port == "any":
        return range(1)  # port 0: the kernel chooses
    first, _, last = relay_port.partition("-")
    return range(int(first), int(last) + 1)


def _policy(listener: ListenerConfig) -> NatPolicy:
    udp = listener.udp
    return NatPolicy(
        SessionLimits(udp.max_sessions, udp.max_sessions_per_client or 1),
        udp.idle_timeout,
        udp.mapping == "symmetric",
        udp.filtering,
    )
