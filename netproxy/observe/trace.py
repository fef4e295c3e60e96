"""The steps of one client connection or UDP session, as records at level debug.  Thread: any."""

from __future__ import annotations

import time

from netproxy.observe.records import DEBUG
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.observe.records import RecordLog


class LogTrace:
    """A Trace: client and listener are in each record, so that grep finds all steps."""

    __slots__ = ("_log", "_listener", "_client", "_began")

    def __init__(self, log: RecordLog, listener: str, client: Address) -> None:
        self._log = log
        self._listener = listener
        self._client = str(client)
        self._began = time.monotonic()

    def step(self, name: str, **values: object) -> None:
        """Write a step, with the seconds since the trace began."""
        fields: dict[str, object] = {
            "msg": "step",
            "step": name,
            "listener": self._listener or "-",
            "client": self._client,
            "after": f"{time.monotonic() - self._began:.6f}",
        }
        fields.update((key, str(value) or "-") for key, value in values.items())
        self._log.record(DEBUG, fields)
