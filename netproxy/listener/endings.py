"""Counts and records how a client's connection has ended, unless it was served to its end.

A client that leaves is counted.  A client that was refused, because it was too slow or broke
its protocol, has a record as well.  Thread: any; nothing here waits.
"""

from __future__ import annotations

from netproxy.errors import CannotLoad, DeadlineError, EndOfStream, NetProxyError, StreamError
from netproxy.interfaces.listeners import DECIDED_BY
from netproxy.interfaces.services import Refusal
from netproxy.typed import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.services import Counter, Log


class RecordedConnection(Protocol):
    """A connection, as far as its records need it."""

    client: Address
    refused: str
    """Why the daemon ends it: that is counted and recorded elsewhere.  "" if it does not."""

    def listener_name(self) -> str:
        """Return the name of the listener that accepted it."""


def note_fault(
    connection: RecordedConnection, error: Exception, counter: Counter, log: Log
) -> None:
    """Count and record a fault that has ended a connection; it is being handled."""
    if connection.refused and isinstance(error, NetProxyError):
        return  # the daemon has ended it, not its client
    if isinstance(error, DeadlineError):
        refuse(connection, ("connections", "timed out"), counter, str(error))
    elif isinstance(error, StreamError):
        counter.count("connections", "broken off")
    elif isinstance(error, EndOfStream):
        counter.count("connections", "closed early")
    elif isinstance(error, CannotLoad):
        refuse(connection, ("connections", "cannot be served"), counter, str(error))
    elif isinstance(error, NetProxyError):
        refuse(connection, ("connections", "bad protocol"), counter, str(error))
    else:
        counter.count("connections", "internal error")
        log.exception(f"serving {connection.client}")


def refuse(
    connection: RecordedConnection, key: tuple[str, str], counter: Counter, decided: str = ""
) -> None:
    """Count and record a connection that is refused; `key`: name and reason of its counter."""
    listener, client = connection.listener_name(), connection.client.host
    decided = decided or DECIDED_BY.get(key[1], "")
    counter.refuse(Refusal(*key, listener, client, "", decided))
