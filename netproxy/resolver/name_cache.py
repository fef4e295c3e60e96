"""The cache of the resolver: addresses of names, fresh ones and stale ones (RFC 8767).

A stale name has outlived its TTL.  It is used if its servers fail, for a limited time.  Not
thread-safe: the resolver calls under its lock.
"""

from __future__ import annotations

from netproxy.interfaces.bounded import BoundedDict
from netproxy.typed import NamedTuple

# Seconds for which a stale name is used before its servers are asked again, RFC 8767 section 5.
STALE_TTL = 30.0


class _CachedName(NamedTuple):
    addresses: tuple[str, ...]
    """Empty for a name that is not there."""
    until: float
    """Monotonic seconds, as is `stale_until`."""
    stale_until: float


class NameCache:
    """Names with their addresses."""

    def __init__(self, limit: int, stale_seconds: float) -> None:
        """Keep at most `limit` names; addresses for `stale_seconds` longer than their TTL."""
        self._names: BoundedDict[str, _CachedName] = BoundedDict(limit)
        self._stale_seconds = stale_seconds

    def __len__(self) -> int:
        """Return the number of names, including stale ones."""
        return len(self._names)

    def fresh(self, host: str, now: float) -> tuple[str, ...] | None:
        """Return the addresses of a name, () if it is not there; None if it must be looked up."""
        cached = self._names.get(host)
        if cached is None:
            return None
        if now < cached.until:
            return cached.addresses
        if now >= cached.stale_until:
            del self._names[host]
        return None

    def has_stale(self, host: str, now: float) -> bool:
        """Return whether a name has addresses that may be used if its servers fail."""
        cached = self._names.get(host)
        return cached is not None and cached.until <= now < cached.stale_until

    def keep(self, host: str, addresses: tuple[str, ...], ttl: float, now: float) -> None:
        """Keep what a lookup has found for `ttl` seconds, and nothing of what it found before."""
        if ttl <= 0:
            self._names.pop(host, None)
            return
        until = now + ttl
        stale_until = until + self._stale_seconds if addresses else until
        self._names.put(host, _CachedName(addresses, until, stale_until))

    def revive(self, host: str, now: float) -> tuple[str, ...]:
        """Use a stale name for STALE_TTL, because its servers fail.

        Returns its addresses, () if there are none.  A fresh name stays as it is.
        """
        cached = self._names.get(host)
        if cached is None or now >= cached.stale_until:
            return ()
        if now >= cached.until:
            until = min(now + STALE_TTL, cached.stale_until)
            self._names.put(host, cached._replace(until=until))
        return cached.addresses
