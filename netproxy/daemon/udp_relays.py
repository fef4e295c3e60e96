"""The UDP side of each listening address: associations, NAT table, arenas, and relay ports of associations' own.

Kept over a reload, so that sessions go on.  On the main thread, but for open_port().
"""

from __future__ import annotations

from typing import Iterator

from netproxy.config.schema import Config, ListenerConfig
from netproxy.errors import DialError, ListenError, Reason
from netproxy.handler.socks5_udp import RelayState, Socks5UdpRelay
from netproxy.interfaces.addresses import Address
from netproxy.listener.udp import UdpListener
from netproxy.daemon.runtime import Runtime
from netproxy.relay.association import Associations
from netproxy.relay.quota import SessionLimits
from netproxy.relay.nat import NatDependencies, NatPolicy, NatTable

Key = tuple[str, Address]  # a listener's name and one of its addresses
States = dict[Key, RelayState]


class UdpRelays:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._states: States = {}
        self._tags = iter(range(1, 1 << 62))

    def state(self, address: Address, config: ListenerConfig) -> RelayState:
        """What lives on an address, or will once a configuration is adopted."""
        found = self._states.get((config.name, address))
        if found is not None:
            return found
        runtime = self._runtime
        arenas = runtime.datagrams.arenas()
        dependencies = NatDependencies(
            arenas, runtime.dials, runtime.names, runtime.counters, runtime.flows, runtime.log
        )
        table = NatTable(_policy(config, {}), dependencies)
        return RelayState(Associations(), table, arenas)

    def adopt(self, states: States, config: Config) -> None:
        """These are in use from now on, by their listeners' policies; what is not among them ends."""
        user_sessions = {
            name: user.sessions for name, user in config.users.items() if user.sessions
        }
        for listener in config.listeners:
            for address in listener.addresses:
                if (listener.name, address) in states:
                    states[listener.name, address].table.set_policy(
                        _policy(listener, user_sessions)
                    )
        for key, state in self._states.items():
            if states.get(key) is not state:
                self._runtime.janitor.unregister(state.table)
                state.table.close()
        for key, state in states.items():
            if self._states.get(key) is not state:
                self._runtime.janitor.register(state.table)
        self._states = states

    def close(self) -> None:
        for state in self._states.values():
            state.table.close()

    def status(self) -> Iterator[str]:
        for (name, address), state in self._states.items():
            yield (
                f"udp {name} {address}: associations={len(state.associations)} sessions={len(state.table)} "
                f"entries={len(state.table.entries)}"
            )

    def open_port(self, ports: range, relay: Socks5UdpRelay, host: str) -> UdpListener:
        """A relay socket of one association's own, on the address its control connection came to."""
        runtime = self._runtime
        tag = b"%d" % next(self._tags)
        start = next(self._tags) % len(
            ports
        )  # one after the other, so that a port just freed rests
        for at in range(len(ports)):
            try:
                address = Address(host, ports[(start + at) % len(ports)])
                listener = UdpListener(
                    address, runtime.datagrams, runtime.counters, runtime.log, tag
                )
            except ListenError:
                continue
            listener.handler = relay
            listener.start()
            return listener
        raise DialError(Reason.GENERAL, "no relay port is free")


def _policy(config: ListenerConfig, user_sessions: dict[str, int]) -> NatPolicy:
    udp = config.udp
    return NatPolicy(
        SessionLimits(udp.max_sessions, udp.max_sessions_per_client or 1, user_sessions),
        udp.idle_timeout,
        udp.mapping == "symmetric",
        udp.filtering,
    )
