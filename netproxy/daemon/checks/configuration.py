"""Checks a whole configuration for what no section of its file can tell alone.

Reads files and asks the kernel; binds and dials nothing.  Thread: main.
"""

from __future__ import annotations

import os
import time

from netproxy.config.schema import TRANSPARENT, Config, Place
from netproxy.config.tree.problems import Problems
from netproxy.config.used import name_servers, used_upstreams
from netproxy.daemon.checks.modules import check_ctypes, check_modules, check_paths
from netproxy.daemon.checks.routing import check_routes, check_rules, check_udp
from netproxy.daemon.checks.sockets import (
    check_collisions,
    check_fake_addresses,
    check_interfaces,
    check_loops,
    check_ports,
)
from netproxy.errors import ConfigError
from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple

if TYPE_CHECKING:
    from netproxy.dialer.factory import DialerFactory


class CertificateFiles(NamedTuple):
    """The files of one TLS configuration; "" for those that it has not."""

    certificate: str
    key: str
    authorities: str
    place: Place


def check_requirements(config: Config) -> None:
    """Raise ConfigError if Python lacks a module without which no plan can be built."""
    problems = Problems()
    check_modules(config, problems)
    problems.check()


def check_configuration(config: Config, dialers: DialerFactory) -> list[str]:
    """Return all warnings of a configuration, those of its file first.

    Raises ConfigError for what can never work.
    """
    problems = Problems()
    check_ctypes(problems)
    check_paths(config, problems)
    check_collisions(config, problems)
    check_loops(config, problems)
    check_fake_addresses(config, problems)
    check_ports(config, problems)
    _check_names(config, problems)
    check_interfaces(config, problems)
    check_udp(config, dialers, problems)
    _check_state(config, problems)
    _check_access_file(config, problems)
    for wanted in config.lists:
        if not os.path.exists(wanted.path):
            problems.warn("it matches nothing until it is fetched", f"list {wanted.name}")
    if any(listener.protocol in TRANSPARENT for listener in config.listeners):
        # late: few configurations have such a listener
        from netproxy.daemon.checks.transparent import check_transparent_listeners

        check_transparent_listeners(config, problems)
    if config.rules:
        check_rules(config, problems)
    if config.pac.address is not None:
        from netproxy.admin.web.pac import make_script  # late: few daemons tell browsers

        make_script(config)
    if any(listener.routes for listener in config.listeners):
        check_routes(config, problems)
    if files := tuple(_tls_files(config)):
        # late: few configurations have certificates
        from netproxy.daemon.checks.certificates import check_certificates

        check_certificates(files, problems, time.time())
    problems.check()
    return [*config.warnings, *problems.warnings]


def _check_names(config: Config, problems: Problems) -> None:
    """Add an error for each listener with the name of an agent's port.

    The flows of both would share limits, rules and a name in records.
    """
    agents = config.tunnel.bridge.agents if config.tunnel.bridge is not None else {}
    for listener in config.listeners:
        agent, _, number = listener.name.rpartition("-")
        ports = agents[agent].ports if agent in agents else ()
        if any(number in map(str, range(port.first, port.last + 1)) for port in ports):
            message = f"the port {number} of the agent '{agent}' has this name"
            problems.add(f"name: '{listener.name}': {message}", listener.place)


def _check_state(config: Config, problems: Problems) -> None:
    """Add an error if the folder cannot be used.  Opens nothing: a daemon may run with it."""
    if not config.state:
        return
    # late: few configurations have a folder
    from netproxy.access.accounts.usage_file import check_folder

    try:
        check_folder(config.state)
    except ConfigError as error:
        problems.add(f"state: {error}", config.state_place)


def _check_access_file(config: Config, problems: Problems) -> None:
    """Add an error if the file of finished flows cannot be written.  Opens nothing."""
    path, _, place = config.log.file
    if not path:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        problems.add(f"log.file: {path} is a directory", Place(place))
    elif not os.path.isdir(folder):
        problems.add(f"log.file: there is no directory {folder}", Place(place))
    elif not os.access(path if os.path.exists(path) else folder, os.W_OK):
        problems.add(f"log.file: {path} cannot be written by this user", Place(place))


def _tls_files(config: Config) -> Iterator[CertificateFiles]:
    for listener in config.listeners:
        if tls := listener.tls:
            yield CertificateFiles(tls.certificate, tls.key, tls.client_ca, tls.place)
    clients = [hop.tls for upstream in used_upstreams(config) for hop in upstream.hops]
    clients += [server.tls for server in name_servers(config)]
    if config.tunnel.agent is not None and config.tunnel.agent.tls is not None:
        clients.append(config.tunnel.agent.tls)
    for client in clients:
        if client.certificate or client.ca:
            yield CertificateFiles(client.certificate, client.key, client.ca, client.place)
