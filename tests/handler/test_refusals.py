"""Every refusal leaves one record and one count; refused logins wait without a thread."""

from __future__ import annotations

import base64
import socket
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.listener import poller as poller_module
from netproxy.observe.records import access_fields, as_text
from tests.support.doors import by_connect, by_socks5, by_socks5_udp, by_uot
from tests.support.handlers import LOCALHOST, eventually
from tests.support.relays import Running, UdpPort, associate, running
from tests.support.sockets import SECONDS, black_hole, read_exactly, read_to_end

PASSWORD = "users: {alice: {password: secret}}\nlisteners: [{listen: '127.0.0.1:0', name: main}]"
OPEN = """
listeners: [{listen: '127.0.0.1:0', name: main}]
rules:
  - {domain: good.example, via: direct}
  - {ip: 192.0.2.0/24, via: block}
destinations: {deny: [private]}
"""
COUNTERS = ("connections_refused", "requests_refused", "connections", "drops", "dial_failures")
WRONG = b"\5\1\2\1\5alice\5wrong"
RIGHT = b"\5\1\2\1\5alice\6secret"


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(PASSWORD) as relay:
        yield relay


def refusals(relay: Running) -> dict[tuple[str, str], int]:
    """Return the counters of refusals."""
    return {
        (name, reason): value
        for name, reason, value in relay.daemon.counters.items()
        if name in COUNTERS and reason != "accepted"
    }


def records(relay: Running) -> list[str]:
    """Return the records of refusals, those of flows included."""
    flows = [as_text(access_fields(record)) for record in relay.log.records if record.decided]
    return [line for line in relay.log.lines if line.startswith("msg=refused")] + flows


class Refused:
    """What one refusal has left."""

    def __init__(self, relay: Running) -> None:
        self._relay = relay
        self._counts, self._records = refusals(relay), records(relay)

    def check(self, counter: str, reason: str, *parts: str) -> None:
        """Check that there is one more count and one more record, with these parts."""
        relay = self._relay
        eventually(lambda: len(records(relay)) > len(self._records))
        counted = {
            key: value - self._counts.get(key, 0)
            for key, value in refusals(relay).items()
            if value != self._counts.get(key, 0)
        }
        assert counted == {(counter, reason): 1}
        (record,) = [line for line in records(relay) if line not in self._records]
        for part in ("listener=main", f"client={LOCALHOST}", *parts):
            assert part in record, record


LIMITED = PASSWORD.replace("secret}", "secret, limits: {connection_rate: 1/h}}")
BASIC = b"Proxy-Authorization: Basic YWxpY2U6c2VjcmV0\r\n"


@pytest.mark.parametrize(
    "request_bytes, answer",
    [
        (b"\5\1\2\1\5alice\6secret\5\1\0\1\x7f\0\0\1\0\x09", b"\5\2\1\0\5\2\0"),
        (b"\5\1\2\1\5alice\6secret\5\2\0\1\x7f\0\0\1\0\x09", b"\5\2\1\0\5\2\0"),
        (b"CONNECT 127.0.0.1:9 HTTP/1.1\r\nHost: a\r\n%b\r\n" % BASIC, b"HTTP/1.1 429 "),
        (b"GET http://127.0.0.1:9/ HTTP/1.1\r\nHost: a\r\n%b\r\n" % BASIC, b"HTTP/1.1 429 "),
    ],
    ids=["CONNECT", "BIND", "HTTP CONNECT", "GET"],
)
def test_limit_of_a_user_has_one_record_and_one_count(request_bytes: bytes, answer: bytes) -> None:
    """Hazard 140."""
    with running(LIMITED) as relay:
        first = relay.daemon.accounts.open(Flow("tcp", *[Address(LOCALHOST, 9)] * 2, "", "alice"))
        first.close()
        refused = Refused(relay)
        assert ask(relay, request_bytes).startswith(answer)
        reason, decided = "connection rate of the user", "users.alice.limits.connection_rate"
        refused.check(
            "requests_refused", reason, f'reason="{reason}"', "user=alice", f"decided={decided}"
        )


def ask(relay: Running, request: bytes) -> bytes:
    """Return the whole answer to a request."""
    with socket.create_connection((LOCALHOST, relay.port), SECONDS) as client:
        client.sendall(request)
        return read_to_end(client)


@pytest.mark.parametrize(
    "request_bytes, answer, reason, parts",
    [
        (
            b"\4\1\0\x50\1\2\3\4\0",
            b"\0\x5b",
            "login required",
            ("asked=1.2.3.4:80", 'decided="auth: SOCKS4 has no password"'),
        ),
        (b"\5\1\0", b"\5\xff", "no acceptable method", ('decided="auth; methods offered: 0"',)),
        (
            b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n",
            b"HTTP/1.1 407",
            "proxy authentication required",
            ('asked="CONNECT a.example:443"',),
        ),
        (b"GET / HTTP/9\r\n\r\n", b"HTTP/1.1 400", "bad request", ()),
    ],
    ids=["socks4", "no method", "no credentials", "bad head"],
)
def test_refusal_before_the_login_has_one_record_and_one_count(
    locked: Running, request_bytes: bytes, answer: bytes, reason: str, parts: tuple[str, ...]
) -> None:
    """Hazard 140."""
    refused = Refused(locked)
    assert ask(locked, request_bytes).startswith(answer)
    refused.check("requests_refused", reason, f'reason="{reason}"', *parts)


@pytest.mark.parametrize(
    "request_bytes, answer, parts",
    [
        (
            b"\4\x09\0\x50\1\2\3\4\0",
            b"\0\x5b",
            ("asked=1.2.3.4:80", 'decided="command 9 for 1.2.3.4:80 is not supported"'),
        ),
        (b"\4\1\0\x50\0\0\0\0\0", b"\0\x5b", ('decided="0.0.0.0 is not a valid target"',)),
        (b"\4\1\0\x50\0\0\0\1\0a/b\0", b"\0\x5b", ()),
        (
            b"\5\1\0\5\x09\0\1\1\2\3\4\0\x50",
            b"\5\0\5\7",
            ('decided="command 9 for 1.2.3.4:80 is not supported"',),
        ),
    ],
    ids=["socks4 command", "socks4 target", "socks4 name", "socks5 command"],
)
def test_socks_request_that_is_not_served_has_one_record_and_one_count(
    request_bytes: bytes, answer: bytes, parts: tuple[str, ...]
) -> None:
    """Hazard 140."""
    with running(OPEN) as relay:
        refused = Refused(relay)
        assert ask(relay, request_bytes).startswith(answer)
        refused.check("requests_refused", "bad request", 'reason="bad request"', *parts)


@pytest.mark.parametrize(
    "protocol, first, spoken",
    [
        ("http", b"\5\1\0", "socks5"),
        ("http", b"\4", "socks4"),
        ("http", b"\x16\3\1", "tls"),
        ("socks5", b"G", "http"),
    ],
)
def test_client_of_another_protocol_is_closed_at_its_first_byte(
    protocol: str, first: bytes, spoken: str
) -> None:
    """Hazard 140."""
    listener = f"{{listen: '127.0.0.1:0', name: main, protocol: {protocol}}}"
    with running(f"listeners: [{listener}]\ntimeouts: {{handshake: 10m}}") as relay:
        refused = Refused(relay)
        assert ask(relay, first) == b""
        served = {"http": "http", "socks5": "socks4, socks5"}[protocol]
        decided = f'decided="the port serves {served}"'
        refused.check("connections_refused", f"speaks {spoken}", decided)


@pytest.mark.parametrize("first", [b"7", b"\0", b"\xff"])
def test_http_port_answers_what_is_no_known_protocol(first: bytes) -> None:
    with running("listeners: [{listen: '127.0.0.1:0', name: main, protocol: http}]") as relay:
        assert ask(relay, first + b"\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_connect_to_a_refused_port_has_one_record_and_one_count() -> None:
    """Hazard 140."""
    with running(OPEN) as relay:
        refused = Refused(relay)
        assert by_connect(relay, "a.example", 25) == "denied"
        refused.check(
            "requests_refused",
            "forbidden",
            'asked="CONNECT a.example:25"',
            'decided="CONNECT to port 25 is not allowed"',
        )


@pytest.mark.parametrize(
    "target, asked",
    [
        (b"GET http://alice:s3cret@a.example/s3cret?token=s3cret", '"GET a.example"'),
        (b"GET http://a.example:80?mail=s3cret@b.example", '"GET a.example:80"'),
        (b"CONNECT bob:s3cret@a.example:443", '"CONNECT a.example:443"'),
        (b"CONNECT a:b@s3cret@[2001:db8::1]:443", '"CONNECT [2001:db8::1]:443"'),
        (b"CONNECT bob:s3cret", "CONNECT"),
        (b"GET http://bob:s3c/ret@a.example/", '"GET http:"'),
        (b"GET /s3cret", "GET"),
        (b"OPTIONS *", '"OPTIONS *"'),
    ],
)
def test_record_of_a_request_holds_no_secret_of_its_target(target: bytes, asked: str) -> None:
    """Hazard 111."""
    with running(PASSWORD) as relay:
        refused = Refused(relay)
        answer = ask(relay, target + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 407")
        refused.check("requests_refused", "proxy authentication required", f"asked={asked} ")
        assert not [line for line in relay.log.lines if "s3c" in line]


def test_failure_of_an_origin_is_no_refused_request() -> None:
    """Hazard 140."""
    config = "listeners: [{listen: '127.0.0.1:0', name: main}]"
    with running(config) as relay, socket.create_server((LOCALHOST, 0)) as origin:
        counts, target = refusals(relay), b"%s:%d" % (LOCALHOST.encode(), origin.getsockname()[1])
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as client:
            client.sendall(b"GET http://%s/ HTTP/1.1\r\nHost: %s\r\n\r\n" % (target, target))
            with origin.accept()[0] as accepted:
                accepted.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
                assert read_to_end(client).startswith(b"HTTP/1.1 502")
        eventually(lambda: relay.log.records)
        assert refusals(relay) == counts


@pytest.mark.parametrize("door", [by_socks5, by_connect, by_uot], ids=lambda door: door.__name__)
def test_record_of_a_blocked_flow_names_the_rule(door: object) -> None:
    """Hazard 140."""
    with running(OPEN) as relay:
        refused = Refused(relay)
        assert door(relay, "192.0.2.9", 443) == "denied"  # type: ignore[operator]
        refused.check(
            "dial_failures", "not allowed by the rules", "rule=rules[1]", "decided=rules[1]"
        )


def test_record_of_a_denied_destination_names_the_range() -> None:
    """Hazard 140."""
    with running(OPEN) as relay:
        refused = Refused(relay)
        assert by_socks5(relay, "10.1.2.3", 443) == "denied"
        refused.check(
            "dial_failures",
            "not allowed by the rules",
            "target=10.1.2.3:443",
            'decided="destinations.deny 10.0.0.0/8 (private)"',
        )


@pytest.mark.parametrize(
    "host, decided",
    [("192.0.2.9", "rules[1]"), ("10.1.2.3", '"destinations.deny 10.0.0.0/8 (private)"')],
)
def test_dropped_datagram_has_one_record_and_one_count(host: str, decided: str) -> None:
    """Hazard 140."""
    with running(OPEN) as relay:
        refused = Refused(relay)
        assert by_socks5_udp(relay, host, 443) == "denied"
        refused.check(
            "drops",
            "not allowed by the rules",
            f"asked={host}:443",
            f"decided={decided}",
            "network=udp",
            "datagrams=1",
        )


def test_datagram_of_a_stranger_has_one_record_and_one_count() -> None:
    """Hazard 140."""
    with running(OPEN) as relay, UdpPort() as stranger:
        refused = Refused(relay)
        stranger.send(b"\0\0\0\1\x7f\0\0\1\0\x35x", Address(LOCALHOST, relay.port))
        refused.check("drops", "unknown sender", "network=udp", "datagrams=1")


def test_associate_without_an_upstream_for_udp_has_one_record_and_one_count() -> None:
    """Hazard 140."""
    with running("listeners: [{listen: '127.0.0.1:0', name: main}]\ndefault: block") as relay:
        refused = Refused(relay)
        with associate(relay.port) as control:
            read_to_end(control)
        refused.check("requests_refused", "not allowed by the rules", 'asked="UDP ASSOCIATE"')


def test_connection_beyond_a_limit_has_one_record_that_names_the_limit() -> None:
    """Hazard 140."""
    limits = "limits: {connections_per_client: 1}"
    with running(f"listeners: [{{listen: '127.0.0.1:0', name: main, {limits}}}]") as relay:
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as first:
            first.sendall(b"\5\1\0")
            assert read_exactly(first, 2) == b"\5\0"
            refused = Refused(relay)
            assert ask(relay, b"") == b""
            refused.check(
                "connections_refused", "client limit", "decided=limits.connections_per_client"
            )


def check_yields_once(relay: Running, *parts: str) -> None:
    """Let a client with two connections lose one; check its one record and its one count."""
    with socket.create_connection((LOCALHOST, relay.port), SECONDS):
        relay.wait_for_count("connections_refused", "yielded to another client", 1)
        eventually(lambda: relay.daemon.live == 2)
        (record,) = records(relay)
        for part in ("client=127.0.0.3", "decided=limits.connections", *parts):
            assert part in record, record
        assert refusals(relay) == {("connections_refused", "yielded to another client"): 1}


@pytest.mark.parametrize("protocol", ["socks5", "http"])
def test_flow_that_yields_to_another_client_has_one_record(protocol: str) -> None:
    """Hazard 140."""
    limits = "limits: {connections: 2}"
    config = f"listeners: [{{listen: '127.0.0.1:0', name: main, {limits}}}]"
    with running(config) as relay, socket.create_server((LOCALHOST, 0)) as target:
        port = target.getsockname()[1]
        request = {
            "socks5": b"\5\1\0\5\1\0\1\x7f\0\0\1" + port.to_bytes(2, "big"),
            "http": b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: a\r\n\r\n" % port,
        }[protocol]
        clients, ends = [], []
        for _ in range(2):
            client = socket.create_connection((LOCALHOST, relay.port), SECONDS, ("127.0.0.3", 0))
            client.sendall(request)
            clients.append(client)
            ends.append(target.accept()[0])
        eventually(lambda: len(relay.daemon.flows) == 2)
        check_yields_once(relay, "msg=finished", 'ended="yielded to another client"')
        for sock in clients + ends:
            sock.close()


def test_dial_that_yields_to_another_client_has_one_record() -> None:
    """Hazard 140."""
    limits = "limits: {connections: 2}"
    config = f"listeners: [{{listen: '127.0.0.1:0', name: main, {limits}}}]"
    with black_hole() as address, running(config) as relay:
        request = b"\5\1\0\5\1\0\1\x7f\0\0\1" + address.port.to_bytes(2, "big")
        clients = [
            socket.create_connection((LOCALHOST, relay.port), SECONDS, ("127.0.0.3", 0))
            for _ in range(2)
        ]
        for client in clients:
            client.sendall(request)
        # Each waits for its client and for its target.
        eventually(lambda: relay.daemon._runtime.poller.watched == 4)
        check_yields_once(relay, "msg=finished", 'ended="yielded to another client"')
        for client in clients:
            client.close()


def test_connection_without_a_flow_that_yields_has_one_record() -> None:
    """Hazard 140."""
    limits = "limits: {connections: 2}"
    with running(f"listeners: [{{listen: '127.0.0.1:0', name: main, {limits}}}]") as relay:
        clients = [
            socket.create_connection((LOCALHOST, relay.port), SECONDS, ("127.0.0.3", 0))
            for _ in range(2)
        ]
        for client in clients:
            client.sendall(b"\5\1\0")
            assert read_exactly(client, 2) == b"\5\0"
        check_yields_once(relay, "msg=refused", 'reason="yielded to another client"')
        for client in clients:
            client.close()


def test_broken_protocol_has_one_record_with_the_fault() -> None:
    """Hazard 140."""
    with running(OPEN) as relay:
        refused = Refused(relay)
        ask(relay, b"\5\1\0\6\1\0\1\0\0\0\0\0\0")
        refused.check("connections", "bad protocol", "decided=")


def test_record_names_rule_and_member_of_a_group() -> None:
    text = """
listeners: [{listen: '127.0.0.1:0', name: main}]
upstreams: {office: direct, pool: {members: [office]}}
rules: [{network: tcp, via: pool}]
"""
    with running(text) as relay, socket.create_server((LOCALHOST, 0)) as target:
        assert by_socks5(relay, LOCALHOST, target.getsockname()[1]) == "open"
        target.accept()[0].close()
        eventually(lambda: relay.log.records)
        line = as_text(access_fields(relay.log.records[0]))
        assert "rule=rules[0] upstream=pool/office" in line


@pytest.mark.parametrize(
    "text, rule",
    [("", "default"), ("upstreams: {out: direct}", "listener")],
    ids=["default", "listener"],
)
def test_record_tells_that_no_rule_decided(text: str, rule: str) -> None:
    upstream = ", upstream: out" if text else ""
    config = f"listeners: [{{listen: '127.0.0.1:0', name: main{upstream}}}]\n{text}"
    with running(config) as relay, socket.create_server((LOCALHOST, 0)) as target:
        assert by_socks5(relay, LOCALHOST, target.getsockname()[1]) == "open"
        target.accept()[0].close()
        eventually(lambda: relay.log.records)
        assert relay.log.records[0].rule == rule


# -- logins


def held_back(relay: Running, seconds: float) -> None:
    """Delay refused logins by so many seconds."""
    back_off = relay.daemon._runtime.back_off
    back_off._first = back_off._longest = seconds


@pytest.mark.parametrize("protocol", ["socks5", "http"])
def test_refused_logins_wait_without_a_thread_and_delay_nobody(protocol: str) -> None:
    """Hazard 110."""
    credentials = base64.b64encode(b"alice:wrong")
    wrong = {
        "socks5": WRONG,
        "http": b"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n"
        b"Proxy-Authorization: Basic %b\r\n\r\n" % credentials,
    }[protocol]
    with running(PASSWORD) as relay:
        held_back(relay, 600.0)
        runtime = relay.daemon._runtime
        guesses = [socket.create_connection((LOCALHOST, relay.port), SECONDS) for _ in range(100)]
        for guess in guesses:
            guess.sendall(wrong)
        relay.wait_for_count("authentication", "refused", 100)
        eventually(lambda: runtime.poller.watched == 100 and not runtime.connections.busy)
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as client:
            client.sendall(RIGHT)
            assert read_exactly(client, 4) == b"\5\2\1\0"
        assert len(runtime.back_off) == 1
        for guess in guesses:
            # A reset: the end alone would not tell that the client cannot read.
            guess.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            guess.close()
        eventually(lambda: not relay.daemon.live)


def test_refusal_of_a_login_comes_after_its_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 110: the delay is not that of the poller's next look."""
    monkeypatch.setattr(poller_module, "TICK", 600.0)
    with running(PASSWORD) as relay:
        held_back(relay, 0.01)
        assert ask(relay, WRONG) == b"\5\2\1\1"
        assert [line for line in relay.log.lines if "auth_failed" in line] == [
            f"auth_failed client={LOCALHOST} user=alice listener=main"
        ]
        assert relay.count("authentication", "refused") == 1
        assert not records(relay)


def test_request_without_credentials_is_no_failed_login() -> None:
    """Hazard 110: browsers send their first request without credentials."""
    with running(PASSWORD) as relay:
        held_back(relay, 600.0)
        answer = ask(relay, b"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 407")
        assert not len(relay.daemon._runtime.back_off)


# -- steps


def steps(relay: Running) -> list[str]:
    lines = [line for line in relay.log.lines if line.startswith("msg=step")]
    return [line.split("step=", 1)[1].split(" listener=")[0].strip('"') for line in lines]


def test_steps_of_a_connection_are_told_at_level_debug() -> None:
    with running(OPEN) as relay, socket.create_server((LOCALHOST, 0)) as target:
        relay.log.tracing = True
        port = target.getsockname()[1]
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as client:
            client.sendall(b"\5\1\0\5\1\0\1\x7f\0\0\1" + port.to_bytes(2, "big"))
            read_exactly(client, 12)
            far, _ = target.accept()
            with far:
                far.sendall(b"x")
                assert read_exactly(client, 1) == b"x"
                eventually(lambda: steps(relay)[-1] == "first byte")
        expected = ["accepted", "protocol", "methods", "request", "routed", "connected"]
        eventually(lambda: steps(relay) == [*expected, "first byte", "ended", "closed"])
        routed = next(line for line in relay.log.lines if "step=routed" in line)
        assert "rule=default upstream=direct addresses=127.0.0.1" in routed


def test_steps_of_a_udp_session_are_told_at_level_debug() -> None:
    with running(OPEN) as relay, UdpPort() as target:
        relay.log.tracing = True
        with (
            associate(relay.port) as control,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            client.settimeout(SECONDS)
            bound = read_exactly(control, 10)
            to = (LOCALHOST, int.from_bytes(bound[8:], "big"))
            header = b"\0\0\0\1\x7f\0\0\1" + target.address.port.to_bytes(2, "big")
            client.sendto(header + b"x", to)
            target.send(b"y", target.expect(b"x"))
            assert client.recv(100) == header + b"y"
        eventually(lambda: "ended" in steps(relay))
        udp = [line for line in relay.log.lines if "msg=step" in line and "network=udp" in line]
        assert [line.split("step=", 1)[1].split(" listener=")[0].strip('"') for line in udp] == [
            *("routed", "connected", "first reply", "ended")
        ]


def test_step_of_the_first_reply_is_told_once_and_for_no_filtered_source() -> None:
    config = "listeners: [{listen: '127.0.0.1:0', udp: {filtering: address-and-port-dependent}}]"
    with running(config) as relay, UdpPort() as target, UdpPort() as other, UdpPort() as stranger:
        relay.log.tracing = True
        with (
            associate(relay.port) as control,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            client.settimeout(SECONDS)
            bound = read_exactly(control, 10)
            to = (LOCALHOST, int.from_bytes(bound[8:], "big"))
            for filtered, port in enumerate((target, other), start=1):
                header = b"\0\0\0\1\x7f\0\0\1" + port.address.port.to_bytes(2, "big")
                client.sendto(header + b"x", to)
                source = port.expect(b"x")
                stranger.send(b"z", source)
                eventually(lambda: relay.count("drops", "filtered") == filtered)  # noqa: B023
                port.send(b"y", source)
                assert client.recv(100) == header + b"y"
        eventually(lambda: "ended" in steps(relay))
        (first,) = [line for line in relay.log.lines if 'step="first reply"' in line]
        assert f"source={target.address}" in first


def test_nothing_is_told_below_level_debug() -> None:
    with running(OPEN) as relay, socket.create_server((LOCALHOST, 0)) as target:
        assert by_socks5(relay, LOCALHOST, target.getsockname()[1]) == "open"
        target.accept()[0].close()
        eventually(lambda: not relay.daemon.live)
        assert not steps(relay)
