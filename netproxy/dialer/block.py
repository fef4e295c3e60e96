"""The way out that leads nowhere: what a rule refuses."""

from __future__ import annotations

from netproxy.errors import DialError, Reason
from netproxy.interfaces.flows import Flow


class BlockDialer:
    name = "block"
    carries: frozenset[str] = frozenset()
    refusal = Reason.DENIED
    symmetric = False
    resolves_names = True  # where they are does not matter

    def fixed_for(self, flow: Flow) -> BlockDialer:
        return self

    def dial(self, flow: Flow) -> None:
        raise DialError(Reason.DENIED, str(flow.target))

    def dial_packet(self, flow: Flow) -> None:
        raise DialError(Reason.DENIED, str(flow.target))
