"""Which way out a flow takes.  Immutable and pure; a reload swaps it whole."""
from __future__ import annotations

from typing import Mapping

from netproxy.interfaces import Dialer, Flow


class ListenerRouter:
    """The listener's own upstream where it has one, else the default."""

    def __init__(self, default: Dialer, by_listener: Mapping[str, Dialer]) -> None:
        self._default = default
        self._by_listener = dict(by_listener)

    def route(self, flow: Flow) -> Dialer:
        return self._by_listener.get(flow.listener, self._default)
