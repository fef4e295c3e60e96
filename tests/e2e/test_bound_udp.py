"""UDP through HTTP proxies with one address for all targets (Connect-UDP-Bind), and without it.

Each hop is a daemon of its own.  The targets are STUN servers, which tell what they see.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol import stun
from tests.e2e.conftest import Start
from tests.e2e.peers import Association, Endpoint, UdpEcho, udp
from tests.e2e.support import ANY_PORT, LOOPBACK, SECONDS, wait_for
from tests.support.certificates import certificates
from tests.support.stun_server import StunServer, stun_server

pytestmark = pytest.mark.e2e

FIELD = b"Connect-UDP-Bind: ?1\r\n"
# The fixture connects to the first listener to check that a daemon still answers.
PLAIN = {"name": "plain", "listen": f"{LOOPBACK}:0", "upstream": "direct"}


def leading(netproxyd: Start, *hops: str) -> Endpoint:
    """Start a daemon; return a port of it that leads through these proxies."""
    port = {"name": "through", "listen": f"{LOOPBACK}:0", "upstream": list(hops)}
    daemon = netproxyd(config=json.dumps({"listeners": [PLAIN, port]}))
    return LOOPBACK, daemon.tcp_ports[1]


class OldProxy:
    """Stands before a daemon and takes the field out of requests, as if nobody knew it."""

    def __init__(self, server: Endpoint) -> None:
        self._server = server
        self._listening = socket.create_server((LOOPBACK, 0))
        self.address: Endpoint = self._listening.getsockname()
        self.asked: list[bool] = []
        """For each request, whether it had the field."""
        self._peers: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._end, self._ended = socket.socketpair()
        for sock in (self._listening, self._ended):
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._ended:
                    return
                if sock is self._listening:
                    self._accept(sock.accept()[0])
                elif sock in self._peers:
                    self._move(sock)

    def _accept(self, client: socket.socket) -> None:
        client.settimeout(SECONDS)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            piece = client.recv(1)
            if not piece:
                client.close()
                return
            head += piece
        self.asked.append(FIELD in head)
        far = socket.create_connection(self._server)
        far.sendall(head.replace(FIELD, b""))
        for sock, peer in ((client, far), (far, client)):
            self._peers[sock] = peer
            self._selector.register(sock, selectors.EVENT_READ)

    def _move(self, sock: socket.socket) -> None:
        peer = self._peers[sock]
        try:
            if data := sock.recv(65536):
                peer.sendall(data)
                return
        except OSError:
            pass
        for end in (sock, peer):
            del self._peers[end]
            self._selector.unregister(end)
            end.close()

    def __enter__(self) -> OldProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()
        self._thread.join()
        self._selector.close()
        for sock in (self._listening, self._ended, *self._peers):
            sock.close()


class Targets:
    """Two STUN servers, and a socket that no client has heard of."""

    def __init__(self, first: StunServer, second: StunServer, stranger: socket.socket) -> None:
        self.first, self.second, self.stranger = first, second, stranger


@pytest.fixture
def targets() -> Iterator[Targets]:
    with ExitStack() as stack:
        servers = [stack.enter_context(stun_server()) for _ in range(2)]
        stranger = stack.enter_context(udp(LOOPBACK))
        yield Targets(servers[0], servers[1], stranger)


def mapped(client: Association, server: StunServer) -> Address:
    """Return the address of a client that a server sees; ask again and again until it answers."""
    transaction = os.urandom(12)
    request = stun.encode_request(stun.BindingRequest(transaction))
    found: list[Address] = []
    client.socket.settimeout(0.2)

    def ask() -> bool:
        client.send((server.address.host, server.address.port), request)
        try:
            data, source, _ = client.receive()
        except TimeoutError:
            return False
        response = stun.parse_response(data)
        if not isinstance(response, stun.BindingSuccess) or response.transaction != transaction:
            return False
        assert source == tuple(server.address)
        found.append(response.mapped)
        return True

    wait_for(ask, SECONDS, "an answer of the server")
    client.socket.settimeout(SECONDS)
    return found[0]


def check_open_to_all(client: Association, targets: Targets) -> Address:
    """Check that all targets see one address, and that whoever writes there is heard."""
    address = mapped(client, targets.first)
    assert mapped(client, targets.second) == address == mapped(client, targets.first)
    targets.stranger.sendto(b"knock", tuple(address))
    while (received := client.receive())[0] != b"knock":
        pass  # a second answer of a server
    assert received[1] == targets.stranger.getsockname()
    return address


def listeners(kind: str) -> str:
    """Return the configuration of a proxy, plain or within TLS."""
    files = certificates()
    tls = {"certificate": files.path("server.pem"), "key": files.path("server.key")}
    secured = {"name": "secured", "listen": f"{LOOPBACK}:0", "tls": tls}
    return json.dumps({"listeners": [PLAIN, secured] if kind == "https" else [PLAIN]})


@pytest.mark.parametrize("kind", ["http", "https"])
def test_all_targets_see_one_address_through_an_http_hop(
    netproxyd: Start, targets: Targets, kind: str
) -> None:
    """RFC 4787: mapping and filtering are endpoint-independent."""
    far = netproxyd(config=listeners(kind))
    options = f"?tls.ca={certificates().path('ca.pem')}" if kind == "https" else ""
    port = far.tcp_ports[-1]
    near = leading(netproxyd, f"{kind}://{LOOPBACK}:{port}{options}")
    with Association(near) as one, Association(near) as other:
        addresses = {check_open_to_all(client, targets) for client in (one, other)}
        assert len(addresses) == 2
    # Each client had one stream.
    assert len(far.said(" network=udp .* upstream=direct ", 2)) == 2


def test_all_targets_see_one_address_through_a_chain_and_through_proxies_in_a_row(
    netproxyd: Start, targets: Targets
) -> None:
    """A proxy whose upstream is a proxy passes its public address on."""
    last = netproxyd("-l", ANY_PORT)
    last_url = f"http://{LOOPBACK}:{last.tcp_ports[0]}"
    middle_url = f"http://{LOOPBACK}:{leading(netproxyd, last_url)[1]}"
    other_url = f"http://{LOOPBACK}:{netproxyd('-l', ANY_PORT).tcp_ports[0]}"
    for hops in ((middle_url,), (other_url, last_url), (other_url, middle_url)):
        with Association(leading(netproxyd, *hops)) as client:
            check_open_to_all(client, targets)


def test_old_proxy_has_a_stream_for_each_target(netproxyd: Start, targets: Targets) -> None:
    """Hazard 178: no datagram is lost, and the proxy is not asked again."""
    far = netproxyd("-l", ANY_PORT)
    with OldProxy(far.server) as old, ExitStack() as stack:
        near = leading(netproxyd, f"http://{LOOPBACK}:{old.address[1]}")
        echoes = [stack.enter_context(UdpEcho()) for _ in range(4)]
        client = stack.enter_context(Association(near))
        client.socket.settimeout(SECONDS)
        # All of them while the first stream is being opened.
        for number, echo in enumerate(echoes):
            client.send(echo.address, b"%d" % number)
        came = sorted(client.receive()[:2] for _ in echoes)
        assert came == [(b"%d" % number, echo.address) for number, echo in enumerate(echoes)]
        assert len({source for echo in echoes for source in echo.sources}) == len(echoes)
        assert mapped(client, targets.first) != mapped(client, targets.second)
        assert old.asked == [True] + [False] * 5


def test_upstream_may_be_told_to_have_a_stream_for_each_target(
    netproxyd: Start, targets: Targets
) -> None:
    far = netproxyd("-l", ANY_PORT)
    url = f"http://{LOOPBACK}:{far.tcp_ports[0]}?udp=connect-udp"
    near = leading(netproxyd, url)
    with Association(near) as client:
        assert mapped(client, targets.first) != mapped(client, targets.second)


def test_proxy_with_several_upstreams_serves_each_target_for_itself(
    netproxyd: Start, targets: Targets
) -> None:
    """Hazard 180: rules choose the upstream of each target, so that there is no one address."""
    other = netproxyd("-l", ANY_PORT)
    rules = [{"port": targets.second.address.port, "via": "other"}]
    far = netproxyd(
        config=json.dumps(
            {
                "listeners": [PLAIN],
                "upstreams": {"other": f"socks5://{LOOPBACK}:{other.tcp_ports[0]}"},
                "rules": rules,
            }
        )
    )
    near = leading(netproxyd, f"http://{LOOPBACK}:{far.tcp_ports[0]}")
    with Association(near) as client:
        assert mapped(client, targets.first) != mapped(client, targets.second)
    assert other.said(f" network=udp target={LOOPBACK}:{targets.second.address.port} ")


def test_reload_that_changes_the_rules_ends_the_stream(
    netproxyd: Start, targets: Targets, tmp_path: Path
) -> None:
    """Hazard 179: the client begins again, with what the new rules allow."""
    other = netproxyd("-l", ANY_PORT)
    config = {
        "listeners": [{"name": "plain", "listen": f"{LOOPBACK}:0"}],
        "upstreams": {"other": f"socks5://{LOOPBACK}:{other.tcp_ports[0]}"},
    }
    far = netproxyd(config=json.dumps(config))
    near = leading(netproxyd, f"http://{LOOPBACK}:{far.tcp_ports[0]}")
    with Association(near) as client, stun_server() as third:
        before = check_open_to_all(client, targets)
        rules = [{"port": third.address.port, "via": "other"}]
        (tmp_path / "netproxyd2.yaml").write_text(json.dumps({**config, "rules": rules}))
        far.reload()
        # What runs goes on.
        assert mapped(client, targets.first) == before
        assert mapped(client, third) != before
        assert mapped(client, targets.first) != mapped(client, targets.second)
