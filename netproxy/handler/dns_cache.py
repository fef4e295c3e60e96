"""The cache of a dns listener: answers of name servers, as long as their TTLs allow.

It keeps whole messages, and changes only their IDs, spelling and TTLs (dns_message.py).
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from netproxy.interfaces.bounded import BoundedDict
from netproxy.protocol import dns_message

# Bytes of an answer that is cached: with 4,096 answers 16 MiB at most.
CACHED_SIZE = 4096
# Seconds that an answer is cached at most, as for our own lookups.
TTL_LIMIT = 86400


class _CachedAnswer(NamedTuple):
    message: bytes
    ttl_offsets: tuple[int, ...]
    since: float
    """Monotonic seconds, as is `until`."""
    until: float


class AnswerCache:
    """Cached answers by dns_message.cache_key().

    find() takes no lock, because it is called for every datagram.
    """

    def __init__(self, limit: int) -> None:
        """Keep at most `limit` answers; 0 keeps none."""
        # Held while _answers is changed.
        self._lock = threading.Lock()
        self._answers: BoundedDict[bytes, _CachedAnswer] = BoundedDict(limit)

    def __len__(self) -> int:
        """Return the number of answers, including expired ones."""
        return len(self._answers)

    def find(self, key: bytes, query: bytes, now: float) -> bytes | None:
        """Return the cached answer to a query with this key, None if there is none."""
        cached = self._answers.get(key)
        if cached is None or now >= cached.until:
            return None
        age = int(now - cached.since)
        return dns_message.aged(cached.message, cached.ttl_offsets, query, age)

    def keep(self, key: bytes, message: bytes, now: float) -> None:
        """Cache an answer for as long as its TTLs allow."""
        ttl = dns_message.least_ttl(message)
        if not ttl or len(message) > CACHED_SIZE:
            return
        message = dns_message.without_options(message)
        offsets = dns_message.ttl_offsets(message)
        cached = _CachedAnswer(message, offsets, now, now + min(ttl, TTL_LIMIT))
        with self._lock:
            self._answers.put(key, cached)
