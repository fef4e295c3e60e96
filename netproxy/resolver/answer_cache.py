"""The cache of dns listeners: answers of name servers, as long as their TTLs allow.

It keeps whole messages, and changes only their IDs, spelling and TTLs (dns_message.py).  An
answer whose TTL is over is stale: it is used if the servers fail (RFC 8767).
"""

from __future__ import annotations

import threading

from netproxy.interfaces.bounded import BoundedDict
from netproxy.protocol import dns_message
from netproxy.typed import NamedTuple, TypeAlias

# Bytes of an answer that is cached: with 4,096 answers 16 MiB at most.
CACHED_SIZE = 4096
# Answers that are ready, which one name in many spellings could fill, and the bytes of one: with
# their queries 4 MiB at most.
READY_LIMIT, READY_SIZE = 4096, 512
# Seconds that an answer is cached at most, as for our own lookups.
TTL_LIMIT = 86400
# Seconds for which a stale answer is used before its servers are asked again, and its TTL
# meanwhile, RFC 8767 section 5.
STALE_TTL = 30


class _CachedAnswer(NamedTuple):
    message: bytes
    ttl_offsets: tuple[int, ...]
    since: float
    """Monotonic seconds, as are the others."""
    until: float
    stale_until: float


_ReadyAnswer: TypeAlias = tuple[_CachedAnswer, bytes, float, bytes]
"""The cached answer, which may have been replaced since, and its key; when its TTLs are wrong, in
monotonic seconds; the answer without its ID."""


class AnswerCache:
    """Cached answers by dns_message.cache_key().

    An answer that was found is ready for a second for queries with the same bytes but the ID.
    ready() and find() take no lock, because they are called for every datagram.
    """

    def __init__(self, limit: int, stale_seconds: float = 0.0) -> None:
        """Keep at most `limit` answers; 0 keeps none.

        Answers with data are kept for `stale_seconds` after their TTL.
        """
        self._stale_seconds = stale_seconds
        # Held while _answers is changed.
        self._lock = threading.Lock()
        self._answers: BoundedDict[bytes, _CachedAnswer] = BoundedDict(limit)
        # The answers of this second by their queries without the ID.  A new dict begins when it
        # is over, so that there are never many that nobody asks for again.
        self._ready: dict[bytes, _ReadyAnswer] = {}
        self._ready_until = 0.0

    def __len__(self) -> int:
        """Return the number of answers, including expired ones."""
        return len(self._answers)

    def ready(self, query: bytes, now: float) -> bytes | None:
        """Return the answer to a query that was answered within this second, else None."""
        ready = self._ready.get(query[2:])
        if ready is None:
            return None
        cached, key, until, behind_id = ready
        if now >= until or self._answers.get(key) is not cached:
            return None
        return query[:2] + behind_id

    def find(self, key: bytes, query: bytes, now: float) -> bytes | None:
        """Return the cached answer to a query with this key, None if there is none."""
        cached = self._answers.get(key)
        if cached is None or now >= cached.until:
            return None
        age = int(now - cached.since)
        answer = dns_message.aged(cached.message, cached.ttl_offsets, query, age)
        if now >= self._ready_until:
            self._ready, self._ready_until = {}, now + 1.0
        if len(self._ready) < READY_LIMIT and len(answer) <= READY_SIZE:
            until = min(cached.since + age + 1, cached.until)
            self._ready[query[2:]] = cached, key, until, answer[2:]
        return answer

    def keep(self, key: bytes, message: bytes, now: float) -> None:
        """Cache an answer for as long as its TTLs allow.

        An answer that must not be cached, but is no failure, removes the one before it.
        """
        ttl = dns_message.least_ttl(message)
        if not ttl or len(message) > CACHED_SIZE:
            if not dns_message.is_failure(message):
                with self._lock:
                    self._answers.pop(key, None)
            return
        message = dns_message.without_options(message)
        offsets = dns_message.ttl_offsets(message)
        until = now + min(ttl, TTL_LIMIT)
        stale_until = until + self._stale_seconds if dns_message.has_data(message) else until
        with self._lock:
            self._answers.put(key, _CachedAnswer(message, offsets, now, until, stale_until))

    def has_stale(self, key: bytes, now: float) -> bool:
        """Return whether there is an answer that may be used if the servers fail."""
        cached = self._answers.get(key)
        return cached is not None and cached.until <= now < cached.stale_until

    def revive(self, key: bytes, now: float) -> bool:
        """Use a stale answer for STALE_TTL; return False if there is none.

        An answer that is not stale yet stays as it is.
        """
        with self._lock:
            cached = self._answers.get(key)
            if cached is None or now >= cached.stale_until:
                return False
            if now >= cached.until:
                message = dns_message.with_ttl(cached.message, cached.ttl_offsets, STALE_TTL)
                until = min(now + STALE_TTL, cached.stale_until)
                self._answers.put(key, cached._replace(message=message, since=now, until=until))
            return True
