"""netproxyctl test: a real dial through a running daemon, step by step."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from netproxy.admin.control.client import CommandError
from netproxy.admin.diagnosis import conversation, dial_test
from netproxy.interfaces.addresses import Address
from netproxy.protocol import dns
from tests.support.certificates import certificates
from tests.support.relays import Running, running
from tests.support.sockets import SECONDS, Task, listen, server, wait_until

pytest.importorskip("yaml")

Tell = Callable[..., Any]


@pytest.fixture
def silent() -> Iterator[Address]:
    """A server that accepts connections and says nothing."""
    with listen() as sock:
        yield Address(*sock.getsockname()[:2])


@pytest.fixture
def text(tmp_path: Path, silent: Address) -> str:
    return f"""
control: unix:{tmp_path / "control"}
listeners: [{{listen: "127.0.0.1:0", name: main}}, {{listen: "127.0.0.1:0", name: more}}]
users: {{alice: {{password: secret}}, bob: {{password: secret, expires: 2020-01-31}}}}
dns: {{hosts: {{near.test: 127.0.0.1}}}}
upstreams:
  gone: socks5://127.0.0.1:1
  hanging: socks5://{silent}
  away: {{members: [gone, direct], balance: failover}}
rules:
  - {{domain: ads.test, via: block}}
  - {{domain: near.test, via: away}}
"""


@pytest.fixture
def daemon(text: str) -> Iterator[Running]:
    with running(text) as daemon:
        yield daemon


@contextmanager
def speaking(data: bytes, closes: bool = False) -> Iterator[Address]:
    """Run a server that sends `data` first, and keeps the connection unless it `closes`."""

    def script(sock: socket.socket) -> None:
        sock.sendall(data)
        if not closes:
            sock.recv(1)

    with server(script) as address:
        yield address


def steps(answer: Any) -> list[tuple[str, str]]:
    return [(row["step"], row["text"]) for row in answer["steps"]]


def names(answer: Any) -> list[str]:
    return [row["step"] for row in answer["steps"]]


def test_url_is_asked_for_and_each_step_has_its_time(daemon: Running, tell: Tell) -> None:
    asked: list[bytes] = []

    def origin(sock: socket.socket) -> None:
        asked.append(sock.recv(65536))
        sock.sendall(b"HTTP/1.1 301 Moved \xe9\r\nLocation: /x\r\n\r\n")

    with server(origin) as address:
        answer = tell("test", target=f"http://{address}/path")
    assert answer["fine"] and answer["failure"] is None
    assert steps(answer)[0][1].startswith(f"tcp 127.0.0.1 -> {address} on main (assumed: ")
    assert steps(answer)[1:] == [
        ("rule", "none matches; the default applies"),
        ("upstream", "direct"),
        ("addresses", "127.0.0.1"),
        ("connecting", str(address)),
        ("connected", f"to {address}"),
        ("answer", r"HTTP/1.1 301 Moved \xe9"),
    ]
    assert asked[0].startswith(b"HEAD / HTTP/1.1\r\nHost: 127.0.0.1\r\n")
    times = [row["at"] for row in answer["steps"]]
    assert times == sorted(times) and times[-1] <= answer["seconds"]


@pytest.mark.parametrize(
    "data, closes, last",
    [
        (b"SSH-2.0-x\r\n", False, ("answer", "the target says: SSH-2.0-x")),
        (b"", True, ("closed", "the target has closed the connection")),
        (b"", False, ("silent", "the target says nothing by itself, as most do")),
    ],
)
def test_target_without_a_scheme_may_speak_first(
    daemon: Running,
    tell: Tell,
    monkeypatch: pytest.MonkeyPatch,
    data: bytes,
    closes: bool,
    last: tuple[str, str],
) -> None:
    if not data and not closes:
        monkeypatch.setattr(conversation, "BANNER_SECONDS", 0.05)
    else:
        monkeypatch.setattr(conversation, "BANNER_SECONDS", SECONDS)
    with speaking(data, closes) as address:
        answer = tell("test", target=str(address))
    assert answer["fine"] and steps(answer)[-1] == last


def test_members_of_a_group_are_tried_in_turn(
    daemon: Running, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "BANNER_SECONDS", SECONDS)
    with speaking(b"220 mail") as address:
        answer = tell("test", target=f"near.test:{address.port}")
    assert answer["fine"]
    assert steps(answer)[1][1].startswith("rules[1] (domain: near.test) at ")
    assert steps(answer)[2][1].startswith("away: failover of (gone, direct)")
    failed = "'gone' (socks5://127.0.0.1:1): connection refused"
    assert steps(answer)[4:] == [
        ("member", "gone of away"),
        ("connecting", "127.0.0.1:1"),
        ("failed", failed),
        ("member", "direct of away"),
        ("connecting", str(address)),
        ("connected", f"to near.test:{address.port} by direct"),
        ("answer", "the target says: 220 mail"),
    ]


def test_hop_of_a_chain_is_a_step(
    tmp_path: Path, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "BANNER_SECONDS", SECONDS)
    with running() as proxy, speaking(b"hello") as address:
        url = f"socks5://127.0.0.1:{proxy.port}"
        listeners = "listeners: [{listen: '127.0.0.1:0'}]\n"
        with running(f"control: unix:{tmp_path / 'control'}\n{listeners}default: '{url}'\n"):
            answer = tell("test", target=str(address))
    assert answer["fine"]
    assert steps(answer)[4:] == [
        ("connecting", f"127.0.0.1:{proxy.port}"),
        ("hop", f"{url} leads to {address}"),
        ("connected", f"to {address}"),
        ("answer", "the target says: hello"),
    ]


def test_upstream_is_chosen_without_rules(daemon: Running, tell: Tell) -> None:
    answer = tell("test", target="ads.test", via="gone")
    assert steps(answer)[1:4] == [
        ("rule", "none is asked: --via"),
        ("upstream", "gone: socks5://127.0.0.1:1"),
        ("addresses", "the upstream resolves the name"),
    ]
    failure = answer["failure"]
    assert (answer["fine"], failure["reason"]) == (False, "name not resolved")


def test_refused_connection_tells_address_reason_and_what_to_do(
    daemon: Running, tell: Tell
) -> None:
    with listen() as sock:
        target = f"127.0.0.1:{sock.getsockname()[1]}"
    failure = tell("test", target=target)["failure"]
    assert (failure["reason"], failure["tried"]) == (
        "connection refused",
        [[target, "connection refused"]],
    )
    assert failure["advice"]


def test_rule_that_blocks_is_named_with_its_place(daemon: Running, tell: Tell) -> None:
    answer = tell("test", target="ads.test")
    assert names(answer)[-1] == "upstream"
    failure = answer["failure"]
    assert (failure["decided"], failure["place"][:10]) == ("rules[0]", "test.yaml:")


def test_certificate_that_is_not_trusted_is_told_as_the_fault_of_the_target(
    daemon: Running, tell: Tell
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates().path("server.pem"), certificates().path("server.key"))

    def origin(sock: socket.socket) -> None:
        with pytest.raises(OSError), context.wrap_socket(sock, server_side=True) as secured:
            secured.recv(1)

    with server(origin) as address:
        answer = tell("test", target=f"https://{address}/")
    assert names(answer)[-1] == "connected"
    assert answer["failure"]["reason"].startswith("TLS: ")
    assert answer["failure"]["advice"] == dial_test.NOT_THE_WAY


def test_user_who_gets_nothing_is_told_so(daemon: Running, tell: Tell) -> None:
    answer = tell("test", target="near.test", user="bob")
    assert (names(answer), answer["fine"]) == (["flow"], False)
    failure = answer["failure"]
    assert (failure["reason"], failure["decided"]) == (
        "not allowed by the rules",
        "users.bob.expires",
    )
    assert failure["place"].startswith("test.yaml:")


@pytest.mark.parametrize(
    "more, said",
    [
        ({"via": "nix"}, r"no upstream 'nix' \(known: direct, .*away"),
        ({"listener": "x"}, r"no listener 'x' \(known: main, more\)"),
        ({"target": "no sense"}, "not a flow"),
    ],
)
def test_wrong_request_is_told_what_there_is(
    daemon: Running, tell: Tell, more: dict[str, str], said: str
) -> None:
    with pytest.raises(CommandError, match=said):
        tell("test", **{"target": "near.test", **more})


class TestDatagrams:
    def test_session_is_opened_and_nothing_said(self, daemon: Running, tell: Tell) -> None:
        answer = tell("test", target="127.0.0.1:9", udp=True, listener="more")
        assert answer["fine"] and steps(answer)[-1] == ("session", "open to 127.0.0.1:9")
        assert steps(answer)[0][1].startswith("udp 127.0.0.1 -> 127.0.0.1:9 on more (assumed: ")

    def test_name_server_is_asked(
        self, daemon: Running, tell: Tell, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            sock.settimeout(SECONDS)
            port = sock.getsockname()[1]
            monkeypatch.setattr(dial_test, "DNS_PORT", port)

            def serve() -> None:
                query, peer = sock.recvfrom(65536)
                # The first one is an answer to something else.
                for number in (bytes(2), query[:2]):
                    sock.sendto(
                        number + (dns.QR | dns.REFUSED).to_bytes(2, "big") + query[4:], peer
                    )

            task = Task(serve)
            answer = tell("test", target=f"127.0.0.1:{port}", udp=True)
            task.result()
        assert names(answer)[-3:] == ["session", "asked", "answer"]
        assert steps(answer)[-1][1].startswith("DNS answer REFUSED, ")

    def test_name_server_that_does_not_answer_is_a_failure(
        self, daemon: Running, tell: Tell, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            monkeypatch.setattr(dial_test, "DNS_PORT", sock.getsockname()[1])
            monkeypatch.setattr(conversation, "REPLY_SECONDS", 0.05)
            answer = tell("test", target=f"127.0.0.1:{sock.getsockname()[1]}", udp=True)
        failure = answer["failure"]
        assert failure["reason"] == "timed out" and "no answer to a DNS query" in failure["decided"]


class TestTime:
    def test_dial_that_hangs_is_aborted_and_other_commands_are_answered_meanwhile(
        self, daemon: Running, tell: Tell, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 172."""
        monkeypatch.setattr(dial_test, "SECONDS", 0.5)
        task = Task(lambda: tell("test", target="127.0.0.1:9", via="hanging"))
        wait_until(lambda: any("dial" in thread.name for thread in threading.enumerate()))
        assert tell("status")["state"] == "serving"
        answer = task.result()
        assert not answer["fine"] and answer["failure"]["hop"].startswith("'hanging'")

    def test_tests_at_once_are_limited(
        self, daemon: Running, tell: Tell, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 172."""
        monkeypatch.setattr(dial_test, "SECONDS", 1.0)
        tasks = [
            Task(lambda: tell("test", target="127.0.0.1:9", via="hanging"))
            for _ in range(dial_test.TESTS_LIMIT + 3)
        ]
        refused = 0
        for task in tasks:
            try:
                task.result()
            except CommandError as error:
                assert str(error) == "4 tests are running: try again"
                refused += 1
        assert refused >= 1
        # There is room again.
        assert tell("test", target="127.0.0.1:9")["failure"]


def test_test_leaves_no_flow_no_record_and_no_count(daemon: Running, tell: Tell) -> None:
    tell("test", target="127.0.0.1:1")
    assert tell("why")["incidents"] == [] and tell("connections") == []
    assert not [row for row in tell("status")["counters"] if row[0] == "dial_failures"]


def test_steps_are_printed_and_the_exit_status_tells(
    daemon: Running, ctl: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "BANNER_SECONDS", SECONDS)
    with speaking(b"hello") as address:
        status, out, err = ctl("test", str(address))
    assert (status, err) == (0, "")
    assert out.splitlines()[-2].endswith(" ms  answer      the target says: hello")
    assert out.endswith(" ms  fine\n")
    status, out, _ = ctl("test", "ads.test", "--user", "alice")
    assert status == 1 and "  decided:  rules[0] (test.yaml:" in out
    assert ctl("test", "127.0.0.1:9", "--udp", "--json")[1].startswith("{")
