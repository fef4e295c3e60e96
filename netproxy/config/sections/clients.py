"""Reads who may connect, and how much: `clients`, `clients_deny` and `limits`.

Clients are networks, exclusions and files of both.
"""

from __future__ import annotations

from netproxy.config.access_schema import ClientsConfig, LimitsConfig, NetworkList
from netproxy.config.tree.node import MapReader
from netproxy.config.units import parse_frequency, parse_rate
from netproxy.interfaces.networks import IpNetwork
from netproxy.typed import Iterator, NamedTuple

ALLOW, DENY = "clients", "clients_deny"
TCP_LIMITS = ("connections", "connections_per_client", "connection_rate_per_client", "handshakes")
"""The limits that are not for UDP."""


class _Entry(NamedTuple):
    """One network, with or without "!" before it."""

    name: str
    """The key in errors, such as "clients[0]"."""
    text: str
    place: str


def read_clients(section: MapReader) -> ClientsConfig:
    """Return who may connect.  An empty `clients` is an error, not everybody."""
    is_given = section.has(ALLOW)
    before = len(section.problems.errors)
    clients = ClientsConfig(_network_list(section, ALLOW), _network_list(section, DENY))
    if is_given and not any(clients.allow) and len(section.problems.errors) == before:
        section.add_error(ALLOW, "names no network")
    return clients


def _network_list(section: MapReader, key: str) -> NetworkList:
    given: dict[bool, dict[IpNetwork, None]] = {True: {}, False: {}}
    for name, text, place in _entries(section, key):
        is_included = not text.startswith("!")
        try:
            network = IpNetwork.parse(text if is_included else text[1:].lstrip())
            if network in given[not is_included]:
                raise ValueError(f"'{network}' is there with '!' and without")
        except ValueError as error:
            section.add_error(name, str(error), place)
        else:
            given[is_included][network] = None
    return NetworkList(tuple(given[True]), tuple(given[False]))


def _entries(section: MapReader, key: str) -> Iterator[_Entry]:
    """Yield the entries of a list, and those of the files in it."""
    for index, node in enumerate(section.items(key)):
        name, text = f"{key}[{index}]", node.value
        if not isinstance(text, str):
            section.add_error(name, "must be a single value", node.place)
        elif node.source.is_value:
            # A byte order mark is no part of the first line.
            for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
                if network := line.partition("#")[0].strip():
                    yield _Entry(name, network, f"{node.source.path}:{number}")
        elif "," in text:
            message = f"'{text}' is one text: write a list, [{text}]"
            section.add_error(name, message, node.place)
        else:
            yield _Entry(name, text, node.place)


def read_limits(owner: MapReader, network: str | None = None) -> LimitsConfig:
    """Take the limits of a listener, or of a port of an agent.

    `network`: "udp" for a port that has no TCP.
    """
    section = owner.mapping("limits")
    if network == "udp":
        for key in filter(section.has, TCP_LIMITS):
            section.add_error(key, "has no meaning for udp")
    limits = LimitsConfig(
        section.whole("connections", LimitsConfig().connections),
        section.whole("connections_per_client", None),
        section.read("connection_rate_per_client", parse_frequency, None),
        section.read("rate", parse_rate, None),
        section.read("rate_per_client", parse_rate, None),
        section.whole("handshakes", LimitsConfig().handshakes),
    )
    section.finish()
    return limits
