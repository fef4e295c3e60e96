"""An sni listener leads connections to targets and to other listeners, by their first bytes."""

from __future__ import annotations

import select
import socket
import ssl
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from netproxy.errors import EndOfStream
from netproxy.handler.sni.first_bytes import LOOKS_LIMIT
from netproxy.handler.sni.handler import SniHandler
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import FirstBytes, PortRoute, Record
from netproxy.net.stream import Stream, complete
from netproxy.observe.flows import describe_flows
from netproxy.observe.records import access_fields, access_text
from netproxy.protocol.proxy_protocol import encode_v2
from netproxy.protocol.tls_hello import parse_client_hello
from tests.support.certificates import certificates
from tests.support.exchanges import EchoTarget, converse, socks5_request
from tests.support.handlers import SECONDS, LOCALHOST, eventually, refused, tcp_pair
from tests.support.proxy_header import encode_v1
from tests.support.relays import Running, UdpClient, UdpPort, running
from tests.support.sockets import read_exactly, server

HELLOS = {
    path.stem: path.read_bytes()
    for path in (Path(__file__).parents[1] / "protocol" / "client_hellos").iterdir()
}
CURL, NAMELESS = HELLOS["curl"], HELLOS["curl-address"]
REQUEST = b"GET / HTTP/1.1\r\nAccept: */*\r\nHost: web.example:80\r\n\r\n"
SPS = f"{{listen: '{LOCALHOST}:0', name: main"


def config(routes: str, *others: str, more: str = "") -> str:
    lines = [f"- {{protocol: sni, listen: '{LOCALHOST}:0', name: web, routes: [{routes}]{more}}}"]
    return "listeners:\n" + "\n".join([*lines, *(f"- {other}" for other in others)]) + "\n"


def tls_sps(more: str = "") -> str:
    return f"{SPS}, tls: {certificates().listener()}{more}}}"


def connect(relay: Running, source: str = LOCALHOST) -> socket.socket:
    return socket.create_connection((LOCALHOST, relay.port), SECONDS, (source, 0))


def talk(relay: Running, *pieces: bytes) -> bytes:
    with connect(relay) as sock:
        return converse(sock, *pieces)


def record(relay: Running) -> Record:
    """Return the next record."""
    eventually(lambda: relay.log.records)
    return relay.log.records.pop(0)


def leads(relay: Running, data: bytes, index: int) -> None:
    """Check that data reaches the target of a route whole."""
    assert talk(relay, data) == b"got " + data
    found = record(relay).flow.port_route
    assert found is not None and found.place == f"listeners[0].routes[{index}]"


def refusals(relay: Running) -> list[str]:
    return [line for line in relay.log.lines if "msg=refused" in line]


# -- the first bytes


class Routes:
    """Takes note of what was seen, and has no route."""

    def __init__(self) -> None:
        self.seen: list[FirstBytes] = []

    def choose(self, seen: FirstBytes) -> None:
        self.seen.append(seen)


class Refusals:
    def __init__(self) -> None:
        self.refused: list[tuple[str, str, object]] = []

    def refuse(self, refusal: object, amount: int = 1) -> None:
        self.refused.append((refusal.counter, refusal.reason, refusal.asked))  # type: ignore[attr-defined]


def seen_of(*pieces: bytes) -> FirstBytes:
    """Return what a handler sees in pieces that come one by one; the rest is not sent."""
    routes, counter = Routes(), Refusals()
    handler = SniHandler("web", routes, (), counter)  # type: ignore[arg-type]
    near, far = tcp_pair()
    with far:
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = Stream(near)
        steps = handler.handle(stream, Address(LOCALHOST, 1))
        try:
            need = next(steps)
            for piece in pieces:
                far.sendall(piece)
                assert need is stream
                stream.wait(select.POLLIN)
                need = steps.send(stream.read_ahead())
            far.shutdown(socket.SHUT_WR)
            stream.wait(select.POLLIN)
            steps.send(stream.read_ahead())
        except StopIteration:
            assert b"".join(pieces).startswith(stream.unread())
        stream.close()
    (seen,) = routes.seen
    assert counter.refused == [("connections_refused", "no route", seen.name or seen.protocol)]
    return seen


@pytest.mark.parametrize("name", HELLOS)
def test_hello_of_a_program_is_seen_whole_and_byte_by_byte(name: str) -> None:
    """Hazard 153."""
    data = HELLOS[name]
    hello = parse_client_hello(data)
    assert not isinstance(hello, int)
    expected = FirstBytes("tls", *hello)
    assert seen_of(data) == expected
    assert seen_of(*(data[at : at + 1] for at in range(len(data)))) == expected


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([REQUEST], FirstBytes("http", "web.example")),
        ([REQUEST[at : at + 1] for at in range(len(REQUEST))], FirstBytes("http", "web.example")),
        ([b"GET / HTTP/1.0\r\n\r\n"], FirstBytes("http")),
        ([b"SSH-2.0-client\r\n"], FirstBytes("http")),
        ([b"\5\1\0"], FirstBytes("socks5")),
        ([b"\4\1\0\x50"], FirstBytes("socks4")),
        ([b"\x9e"], FirstBytes("tunnel")),
        ([b"\0\0"], FirstBytes("unknown")),
        ([b"\x16\x03\x01\0\0"], FirstBytes("tls")),
        ([b"\x16\x02"], FirstBytes("tls")),
        ([CURL[:100]], FirstBytes("tls")),
        ([REQUEST[:20]], FirstBytes("http")),
        ([b"GET / HTTP/1.1\r\n", *[b"a: b\r\n"] * LOOKS_LIMIT], FirstBytes("http")),
    ],
)
def test_what_has_no_name_is_seen_by_its_first_byte(
    pieces: list[bytes], expected: FirstBytes
) -> None:
    """Hazards 153 and 163."""
    assert seen_of(*pieces) == expected


def test_client_that_sends_nothing_is_no_route() -> None:
    routes = Routes()
    near, far = tcp_pair()
    far.close()
    stream = Stream(near)
    handler = SniHandler("web", routes, (), Refusals())  # type: ignore[arg-type]
    with pytest.raises(EndOfStream):
        complete(handler.handle(stream, Address(LOCALHOST, 1)))
    stream.close()
    assert routes.seen == []


# -- targets


def test_names_and_first_bytes_lead_to_targets() -> None:
    with server(EchoTarget()) as echo:
        target = f"target: '{echo}'"
        routes = (
            *(f"sni: curl.example, alpn: h2, {target}", f"sni: curl.example, {target}"),
            *(f"host: web.example, {target}", f"protocol: socks5, {target}"),
            f"sni: '*.example', {target}",
        )
        with running(config(", ".join(f"{{{route}}}" for route in routes))) as relay:
            leads(relay, CURL, 0)
            leads(relay, HELLOS["curl-no-alpn"], 1)
            leads(relay, REQUEST, 2)
            leads(relay, b"\5\1\0" + bytes(20), 3)
            leads(relay, HELLOS["firefox"] + bytes(50000), 4)
            assert talk(relay, NAMELESS) == b""
            assert talk(relay, b"\0") == b""
            relay.wait_for_count("connections_refused", "no route", 2)


def test_record_and_list_show_name_and_route() -> None:
    with server(EchoTarget()) as echo, running(config(f"{{target: '{echo}'}}")) as relay:
        with connect(relay) as sock:
            sock.sendall(CURL)
            eventually(lambda: relay.daemon.flows.live())
            (row,) = describe_flows(relay.daemon.flows.live(), time.monotonic())
            assert (row["name"], row["route"]) == ("curl.example", "listeners[0].routes[0]")
        found = record(relay)
    assert found.flow.port_route == PortRoute("web", "listeners[0].routes[0]", "curl.example")
    fields = access_fields(found)
    expected = {"name": "curl.example", "seen_in": "tls", "route": "listeners[0].routes[0]"}
    assert expected.items() <= fields.items() and "route_name" not in fields
    assert access_text(found) == ""


def test_connection_without_a_route_is_closed_without_a_word_and_recorded() -> None:
    """Hazard 163."""
    with running(config("{sni: a.example, target: '192.0.2.1:1'}")) as relay:
        for data in (CURL, REQUEST, NAMELESS, b"\5\1\0"):
            assert talk(relay, data) == b""
        relay.wait_for_count("connections_refused", "no route", 4)
        assert [line.partition("asked=")[2].partition(" id=")[0] for line in refusals(relay)] == [
            "curl.example decided=routes",
            "web.example decided=routes",
            "tls decided=routes",
            "socks5 decided=routes",
        ]
        assert relay.log.records == []


def test_target_gets_a_proxy_header_and_then_all_bytes() -> None:
    with server(EchoTarget()) as echo:
        with running(config(f"{{target: '{echo}', send_proxy: v2}}")) as relay:
            with connect(relay) as sock:
                ends = (Address(*sock.getsockname()), Address(*sock.getpeername()))
                assert converse(sock, CURL) == b"got " + encode_v2(*ends) + CURL


def test_rules_decide_by_the_name_and_the_upstream_of_a_route_comes_first() -> None:
    with server(EchoTarget()) as echo:
        routes = (
            f"{{sni: curl.example, target: '{echo}'}}, {{host: web.example, target: '{echo}'}}, "
            f"{{sni: '*.example', target: '{echo}', via: direct}}, "
            f"{{protocol: tls, target: '{echo}', via: block}}"
        )
        rules = "rules: [{sni: curl.example, via: direct}]\ndefault: block\n"
        with running(config(routes) + rules) as relay:
            decided = []
            for data in (CURL, REQUEST, HELLOS["python"], NAMELESS):
                served = talk(relay, data) == b"got " + data
                decided.append((served, record(relay).rule))
        assert decided == [
            (True, "rules[0]"),
            (False, "default"),
            (True, "listeners[0].routes[2]"),
            (False, "listeners[0].routes[3]"),
        ]


def test_target_that_refuses_resets_the_client() -> None:
    with socket.create_server((LOCALHOST, 0)) as closed:
        port = closed.getsockname()[1]
    with running(config(f"{{target: '{LOCALHOST}:{port}'}}")) as relay:
        assert talk(relay, CURL) == b""
        assert record(relay).ended == "connection refused"


def test_client_of_a_proxy_header_is_the_client() -> None:
    header = encode_v1(Address("10.1.2.3", 45), Address("10.9.9.9", 443))
    more = f", proxy_protocol: {LOCALHOST}, clients: [10.0.0.0/8]"
    with server(EchoTarget()) as echo:
        with running(config(f"{{sni: curl.example, target: '{echo}'}}", more=more)) as relay:
            assert talk(relay, header + CURL) == b"got " + CURL
            assert record(relay).flow.client == Address("10.1.2.3", 45)
            assert talk(relay, encode_v1(Address("11.1.2.3", 4), Address("10.9.9.9", 4))) == b""
            relay.wait_for_count("connections_refused", "client not allowed", 1)


# -- other listeners


def test_proxy_within_tls_serves_with_its_own_login_and_name() -> None:
    users = "users: {alice: {password: open-sesame}}\n"
    text = config("{sni: localhost, listener: main}", tls_sps())
    with server(EchoTarget()) as echo, running(users + text) as relay:
        secured = certificates().secure(connect(relay))
        with secured:
            secured.sendall(b"\5\1\2")
            assert read_exactly(secured, 2) == b"\5\2"
            secured.sendall(b"\1\5alice\x0bopen-sesame")
            assert read_exactly(secured, 2) == b"\1\0"
            secured.sendall(socks5_request(echo))
            assert read_exactly(secured, 10)[1] == 0
            secured.sendall(b"hello")
            eventually(lambda: relay.daemon.flows.live())
        flow = record(relay).flow
    assert (flow.listener, flow.user, flow.seen) == ("main", "alice", None)
    assert flow.port_route == PortRoute("web", "listeners[0].routes[0]", "localhost")
    assert relay.daemon._plan.admissions["web"].entered == 1
    assert relay.daemon._plan.admissions["main"].entered == 0


def test_bytes_behind_the_hello_are_no_plain_text() -> None:
    """Hazard 120: what a ClientHello is followed by goes through TLS, or ends it."""
    with running(config("{protocol: [tls, http], listener: main}", tls_sps())) as relay:
        answer = talk(relay, CURL, b"\5\1\0")
        assert b"\5\0" not in answer[:2] and answer[:1] in (b"", b"\x15", b"\x16")
        assert talk(relay, REQUEST)[:1] in (b"", b"\x15")
        relay.wait_for_count("connections", "bad protocol", 2)


def test_requests_on_a_kept_connection_keep_their_route() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

    def origin(sock: socket.socket) -> None:
        for _ in range(2):
            data = b""
            while not data.endswith(b"\r\n\r\n"):
                data += sock.recv(4096)
            sock.sendall(answer)

    with server(origin) as address, running(config("{listener: main}", SPS + "}")) as relay:
        request = f"GET http://{address}/ HTTP/1.1\r\nHost: {address}\r\n\r\n".encode()
        with connect(relay) as sock:
            for _ in range(2):
                sock.sendall(request)
                assert b"\r\n\r\nok" in sock.recv(4096)
        records = [record(relay), record(relay)]
    assert [str(found.flow.port_route and found.flow.port_route[:2]) for found in records] == [
        "('web', 'listeners[0].routes[0]')"
    ] * 2


def test_clients_of_the_other_listener_are_refused_without_a_word() -> None:
    """Hazard 162."""
    others = [
        SPS + ", clients_deny: 127.0.0.0/8}",
        f"{{protocol: tcp, listen: '{LOCALHOST}:0', name: main, target: '192.0.2.1:1', "
        "clients_deny: 127.0.0.0/8}",
    ]
    for other in others:
        with running(config("{listener: main}", other)) as relay:
            assert talk(relay, b"\5\1\0") == b""
            relay.wait_for_count("connections_refused", "client not allowed", 1)
            (line,) = refusals(relay)
            assert "listener=main" in line and " decided=clients_deny id=" in line


def test_proxy_header_of_the_other_listener_is_read_before_its_tls() -> None:
    header = encode_v1(Address("10.1.2.3", 45), Address("10.9.9.9", 443))
    text = config("{listener: main}", tls_sps(f", proxy_protocol: {LOCALHOST}"))
    with server(EchoTarget()) as echo, running(text) as relay, connect(relay) as sock:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = certificates().client_context()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        sock.sendall(header + outgoing.read())  # in one segment
        while True:
            incoming.write(sock.recv(65536))
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                continue
        tls.write(b"\5\1\0" + socks5_request(echo))
        sock.sendall(outgoing.read())
        eventually(lambda: relay.daemon.flows.live())
        (live,) = relay.daemon.flows.live()
        assert live.flow.client == Address("10.1.2.3", 45)


def test_associate_through_a_route_names_the_udp_port_of_its_listener() -> None:
    with running(config("{protocol: socks5, listener: main}", SPS + "}")) as relay:
        ports = [
            listener.address.port
            for listener in relay.daemon._manager.listeners
            if listener.network == "udp"
        ]
        with UdpClient(relay.port) as client, UdpPort() as target:
            assert [client.bound.port] == ports != [relay.port]
            client.check_echo(target)
        eventually(relay.idle)


# -- reload and limits


def test_reload_replaces_routes_and_keeps_what_runs() -> None:
    with server(EchoTarget()) as echo, server(EchoTarget()) as other:
        text = config(f"{{target: '{echo}'}}")
        with running(text) as relay, connect(relay) as sock:
            sock.sendall(CURL)
            eventually(lambda: relay.daemon.flows.live())
            relay.reload(text.replace(str(echo), str(other)))
            assert talk(relay, CURL) == b"got " + CURL
            assert record(relay).flow.target == other
            assert converse(sock) == b"got " + CURL
            assert record(relay).flow.target == echo
            relay.reload(text.replace("{target", "{host: none.example, target"))
            assert talk(relay, CURL) == b""
            relay.wait_for_count("connections_refused", "no route", 1)


def test_listener_that_a_reload_removes_serves_no_handshake_that_waits() -> None:
    both = config("{sni: '*.example', listener: main}, {listener: main}", SPS + "}")
    with running(both) as relay, connect(relay) as sock:
        sock.sendall(b"\5")
        eventually(lambda: relay.daemon.live == 1)
        relay.reload(config("{target: '192.0.2.1:1'}"))
        sock.sendall(b"\1\0" + socks5_request(Address("192.0.2.1", 1)))
        assert read_exactly(sock, 4) == b"\5\0\5\2"
        relay.wait_for_count("requests_refused", "listener removed", 1)


def test_handshake_of_an_sni_listener_that_is_gone_reaches_no_target() -> None:
    with running(config("{target: '192.0.2.1:1'}")) as relay, connect(relay) as sock:
        eventually(lambda: relay.daemon.live == 1)
        relay.reload("listeners: []")
        sock.sendall(CURL)
        assert refused(Address(LOCALHOST, relay.port))
        relay.wait_for_count("requests_refused", "listener removed", 1)


def test_silent_clients_are_ended_at_the_deadline_and_hold_no_thread() -> None:
    """Hazards 119 and 163."""
    with running(config("{target: '192.0.2.1:1'}") + "timeouts: {handshake: 1s}\n") as relay:
        with ExitStack() as stack:
            clients = [stack.enter_context(connect(relay)) for _ in range(40)]
            for number, sock in enumerate(clients):
                sock.sendall((b"", CURL[:1], CURL[:200], REQUEST[:30])[number % 4])
            eventually(lambda: relay.daemon.live == len(clients))
            assert relay.daemon.pools["connection"].threads == 0
            for sock in clients:
                assert sock.recv(1) == b""
        relay.wait_for_count("connections", "timed out", len(clients))


def test_client_with_most_handshakes_yields_and_others_are_served() -> None:
    """Hazards 137 and 163."""
    more = ", limits: {handshakes: 8}"
    with server(EchoTarget()) as echo:
        with running(config(f"{{target: '{echo}'}}", more=more)) as relay, ExitStack() as stack:
            hostile = [stack.enter_context(connect(relay, "127.0.0.3")) for _ in range(30)]
            relay.wait_for_count("connections_refused", "too many handshakes", 22)
            assert talk(relay, CURL) == b"got " + CURL
            assert len(hostile) == 30
