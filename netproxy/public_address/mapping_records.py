"""Tells what becomes of port mappings: a record and a counter for each change."""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.services import Counter, Log
    from netproxy.public_address.dialects import Port
    from netproxy.public_address.mapping import Mapping

COUNTER = "port_mappings"
"""The name of the counter; its reasons are events."""
REFUSED = "refused: "
"""How the fault of a refused mapping begins."""


class MappingRecords:
    """Writes the records of one PortMapper.  Thread: any."""

    def __init__(self, log: Log, counter: Counter) -> None:
        self._log = log
        self._counter = counter

    def granted(self, mapping: Mapping, before: Address | None, by: str) -> None:
        """Tell of a new mapping, or of another external address; `by` whom."""
        self._counter.count(COUNTER, "changed" if before else "granted")
        port, listener, _ = mapping.wanted
        was = f", it was {before}" if before else ""
        text = "listener '%s': %s is mapped to %s (%s%s)"
        self._log.info(text, listener, port, mapping.external, by, was)

    def failed(self, mapping: Mapping, fault_before: str, by: str) -> None:
        """Tell why there is no mapping, unless that was told before.

        A router that lacks the protocol is silent now and then: it limits its ICMP errors.
        """
        was_refused, is_refused = (
            fault.startswith(REFUSED) for fault in (fault_before, mapping.fault)
        )
        if fault_before and was_refused == is_refused:
            return
        self._counter.count(COUNTER, "failed")
        port, listener, _ = mapping.wanted
        state = "cannot be renewed" if mapping.grant else "is not mapped"
        self._log.warning("listener '%s': %s %s: %s (%s)", listener, port, state, mapping.fault, by)

    def released(self, port: Port) -> None:
        """Tell of the end of a mapping."""
        self._counter.count(COUNTER, "released")
        self._log.info("%s is mapped no more", port)

    def lost(self, router: str) -> None:
        """Tell that a router has lost its mappings."""
        self._counter.count(COUNTER, "lost by the router")
        text = "the router %s has lost its port mappings: they are asked for again"
        self._log.warning(text, router)

    def clock_not_told(self) -> None:
        """Count that a router has not told its clock: the next renewal tells what it means."""
        self._counter.count(COUNTER, "clock not told")

    def speaks_nat_pmp(self, router: str) -> None:
        """Tell that a router does not know PCP."""
        self._log.info("the router %s speaks nat-pmp, not pcp", router)
