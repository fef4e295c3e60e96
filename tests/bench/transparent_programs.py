"""The programs that transparent_peers.py compares: their configurations, and the kernel's rules.

All of them serve on a router, in the same network namespaces and under the same rules: those that
`netproxyctl nft` prints for netproxyd's configuration.  Programs of others run as nobody, with
CAP_NET_ADMIN and CAP_NET_BIND_SERVICE alone.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from rig import Endpoint

from peers import Started

from tests.e2e.namespaces import Namespace
from tests.e2e.router import (
    CLIENT,
    CLIENT6,
    CLIENTS,
    LAN,
    PROXY,
    ROUTER_OUT,
    ROUTER_OUT6,
    netproxyctl_nft,
    run_in,
)

TCP_PORT, UDP_PORT = 7892, 7893
UPSTREAM: Endpoint = PROXY, 1080
BLOCKED = "blocked.example"
"""The name that a rule refuses, in a setting with `block`."""
FLOWS_LIMIT = 4096
"""Of all programs that have such a limit."""
REDIRECT, TPROXY, FORWARD = "redirect", "tproxy", "forward"
# The second one: replies of DNS servers leave from port 53.
CAPABILITIES = "-all,+net_admin,+net_bind_service"
NOBODY = (
    *("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--no-new-privs"),
    *("--inh-caps", CAPABILITIES, "--ambient-caps", CAPABILITIES),
)


class Setting(NamedTuple):
    """What a program is started for."""

    upstream: bool = False
    """True for the SOCKS5 proxy at UPSTREAM, False for direct connections."""
    block: bool = False
    """True for a rule that refuses BLOCKED."""


class Program(NamedTuple):
    """A transparent proxy, or the kernel alone."""

    name: str
    way: str
    """How TCP comes to it: REDIRECT or TPROXY; FORWARD for the kernel alone.  UDP: TPROXY."""
    command: Callable[[Path, str, Setting], list[str]] | None = None
    """Writes the configuration into a folder and returns the command, for a way."""
    direct: bool = True
    """False if it needs an upstream."""


# -- configurations


def netproxyd_config(way: str, setting: Setting) -> str:
    """Return netproxyd's file.  The rules of the kernel are those for this file."""
    limits = f"limits: {{connections: {FLOWS_LIMIT}, connections_per_client: {FLOWS_LIMIT}}}"
    udp = f"udp: {{max_sessions_per_client: {FLOWS_LIMIT}}}"
    both = f'listen: ":{UDP_PORT}", clients: {CLIENTS}, {udp}'
    listeners = {
        REDIRECT: f"""
- {{protocol: redirect, listen: ":{TCP_PORT}", clients: {CLIENTS}, {limits}}}
- {{protocol: tproxy, network: udp, {both}}}""",
        TPROXY: f"\n- {{protocol: tproxy, {both}, {limits}}}",
    }[way]
    default = f"socks5://{UPSTREAM[0]}:{UPSTREAM[1]}" if setting.upstream else "direct"
    rules = f"rules: [{{domain: {BLOCKED}, via: block}}]\n" if setting.block else ""
    return f"listeners:{listeners}\ndefault: {default}\n{rules}log: {{access: false}}\n"


def _netproxyd(folder: Path, way: str, setting: Setting) -> list[str]:
    path = folder / "netproxyd.yaml"
    path.write_text(netproxyd_config(way, setting))
    return [sys.executable, "-m", "netproxy", "-q", "-c", str(path)]


def _redsocks(folder: Path, way: str, setting: Setting) -> list[str]:
    path = folder / "redsocks.conf"
    host, port = UPSTREAM
    path.write_text(f"""
base {{ log_info = off; log = stderr; daemon = off; redirector = iptables;
        redsocks_conn_max = {FLOWS_LIMIT}; }}
redsocks {{ local_ip = 0.0.0.0; local_port = {TCP_PORT}; type = socks5; ip = {host};
            port = {port}; }}
redudp {{ local_ip = 0.0.0.0; local_port = {UDP_PORT}; ip = {host}; port = {port}; }}
""")
    return [*NOBODY, "redsocks", "-c", str(path)]


def _sing_box(folder: Path, way: str, setting: Setting) -> list[str]:
    both = {"type": "tproxy", "tag": "lan", "listen": "::", "listen_port": UDP_PORT}
    inbounds = [both]
    if way == REDIRECT:
        both["network"] = "udp"
        inbounds.append(
            {"type": "redirect", "tag": "lan-tcp", "listen": "::", "listen_port": TCP_PORT}
        )
    outbound: dict[str, object] = {"type": "direct", "tag": "out"}
    if setting.upstream:
        host, port = UPSTREAM
        outbound = {"type": "socks", "tag": "out", "server": host, "server_port": port}
    rules: list[dict[str, object]] = []
    if setting.block:
        rules = [{"action": "sniff"}, {"domain": [BLOCKED], "action": "reject"}]
    content = {
        "log": {"level": "error"},
        "inbounds": inbounds,
        "outbounds": [outbound],
        "route": {"rules": rules, "final": "out"},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return [*NOBODY, os.environ.get("SING_BOX", "sing-box"), "run", "-c", str(path)]


def installed() -> list[Program]:
    """Return the kernel, netproxyd, and those of the others that are there."""
    programs = [
        Program("kernel", FORWARD),
        Program("netproxyd tproxy", TPROXY, _netproxyd),
        Program("netproxyd redirect", REDIRECT, _netproxyd),
    ]
    if shutil.which(os.environ.get("SING_BOX", "sing-box")):
        programs.append(Program("sing-box tproxy", TPROXY, _sing_box))
        programs.append(Program("sing-box redirect", REDIRECT, _sing_box))
    if shutil.which("redsocks"):
        programs.append(Program("redsocks redirect", REDIRECT, _redsocks, direct=False))
    return programs


# -- running them


class Running(Started):
    """A program that serves on a router."""

    def __init__(self, program: Program, setting: Setting, router: Namespace, folder: Path) -> None:
        assert program.command is not None
        folder.chmod(0o755)  # nobody reads the configuration
        self._way = program.way
        command = program.command(folder, program.way, setting)
        super().__init__(program.name, command, folder, router.enter)

    def answers(self) -> bool:
        """Return whether both ports are bound."""
        tcp = TCP_PORT if self._way == REDIRECT else UDP_PORT
        return _bound(self.pid, "tcp", tcp, "0A") and _bound(self.pid, "udp", UDP_PORT, "07")


class Upstream(Started):
    """A netproxyd as the SOCKS5 proxy at UPSTREAM."""

    def __init__(self, internet: Namespace, folder: Path) -> None:
        path = folder / "upstream.yaml"
        limits = f"{{connections: {FLOWS_LIMIT}, connections_per_client: {FLOWS_LIMIT}}}"
        path.write_text(
            f"listeners: [{{listen: '{UPSTREAM[0]}:{UPSTREAM[1]}', allow_open: true,\n"
            f"  limits: {limits}, udp: {{max_sessions_per_client: {FLOWS_LIMIT}}}}}]\n"
            "log: {access: false}\n"
        )
        command = [sys.executable, "-m", "netproxy", "-q", "-c", str(path)]
        super().__init__("the upstream", command, folder, internet.enter)

    def answers(self) -> bool:
        """Return whether its port is bound."""
        return _bound(self.pid, "tcp", UPSTREAM[1], "0A")


def _bound(pid: int, network: str, port: int, state: str) -> bool:
    """Return whether a socket has a port and a state, in the namespace of a process."""
    for name in (network, f"{network}6"):
        try:
            lines = Path(f"/proc/{pid}/net/{name}").read_text().split("\n")[1:-1]
        except OSError:
            return False  # it has ended
        for fields in map(str.split, lines):
            if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == state:
                return True
    return False


@contextmanager
def running(program: Program, setting: Setting, router: Namespace) -> Iterator[Running | None]:
    """Start a program for a measurement; the kernel needs none."""
    if program.command is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="netproxy-bench-") as folder:
        process = Running(program, setting, router, Path(folder))
        try:
            yield process
        finally:
            process.stop()


class Rules:
    """The kernel's rules of each way."""

    def __init__(self, router: Namespace, internet: Namespace) -> None:
        self._router, self._internet = router, internet
        self._rules: dict[str, list[str]] = {}

    def _print(self, way: str) -> list[str]:
        """Return what `netproxyctl nft` prints: the rules, the routes, and how they are removed."""
        with tempfile.TemporaryDirectory(prefix="netproxy-bench-") as folder:
            path = Path(folder) / "netproxyd.yaml"
            path.write_text(netproxyd_config(way, Setting()))
            outputs = []
            for options in (("--lan", LAN), ("--routes",), ("--remove",)):
                process = netproxyctl_nft(self._router, path, *options)
                if process.returncode:
                    raise SystemExit(f"netproxyctl nft: {process.stderr}")
                outputs.append(process.stdout)
        return outputs

    @contextmanager
    def applied(self, way: str) -> Iterator[None]:
        """Apply the rules of a way.  For the kernel alone, the internet has a way back."""
        if way == FORWARD:
            for client, router in ((CLIENT, ROUTER_OUT), (CLIENT6, ROUTER_OUT6)):
                self._internet.ip("route", "add", client, "via", router)
            try:
                yield
            finally:
                for client in (CLIENT, CLIENT6):
                    self._internet.ip("route", "del", client)
            return
        if way not in self._rules:
            self._rules[way] = self._print(way)
        rules, routes, remove = self._rules[way]
        self._router.nft(rules)
        run_in(self._router, "sh", "-e", "-c", routes)
        try:
            yield
        finally:
            run_in(self._router, "sh", "-c", remove)
