"""Names to addresses: hosts, a cache, and a bounded pool of threads that ask.

A lookup runs on a thread of the pool, so that a name server that does not answer
holds up nothing but the callers that ask for its names; those that ask for one
name at once share one lookup.  Literal addresses never wait.  Who is asked (the
system, or name servers of the configuration) is the plan's, replaced by a reload.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from typing import Callable, Mapping, NamedTuple, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.services import Counter

LOOKUP_SECONDS = 5.0  # what resolv.conf(5) gives the first try of a name server
SYSTEM_TTL = (
    10.0  # seconds: getaddrinfo(3) tells none, and a burst of connections to one host is one lookup
)
FAILURE_TTL = 2.0  # seconds until a name whose lookup has failed is asked for again
NEGATIVE_LIMIT = 300.0  # seconds a name may be known not to exist (RFC 2308 section 5 allows hours; people mend mistakes)
TTL_LIMIT = 86400.0  # seconds: what a server gives for longer is asked for again
CACHE_NAMES = 4096  # names kept, some 300 bytes each
LOCALHOST = ("127.0.0.1", "::1")  # RFC 6761 section 6.3: never asked for


class Found(NamedTuple):
    addresses: tuple[str, ...]  # none: there is no such name, or it has no address
    ttl: float  # seconds


class LookupFailed(Exception):
    """Nobody has answered."""


class Plan(NamedTuple):
    """`ask(host)` blocks and gives Found or raises LookupFailed; `hosts`: names that are known; `prefer`: ipv4, ipv6 or ""."""

    ask: Callable[[str], Found]
    hosts: Mapping[str, tuple[str, ...]] = {}
    prefer: str = ""
    cache: int = CACHE_NAMES


class Resolver:
    """`submit(task)` runs a task on another thread and returns False when too many wait.  Used by all threads."""

    def __init__(
        self,
        submit: Callable[[Callable[[], None]], bool],
        counter: Counter,
        plan: Plan | None = None,
    ) -> None:
        """Without a plan the system is asked."""
        self._submit = submit
        self._counter = counter
        self._lock = threading.Lock()  # guards all below
        self._plan = plan or Plan(ask_system)
        self._cache: dict[
            str, tuple[float, tuple[str, ...]]
        ] = {}  # oldest first: until when (monotonic), addresses
        self._lookups: dict[str, _Lookup] = {}  # under way

    def configure(self, plan: Plan) -> None:
        """At the start and on a reload; what others have answered is forgotten."""
        with self._lock:
            self._plan = plan
            self._cache = {}

    def resolve(self, target: Address, seconds: float = math.inf) -> list[Address]:
        """The addresses of a target, in the order they are to be tried, at least one; DialError(NAME or TIMEOUT)."""
        known = self.known(target)
        if known is not None:
            return known
        lookup = self._lookup(target.host)
        if not lookup.done.wait(min(seconds, LOOKUP_SECONDS)):
            self._counter.count("lookups", "abandoned")
            raise DialError(Reason.TIMEOUT, f"{target.host}: name server")
        if not lookup.found:
            self._counter.count("lookups", "failed")
            raise DialError(Reason.NAME, target.host)
        return self._places(target, lookup.found)

    def known(self, target: Address) -> list[Address] | None:
        """The same without waiting; None where nobody has asked lately."""
        host = target.host
        if pack_ip(host.partition("%")[0]) is not None:
            return [target]
        found = self._plan.hosts.get(host)
        if found is None and (host == "localhost" or host.endswith(".localhost")):
            found = LOCALHOST
        if found is None:
            with self._lock:
                until, found = self._cache.get(host, (0.0, None))
                if found is None:
                    return None
                if time.monotonic() >= until:
                    del self._cache[host]
                    return None
        if not found:
            raise DialError(Reason.NAME, host)
        return self._places(target, found)

    def __len__(self) -> int:
        """Names in the cache."""
        return len(self._cache)

    def _places(self, target: Address, found: Sequence[str]) -> list[Address]:
        prefer = self._plan.prefer
        if prefer:
            found = sorted(found, key=lambda host: (":" in host) == (prefer == "ipv4"))
        return [Address(host, target.port) for host in found]

    def _lookup(self, host: str) -> _Lookup:
        """The one under way for a name, or a new one; DialError(NAME) where too many wait."""
        with self._lock:
            lookup = self._lookups.get(host)
            if lookup is not None:
                return lookup
            lookup = self._lookups[host] = _Lookup()
            plan = self._plan
        if not self._submit(lambda: self._run(host, lookup, plan)):
            self._counter.count("lookups", "queue full")
            self._end(host, lookup)
            raise DialError(Reason.NAME, f"{host}: too many lookups wait")
        return lookup

    def _run(self, host: str, lookup: _Lookup, plan: Plan) -> None:
        """On a thread of the pool."""
        ttl = FAILURE_TTL
        try:
            lookup.found, ttl = plan.ask(host)
            ttl = min(ttl, TTL_LIMIT if lookup.found else NEGATIVE_LIMIT)
        except LookupFailed:
            pass
        finally:
            self._keep(host, lookup.found, ttl, plan)
            self._end(host, lookup)

    def _keep(self, host: str, found: tuple[str, ...], ttl: float, plan: Plan) -> None:
        with self._lock:
            if ttl <= 0 or plan is not self._plan or not plan.cache:
                return
            self._cache.pop(host, None)
            while len(self._cache) >= plan.cache:
                del self._cache[next(iter(self._cache))]
            self._cache[host] = (time.monotonic() + ttl, found)

    def _end(self, host: str, lookup: _Lookup) -> None:
        with self._lock:
            self._lookups.pop(host, None)
        lookup.done.set()


class _Lookup:
    __slots__ = ("found", "done")

    def __init__(self) -> None:
        self.found: tuple[str, ...] = ()
        self.done = threading.Event()


def ask_system(host: str) -> Found:
    """getaddrinfo(3), which reads hosts(5) and resolv.conf(5)."""
    try:
        answers = socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM)
    except (
        OSError,
        UnicodeError,
    ) as error:  # the idna codec raises UnicodeError for labels it does not like
        raise LookupFailed from error
    return Found(
        tuple(
            str(answer[4][0])
            for answer in answers
            if answer[0] in (socket.AF_INET, socket.AF_INET6)
        ),
        SYSTEM_TTL,
    )
