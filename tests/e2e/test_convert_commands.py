"""Command lines of gost and goproxy: netproxyd decides as their documents say that they do.

Debian has neither of the two programs, so that no test can ask them.
"""

from __future__ import annotations

import re
import socket

import pytest

from netproxy.ctl.convert.command import convert
from netproxy.ctl.convert.source import Source
from tests.e2e.conftest import Start
from tests.e2e.peers import BIND, CONNECT, Endpoint, Login, Refused, TcpEcho, echo, socks5
from tests.e2e.support import LOOPBACK, SECONDS, wait_for
from tests.support.certificates import certificates
from tests.support.ports import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]
pytest.importorskip("yaml")

FRONT = """\
gost -L 'socks5://bob:secret@127.0.0.1:{socks}?bypass=127.0.0.9,.ads.example' \\
     -L socks5://ann:other@127.0.0.1:{other}?bind=true \\
     -L tcp://127.0.0.1:{tcp}/127.0.0.1:{target} -F socks5://joe:hop@127.0.0.1:{hop}
"""
BACK = "gost -L 'socks5://joe:hop@127.0.0.1:{hop}?bypass=~127.0.0.1'\n"
BRIDGE = """\
proxy bridge -p 127.0.0.1:{bridge} -C {server}.pem -K {server}.key --ca {ca}
proxy server -r 127.0.0.1:{tcp}@[home]127.0.0.1:{target} -P 127.0.0.1:{bridge}
proxy socks -t tcp -p 127.0.0.1:{front}
"""
CLIENT = (
    "proxy client -P localhost:{bridge} -C {client}.pem -K {client}.key --ca {ca} --k home\n"
    "proxy socks -t tcp -p 127.0.0.1:{socks}\n"
)
BOB, ANN = ("bob", "secret"), ("ann", "other")
IDLE_DESCRIPTORS = 24
"""Of an idle tunnel: ports, control connection, idle work connections."""


def verdict(server: Endpoint, login: Login, target: Endpoint, command: int = CONNECT) -> bool:
    """Return whether the proxy leads to the target."""
    try:
        sock, _ = socks5(server, command, target, login)
    except Refused:
        return False
    with sock:
        if command == CONNECT:
            echo(sock, b"through")
    return True


def test_converted_commands_of_gost_decide_as_documented(netproxyd: Start) -> None:
    with TcpEcho() as server:
        ports = {name: free_port() for name in ("socks", "other", "tcp", "hop")}
        ports["target"] = server.address[1]
        configs = [
            convert("gost", Source("gost.sh", text.format(**ports)))[0] for text in (BACK, FRONT)
        ]
        # The first daemon that is started is the first to end: its last check needs the other.
        netproxyd(config=configs[1], login=BOB)
        netproxyd(config=configs[0], login=("joe", "hop"))
        first, second = (LOOPBACK, ports["socks"]), (LOOPBACK, ports["other"])
        near, refused = (LOOPBACK, ports["target"]), ("127.0.0.9", ports["target"])
        decisions = {
            "bob": verdict(first, BOB, near),
            "a stranger": verdict(first, ("bob", "wrong"), near),
            "the user of the other listener": verdict(first, ANN, near),
            "ann": verdict(second, ANN, near),
            "bob at the other listener": verdict(second, BOB, near),
            "a bypass of the listener": verdict(first, BOB, refused),
            "a name below one of the bypass": verdict(first, BOB, ("x.ads.example", 80)),
            "a target that the second proxy refuses": verdict(second, ANN, refused),
            "BIND": verdict(first, BOB, near, BIND),
        }
        assert decisions == {
            **{"bob": True, "a stranger": False, "the user of the other listener": False},
            **{"ann": True, "bob at the other listener": False},
            **{"a bypass of the listener": False, "a name below one of the bypass": False},
            **{"a target that the second proxy refuses": False, "BIND": False},
        }
        with socket.create_connection((LOOPBACK, ports["tcp"]), SECONDS) as sock:
            echo(sock, b"by a fixed target")


def test_converted_commands_of_goproxy_are_a_tunnel(netproxyd: Start) -> None:
    made = certificates()
    with TcpEcho() as target:
        values: dict[str, object] = {
            name: free_port() for name in ("bridge", "tcp", "front", "socks")
        }
        values |= {name: made.path(name) for name in ("server", "client")}
        values |= {"target": target.address[1], "ca": made.path("ca.pem")}
        head = convert("goproxy", Source("a.sh", BRIDGE.format(**values)))[0]
        found = re.search(r"token: ([0-9a-f]{32})", head)
        assert found
        agent = convert("goproxy", Source("b.sh", CLIENT.format(**values)))[0]
        # The step that the report asks for.
        agent = agent.replace('"write here the token of the bridge"', found[1])
        daemons = [netproxyd(config=head), netproxyd(config=agent)]
        for daemon in daemons:
            daemon.baseline += IDLE_DESCRIPTORS
        daemons[1].said("tunnel: connected as 'home'", seconds=SECONDS)

        def answers() -> bool:
            try:
                address = (LOOPBACK, int(str(values["tcp"])))
                with socket.create_connection(address, SECONDS) as sock:
                    echo(sock, b"through the tunnel")
                    return True
            except (OSError, EOFError):
                return False

        wait_for(answers, SECONDS, "the port of the server leads to the agent")
