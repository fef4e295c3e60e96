"""Keeps ports of this machine open in the router: asks for mappings, renews and releases them.

The janitor tells the time, and what is due runs on a thread of a pool: a router that does not
answer delays nobody.  A router that has restarted is noticed by its clock.
"""

from __future__ import annotations

import threading
import time

from netproxy.errors import DialError
from netproxy.interfaces.addresses import Address
from netproxy.public_address.dialects import MappingRefused, NatPmp, Pcp, SpeaksNatPmp, is_usable
from netproxy.public_address.epoch import Epoch
from netproxy.public_address.mapping import LIFETIME, Mapping, MappingState
from netproxy.public_address.mapping_records import REFUSED, MappingRecords
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.services import Counter, Log
    from netproxy.public_address.dialects import Dialect, Exchange, Port
    from netproxy.public_address.mapping import WantedPort

POLL_SECONDS = 60.0
"""Between two questions for the router's clock: for so long others may not reach the ports after
the router has restarted."""
RELEASE_WAITS = (0.2, 0.3)
"""Seconds after each try to release a mapping; what is not released expires."""
NO_ROUTER = "there is no default gateway"


class MapperDependencies(NamedTuple):
    """What asking the router needs of the daemon.  Thread: any."""

    find_router: Callable[[], str]
    """Returns the address of the default gateway, "" if there is none."""
    connect: Callable[[str, str], Exchange]
    """connect(router, source) opens what asks a router.  Raises DialError."""
    submit: Callable[[Callable[[], None]], bool]
    """Runs a task that may block on another thread; False if the queue is full."""
    key: bytes
    """The secret that nonces are made of."""
    log: Log
    counter: Counter


class PortMapper:
    """The mappings of one source address.  An Expirable."""

    def __init__(self, source: str, protocol: str, dependencies: MapperDependencies) -> None:
        """`source`: the address that the ports are bound to, "" for all of the machine.

        `protocol`: "pcp" or "nat-pmp".
        """
        self._source = source
        self._protocol = protocol
        self._dependencies = dependencies
        self._records = MappingRecords(dependencies.log, dependencies.counter)
        # Guards all below except _dialect, _router and _epoch, which belong to the task that
        # runs; no question is asked under it.
        self._lock = threading.Lock()
        self._mappings: dict[Port, Mapping] = {}
        self._unwanted: list[Port] = []
        """Granted ports that nobody wants any more."""
        self._poll_due = 0.0
        self._is_busy = False
        self._is_stopped = False
        self._router = ""
        self._dialect: Dialect = self._first_dialect()
        self._epoch = Epoch()

    # -- thread: main

    def want(self, wanted: Sequence[WantedPort]) -> None:
        """Map these ports from now on, and release all others."""
        with self._lock:
            before, self._mappings = self._mappings, {}
            for wanted_port in wanted:
                port = wanted_port.port
                mapping = before.pop(port, None) or Mapping(wanted_port)
                mapping.wanted = wanted_port
                self._mappings[port] = mapping
            self._unwanted += [port for port, mapping in before.items() if mapping.grant]
            # A user who reloads may know that the router has restarted.
            self._poll_due = 0.0
            told = [(mapping.wanted, mapping.external) for mapping in self._mappings.values()]
        for (port, _, follower), external in told:
            follower.mapped(port, external)

    def stop(self) -> None:
        """Release all mappings; blocks for a moment."""
        with self._lock:
            self._is_stopped = True
            granted = [port for port, mapping in self._mappings.items() if mapping.grant]
            ports, self._mappings, self._unwanted = self._unwanted + granted, {}, []
        if not ports or not self._router:
            return
        try:
            exchange = self._dependencies.connect(self._router, self._source)
        except DialError:
            # The network is gone; the mappings expire.
            return
        self._release(exchange, ports)
        exchange.close()

    # -- thread: the janitor's, or any

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Ask the router if something is due; nothing expires."""
        with self._lock:
            is_due = bool(self._unwanted) or any(
                min(mapping.due, self._poll_due) <= now for mapping in self._mappings.values()
            )
            if not is_due or self._is_busy or self._is_stopped:
                return ()
            self._is_busy = True
        if not self._dependencies.submit(self._run):
            self._is_busy = False
        return ()

    @property
    def is_done(self) -> bool:
        """True if there is nothing to map or to release."""
        return not (self._mappings or self._unwanted or self._is_busy)

    def states(self, now: float) -> list[MappingState]:
        """Return the state of all mappings."""
        how = f"{self._dialect.name}, router {self._router}" if self._router else self._protocol
        with self._lock:
            return [
                MappingState(
                    mapping.wanted.listener,
                    port,
                    mapping.external,
                    how,
                    mapping.left(now),
                    mapping.fault,
                )
                for port, mapping in self._mappings.items()
            ]

    # -- thread: a pool's, one at a time

    def _run(self) -> None:
        try:
            self.ask(time.monotonic())
        finally:
            self._is_busy = False

    def ask(self, now: float) -> None:
        """Ask the router for all that is due.  Blocks."""
        self._follow_router(self._dependencies.find_router())
        self._poll_due, is_polled = now + POLL_SECONDS, self._poll_due <= now
        if not self._router:
            self._fail(self._due(now), NO_ROUTER, now)
            return
        try:
            exchange = self._dependencies.connect(self._router, self._source)
        except DialError as error:
            self._fail(self._due(now), str(error), now)
            return
        try:
            with self._lock:
                unwanted, self._unwanted = self._unwanted, []
            self._release(exchange, unwanted)
            if is_polled:
                self._poll(exchange, now)
            # A renewal may show that the router has lost all others.
            while due := self._due(now):
                self._renew(exchange, due, now)
        finally:
            exchange.close()

    def _first_dialect(self) -> Dialect:
        return Pcp(self._dependencies.key) if self._protocol == "pcp" else NatPmp()

    def _follow_router(self, router: str) -> None:
        """Use another default gateway: what the one before has granted is of no use."""
        if router == self._router:
            return
        self._router, self._dialect = router, self._first_dialect()
        self._epoch.forget()
        with self._lock:
            gone = [mapping for mapping in self._mappings.values() if mapping.grant]
            for mapping in self._mappings.values():
                mapping.grant, mapping.due = None, 0.0
        for mapping in gone:
            mapping.wanted.follower.mapped(mapping.wanted.port, None)

    def _due(self, now: float) -> list[Mapping]:
        with self._lock:
            return [mapping for mapping in self._mappings.values() if mapping.due <= now]

    def _poll(self, exchange: Exchange, now: float) -> None:
        """Ask the router for its clock, if there is anything that it could have lost."""
        if not any(mapping.grant for mapping in self._mappings.values()):
            return
        try:
            self._note_epoch(self._dialect.epoch(exchange), now)
        except (DialError, MappingRefused, SpeaksNatPmp):
            self._records.clock_not_told()

    def _note_epoch(self, epoch: int, now: float, renewed: Mapping | None = None) -> None:
        """Have all mappings renewed, except the one just `renewed`, if the router lost them."""
        if not self._epoch.note(epoch, now, self._dialect.tolerance):
            return
        self._records.lost(self._router)
        with self._lock:
            for mapping in self._mappings.values():
                if mapping is not renewed:
                    mapping.due = now

    def _renew(self, exchange: Exchange, due: Sequence[Mapping], now: float) -> None:
        """Ask for mappings; if the router does not answer for one, do not ask for the others."""
        for index, mapping in enumerate(due):
            port, before = mapping.wanted.port, mapping.external
            wish = before or Address("0.0.0.0", port.number)
            try:
                grant = self._dialect.map(exchange, port, wish, LIFETIME)
                if not is_usable(grant.external):
                    raise MappingRefused("the router has no external address")
                if not grant.lifetime:
                    raise MappingRefused("the router grants no time")
            except SpeaksNatPmp:
                self._records.speaks_nat_pmp(self._router)
                self._dialect = NatPmp()
                return
            except MappingRefused as error:
                self._refuse(mapping, error, now)
                continue
            except DialError as error:
                self._fail(due[index:], str(error), now)
                return
            with self._lock:
                is_wanted = self._mappings.get(port) is mapping
                mapping.granted(grant, now)
            if not is_wanted:
                # It was released, or the daemon has stopped, while the router was asked.
                self._release(exchange, [port])
                continue
            self._note_epoch(grant.epoch, now, mapping)
            if grant.external != before:
                by = f"{self._dialect.name}, router {self._router}"
                self._records.granted(mapping, before, by)
                mapping.wanted.follower.mapped(port, grant.external)

    def _refuse(self, mapping: Mapping, error: MappingRefused, now: float) -> None:
        before, fault = mapping.external, mapping.fault
        with self._lock:
            mapping.refused(REFUSED + str(error), error.seconds, now)
        self._records.failed(mapping, fault, self._dialect.name)
        if before is not None:
            mapping.wanted.follower.mapped(mapping.wanted.port, None)

    def _fail(self, due: Sequence[Mapping], fault: str, now: float) -> None:
        for mapping in due:
            before, fault_before = mapping.external, mapping.fault
            with self._lock:
                mapping.failed(fault, now)
            self._records.failed(mapping, fault_before, self._dialect.name)
            if before is not None and mapping.grant is None:
                mapping.wanted.follower.mapped(mapping.wanted.port, None)

    def _release(self, exchange: Exchange, ports: Sequence[Port]) -> None:
        """Delete mappings; if the router does not answer, leave them to expire."""
        for port in ports:
            try:
                self._dialect.release(exchange, port, RELEASE_WAITS)
            except (MappingRefused, SpeaksNatPmp):
                continue
            except DialError:
                return
            self._records.released(port)
