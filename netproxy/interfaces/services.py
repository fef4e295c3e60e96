"""What every room may need of the daemon: a log, counters, the state, the janitor's tables."""

from __future__ import annotations

import enum

from netproxy.typed import TYPE_CHECKING, Callable, Hashable, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address


class DaemonState(str, enum.Enum):
    """STARTING -> SERVING -> DRAINING.  The text is the word for users."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"

    def __str__(self) -> str:
        return self.value


class AccessFileName(NamedTuple):
    """The file that the records of finished flows go to, and their form."""

    path: str = ""
    """ "" if they go to the log."""
    form: str = "text"
    """ "text", "json", "clf" (Common Log Format) or "squid" (its native form)."""
    place: str = ""
    """Where the path is written, for errors."""


NO_ACCESS_FILE = AccessFileName()


DOMAINS, NETWORKS = "domain_file", "ip_file"
"""Kinds of lists: the keys of rules that name them."""


class FetchedPath(str):
    """The path of the copy of a list that is fetched.  There is none before the first time."""

    __slots__ = ()


class RemoteList(NamedTuple):
    """A list that is fetched by HTTPS."""

    url: str
    path: FetchedPath
    kind: str
    """DOMAINS or NETWORKS."""
    refresh: float
    """Seconds between two times that it is fetched."""
    sha256: str = ""
    """The checksum that it must have, in hexadecimal digits; "" for any."""

    @property
    def name(self) -> str:
        """The URL for messages: without its query, which may have a token."""
        return self.url.partition("?")[0]


class Log(Protocol):
    """The log.  Thread: any; never blocks."""

    tracing: bool
    """True at level debug: connections and sessions then tell their steps."""

    def trace(self, listener: str, client: Address) -> Trace:
        """Return what writes the steps of a client's connection or session."""

    def debug(self, message: str, *values: object) -> None:
        """Write a record at level debug, formatted with %."""

    def info(self, message: str, *values: object) -> None:
        """Write a record at level info."""

    def warning(self, message: str, *values: object) -> None:
        """Write a record at level warning."""

    def error(self, message: str, *values: object) -> None:
        """Write a record at level error."""

    def limited(self, key: Hashable, message: str, *values: object) -> None:
        """Write a warning, at most once a minute for each `key`."""

    def auth_failed(self, client: str, user: str, listener: str) -> None:
        """Write the record of a refused login: the client's address and the name it gave."""

    def exception(self, doing: str) -> None:
        """Write the exception that is being handled, with its traceback, as one record."""


class Refusal(NamedTuple):
    """A connection, a request or a datagram that is refused or dropped."""

    counter: str
    """The name of its counter."""
    reason: str
    """The counter's reason: one of a few words, nothing that a client has chosen."""
    listener: str = ""
    """The listener's name, "" if unknown.  The fields below are also empty if unknown."""
    client: str = ""
    """The client's host."""
    asked: object = ""
    """What the client has asked for; its text goes into the record."""
    decided: object = ""
    """What decided: a rule, a range, the key of a limit, or the protocol fault."""
    network: str = "tcp"
    user: str = ""


def dropped(reason: str, asked: object = "", decided: object = "") -> Refusal:
    """Return the refusal of datagrams of which only the socket is known, not their client."""
    return Refusal("drops", reason, asked=asked, decided=decided, network="udp")


class Trace(Protocol):
    """Writes the steps of one connection or UDP session to the log.  Thread: any."""

    def step(self, name: str, **values: object) -> None:
        """Write a step at level debug, with the seconds since the first one."""


class Counter(Protocol):
    """Counters by name and reason.  Thread: any; never blocks."""

    def count(self, name: str, reason: str, amount: int = 1) -> None:
        """Add `amount`."""

    def refuse(self, refusal: Refusal, amount: int = 1) -> str:
        """Count `amount` refusals, and write their record; return its id, "" without a record."""

    def refuse_unrecorded(self, name: str, reason: str, client: str, amount: int) -> bool:
        """Count `amount` refusals of a client's host if they get no record now.

        Return False if they may get one: call refuse() then.  A flood of datagrams thus pays
        for no Refusal.
        """


def refuse_dropped(counter: Counter, reason: str, amount: int = 1) -> None:
    """Count and record dropped datagrams of which only the socket is known, not their client."""
    if not counter.refuse_unrecorded("drops", reason, "", amount):
        counter.refuse(dropped(reason), amount)


class Expirable(Protocol):
    """A table that the janitor looks through once a second."""

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Remove what has expired by `now` (monotonic seconds).

        Return calls that close it.  The janitor makes them without any lock.
        """


class PreparedChange(Protocol):
    """A change that is ready: everything that can fail has been done.

    Call commit() or discard() once.  Neither can fail.
    """

    def commit(self) -> None:
        """Put the change into force."""

    def discard(self) -> None:
        """Undo what was prepared; everything is as it was."""
