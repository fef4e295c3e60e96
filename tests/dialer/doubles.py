"""Test doubles for dialers and groups, and factories of real dialers."""

from __future__ import annotations

from typing import Any, Callable, Sequence

import pytest

from netproxy.dialer.direct import TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.dialer.group import GroupDialer
from netproxy.interfaces.datagrams import PacketDependencies
from netproxy.dialer.member import Member
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import Stream
from netproxy.net.udp_sockets import UdpSocketFactory
from tests.support.doubles import Counts, Lines, no_packets
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import SECONDS
from tests.support.upstreams import FakeConn

TARGET = Address("198.51.100.7", 443)
TCP, UDP = tcp_to(TARGET), udp_to(TARGET)
BALANCES = (
    "round-robin",
    "weighted",
    "least-connections",
    "least-latency",
    "hash-client",
    "hash-target",
    "failover",
)


def make_factory(
    target_resolver: TargetResolver,
    seconds: float = SECONDS,
    dependencies: PacketDependencies | None = None,
) -> DialerFactory:
    """Return a factory on real sockets.  By default its dialers open no packet connection."""
    datagrams = UdpSocketFactory(Counts(), Lines())
    return DialerFactory(target_resolver, datagrams, seconds, dependencies or no_packets())


class Clock:
    """Stands in for the module `time`; stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class NoSocket:
    """A socket for a Stream, without a descriptor."""

    def detach(self) -> int:
        return -1

    close = detach


class CountingConn(FakeConn):
    """A PacketConn that counts how often it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closes = 0

    def close(self) -> None:
        self.closes += 1
        super().close()


class StubDialer:
    """A Dialer whose streams and packet connections have no sockets."""

    refusal = Reason.UNSUPPORTED
    resolves_names = True
    knows_bound = False

    def __init__(
        self,
        name: str = "stub",
        asked: list[str] | None = None,
        carries: Sequence[str] = ("tcp", "udp", "bind"),
        symmetric: bool = False,
    ) -> None:
        """Appends the name to `asked` for each dial."""
        self.name = name
        self.asked = [] if asked is None else asked
        self.carries = frozenset(carries)
        self.symmetric = symmetric
        self.fails: Callable[[], BaseException] | None = None
        """Returns what each dial raises; None: dials succeed."""
        self.meanwhile: Callable[[], None] = lambda: None
        """Called during each dial."""
        self.flows: list[Flow] = []
        self.conns: list[CountingConn] = []

    def dial(self, flow: Flow) -> Stream:
        self._ask(flow)
        return Stream(NoSocket())  # type: ignore[arg-type]  # it is only closed

    def dial_packet(self, flow: Flow) -> CountingConn:
        self._ask(flow)
        self.conns.append(CountingConn())
        return self.conns[-1]

    def fixed_for(self, flow: Flow) -> StubDialer:
        return self

    def _ask(self, flow: Flow) -> None:
        self.asked.append(self.name)
        self.flows.append(flow)
        self.meanwhile()
        if self.fails:
            raise self.fails()


def fault(
    reason: Reason = Reason.TIMEOUT, hop: str = "", said: str = ""
) -> Callable[[], DialError]:
    """Return a factory of errors that are the upstream's fault."""
    return lambda: DialError(reason, said=said, hop=hop, upstream=True)


def refusal(reason: Reason = Reason.REFUSED) -> Callable[[], DialError]:
    """Return a factory of errors that are the target's fault."""
    return lambda: DialError(reason, str(TARGET))


class StubGroup:
    """A group of StubDialers with one-letter names.  `asked` lists the names of all dials."""

    def __init__(
        self, balance: str, names: str = "abc", weights: Sequence[int] = (), only_tcp: str = ""
    ) -> None:
        self.asked: list[str] = []
        self.dialers = {
            name: StubDialer(
                name, self.asked, ("tcp",) if name in only_tcp else ("tcp", "udp", "bind")
            )
            for name in names
        }
        self.members = {
            name: Member(name, self.dialers[name], weight)
            for name, weight in zip(names, weights or [1] * len(names), strict=True)
        }
        self.group = GroupDialer("pool", list(self.members.values()), balance, 10.0)

    def dial_once(self, flow: Flow = TCP) -> str:
        """Dial, close the result, and return the names of the members asked, in order."""
        before = len(self.asked)
        try:
            connection: Any = self.dial(flow)
        except DialError:
            pass
        else:
            connection.close()
        return "".join(self.asked[before:])

    def dial_times(self, count: int, flow: Flow = TCP) -> str:
        """Return the names of the members that `count` dials ask."""
        return "".join(self.dial_once(flow) for _ in range(count))

    def dial(self, flow: Flow = TCP) -> Any:
        """Return what the group's dial returns for the flow's network."""
        return self.group.dial(flow) if flow.network == "tcp" else self.group.dial_packet(flow)

    def fail(self, names: str, make: Callable[[], BaseException] = fault()) -> None:
        """Let all dials of these members raise what `make` returns."""
        for name in names:
            self.dialers[name].fails = make

    def mend(self, names: str) -> None:
        """Let the dials of these members succeed again."""
        for name in names:
            self.dialers[name].fails = None

    def takes(self, clock: Clock, **seconds: float) -> None:
        """Let each dial of a member move the clock."""

        def advance(time: float) -> Callable[[], None]:
            def call() -> None:
                clock.now += time

            return call

        for name, time in seconds.items():
            self.dialers[name].meanwhile = advance(time)

    def failure(self, flow: Flow = TCP) -> DialError:
        """Dial and return the error."""
        with pytest.raises(DialError) as caught:
            self.dial(flow)
        return caught.value

    def live(self) -> dict[str, int]:
        """Return the live flows of each member."""
        return {name: member.live for name, member in self.members.items()}
