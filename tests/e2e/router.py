"""A client, a router with netproxyd, and an internet, each in its own namespace.

The rules are those that netproxyctl nft prints.  The internet has no route to the client: what
the client receives from there has come through the proxy.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, NamedTuple

from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.support import ROOT, SECONDS, environment, program

CLIENT, CLIENT6 = "10.81.1.2", "fd81:1::2"
ROUTER, ROUTER6 = "10.81.1.1", "fd81:1::1"
ROUTER_OUT, ROUTER_OUT6 = "203.0.113.1", "2001:db8:3::1"
SERVER, SERVER6 = "203.0.113.10", "2001:db8:3::10"
OTHER, OTHER6 = "203.0.113.11", "2001:db8:3::11"
PROXY = "203.0.113.20"
LAN = "to-client"
CLIENTS = "[10.81.1.0/24, fd81:1::/64]"
CONTROL_PORT = 1080
"""Of the sps listener, by which a test asks whether the daemon still answers."""


class Net(NamedTuple):
    """The three hosts."""

    client: Namespace
    router: Namespace
    internet: Namespace


@contextmanager
def network() -> Iterator[Net]:
    """Create the hosts."""
    with hosts("client", "router", "internet") as created:
        net = Net(*created)
        connect(
            net.client,
            [f"{CLIENT}/24", f"{CLIENT6}/64"],
            net.router,
            [f"{ROUTER}/24", f"{ROUTER6}/64"],
        )
        connect(
            net.router,
            [f"{ROUTER_OUT}/24", f"{ROUTER_OUT6}/64"],
            net.internet,
            [
                *(f"{host}/24" for host in (SERVER, OTHER, PROXY)),
                *(f"{host}/64" for host in (SERVER6, OTHER6)),
            ],
        )
        net.client.ip("route", "add", "default", "via", ROUTER)
        net.client.ip("-6", "route", "add", "default", "via", ROUTER6)
        for key in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            run_in(net.router, "sh", "-c", f"echo 1 > /proc/sys/net/{key}")
        yield net


def configuration(listeners: str, rest: str = "") -> str:
    """Return a configuration with transparent listeners, and an sps listener before them."""
    sps = f"{{protocol: sps, listen: '{ROUTER}:{CONTROL_PORT}', clients: {CLIENTS}, name: sps}}"
    own = f"[{ROUTER}/32, {ROUTER_OUT}/32, 127.0.0.0/8]"
    sps = sps.replace(CLIENTS, f"{CLIENTS[:-1]}, {own[1:]}")
    return f"listeners:\n  - {sps}\n{listeners}\n{rest}\n"


TPROXY = """
  - {protocol: tproxy, listen: "127.0.0.1:7893", name: lan4}
  - {protocol: tproxy, listen: "[::1]:7893", name: lan6}
"""
TPROXY_ALL = f"""
  - {{protocol: tproxy, listen: ":7893", name: lan, clients: {CLIENTS}}}
"""
REDIRECT = f"""
  - {{protocol: redirect, listen: ":7892", name: lan, clients: {CLIENTS}}}
  - {{protocol: tproxy, listen: ":7893", network: udp, name: lan-udp, clients: {CLIENTS}}}
"""


def netproxyctl_nft(
    host: Namespace, path: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run netproxyctl nft on a host."""
    code = "import sys; from netproxy.cli import control_main; sys.exit(control_main())"
    command = [sys.executable, "-c", code, "nft", "-c", str(path), *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=host.enter,
        timeout=SECONDS,
    )


@contextmanager
def iptables_rules(net: Net, path: Path, *arguments: str) -> Iterator[None]:
    """Apply the rules with iptables, then remove them.  Skip the test without iptables."""
    for name in ("iptables", "ip6tables"):
        program(name)
    options = ("--iptables", "--lan", LAN, *arguments)
    script = netproxyctl_nft(net.router, path, *options).stdout
    try:
        for _ in range(2):  # the second time it replaces what is there
            run_in(net.router, "sh", "-c", script)
        yield
    finally:
        script = netproxyctl_nft(net.router, path, "--iptables", "--remove").stdout
        run_in(net.router, "sh", "-c", script)
        assert "NETPROXY" not in run_in(net.router, "iptables-save")


@contextmanager
def rules(net: Net, path: Path, *arguments: str) -> Iterator[None]:
    """Apply the rules for a configuration, then remove them."""
    net.router.nft(netproxyctl_nft(net.router, path, "--lan", LAN, *arguments).stdout)
    run_in(net.router, "sh", "-e", "-c", netproxyctl_nft(net.router, path, "--routes").stdout)
    try:
        yield
    finally:
        run_in(net.router, "sh", "-c", netproxyctl_nft(net.router, path, "--remove").stdout)


def run_in(host: Namespace, name: str, *arguments: str, seconds: float = SECONDS) -> str:
    """Run a program on a host and return its output.  Skip the test if it is not installed."""
    process = subprocess.run(
        [program(name), *arguments],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=host.enter,
        timeout=seconds,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout
