"""frps.toml and frpc.toml, both converted: a tunnel that carries what frp's would."""

from __future__ import annotations

import socket

import pytest

from netproxy.ctl.convert.command import convert
from netproxy.ctl.convert.source import Source
from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, TcpEcho, UdpEcho, echo, socks5, udp
from tests.e2e.support import LOOPBACK, SECONDS, wait_for
from tests.support.ports import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]
pytest.importorskip("yaml")

SERVER = """
bindAddr = "127.0.0.1"
bindPort = {port}
auth.token = "a token of both files"
allowPorts = [{{ single = {tcp} }}, {{ single = {udp} }}, {{ single = {socks} }}]
"""
CLIENT = """
serverAddr = "127.0.0.1"
serverPort = {port}
auth.token = "a token of both files"
[[proxies]]
name = "stream"
type = "tcp"
localPort = {tcp_target}
remotePort = {tcp}
[[proxies]]
name = "datagrams"
type = "udp"
localPort = {udp_target}
remotePort = {udp}
[[proxies]]
name = "socks"
type = "tcp"
remotePort = {socks}
plugin = {{ type = "socks5", username = "bob", password = "secret" }}
"""
LOGIN = ("bob", "secret")
IDLE_DESCRIPTORS = 24
"""Of an idle tunnel: ports, control connection, idle work connections."""


def test_converted_files_of_frp_are_a_tunnel(netproxyd: Start) -> None:
    names = ("port", "tcp", "udp", "socks")
    with TcpEcho() as tcp_target, UdpEcho() as udp_target:
        ports = {name: free_port() for name in names}
        targets = {"tcp_target": tcp_target.address[1], "udp_target": udp_target.address[1]}
        server = convert("frp", Source("frps.toml", SERVER.format(**ports)))[0]
        client = convert("frp", Source("frpc.toml", CLIENT.format(**ports, **targets)))[0]
        # On one machine the listener of the plug-in cannot have the port of the bridge.
        own = free_port()
        client = client.replace(f"{LOOPBACK}:{ports['socks']}", f"{LOOPBACK}:{own}")
        # A listener that the end of the test asks.
        server = server.replace("listeners: []", f'listeners: [{{listen: "{LOOPBACK}:0"}}]')
        daemons = [netproxyd(config=server), netproxyd(config=client, login=LOGIN)]
        for daemon in daemons:
            daemon.baseline += IDLE_DESCRIPTORS
        daemons[1].said("tunnel: connected as 'frpc'", seconds=SECONDS)

        def answers() -> bool:
            try:
                with socket.create_connection((LOOPBACK, ports["tcp"]), SECONDS) as sock:
                    echo(sock, b"stream")
                    return True
            except (OSError, EOFError):
                return False

        wait_for(answers, SECONDS, "the port is open")
        with udp(LOOPBACK) as sock:
            sock.sendto(b"datagram", (LOOPBACK, ports["udp"]))
            assert sock.recv(64) == b"datagram"
        sock, _ = socks5((LOOPBACK, ports["socks"]), CONNECT, tcp_target.address, LOGIN)
        with sock:
            echo(sock, b"through the proxy at the agent")
