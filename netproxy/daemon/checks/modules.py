"""Checks that Python has the modules that a configuration needs.

Small distributions split the standard library into packages.  Loads no module, because most of
them cost memory.
"""

from __future__ import annotations

import sys

from netproxy.access.factory import user_with_quota
from netproxy.config.schema import Config
from netproxy.config.tree.problems import Problems
from netproxy.config.used import name_servers, used_upstreams
from netproxy.interfaces.listeners import HASH_PREFIX
from netproxy.typed import Iterator

PACKAGES = {
    "ssl": "python3-openssl",
    "hashlib": "python3-openssl",
    "_hashlib": "python3-openssl",
    "_blake2": "python3-light",
    "hmac": "python3-light",
    "ctypes": "python3-ctypes",
    "email": "python3-email",
    "http": "python3-light",
    "urllib": "python3-urllib",
    "_sqlite3": "python3-sqlite3",
}
"""The packages of OpenWrt with the modules that it splits off; Debian's python3 has all."""


def check_modules(config: Config, problems: Problems) -> None:
    """Add an error for each module that the configuration needs and Python lacks."""
    missing: set[str] = set()
    for module, purpose, place in _needs(config):
        if module not in missing and not has_module(module):
            missing.add(module)
            problems.add(f"{purpose} needs {_description(module)}", place)


def check_paths(config: Config, problems: Problems) -> None:
    """Warn if Python lacks what datagram paths of tunnels are sealed with."""
    bridge, agent = config.tunnel
    wanted = [("bridge", bridge.datagrams, bridge.place)] if bridge is not None else []
    wanted += [("agent", agent.datagrams, agent.place)] if agent is not None else []
    for side, is_on, place in wanted:
        if is_on and not has_module("cryptography"):
            needs = "needs python3-cryptography: until then datagrams go by TCP"
            problems.warn(f"tunnel.{side}.datagrams {needs}", place)
    for upstream in used_upstreams(config):
        for hop in upstream.hops:
            if hop.direct and not has_module("cryptography"):
                needs = "needs python3-cryptography: until then datagrams are relayed"
                problems.warn(f"direct: {needs}", hop.place)


def check_ctypes(problems: Problems) -> None:
    """Warn if Python lacks ctypes: everything works without it, but more slowly."""
    if not has_module("ctypes"):
        problems.warn(f"datagrams take longer without {_description('ctypes')}", "python3")


def has_module(name: str) -> bool:
    """Return whether a module could be imported.  Does not import it."""
    if name in sys.modules:
        return sys.modules[name] is not None
    return any(finder.find_spec(name, None) for finder in sys.meta_path)


def _description(module: str) -> str:
    return f"Python's module {module} (Debian: python3, OpenWrt: {PACKAGES[module]})"


def _needs(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield each module that is needed, what for, and the place that needs it."""
    for listener in config.listeners:
        if listener.tls:
            yield "ssl", "tls", listener.tls.place
        if listener.port_mapping == "pcp":
            yield "_blake2", "port_mapping: pcp", listener.place
        if listener.bind is not None and listener.bind.keeps:
            yield "_blake2", f"rotate: {listener.bind.rotate}", listener.place
    for upstream in used_upstreams(config):
        for hop in upstream.hops:
            if hop.has_tls:
                yield "ssl", hop.url, hop.place
            if hop.bind is not None and hop.bind.keeps:
                yield "_blake2", f"rotate: {hop.bind.rotate}", hop.place
    for server in name_servers(config):
        if server.scheme in ("tls", "https"):
            yield "ssl", f"dns: {server.server}", server.place
    if config.tunnel.agent is not None and config.tunnel.agent.tls is not None:
        yield "ssl", "tunnel.agent", config.tunnel.agent.tls.place
    if config.state or user_with_quota(config):
        # Without it Python has the package sqlite3 nevertheless, and cannot use it.
        yield "_sqlite3", "state" if config.state else "a quota", config.state_place
    if config.lists:
        for module in ("http", "email", "urllib", "ssl"):
            yield module, "a list that is fetched", config.lists[0].name
    if config.auth.is_set:
        yield "_blake2", "auth", config.auth.place
    if config.auth.url:
        # http.client needs the other two.  It is not looked for itself: that would import http.
        for module in ("http", "email", "urllib"):
            yield module, "auth.url", config.auth.place
    if config.auth.url.startswith("https:"):
        yield "ssl", "auth.url", config.auth.place
    for name, user in config.users.items():
        yield "hmac", f"users.{name}", user.place
        if user.bind is not None and user.bind.keeps:
            yield "_blake2", f"users.{name}.rotate", user.place
        if user.password.startswith(HASH_PREFIX):
            # Without OpenSSL hashlib has no scrypt.
            module = "_hashlib" if has_module("hashlib") else "hashlib"
            yield module, f"users.{name}", user.place
