"""The reasons that counters have from the start, with 0, and the counters' names for people.

A graph shows the first event of a reason only if its counter was there before.  A rarer reason than
these appears with its first event.  Pure.
"""

from __future__ import annotations

from netproxy.errors import OF_OTHERS, Reason
from netproxy.interfaces.listeners import CLIENT_NOT_ALLOWED, CLIENT_RATE, EVICTED
from netproxy.typed import Iterable, Mapping

FROM_THE_START: Mapping[str, tuple[str, ...]] = {
    "authentication": ("refused", "penalty", "unavailable"),
    "connections": (
        *("bad protocol", "broken off", "cannot be served"),
        *("closed early", "internal error", "timed out"),
    ),
    "connections_refused": (
        *(CLIENT_NOT_ALLOWED, CLIENT_RATE, EVICTED, "client banned", "client limit"),
        *("connection limit", "no descriptor", "no thread", "too many handshakes"),
    ),
    "dial_failures": (*(reason.value for reason in Reason), *OF_OTHERS),
    "drops": (
        *(CLIENT_NOT_ALLOWED, "association ended", "bad target", "closed", "dial queue full"),
        *("filtered", "fragment", "internal error", "lookup queue full", "malformed"),
        *("not permitted", "rate limit", "receive buffer full", "refused", "send buffer full"),
        *("session limit", "stream full", "target failed", "too big", "truncated"),
        *(
            "unknown context",
            "unknown sender",
            "unreachable",
            "upstream failed",
            "waiting queue full",
        ),
        *("quota used up", "user banned", "client banned", Reason.DENIED.value, Reason.NAME.value),
    ),
    "log_dropped": ("debug", "info", "warning", "error"),
    "lookups": ("abandoned", "failed", "queue full", "stale"),
    "requests_refused": (
        *("bad request", "client banned", "connection limit of the user", "session limit"),
        *("connection rate of the user", "forbidden", "proxy authentication required"),
        *("quota used up", "user banned", "user expired"),
    ),
    "sessions_evicted": ("association ended", "evicted", "idle", "killed"),
}
IN_WORDS = {
    "accept_errors": "connections not accepted",
    "authentication": "logins refused",
    "connections": "connections ended by a fault",
    "connections_refused": "connections refused",
    "dial_failures": "targets not reached",
    "drops": "datagrams dropped",
    "icmp": "ICMP errors for datagrams",
    "log_dropped": "log records not written",
    "lookups": "names not found",
    "port_mappings": "events of port mappings",
    "public_address": "events of announced addresses",
    "queries": "DNS queries beside the cache",
    "reply_sockets": "reply sockets closed for others",
    "requests_refused": "requests refused",
    "sessions_evicted": "UDP sessions ended",
    "stun": "STUN questions without an answer",
    "tunnel_bytes": "bytes of tunnels",
    "tunnel_direct": "events of direct paths",
    "tunnel_handshakes": "handshakes of tunnel agents",
    "tunnel_paths": "events of UDP beside tunnels",
    "tunnel_refused": "requests of the bridge refused",
    "tunnel_too_long": "datagrams too long for UDP beside tunnels",
}
"""What people call a counter, for netproxyctl status."""
NO_TROUBLE = frozenset((("connections", "accepted"), ("sessions_opened", "")))
"""Counters that netproxyctl status shows otherwise."""


def with_zeros(counters: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Return counters by name and reason, with those that were not counted yet, in their order."""
    zeros = {(name, reason): 0 for name, reasons in FROM_THE_START.items() for reason in reasons}
    return dict(sorted({**zeros, **counters}.items()))


def in_words(counters: Iterable[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Return what has happened as (what, why, how often), without what is shown elsewhere."""
    return [
        (IN_WORDS.get(name, name.replace("_", " ")), reason, value)
        for name, reason, value in counters
        if value and not name.endswith("bytes") and (name, reason) not in NO_TROUBLE
    ]
