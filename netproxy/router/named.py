"""Gives flows to an address the name that their client wants.

The name of a fake address is that which the address stands for.  Any other address has the name
that the client has asked a dns listener for.
"""

from __future__ import annotations

import time

from netproxy.errors import FlowRefused, Reason
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.flows import SeenName, is_public
from netproxy.typed import TYPE_CHECKING, Container

if TYPE_CHECKING:
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import FakeAddresses, NamedFlows, NameMemory

DNS = "dns"
UNKNOWN = "unknown fake address"
"""The reason of flows to a fake address that has no name, because of a restart for instance."""


class RememberedNames:
    """Names for flows.  Thread: any; never blocks."""

    def __init__(self, memory: NameMemory, transparent: Container[str]) -> None:
        """`transparent`: the listeners whose clients know of no proxy.

        The connections of these clients alone are led by the name: the others have chosen the
        address for the upstream.
        """
        self._memory = memory
        self._transparent = transparent

    def named(self, flow: Flow) -> Flow:
        """Return the flow with its name, if there is one; as it is if a name was seen in it."""
        host = flow.target.host
        if flow.seen is not None or pack_ip(host) is None:
            return flow
        name = self._memory.find(flow.client.host, host, time.monotonic())
        if not name:
            return flow
        leads = flow.network == "tcp" and flow.listener in self._transparent and is_public(name)
        return flow._replace(seen=SeenName(name, DNS, leads))


class FakeTargets:
    """Flows to fake addresses become flows to names.  Thread: any; never blocks."""

    def __init__(self, fakes: FakeAddresses, others: NamedFlows | None) -> None:
        """`others` names the flows to all other addresses; None for nothing that does."""
        self._fakes = fakes
        self._others = others

    def named(self, flow: Flow) -> Flow:
        """Return the flow to the name.  Raises FlowRefused for an address without a name."""
        name = self._fakes.name(flow.target.host, flow.client.host)
        if name is None:
            return flow if self._others is None else self._others.named(flow)
        if not name:
            target = str(flow.target)
            raise FlowRefused(Reason.HOST_UNREACHABLE, target, said=UNKNOWN, decided="dns.fake")
        seen = flow.seen
        if seen is not None:
            # The client has chosen the name by the address: that of its first bytes is for rules.
            seen = seen._replace(leads=False)
        return flow._replace(target=Address(name, flow.target.port), seen=seen)
