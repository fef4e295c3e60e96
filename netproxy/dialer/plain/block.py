"""The upstream that refuses everything, for rules that block a flow."""

from __future__ import annotations

from netproxy.errors import DialError, Reason
from netproxy.typed import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from netproxy.interfaces.flows import Flow


class BlockDialer:
    """A dialer whose every dial fails with DialError(DENIED)."""

    name = "block"
    carries: frozenset[str] = frozenset()
    refusal = Reason.DENIED
    symmetric = knows_bound = False
    # No name is looked up for a flow that is refused anyway.
    resolves_names = True

    def fixed_for(self, flow: Flow) -> BlockDialer:
        """Return the dialer itself."""
        return self

    def dial(self, flow: Flow) -> NoReturn:
        """Raise DialError(DENIED)."""
        raise DialError(Reason.DENIED, str(flow.target))

    def dial_packet(self, flow: Flow) -> NoReturn:
        """Raise DialError(DENIED)."""
        raise DialError(Reason.DENIED, str(flow.target))
