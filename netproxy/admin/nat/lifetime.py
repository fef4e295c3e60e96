"""Finds out how long a NAT keeps an idle mapping (RFC 5780 section 4.6).

Each time in AGES has a local port of its own, whose mapping is made in the beginning.  When a
mapping has that age, a server is asked, from another port, to answer to the mapping: either it
is still there, and the answer comes, or it has expired.  The first that has expired is the end.
Thread: one, which blocks until then.
"""

from __future__ import annotations

import time

from netproxy.admin.nat.discovery import Probe
from netproxy.admin.nat.exchange import Round
from netproxy.admin.nat.report import Lifetime
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.admin.nat.exchange import Transport
    from netproxy.interfaces.addresses import Address

AGES = (15, 25, 35, 50, 65, 95, 125, 185, 245, 305)
"""Seconds.  NATs use multiples of 30 seconds: none of these is one."""
ASKING, TRIAL = len(AGES), len(AGES) + 1
"""The local ports behind those of AGES: that which asks, and that which shows if it works."""
PORTS = len(AGES) + 2

SETTLED_SECONDS = 2.5
"""Linux keeps a mapping longer from two seconds on, if datagrams go in both directions then."""

_NO_ANSWER = "the server does not answer"
_NOT_SUPPORTED = "the server does not answer to another port (RESPONSE-PORT of RFC 5780)"


def measure_lifetime(
    server: Address, transport: Transport, clock: Callable[[], float] = time.monotonic
) -> Lifetime:
    """Return how long a NAT keeps idle mappings to a server.  Blocks for minutes.

    The transport has PORTS local ports.
    """
    ask_all = [Probe(port, server) for port in range(PORTS)]
    Round(transport, clock).run(ask_all)
    _wait_until(clock() + SETTLED_SECONDS, transport, clock)
    started = clock()
    mapped = [outcome.mapped for outcome in Round(transport, clock).run(ask_all)]
    trial = mapped[TRIAL]
    if trial is None or None in mapped:
        return Lifetime(unknown=_NO_ANSWER)
    if not _is_alive(Probe(ASKING, server, response_port=trial.port), TRIAL, transport, clock):
        return Lifetime(unknown=_NOT_SUPPORTED)
    alive = 0
    for port, age in enumerate(AGES):
        _wait_until(started + age, transport, clock)
        address = mapped[port]
        assert address is not None
        probe = Probe(ASKING, server, response_port=address.port)
        if not _is_alive(probe, port, transport, clock):
            return Lifetime(alive, age)
        alive = age
    return Lifetime(alive)


def _is_alive(probe: Probe, port: int, transport: Transport, clock: Callable[[], float]) -> bool:
    """Return whether the answer to a probe comes to a local port."""
    (outcome,) = Round(transport, clock).run([probe])
    return outcome.port == port


def _wait_until(end: float, transport: Transport, clock: Callable[[], float]) -> None:
    """Wait, and read what comes: nobody has asked for it."""
    while (left := end - clock()) > 0:
        transport.receive(left)
