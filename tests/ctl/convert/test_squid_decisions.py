"""Random access lists of squid, read by a few lines that do what squid does, and converted.

Both must decide the same about all flows: by client, target, port, command and login.
"""

from __future__ import annotations

import ipaddress
import random
import re
from typing import NamedTuple

import pytest

from netproxy.interfaces.networks import IpNetwork, NetworkSet
from tests.ctl.convert.converting import converted
from tests.support.relays import configuration
from tests.support.routing import StubResolver, flow, routing

pytest.importorskip("yaml")

HOSTS = {"www.a.example": "10.2.0.1", "a.example": "10.1.0.1", "b.example": "192.0.2.1"}
VALUES = {
    "src": ["10.0.0.0/8", "10.1.0.0/16", "192.168.0.0/16", "10.1.0.1-10.1.0.9", "all"],
    "dst": ["10.0.0.0/8", "10.2.0.0/16", "192.0.2.1"],
    "dstdomain": [".a.example", "www.a.example", "b.example"],
    "dstdom_regex": ["^www", "b", r"\.a\.example$"],
    "port": ["80", "443", "1-100", "25"],
    "method": ["CONNECT", "PURGE"],
    "proxy_auth": ["REQUIRED", "joe", "ann"],
    "proto": ["FTP", "cache_object"],
}
NAMES = ("a", "b", "c", "d", "e", "all", "CONNECT", "localhost", "manager")


class Asked(NamedTuple):
    command: str
    """ "tcp" for CONNECT, or "http"."""
    client: str
    host: str
    port: int
    user: str


class Acls(NamedTuple):
    kinds: dict[str, str]
    values: dict[str, list[str]]

    def matches(self, name: str, asked: Asked) -> bool:
        """Return whether an access list matches; a login is there if it needs one."""
        if name in ("all", "CONNECT", "localhost", "manager"):
            return {
                "all": True,
                "CONNECT": asked.command == "tcp",
                "localhost": asked.client == "127.0.0.1",
                "manager": False,
            }[name]
        return any(self._value(self.kinds[name], value, asked) for value in self.values[name])

    def _value(self, kind: str, value: str, asked: Asked) -> bool:
        address = HOSTS.get(asked.host, asked.host)
        is_name = asked.host in HOSTS
        if kind in ("src", "dst"):
            host = asked.client if kind == "src" else address
            first, dash, last = value.partition("-")
            if dash:
                ends = [int(ipaddress.ip_address(end)) for end in (first, last)]
                return ends[0] <= int(ipaddress.ip_address(host)) <= ends[1]
            return value == "all" or host in NetworkSet([IpNetwork.parse(value)])
        if kind == "dstdomain":
            below = value.startswith(".") and f".{asked.host}".endswith(value)
            return is_name and (below or asked.host == value)
        if kind == "dstdom_regex":
            return is_name and bool(re.search(value, asked.host))
        if kind == "port":
            first, dash, last = value.partition("-")
            return int(first) <= asked.port <= int(last if dash else first)
        if kind == "proxy_auth":
            return value == "REQUIRED" or asked.user == value
        return kind == "method" and value == "CONNECT" and asked.command == "tcp"


def squid_allows(rules: list[tuple[bool, list[str]]], acls: Acls, asked: Asked) -> bool:
    for allows, terms in rules:
        for term in terms:
            name = term.removeprefix("!")
            if acls.kinds.get(name) == "proxy_auth" and not asked.user:
                # The answer is 407.
                return False
            if acls.matches(name, asked) == term.startswith("!"):
                break
        else:
            return allows
    return bool(rules) and not rules[-1][0]


FLOWS = [
    Asked(command, client, host, port, user)
    for command in ("tcp", "http")
    for client in ("10.1.0.5", "10.1.0.77", "10.7.0.1", "192.168.1.1", "127.0.0.1")
    for host in (*HOSTS, "10.2.0.9", "192.0.2.1")
    for port in (80, 443)
    for user in ("", "joe", "ann")
]


@pytest.mark.parametrize("seed", range(60))
def test_conversion_decides_as_squid_does(seed: int) -> None:
    chance = random.Random(seed)
    kinds = {name: chance.choice(list(VALUES)) for name in "abcde"}
    values = {
        name: chance.sample(VALUES[kind], chance.randint(1, 2)) for name, kind in kinds.items()
    }
    rules = [
        (
            chance.random() < 0.5,
            [
                chance.choice(["", "", "!"]) + chance.choice(NAMES)
                for _ in range(chance.randint(1, 3))
            ],
        )
        for _ in range(chance.randint(1, 6))
    ]
    lines = ["http_port 127.0.0.1:3128 name=main"]
    lines += [f"acl {name} {kinds[name]} {' '.join(values[name])}" for name in kinds]
    lines += [f"http_access {'allow' if yes else 'deny'} {' '.join(terms)}" for yes, terms in rules]
    text = "\n".join(lines)
    result = converted("squid", text)
    # Where a line could not be said, squid and the result may differ.
    if result.lost:
        return
    router = routing(
        configuration(result.text), StubResolver({k: [v] for k, v in HOSTS.items()})
    ).router
    listener = result.config["listeners"][0]
    clients = [IpNetwork.parse(client) for client in listener.get("clients", ["0.0.0.0/0"])]
    acls, admitted = Acls(kinds, values), NetworkSet(clients)
    for asked in FLOWS:
        login = f"{asked.user}@" if asked.user else ""
        wanted = squid_allows(rules, acls, asked)
        asked_text = f"{asked.command} {login}{asked.client} -> {asked.host}:{asked.port} on main"
        may_log_in = bool(asked.user) or listener.get("auth") != "required"
        decided = (
            asked.client in admitted
            and may_log_in
            and router.route(flow(asked_text)).dialer.name != "block"
        )
        assert decided == wanted, f"{asked_text}: squid {wanted}\n{text}\n{result.text}"
