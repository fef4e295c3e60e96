"""Resolves names to addresses: known hosts, a cache, and lookups on a bounded pool.

A lookup runs on a pool thread, so that a silent name server delays only the callers that
ask for its names.  The pool serves clients fairly.  Callers that ask for one name at the same
time share one lookup, which then waits on behalf of the client of each.
Literal addresses never wait.  The plan says who is asked: the system, or the name servers
of the configuration; a reload replaces it.
"""

from __future__ import annotations

import math
import socket
import threading
import time

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.fairness import Claims, client_key
from netproxy.resolver.name_cache import NameCache
from netproxy.resolver.special_names import LOCALHOST_ADDRESSES, has_no_address, is_localhost
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.fairness import FairSubmit
    from netproxy.interfaces.networks import IpNetwork
    from netproxy.interfaces.services import Counter

# Seconds of a lookup: what resolv.conf(5) gives the first attempt at a name server.
LOOKUP_SECONDS = 5.0
# Seconds that a caller waits for servers if there are stale addresses, RFC 8767 section 5.
STALE_SECONDS = 1.8
# Seconds that an answer of the system is kept: getaddrinfo(3) reports no TTL, and a burst of
# connections to one host needs one lookup.
SYSTEM_TTL = 10.0
# Seconds until a name whose lookup has failed is looked up again.
FAILURE_TTL = 2.0
# Seconds, at most, that a name is known not to exist.  RFC 2308 section 5 allows hours, but
# people correct mistakes.
NEGATIVE_LIMIT = 300.0
# Seconds, at most, that addresses are kept.
TTL_LIMIT = 86400.0
# Names in the cache if a plan has no other limit, some 300 bytes each.
CACHE_NAMES = 4096
# What getaddrinfo(3) says of names that are not there or have no address.  musl has no
# EAI_NODATA.
_NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


class LookupResult(NamedTuple):
    """What a lookup has found."""

    addresses: tuple[str, ...]
    """Empty if there is no such name, or if it has no address."""
    ttl: float
    """Seconds that the result may be kept."""


class LookupFailed(Exception):
    """No name server has answered."""


class LookupPlan(NamedTuple):
    """How names are looked up."""

    ask: Callable[[str], LookupResult]
    """Looks up a host; blocks.  Raises LookupFailed."""
    hosts: Mapping[str, tuple[str, ...]] = {}
    """Addresses by name, which are never looked up."""
    prefer: str = ""
    """The family that comes first: "ipv4", "ipv6", or "" for the order of the answer."""
    cache: int = CACHE_NAMES
    """Names in the cache; 0 keeps none."""
    stale: float = 0.0
    """Seconds that addresses may be used after their TTL if the servers fail (RFC 8767)."""
    nat64: IpNetwork | None = None
    """The prefix of the network's NAT64, for resolver.nat64.  None: see `find_nat64`."""
    find_nat64: bool = False
    """True if the prefix is looked up (RFC 7050)."""


class Resolver:
    """The Resolver.  Thread: any."""

    def __init__(
        self, submit: FairSubmit, counter: Counter, plan: LookupPlan | None = None
    ) -> None:
        """Look names up by `plan`, on threads of `submit`; without a plan the system is asked."""
        self._submit = submit
        self._counter = counter
        # Guards everything below, and the lookups.
        self._lock = threading.Lock()
        self._plan = plan or LookupPlan(ask_system)
        self._cache = NameCache(self._plan.cache, self._plan.stale)
        # Lookups that wait or run, by name.
        self._lookups: dict[str, _Lookup] = {}

    def configure(self, plan: LookupPlan) -> None:
        """Replace the plan, at start and on a reload; the cache is emptied."""
        with self._lock:
            self._plan = plan
            self._cache = NameCache(plan.cache, plan.stale)

    def resolve(
        self, target: Address, client: str = "", seconds: float = math.inf
    ) -> list[Address]:
        """Return the addresses of a target in the order to try them, at least one.

        `client` is the host that asks, "" for NetProxy itself.
        Blocks for at most `seconds` and LOOKUP_SECONDS.  Raises DialError(NAME or TIMEOUT).
        """
        known = self.known(target)
        if known is not None:
            return known
        lookup, has_stale = self._lookup(target.host, client, min(seconds, LOOKUP_SECONDS))
        longest = STALE_SECONDS if has_stale else LOOKUP_SECONDS
        is_done = lookup.done.wait(min(seconds, longest))
        if has_stale and (not is_done or lookup.dropped):
            stale = self._revive(target.host)
            if stale:
                return self._to_targets(stale, target.port)
        if not is_done:
            self._counter.count("lookups", "abandoned")
            raise DialError(Reason.TIMEOUT, f"{target.host}: name server")
        if lookup.dropped:
            raise DialError(Reason.NAME, f"{target.host}: too many lookups are waiting")
        if not lookup.addresses:
            self._counter.count("lookups", "failed")
            raise DialError(Reason.NAME, target.host)
        return self._to_targets(lookup.addresses, target.port)

    def known(self, target: Address) -> list[Address] | None:
        """Return what resolve() would without blocking, None if that needs a lookup.

        Raises DialError(NAME) for a name that was recently not found.
        """
        host = target.host
        if pack_ip(host.partition("%")[0]) is not None:
            return [target]
        addresses = self._plan.hosts.get(host)
        if addresses is None and is_localhost(host):
            addresses = LOCALHOST_ADDRESSES
        if addresses is None:
            with self._lock:
                addresses = self._cache.fresh(host, time.monotonic())
        if addresses is None:
            return None
        if not addresses:
            raise DialError(Reason.NAME, host)
        return self._to_targets(addresses, target.port)

    def __len__(self) -> int:
        """Return the number of names in the cache."""
        return len(self._cache)

    def _to_targets(self, addresses: Sequence[str], port: int) -> list[Address]:
        prefer = self._plan.prefer
        if prefer:
            # The sort is stable: within a family the order stays.
            addresses = sorted(addresses, key=lambda host: (":" in host) == (prefer == "ipv4"))
        return [Address(host, port) for host in addresses]

    def _lookup(self, host: str, client: str, seconds: float) -> tuple[_Lookup, bool]:
        """Return the lookup of a name, which waits on behalf of `client` as well.

        Its result is of use for `seconds`.  The second item is true if there are stale
        addresses.
        """
        with self._lock:
            has_stale = self._cache.has_stale(host, time.monotonic())
            lookup = self._lookups.get(host)
            if lookup is None:
                lookup = self._lookups[host] = _Lookup(host, self._plan)
            lookup.wanted_until = max(lookup.wanted_until, time.monotonic() + seconds)
            is_new_claim = lookup.claims.add(client_key(client))
        if is_new_claim:
            self._submit(_LookupTask(self, lookup, client))
        return lookup, has_stale

    def _revive(self, host: str) -> tuple[str, ...]:
        """Return stale addresses, and use them for a while; () if there are none."""
        with self._lock:
            stale = self._cache.revive(host, time.monotonic())
        if stale:
            self._counter.count("lookups", "stale")
        return stale

    def run(self, lookup: _Lookup) -> None:
        """Look a name up, unless another task does.  Blocks.  Thread: the pool's."""
        with self._lock:
            if not lookup.claims.begin():
                return
            if time.monotonic() >= lookup.wanted_until:
                # All callers have given up while it waited.
                del self._lookups[lookup.host]
                return
        ttl = FAILURE_TTL
        try:
            lookup.addresses, ttl = lookup.plan.ask(lookup.host)
            ttl = min(ttl, TTL_LIMIT if lookup.addresses else NEGATIVE_LIMIT)
            lookup.answered = True
        except LookupFailed:
            pass
        finally:
            self._end(lookup, ttl)

    def drop(self, lookup: _Lookup, client: str) -> None:
        """Give up the claim of a client; the lookup ends with its last claim."""
        with self._lock:
            if not lookup.claims.drop(client_key(client)):
                return
            lookup.dropped = True
            del self._lookups[lookup.host]
        self._counter.count("lookups", "queue full")
        lookup.done.set()

    def _end(self, lookup: _Lookup, ttl: float) -> None:
        """Keep what a lookup has found, for `ttl` seconds, and tell its callers.

        Without an answer they get stale addresses, if there are any.
        """
        stale = () if lookup.answered else self._revive(lookup.host)
        with self._lock:
            # An answer under an earlier plan is not kept.
            if not stale and lookup.plan is self._plan:
                self._cache.keep(lookup.host, lookup.addresses, ttl, time.monotonic())
            del self._lookups[lookup.host]
        lookup.addresses = stale or lookup.addresses
        lookup.done.set()


class _Lookup:
    """A lookup that waits or runs.  `addresses` is valid once `done` is set."""

    __slots__ = (
        "host",
        "plan",
        "claims",
        "wanted_until",
        "addresses",
        "answered",
        "dropped",
        "done",
    )

    def __init__(self, host: str, plan: LookupPlan) -> None:
        self.host = host
        self.plan = plan
        self.claims = Claims()
        self.wanted_until = 0.0
        """Monotonic seconds: when the last caller gives up."""
        self.addresses: tuple[str, ...] = ()
        self.answered = False
        """True if a server, or the system, has answered."""
        self.dropped = False
        """True if too many lookups wait."""
        self.done = threading.Event()


class _LookupTask:
    """A lookup on behalf of one client (interfaces.fairness.ClientTask)."""

    __slots__ = ("client", "_resolver", "_lookup")

    def __init__(self, resolver: Resolver, lookup: _Lookup, client: str) -> None:
        self.client = client
        self._resolver = resolver
        self._lookup = lookup

    def run(self) -> None:
        """Look the name up.  Blocks."""
        self._resolver.run(self._lookup)

    def drop(self) -> None:
        """Give up the client's claim."""
        self._resolver.drop(self._lookup, self.client)


def ask_system(host: str) -> LookupResult:
    """Look a name up by getaddrinfo(3), which reads hosts(5) and resolv.conf(5).

    Blocks.  Raises LookupFailed.
    """
    if has_no_address(host):
        return LookupResult((), SYSTEM_TTL)
    try:
        answers = socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM)
    except OSError as error:
        if error.errno in _NO_SUCH_NAME:
            return LookupResult((), FAILURE_TTL)
        raise LookupFailed from error
    except UnicodeError:
        # The idna codec does not accept every label.
        return LookupResult((), FAILURE_TTL)
    families = (socket.AF_INET, socket.AF_INET6)
    return LookupResult(
        tuple(str(answer[4][0]) for answer in answers if answer[0] in families), SYSTEM_TTL
    )
