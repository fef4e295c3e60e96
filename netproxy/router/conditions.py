"""Makes conditions: functions that tell whether a flow matches one part of a rule.

A condition is a plain closure, because a router calls several of them for each flow.
Any thread.
"""

from __future__ import annotations

from netproxy.interfaces.flows import ANY_USER
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from time import struct_time

    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.networks import HostSet
    from netproxy.router.matchers import MinuteSet, PortSet
    from netproxy.router.router import Condition


def network_in(networks: frozenset[str]) -> Condition:
    """Return the condition that a flow is over one of the networks, "tcp" or "udp"."""

    def holds(flow: Flow) -> bool:
        return flow.network in networks

    return holds


def command_in(commands: frozenset[str]) -> Condition:
    """Return the condition that the client asked for one of the commands (flows.COMMANDS)."""

    def holds(flow: Flow) -> bool:
        return (flow.command if flow.network == "tcp" else "udp") in commands

    return holds


def listener_in(listeners: frozenset[str]) -> Condition:
    """Return the condition that a flow came to one of the listeners, by name."""

    def holds(flow: Flow) -> bool:
        return flow.listener in listeners

    return holds


def user_in(users: frozenset[str]) -> Condition:
    """Return the condition that a flow is from one of the users, by name; "*" is every user."""
    if ANY_USER in users:
        return has_user

    def holds(flow: Flow) -> bool:
        return flow.user in users

    return holds


def has_user(flow: Flow) -> bool:
    """Return whether the client has logged in.  A Condition."""
    return bool(flow.user)


def client_in(hosts: HostSet) -> Condition:
    """Return the condition that the address of the client is in a set."""

    def holds(flow: Flow) -> bool:
        return flow.client.host in hosts

    return holds


def port_in(ports: PortSet) -> Condition:
    """Return the condition that the port of the target is in a set."""

    def holds(flow: Flow) -> bool:
        return flow.target.port in ports

    return holds


def time_in(minutes: MinuteSet, clock: Callable[[], struct_time]) -> Condition:
    """Return the condition that the time is in a set.  `clock` returns the local time."""

    def holds(flow: Flow) -> bool:
        now = clock()
        return (now.tm_wday * 24 + now.tm_hour) * 60 + now.tm_min in minutes

    return holds


def name_in(names: HostSet) -> Condition:
    """Return the condition that a name is in a set: the target's, or that seen in its place."""

    def holds(flow: Flow) -> bool:
        return flow.target.host in names or (flow.seen is not None and flow.seen.host in names)

    return holds


def server_name_in(names: HostSet) -> Condition:
    """Return the condition that the name in the client's TLS ClientHello is in a set."""

    def holds(flow: Flow) -> bool:
        seen = flow.seen
        return seen is not None and seen.seen_in == "tls" and seen.host in names

    return holds


def address_in(
    networks: HostSet, countries: frozenset[str], country_of: Callable[[str], str]
) -> Condition:
    """Return the condition that any address of a flow is in a network or a country.

    `country_of` returns the code of an address's country, "" if it is not known.
    """

    def holds(flow: Flow) -> bool:
        return any(
            address.host in networks or (countries and country_of(address.host) in countries)
            for address in flow.addresses
        )

    return holds


def negated(condition: Condition) -> Condition:
    """Return the condition that another condition does not hold."""

    def holds(flow: Flow) -> bool:
        return not condition(flow)

    return holds
