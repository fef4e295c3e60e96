"""Finds out how a NAT treats UDP: what to ask STUN servers, and what their answers mean.

RFC 5780 section 4, in three rounds, whose probes do not depend on each other:

1. Each server is asked for the address that it sees.
2. The mapping: the server's other address is asked from the same local port.
3. The filtering: the server answers from its other address and port.  It answers to a second
   local port, which has sent nothing there.  Hairpinning: both ports send to each other's
   external address.

Pure: discover() yields what to send and is given what came back (admin.nat.exchange).
"""

from __future__ import annotations

from netproxy.admin.nat.report import (
    ADDRESS_AND_PORT_DEPENDENT,
    ADDRESS_DEPENDENT,
    DEPENDENT,
    ENDPOINT_INDEPENDENT,
    NO_ANSWER,
    UNKNOWN,
    Report,
    ServerReport,
)
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.protocol.stun import BindingError, BindingSuccess
from netproxy.typed import Generator, Iterable, Mapping, NamedTuple, Sequence, TypeAlias

SERVERS_LIMIT = 8
"""Servers of one discovery: two are enough, and all are asked at once."""
FIRST, SECOND = 0, 1
"""The local ports that probes are sent from."""
PORTS = (FIRST, SECOND)

_TOLD = ("mapping", "filtering", "hairpin")
_NO_SUCCESS = "no server has told an address"
_NO_SECOND_ADDRESS = "no server has a second address (OTHER-ADDRESS of RFC 5780)"
_SECOND_IS_SILENT = "the second address of the server does not answer"
_CHANGE_IGNORED = "the server does not answer from its second address (CHANGE-REQUEST)"
_NOT_OURS = "the server has told an address that cannot be ours"
_FIRST_IS_SILENT = "the server did not answer another local port"


class Probe(NamedTuple):
    """A Binding request to send from a local port."""

    port: int
    """The number of the local port, such as FIRST."""
    target: Address
    """A server, or an external address of our own."""
    change_ip: bool = False
    change_port: bool = False
    response_port: int = 0
    """The external port that the answer is to go to; 0 for that of the local port."""


class Outcome(NamedTuple):
    """What has become of a probe."""

    response: BindingSuccess | BindingError | None = None
    """The answer; None if there is none, or the request itself has come back."""
    source: Address | None = None
    """Where it came from."""
    port: int | None = None
    """The local port that it came to; None if nothing has come."""
    seconds: float = 0.0
    """From the first try."""
    error: str = NO_ANSWER
    """Why there is no answer."""

    @property
    def mapped(self) -> Address | None:
        """The address that the server has seen, None without a successful answer."""
        return self.response.mapped if isinstance(self.response, BindingSuccess) else None

    @property
    def is_own_request(self) -> bool:
        """True if the request itself has come, to another local port."""
        return self.port is not None and self.response is None


Rounds: TypeAlias = Generator[Sequence[Probe], Sequence[Outcome], Report]


def discover(servers: Sequence[Address], local: Sequence[Address | None]) -> Rounds:
    """Yield the probes of each round, receive an outcome for each of them, return the report.

    `local` are the addresses of the local ports towards the servers, None if not known.
    """
    first = yield [Probe(FIRST, server) for server in servers]
    answered = [outcome for outcome in first if outcome.mapped is not None]
    reports = [_server_report(*pair) for pair in zip(servers, first, strict=True)]
    own = str(local[FIRST] or "")
    if not answered:
        works = any(outcome.response is not None for outcome in first)
        return Report(reports, works, own, unknown=dict.fromkeys(_TOLD, _NO_SUCCESS))
    main = _Main.choose(answered)
    second, *others = yield [Probe(SECOND, main.address), *main.mapping_probes()]
    mapped = {FIRST: main.mapped} | ({SECOND: second.mapped} if second.mapped else {})
    seen = [outcome.mapped for outcome in (main.first, *answered, *others) if outcome.mapped]
    external = [address for address in seen if _same_family(address, main.mapped)]
    nat = None if local[FIRST] is None else local[FIRST] != main.mapped
    mapping = _mapping(main, answered, others, external)
    probes = main.filtering_probes() if SECOND in mapped and _any_mapped(others) else []
    hairpins, why_no_hairpin = _hairpin_probes(nat, mapped, main.address)
    outcomes = yield [*probes, *hairpins]
    filtering, why_no_filtering = _filtering(main, second, others, outcomes[: len(probes)])
    returned = [outcome.is_own_request for outcome in outcomes[len(probes) :]]
    unknown = {
        "mapping": _why_no_mapping(main, mapping),
        "filtering": why_no_filtering,
        "hairpin": why_no_hairpin,
    }
    return Report(
        reports,
        works=True,
        local=own,
        external=list(dict.fromkeys(map(str, external))),
        nat=nat,
        mapping=mapping,
        filtering=filtering,
        hairpin=any(returned) if returned else None,
        port_preserved=_port_preserved(nat, mapped, local),
        unknown={name: why for name, why in unknown.items() if why},
    )


class _Main(NamedTuple):
    """The server that the rounds after the first one ask."""

    first: Outcome
    """That of the first round."""
    mapped: Address
    address: Address
    second: Address | None
    """The server's other address and port; None if there is no usable one."""

    @classmethod
    def choose(cls, answered: Iterable[Outcome]) -> _Main:
        """Return the first server with a second address, else the first one."""
        servers = []
        for outcome in answered:
            response, source = outcome.response, outcome.source
            assert isinstance(response, BindingSuccess) and source is not None
            other = response.other
            # An address that differs in one part alone cannot tell what RFC 5780 asks for.
            is_usable = (
                other is not None
                and _same_family(other, response.mapped)
                and other.port != source.port
                and other.host != source.host
                and _may_be_asked(other, source)
            )
            servers.append(cls(outcome, response.mapped, source, other if is_usable else None))
        return next((server for server in servers if server.second), servers[0])

    def mapping_probes(self) -> list[Probe]:
        """Return the probes to the other address: with the same port, and with the other one."""
        if self.second is None:
            return []
        same_port = Address(self.second.host, self.address.port)
        return [Probe(FIRST, same_port), Probe(FIRST, self.second)]

    def filtering_probes(self) -> list[Probe]:
        """Return the probes that are to be answered from elsewhere."""
        return [
            Probe(SECOND, self.address, change_ip=True, change_port=True),
            Probe(SECOND, self.address, change_port=True),
        ]

    def has_sent(self, outcome: Outcome) -> bool:
        """Return whether an answer has come from the address that was asked.

        The origin counts if it differs: a proxy may hide where an answer came from.
        """
        if outcome.response is None or outcome.source != self.address:
            return False
        return _origin(outcome) in (None, _origin(self.first))


def _origin(outcome: Outcome) -> Address | None:
    response = outcome.response
    return response.origin if isinstance(response, BindingSuccess) else None


def _mapping(
    main: _Main, answered: Sequence[Outcome], others: Sequence[Outcome], external: Sequence[Address]
) -> str:
    """Return the mapping (RFC 5780 section 4.3)."""
    if len(set(external)) == 1:
        hosts = {outcome.source.host for outcome in (*answered, *others) if outcome.source}
        return ENDPOINT_INDEPENDENT if len(hosts) > 1 else UNKNOWN
    same_port, both = others[0].mapped if others else None, others[1].mapped if others else None
    if same_port is None or both is None or same_port == main.mapped:
        # In the last case another server has seen something else: there are several routes.
        return DEPENDENT
    return ADDRESS_DEPENDENT if both == same_port else ADDRESS_AND_PORT_DEPENDENT


def _why_no_mapping(main: _Main, mapping: str) -> str:
    if mapping != UNKNOWN:
        return ""
    return _NO_SECOND_ADDRESS if main.second is None else _SECOND_IS_SILENT


def _filtering(
    main: _Main, again: Outcome, others: Sequence[Outcome], outcomes: Sequence[Outcome]
) -> tuple[str, str]:
    """Return the filtering (RFC 5780 section 4.4), and why it is unknown if it is.

    `again` is the outcome of the question from the second port; nothing in `outcomes` means
    that the probes were of no use.
    """
    if main.second is None:
        return UNKNOWN, _NO_SECOND_ADDRESS
    if not outcomes:
        return UNKNOWN, _FIRST_IS_SILENT if again.mapped is None else _SECOND_IS_SILENT
    if any(main.has_sent(outcome) for outcome in outcomes):
        return UNKNOWN, _CHANGE_IGNORED
    if outcomes[0].mapped is not None:
        return ENDPOINT_INDEPENDENT, ""
    return ADDRESS_AND_PORT_DEPENDENT if outcomes[1].mapped is None else ADDRESS_DEPENDENT, ""


def _hairpin_probes(
    nat: bool | None, mapped: Mapping[int, Address], server: Address
) -> tuple[list[Probe], str]:
    """Return the probes by which both ports send to each other's external address.

    Each opens the filter for what the other port sends (RFC 4787 section 6).  If there are none,
    return also why nothing can be known, "" if there is nothing to know.
    """
    if nat is False:
        return [], ""
    if not all(_may_be_asked(address, server) for address in mapped.values()):
        return [], _NOT_OURS
    if SECOND not in mapped:
        return [], _FIRST_IS_SILENT
    return [Probe(SECOND, mapped[FIRST]), Probe(FIRST, mapped[SECOND])], ""


def _port_preserved(
    nat: bool | None, mapped: Mapping[int, Address], local: Sequence[Address | None]
) -> bool | None:
    """Return whether the NAT keeps the ports of all local sockets."""
    if not nat:
        return None
    return all(
        address is not None and mapped[port].port == address.port
        for port, address in enumerate(local)
        if port in mapped
    )


def _any_mapped(outcomes: Sequence[Outcome]) -> bool:
    return any(outcome.mapped is not None for outcome in outcomes)


def _may_be_asked(told: Address, server: Address) -> bool:
    """Return whether probes may go to an address that a server has told.

    A server must not lead them to services of this machine, nor to groups, unless it is here
    itself.
    """
    return told.port != 0 and (not _is_special(told.host) or _is_special(server.host))


def _is_special(host: str) -> bool:
    """Return whether an address is unspecified, loopback, multicast, reserved or broadcast."""
    packed = pack_ip(host)
    if packed is None:
        return False
    if len(packed) == 4:
        return packed[0] in (0, 127) or packed[0] >= 224
    return packed[0] == 0xFF or not any(packed[:15])


def _same_family(first: Address, second: Address) -> bool:
    return (":" in first.host) == (":" in second.host)


def _server_report(server: Address, outcome: Outcome) -> ServerReport:
    response, mapped, error = outcome.response, outcome.mapped, outcome.error
    other = response.other if isinstance(response, BindingSuccess) else None
    if isinstance(response, BindingError):
        error = f"error {response.code} {response.phrase}".strip()
    return ServerReport(
        str(server),
        str(outcome.source or ""),
        str(mapped or ""),
        str(other or ""),
        response.software if response else "",
        round(outcome.seconds * 1000, 1),
        "" if mapped else error,
    )
