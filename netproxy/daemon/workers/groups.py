"""Binds the sockets of all workers: for each address a group with one socket for each worker.

The parent binds them and keeps them open, so that a connection or a datagram waits for the
successor of a worker that has died.  Thread: main.
"""

from __future__ import annotations

import socket

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import ActivationAddress, UnixAddress
from netproxy.listener.manager import ListenerSpec
from netproxy.listener.steering import steer_by_client, steer_by_connection, steer_by_identifier
from netproxy.listener.tcp import BACKLOG
from netproxy.net.address import from_sockaddr, is_ipv6, is_unspecified, listen_error, to_sockaddr
from netproxy.net.socket_options import check_transparent, set_transparent, tune
from netproxy.net.udp_sockets import set_target_options
from netproxy.protocol.tunnels.path import ID_OFFSET
from netproxy.typed import TYPE_CHECKING, Callable, Iterator, Sequence

if TYPE_CHECKING:
    from netproxy.config.schema import Config, ListenerConfig
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.listeners import GivenSockets
    from netproxy.listener.sockets.unix import SocketFile

AGENT_PROTOCOL = "tunnel"
"""The connections of an agent must meet in one worker: those of its listeners go by client."""
_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


class SocketGroup:
    """The bound sockets of one address.  A Listener that starts nothing."""

    def __init__(
        self,
        network: str,
        sockets: Sequence[socket.socket | None],
        address: Address | None = None,
        file: SocketFile | None = None,
    ) -> None:
        """Take the sockets over, by worker; None: the worker does not serve the address.

        `address` and `file` are those of a UNIX socket.
        """
        self.network = network
        self.sockets = sockets
        first = next(sock for sock in sockets if sock is not None)
        self.address = address or from_sockaddr(first.getsockname())
        self._file = file

    def start(self, held: bool = False) -> None:
        """Do nothing: the workers serve the sockets."""

    def begin(self) -> None:
        """Do nothing, as start()."""

    def halt(self) -> None:
        """Do nothing: stop() takes no time."""

    def stop(self) -> None:
        """Close the sockets."""
        if self._file is not None:
            self._file.remove()
        for sock in self.sockets:
            if sock is not None:
                sock.close()


class GroupSpec(ListenerSpec):
    """An address that needs a group."""

    def __init__(
        self, network: str, address: Address, group: str, by_client: bool, config: ListenerConfig
    ) -> None:
        """`by_client`: the client's address alone decides which worker has a connection."""
        super().__init__(network, address, group)
        self.by_client = by_client
        self._is_tproxy = config.protocol == "tproxy"
        # The datagrams of an agent, whose address may change.
        self._has_identifiers = network == "udp" and config.protocol == AGENT_PROTOCOL
        self._socket_file = config.socket_file

    def configure(self, group: SocketGroup) -> None:
        """Steer the clients of a group."""
        if self._is_tproxy:
            check_transparent(self.network, group.address)
            # Now, because the kernel drops what it leads to a socket that is not transparent.
            set_options = set_target_options if self.network == "udp" else set_transparent
            for member in group.sockets:
                if member is not None:
                    set_options(member, True)
        sock = group.sockets[0]
        if isinstance(self.address, UnixAddress):
            from netproxy.listener.sockets.unix import FileAccess, allow  # late: few have one

            allow(self.address, FileAccess(*self._socket_file))
            return
        if sock is None or isinstance(self.address, ActivationAddress):
            return
        steer = steer_by_client if self.by_client else steer_by_connection
        try:
            if self._has_identifiers:
                steer_by_identifier(sock, len(group.sockets), ID_OFFSET)
            else:
                steer(sock, len(group.sockets))
        except OSError as error:
            raise ListenError(
                f"cannot steer the clients of {self.network} {group.address}: {error.strerror}"
                " (workers: 1 needs no steering)"
            ) from error


def group_specs(config: Config) -> Iterator[GroupSpec]:
    """Yield the addresses of a configuration, UDP before TCP as daemon.build does."""
    for_agents = {other.name for other in config.listeners if other.protocol == AGENT_PROTOCOL}
    for listener in config.listeners:
        has_agents = any(route.listener in for_agents for route in listener.routes)
        has_agents = has_agents or listener.name in for_agents
        for address in listener.addresses:
            for network in sorted(listener.bound_networks, reverse=True):
                by_client = network == "udp" or has_agents
                group = f"{listener.name} {address}"
                yield GroupSpec(network, address, group, by_client, listener)


class GroupBinder:
    """Binds groups."""

    def __init__(
        self, workers: int, given: GivenSockets, concrete: Callable[[Address], Address]
    ) -> None:
        """`given`: the sockets of the service manager.  `concrete(address)`: what to bind."""
        self._workers = workers
        self._given = given
        self._concrete = concrete

    def tcp(self, address: Address) -> SocketGroup:
        """Return the group of a TCP address.  Raises ListenError."""
        given = self._given.take("tcp", address)
        if given is not None:
            return SocketGroup("tcp", [given] + [given.dup() for _ in range(self._workers - 1)])
        if isinstance(address, UnixAddress):
            return self._unix(address)
        return self._bind("tcp", self._concrete(address))

    def udp(self, address: Address) -> SocketGroup:
        """Return the group of a UDP address.  Raises ListenError."""
        given = self._given.take("udp", address)
        if given is not None:
            # Datagrams of one socket cannot be told apart by client before they are read.
            return SocketGroup("udp", [given] + [None] * (self._workers - 1))
        return self._bind("udp", self._concrete(address))

    def _unix(self, address: UnixAddress) -> SocketGroup:
        """Return a UNIX socket, which all workers share.  Raises ListenError."""
        from netproxy.listener.sockets.unix import SocketFile, bind_unix  # late: few have one

        try:
            sock = bind_unix(address)
            file = SocketFile(address)
        except OSError as error:
            raise listen_error("tcp", address, error) from error
        copies = [sock.dup() for _ in range(self._workers - 1)]
        return SocketGroup("tcp", [sock, *copies], address, file)

    def _bind(self, network: str, address: Address) -> SocketGroup:
        sockets: list[socket.socket] = []
        try:
            if address.port:
                # A group of another process would let our sockets join it.
                _bound(network, address, alone=True).close()
            for _ in range(self._workers):
                sock = _bound(network, address, alone=False)
                sockets.append(sock)
                address = address._replace(port=from_sockaddr(sock.getsockname()).port)
            if network == "tcp":
                for sock in sockets:
                    sock.listen(BACKLOG)
        except OSError as error:
            for sock in sockets:
                sock.close()
            raise listen_error(network, address, error) from error
        return SocketGroup(network, sockets)


def _bound(network: str, address: Address, alone: bool) -> socket.socket:
    """Return a bound socket; `alone`: fail if any other socket has the port.  Raises OSError."""
    family = socket.AF_INET6 if is_ipv6(address.host) else socket.AF_INET
    sock = socket.socket(family, _KINDS[network])
    try:
        if family == socket.AF_INET6:
            only_ipv6 = 0 if is_unspecified(address.host) else 1
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
        if network == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # The workers' sockets inherit these.
            tune(sock)
        if not alone:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(to_sockaddr(address, family))
    except OSError:
        sock.close()
        raise
    return sock


def with_ports(config: Config, pairs: Sequence[tuple[ListenerSpec, SocketGroup]]) -> Config:
    """Return a configuration in which each address has the port that was bound for it."""
    ports = {(spec.group, spec.address): group.address.port for spec, group in pairs}
    return config._replace(
        listeners=tuple(
            listener._replace(
                addresses=tuple(
                    address
                    if isinstance(address, ActivationAddress)
                    else address._replace(port=ports[f"{listener.name} {address}", address])
                    for address in listener.addresses
                )
            )
            for listener in config.listeners
        )
    )
