"""netproxyctl nat against coturn, behind NATs of nftables, and through upstreams of a daemon."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.router import run_in
from tests.e2e.support import ROOT, SECONDS, environment, program, wait_for

pytestmark = pytest.mark.e2e

ROUTER_OUT, PROXY = "203.0.113.1", "203.0.113.20"
STUN, STUN_SECOND = "203.0.113.10", "203.0.113.11"
STUN6, STUN6_SECOND = "2001:db8:3::10", "2001:db8:3::11"
HOMES = ("cone", "home", "mobile", "closed")
"""The clients, each behind a NAT of another kind."""
INDEPENDENT, PORT_DEPENDENT = "endpoint-independent", "address-and-port-dependent"
SOCKS_PORT, BRIDGE_PORT = 1080, 7000
TOKEN = "0123456789abcdef0123456789abcdef"


def inside(home: str, host: int = 2) -> str:
    return f"10.82.{HOMES.index(home)}.{host}"


NATS = f"""
table ip nats {{
  chain forwarded {{
    type filter hook forward priority filter;
    ip saddr {inside("closed")} meta l4proto udp drop
  }}
  chain leaving {{
    type nat hook postrouting priority srcnat;
    oifname "to-internet" ip saddr {inside("mobile")} masquerade fully-random
    oifname "to-internet" masquerade
    oifname "to-cone" ip saddr {inside("cone")} masquerade
  }}
  chain coming {{
    type nat hook prerouting priority dstnat;
    ip daddr {ROUTER_OUT} udp sport != 3478 meta l4proto udp dnat to {inside("cone")}
  }}
}}
"""
"""Each of them is that of routers which people have: all ports forwarded, a home router, a
network of a mobile provider, a firewall."""


FAR = f"""
listeners: [{{listen: "{PROXY}:{SOCKS_PORT}", name: far, auth: required}}]
users: {{alice: {{password: secret}}}}
tunnel:
  agent: {{bridge: "tcp://{inside("mobile")}:{BRIDGE_PORT}", name: far, token: {TOKEN}, exit: true}}
"""
NEAR = f"""
control: unix:FOLDER/control
listeners: [{{listen: "127.0.0.1:0", name: near}}]
upstreams:
  socks: socks5://alice:secret@{PROXY}:{SOCKS_PORT}
  uot: socks5://alice:secret@{PROXY}:{SOCKS_PORT}?udp=uot
  web: http://alice:secret@{PROXY}:{SOCKS_PORT}
  each: http://alice:secret@{PROXY}:{SOCKS_PORT}?udp=connect-udp
  tunnel: tunnel://far
tunnel:
  bridge:
    listen: tcp://{inside("mobile")}:{BRIDGE_PORT}
    agents: {{far: {{token: {TOKEN}}}}}
"""


class Net(NamedTuple):
    homes: dict[str, Namespace]
    router: Namespace
    internet: Namespace


class Result(NamedTuple):
    status: int
    mapping: str
    filtering: str
    hairpin: bool | None


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with hosts(*HOMES, "router", "internet") as created:
        *homes, router, internet = created
        net = Net(dict(zip(HOMES, homes, strict=True)), router, internet)
        run_in(router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        run_in(router, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
        for name, home in net.homes.items():
            number = HOMES.index(name)
            addresses = [f"{inside(name)}/24", f"fd82:{number}::2/64"]
            connect(home, addresses, router, [f"{inside(name, 1)}/24", f"fd82:{number}::1/64"])
            home.ip("route", "add", "default", "via", inside(name, 1))
            home.ip("-6", "route", "add", "default", "via", f"fd82:{number}::1")
        outside = [*(f"{host}/24" for host in (STUN, STUN_SECOND, PROXY))]
        outside += [f"{host}/64" for host in (STUN6, STUN6_SECOND)]
        connect(router, [f"{ROUTER_OUT}/24", "2001:db8:3::1/64"], internet, outside)
        internet.ip("-6", "route", "add", "fd82::/16", "via", "2001:db8:3::1")
        # An agent outside reaches a bridge inside, without the NAT.
        internet.ip("route", "add", "10.82.0.0/16", "via", ROUTER_OUT)
        router.nft(NATS)
        yield net


def listening_on(host: Namespace, port: int) -> set[str]:
    """Return the addresses on which a host has UDP sockets with a port."""
    sockets = run_in(host, "sh", "-c", "cat /proc/net/udp /proc/net/udp6")
    return set(re.findall(rf" (\w+):{port:04X} ", sockets))


@pytest.fixture(scope="module")
def coturn(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("coturn")
    listening = [f"--listening-ip={host}" for host in (STUN, STUN_SECOND, STUN6, STUN6_SECOND)]
    options = ["--stun-only", "--no-tcp", "--no-tls", "--no-dtls", "--no-cli", "--log-file=stdout"]
    files = [f"--pidfile={folder / 'pid'}", f"--userdb={folder / 'db'}"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [program("turnserver"), "-n", *options, *files, *listening],
            preexec_fn=net.internet.enter,
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(
            lambda: len(listening_on(net.internet, 3479)) == 4,
            SECONDS,
            "coturn listens on the second port of all addresses",
        )
        yield
    finally:
        process.terminate()
        process.wait(SECONDS)


def begin(host: Namespace, *arguments: str, socket: Path | str = "") -> subprocess.Popen[str]:
    """Start netproxyctl nat."""
    place = ["-s", str(socket)] if socket else []
    call = "import sys; from netproxy.cli import control_main; sys.exit(control_main())"
    return subprocess.Popen(
        [sys.executable, "-c", call, *place, "nat", "--json", *arguments],
        cwd=ROOT,
        env=environment(),
        preexec_fn=host.enter,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[Result, dict[str, Any]]:
    """Return the result, and all that was printed of it."""
    output, errors = process.communicate(timeout=3 * SECONDS)
    assert not errors
    (printed,) = json.loads(output)
    kinds = printed["mapping"], printed["filtering"], printed["hairpin"]
    return Result(process.returncode, *kinds), printed


@pytest.fixture(scope="module")
def control(net: Net, shared_netproxyd: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start a daemon behind the NAT of `mobile`, and one outside; return the former's socket."""
    folder, mobile = tmp_path_factory.mktemp("near"), net.homes["mobile"]
    near = shared_netproxyd(
        config=NEAR.replace("FOLDER", str(folder)), preexec_fn=mobile.enter, make=mobile.socket
    )
    far = shared_netproxyd(
        config=FAR,
        host=PROXY,
        login=("alice", "secret"),
        preexec_fn=net.internet.enter,
        make=net.internet.socket,
    )
    wait_for(lambda: near.lines("agent 'far' connected"), SECONDS, "the agent is connected")
    # The connections between agent and bridge stay.
    near.baseline = far.baseline = 0
    return folder / "control"


UPSTREAMS = ("direct", "socks", "uot", "web", "each", "tunnel")


Results = dict[str, tuple[Result, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(net: Net, coturn: None, control: Path) -> Results:
    """Run netproxyctl everywhere at once: what is filtered takes all of them seconds."""
    mobile, server = net.homes["mobile"], ("--server", STUN)
    processes = {name: begin(host, *server) for name, host in net.homes.items()}
    processes["ipv6"] = begin(net.homes["home"], "--server", STUN6)
    for name in UPSTREAMS:
        processes[name] = begin(mobile, "--via", name, *server, socket=control)
    return {name: finish(process) for name, process in processes.items()}


def test_nat_of_every_kind_is_recognized(results: Results) -> None:
    assert {name: results[name][0] for name in HOMES} == {
        "cone": Result(0, INDEPENDENT, INDEPENDENT, True),
        "home": Result(0, INDEPENDENT, PORT_DEPENDENT, False),
        "mobile": Result(4, PORT_DEPENDENT, PORT_DEPENDENT, False),
        "closed": Result(5, "unknown", "unknown", None),
    }
    home = results["home"][1]
    assert (home["nat"], home["port_preserved"], home["via"]) == (True, True, "")
    assert home["local"].startswith(f"{inside('home')}:")
    assert [address.partition(":")[0] for address in home["external"]] == [ROUTER_OUT]
    assert home["servers"][0]["second"] == f"{STUN_SECOND}:3479"


def test_ipv6_without_nat_is_recognized(results: Results) -> None:
    result, printed = results["ipv6"]
    assert result == Result(0, INDEPENDENT, INDEPENDENT, None)
    assert (printed["family"], printed["nat"]) == ("IPv6", False)
    assert printed["external"] == [printed["local"]]


def test_upstream_of_a_client_behind_a_symmetric_nat_is_probed(results: Results) -> None:
    """Its NAT would need a relay for most peers; upstreams outside are open."""
    open_to_all = Result(0, INDEPENDENT, INDEPENDENT, True)
    closed = Result(4, PORT_DEPENDENT, PORT_DEPENDENT, False)
    assert {name: results[name][0] for name in UPSTREAMS} == {
        "direct": closed,
        "socks": open_to_all,
        "uot": open_to_all,
        "tunnel": open_to_all,
        "web": open_to_all,
        "each": closed,
    }
    for name in UPSTREAMS[1:]:
        printed = results[name][1]
        assert f"{ROUTER_OUT}:" not in str(printed["external"])
        assert printed["per_target"] == (name == "each")
