"""The listeners and the upstreams of the running daemon, as rows of netproxyctl.

Pure, except that statistics are read.
"""

from __future__ import annotations

from netproxy.dialer.member import Member
from netproxy.typed import TYPE_CHECKING, Iterable, Mapping, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.access.limits import Admission
    from netproxy.config.schema import UpstreamConfig
    from netproxy.dialer.factory import DialerFactory
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.answers import ListenerRow, MappingRow, MemberRow, UpstreamRow
    from netproxy.interfaces.routing import Dialer


class BoundListener(Protocol):
    """A listener that is running, as far as listening() needs it."""

    name: str
    """In the configuration; several addresses have one name."""
    network: str
    address: Address


class FoundRows(Protocol):
    """What was found for a listener."""

    @property
    def announced(self) -> Sequence[str]:
        """Its public addresses."""

    @property
    def mappings(self) -> Sequence[MappingRow]:
        """Its ports that the router is asked to map."""


def listening(
    listeners: Iterable[BoundListener],
    admissions: Mapping[str, Admission],
    found: Mapping[str, FoundRows],
) -> list[ListenerRow]:
    """Return the listeners, one row for each name; `admissions` and `found` are by name."""
    by_name: dict[str, list[BoundListener]] = {}
    for listener in listeners:
        by_name.setdefault(listener.name, []).append(listener)
    return [
        {
            "name": name,
            "network": "+".join(sorted({listener.network for listener in of_name})),
            "address": ", ".join(dict.fromkeys(str(listener.address) for listener in of_name)),
            "live": admissions[name].live if name in admissions else 0,
            "accepted": admissions[name].entered if name in admissions else 0,
            "announced": list(found[name].announced) if name in found else [],
            "mappings": list(found[name].mappings) if name in found else [],
        }
        for name, of_name in by_name.items()
    ]


def upstreams(dialers: DialerFactory, configs: Mapping[str, UpstreamConfig]) -> list[UpstreamRow]:
    """Return the upstreams with their statistics; `configs` are by name."""
    return [
        {
            **(_member_row(name, dialer) if isinstance(dialer, Member) else _bare(name, dialer)),
            "groups": [
                {
                    "name": group.name,
                    "balance": group.balance,
                    "members": [_member_row(member.name, member) for member in group.members],
                }
                for group in groups
            ],
        }
        for name, dialer, groups in dialers.upstreams(configs)
    ]


def _member_row(name: str, member: Member) -> MemberRow:
    return {
        "name": name,
        "state": member.state,
        "carries": sorted(member.carries),
        "live": member.live,
        "dialled": member.dialled,
        "failed": member.failed,
        "latency": member.latency or None,
        "error": member.error,
    }


def _bare(name: str, dialer: Dialer) -> MemberRow:
    """Return the row of an upstream that keeps no statistics: direct, block and auto."""
    return {
        "name": name,
        "state": "-",
        "carries": sorted(dialer.carries),
        "live": 0,
        "dialled": 0,
        "failed": 0,
        "latency": None,
        "error": "",
    }
