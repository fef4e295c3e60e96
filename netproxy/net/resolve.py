"""Names to addresses, with a deadline that getaddrinfo(3) does not have.

A lookup runs on a thread of a bounded pool, so that a name server that does
not answer holds up nothing but the callers that ask for its names.  Literal
addresses never wait.  Today the system's resolver answers; no cache.
"""
from __future__ import annotations

import socket
import threading
from typing import Callable

from netproxy.errors import DialError, Reason
from netproxy.interfaces import Address, Counter, pack_ip

LOOKUP_SECONDS = 5.0        # what resolv.conf(5) gives the first try of a name server


class Resolver:
    """`submit(task)` runs a task on another thread and returns False when too many wait."""

    def __init__(self, submit: Callable[[Callable[[], None]], bool], counter: Counter) -> None:
        self._submit = submit
        self._counter = counter

    def resolve(self, target: Address, seconds: float = LOOKUP_SECONDS) -> list[Address]:
        """The addresses of a target, in the system's order, at least one; DialError(NAME or TIMEOUT)."""
        if pack_ip(target.host.partition("%")[0]) is not None:
            return [target]
        lookup = _Lookup(target)
        if not self._submit(lookup.run):
            self._counter.count("lookups", "queue full")
            raise DialError(Reason.NAME, f"{target.host}: too many lookups wait")
        if not lookup.done.wait(seconds):
            self._counter.count("lookups", "abandoned")
            raise DialError(Reason.TIMEOUT, f"{target.host}: name server")
        if not lookup.found:
            self._counter.count("lookups", "failed")
            raise DialError(Reason.NAME, target.host)
        return lookup.found


class _Lookup:
    __slots__ = ("_target", "found", "done")

    def __init__(self, target: Address) -> None:
        self._target = target
        self.found: list[Address] = []
        self.done = threading.Event()

    def run(self) -> None:
        host, port = self._target
        try:
            answers = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
            self.found = [Address(answer[4][0], port) for answer in answers
                          if answer[0] in (socket.AF_INET, socket.AF_INET6)]
        except (OSError, UnicodeError):     # the idna codec raises UnicodeError for labels it does not like
            pass
        finally:
            self.done.set()
