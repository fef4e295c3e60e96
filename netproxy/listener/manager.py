"""Keeps the listeners of the running configuration, TCP and UDP.

A new configuration comes in two phases.  bind() binds and starts the new listeners, all
or none, and leaves the running ones as they are.  It returns BoundListeners: commit()
configures the listeners that stay and stops the others, discard() stops the new ones.
A listener whose network and address stay the same keeps its socket.  Thread: main.
"""

from __future__ import annotations

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import Address, UnixAddress
from netproxy.interfaces.listeners import Listener
from netproxy.typed import Any, Callable, Generic, Mapping, Sequence, TypeVar

PORT_TRIES = 16
"""How many ports are tried for a group before its last one must be free for TCP and UDP alike."""

L = TypeVar("L", bound=Listener)


class ListenerSpec:
    """A listener that a configuration wants.

    Specs with port 0 and the same `group` get the same port number.  The methods receive a
    listener that was bound for the spec's network.  Any: its type depends on the network.
    """

    def __init__(self, network: str, address: Address, group: str) -> None:
        """`network`: "tcp" or "udp"."""
        self.network = network
        self.address = address
        self.group = group

    def attach(self, listener: Any) -> None:  # Any: see above
        """Tell the handlers of the spec which listener they get.

        Called for every spec before any listener is configured.  Must not change the listener,
        which may be running with the configuration before.
        """

    def configure(self, listener: Any) -> None:  # Any: see above
        """Give the listener its name, its handler and its limits."""
        raise NotImplementedError


class BoundListeners(Generic[L]):
    """The listeners of a new configuration, those that are new bound and started.

    Call commit() or discard() once.
    """

    def __init__(
        self,
        manager: ListenerManager[L],
        pairs: Sequence[tuple[ListenerSpec, L]],
        fresh: Sequence[L],
    ) -> None:
        """`pairs`: all listeners with their specs; `fresh`: those that were not there before."""
        before = manager.listeners
        self._manager = manager
        self.pairs = list(pairs)
        self.fresh = list(fresh)
        self.listeners = [listener for _, listener in pairs]
        staying = {id(listener) for listener in self.listeners}
        self.gone = [listener for listener in before if id(listener) not in staying]
        """The running listeners that the new configuration does not want."""

    def commit(self) -> None:
        """Configure the listeners that stay, then stop those that are gone, the last first.

        The new ones wait for begin().
        """
        fresh = {id(listener) for listener in self.fresh}
        for spec, listener in self.pairs:
            if id(listener) not in fresh:
                spec.configure(listener)
        self._manager.pairs = self.pairs
        _stop(self.gone)

    def begin(self) -> None:
        """Have the new listeners take what comes; after commit(), once all else is in force."""
        for listener in self.fresh:
            listener.begin()

    def discard(self) -> None:
        """Stop the new listeners, the last first."""
        _stop(self.fresh)


class ListenerManager(Generic[L]):
    """Binds the listeners of a configuration and stops those of the one before."""

    def __init__(self, binders: Mapping[str, Callable[[Address], L]]) -> None:
        """`binders[network](address)` returns a bound listener or raises ListenError."""
        self._binders = binders
        self.pairs: list[tuple[ListenerSpec, L]] = []
        """The running listeners with their specs; replaced whole by BoundListeners.commit()."""

    @property
    def listeners(self) -> list[L]:
        """The running listeners, in the order of their specs."""
        return [listener for _, listener in self.pairs]

    def bind(self, specs: Sequence[ListenerSpec]) -> BoundListeners[L]:
        """Bind and start the listeners that are not running yet.

        Raises ListenError if an address cannot be bound, is wanted twice, or no thread can be
        had; then nothing has changed.
        """
        _refuse_duplicates(specs)
        running = {_identity(spec): listener for spec, listener in self.pairs}
        pairs: list[tuple[ListenerSpec, L]] = []
        fresh: list[L] = []
        try:
            for group in _groups(specs):
                kept = [running[_identity(spec)] for spec in group if _identity(spec) in running]
                missing = [spec for spec in group if _identity(spec) not in running]
                bound = iter(self._bind_group(missing, kept[0].address.port if kept else 0))
                for spec in group:
                    listener = running.get(_identity(spec))
                    if listener is None:
                        listener = next(bound)
                        fresh.append(listener)
                    pairs.append((spec, listener))
            _start(pairs, fresh)
        except ListenError:
            _stop(fresh)
            raise
        return BoundListeners(self, pairs, fresh)

    def stop(self, networks: Sequence[str] = ("tcp", "udp")) -> list[L]:
        """Stop the listeners of these networks, the last first, and return them."""
        gone = [listener for spec, listener in reversed(self.pairs) if spec.network in networks]
        self.pairs = [pair for pair in self.pairs if pair[0].network not in networks]
        _stop(gone[::-1])
        return gone

    def _bind_group(self, group: Sequence[ListenerSpec], kept_port: int) -> list[L]:
        """Bind all of a group, on one port number if they have port 0.

        `kept_port`: the port of a listener of the group that stays, 0 for none.
        Raises ListenError; then none of them is bound.
        """
        for last_try in [False] * (PORT_TRIES - 1) + [True]:
            bound: list[L] = []
            try:
                for spec in group:
                    chosen = kept_port or (bound[0].address.port if bound else 0)
                    address = spec.address._replace(port=spec.address.port or chosen)
                    bound.append(self._binders[spec.network](address))
                return bound
            except ListenError:
                _stop(bound)
                # Another try can only help if the kernel chose the port for the first of the group.
                if last_try or kept_port or not bound or group[0].address.port:
                    raise
        raise AssertionError("not reached")


def _start(pairs: Sequence[tuple[ListenerSpec, L]], fresh: Sequence[L]) -> None:
    """Configure and start the fresh listeners.  Raises ListenError if a thread cannot be had."""
    new = {id(listener) for listener in fresh}
    for spec, listener in pairs:
        spec.attach(listener)
    for spec, listener in pairs:
        if id(listener) in new:
            spec.configure(listener)
    try:
        for listener in fresh:
            listener.start(held=True)
    except RuntimeError as error:  # can't start new thread
        raise ListenError(f"cannot start a listener: {error}") from error


def _stop(listeners: Sequence[L]) -> None:
    for listener in listeners:
        listener.halt()
    for listener in reversed(listeners):
        listener.stop()


def _identity(spec: ListenerSpec) -> tuple[str, Address, str]:
    """Return what a running listener is recognized by; for port 0 its group belongs to it."""
    has_place = spec.address.port or isinstance(spec.address, UnixAddress)
    return spec.network, spec.address, "" if has_place else spec.group


def _refuse_duplicates(specs: Sequence[ListenerSpec]) -> None:
    seen = set()
    for spec in specs:
        if _identity(spec) in seen:
            raise ListenError(f"{spec.network} {spec.address}: wanted twice")
        seen.add(_identity(spec))


def _groups(specs: Sequence[ListenerSpec]) -> list[list[ListenerSpec]]:
    """Return the specs in groups that are bound together: those of one group with port 0."""
    groups: dict[str | int, list[ListenerSpec]] = {}
    for number, spec in enumerate(specs):
        groups.setdefault(number if spec.address.port else spec.group, []).append(spec)
    return list(groups.values())
