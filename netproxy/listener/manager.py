"""ListenerManager: stream and packet listeners under one roof.

Told apart by their network ("tcp", "udp").  Binds all or none, starts all,
stops in reverse.  replace() on a reload keeps every socket whose network and
address stay the same, and gives it its new handler.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Sequence

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Listener

PORT_TRIES = 16  # for one port number that is free for TCP and UDP alike


class ListenerSpec(NamedTuple):
    """A listener to have.  Those with port 0 and the same `group` get the same port number.

    `equip(listener)` gives a bound listener its handler; it runs again when a reload keeps the socket.
    """

    network: str
    address: Address
    group: str
    configure: Callable[[Any], None]


class ListenerManager:
    """`bind[network](address)` makes a bound listener or raises ListenError."""

    def __init__(self, bind: dict[str, Callable[[Address], Listener]]) -> None:
        self._bind = bind
        self._live: list[tuple[ListenerSpec, Listener]] = []

    @property
    def listeners(self) -> list[Any]:
        return [listener for _, listener in self._live]

    def start(self, wanted: Sequence[ListenerSpec]) -> None:
        """Binds all or none (ListenError), then starts all."""
        self.replace(wanted)

    def replace(self, wanted: Sequence[ListenerSpec]) -> list[Any]:
        """The listeners are now these; on ListenError they stay what they were.  Gives back those that were stopped."""
        kept = {_identity(one): listener for one, listener in self._live}
        bound: list[Listener] = []
        live: list[tuple[ListenerSpec, Listener]] = []
        try:
            _check_twice(wanted)
            for group in _groups(wanted):
                old = [kept[_identity(one)] for one in group if _identity(one) in kept]
                fresh = [one for one in group if _identity(one) not in kept]
                made = iter(self._bind_group(fresh, old[0].address.port if old else 0, bound))
                live += [(one, kept.get(_identity(one)) or next(made)) for one in group]
        except ListenError:
            for listener in reversed(bound):
                listener.stop()
            raise
        for one, listener in live:
            one.configure(listener)
        try:
            for listener in bound:
                listener.start()
        except RuntimeError as error:  # can't start new thread
            for listener in reversed(bound):
                listener.stop()
            for one, listener in self._live:  # those that stay had been given what is new already
                one.configure(listener)
            raise ListenError(f"cannot start a listener: {error}") from error
        staying = {id(listener) for _, listener in live}
        gone = [listener for _, listener in self._live if id(listener) not in staying]
        self._live = live
        for listener in reversed(gone):
            listener.stop()
        return gone

    def stop(self, networks: Sequence[str] = ("tcp", "udp")) -> list[Any]:
        """Stops those of `networks`, the last first; gives them back."""
        gone = [listener for one, listener in reversed(self._live) if one.network in networks]
        self._live = [pair for pair in self._live if pair[0].network not in networks]
        for listener in gone:
            listener.stop()
        return gone

    def _bind_group(
        self, group: Sequence[ListenerSpec], given: int, bound: list[Listener]
    ) -> list[Listener]:
        """Binds one port number for all of a group, the one `given` by a socket that is kept, or any for 0.

        Appends to `bound` what the caller has to stop on an error.
        """
        for last in [False] * (PORT_TRIES - 1) + [True]:
            made: list[Listener] = []
            try:
                for one in group:
                    port = one.address.port or given or (made[0].address.port if made else 0)
                    made.append(self._bind[one.network](one.address._replace(port=port)))
                bound += made
                return made
            except ListenError:
                for listener in made:
                    listener.stop()
                if last or given or not made or group[0].address.port:
                    raise  # only a port the kernel chose for the first may be busy for the second
        raise AssertionError("not reached")


def _identity(one: ListenerSpec) -> tuple[str, Address, str]:
    """What makes a listener the same after a reload; where any port will do, its group tells it from others."""
    return one.network, one.address, "" if one.address.port else one.group


def _check_twice(wanted: Sequence[ListenerSpec]) -> None:
    seen = set()
    for one in wanted:
        if _identity(one) in seen:
            raise ListenError(f"{one.network} {one.address}: wanted twice")
        seen.add(_identity(one))


def _groups(wanted: Sequence[ListenerSpec]) -> list[list[ListenerSpec]]:
    """In order; what shares a group and asks for any port belongs together."""
    groups: dict[Any, list[ListenerSpec]] = {}
    for at, one in enumerate(wanted):
        groups.setdefault(one.group if not one.address.port else at, []).append(one)
    return list(groups.values())
