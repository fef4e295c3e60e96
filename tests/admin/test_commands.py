"""A daemon in this process, seen from outside: control socket, metrics, status page."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from netproxy.admin import commands
from netproxy.admin.flow_filter import FlowFilter
from netproxy.admin.control.ask import NotRunning, ask
from netproxy.admin.control.client import CommandError
from netproxy.admin.servers import Admin
from netproxy.admin.stats.stats import Stats
from netproxy.errors import ListenError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.protocol import socks5
from tests.daemon.test_daemon import Tunnel
from tests.support.handlers import RecordingLog
from tests.support.relays import Running, UdpClient, UdpPort, running
from tests.support.sockets import (
    SECONDS,
    Task,
    listen,
    read_exactly,
    read_to_end,
    server,
    wait_until,
)

pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef"


@pytest.fixture
def text(tmp_path: Path) -> str:
    return (
        f"control: unix:{tmp_path / 'control'}\n"
        f"metrics: 127.0.0.1:0\nmetrics_token: {TOKEN}\nstatus_page: true\n"
        "listeners: [{listen: '127.0.0.1:0', name: main, auth: optional}]\n"
        "users: {alice: {password: secret}}\nupstreams: {gone: 'socks5://127.0.0.1:1'}\n"
    )


@pytest.fixture
def daemon(text: str) -> Iterator[Running]:
    with running(text) as daemon:
        yield daemon


def metrics_address(daemon: Running) -> Address:
    metrics = daemon.daemon._admin.servers.metrics
    assert metrics is not None
    return metrics.server.address


def get(daemon: Running, path: str, token: str = TOKEN) -> tuple[int, str]:
    """Return the status and the body of a page."""
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n" + (
        f"Authorization: Bearer {token}\r\n" if token else ""
    )
    address = "127.0.0.1", metrics_address(daemon).port
    with socket.create_connection(address, SECONDS) as client:
        client.sendall(head.encode() + b"\r\n")
        answer = read_to_end(client).decode()
    return int(answer.split(" ")[1]), answer.partition("\r\n\r\n")[2]


def value(daemon: Running, series: str) -> float:
    """Return the value of a series in /metrics, 0 if there is none."""
    values = re.findall(rf"^{re.escape(series)} (\S+)$", get(daemon, "/metrics")[1], re.M)
    return float(values[0]) if values else 0.0


class TestConnections:
    def test_connection_is_listed_while_it_runs(
        self, daemon: Running, tell: Callable[..., Any], echo: Address
    ) -> None:
        began = time.monotonic()
        with Tunnel(daemon.port, echo, ("alice", "secret")) as tunnel:
            tunnel.check(b"four" * 25)
            # Bytes are counted just after they were sent.
            wait_until(lambda: tell("connections")[0]["received"])
            (row,) = tell("connections")
            assert {**row, "client": "", "age": 0, "idle": 0} == {
                "id": 1,
                "network": "tcp",
                "listener": "main",
                "client": "",
                "user": "alice",
                "target": str(echo),
                "name": "",
                "route": "",
                "upstream": "direct",
                "age": 0,
                "idle": 0,
                "sent": 100,
                "received": 100,
                "datagrams_sent": 0,
                "datagrams_received": 0,
            }
            # Both are rounded to a millisecond.
            assert 0 <= row["idle"] <= row["age"] <= time.monotonic() - began + 0.001
            assert tell("sessions") == []
        wait_until(lambda: tell("connections") == [])

    def test_filters_select_connections(
        self, daemon: Running, tell: Callable[..., Any], echo: Address
    ) -> None:
        with Tunnel(daemon.port, echo, ("alice", "secret")), Tunnel(daemon.port, echo):
            for wanted in (
                {"user": "alice"},
                {"ids": [2]},
                {"user": "alice", "listener": "main", "target": "127.0.0.1", "upstream": "direct"},
            ):
                assert len(tell("connections", **wanted)) == 1
            assert len(tell("connections", client="127.0.0.1")) == 2
            assert tell("connections", client="192.0.2.1") == []

    def test_killed_connection_ends_on_both_sides_with_its_record(
        self, daemon: Running, tell: Callable[..., Any], echo: Address
    ) -> None:
        with (
            Tunnel(daemon.port, echo) as kept,
            Tunnel(daemon.port, echo, ("alice", "secret")) as tunnel,
        ):
            tunnel.check()
            kept.check()
            assert tell("kill", user="alice") == {"killed": 1}
            assert tunnel.socket.recv(1) == b""
            wait_until(lambda: len(tell("connections")) == 1)
            kept.check()
        wait_until(lambda: len(daemon.log.records) == 2)
        assert [record.ended for record in daemon.log.records if record.flow.user] == ["killed"]

    def test_kill_without_a_flow_is_refused(
        self, daemon: Running, tell: Callable[..., Any]
    ) -> None:
        with pytest.raises(CommandError, match="no such flow"):
            tell("kill", ids=[99])
        with pytest.raises(CommandError, match="nothing to kill"):
            tell("kill")

    def test_each_http_request_is_a_flow(self, daemon: Running, tell: Callable[..., Any]) -> None:
        release = threading.Event()

        def origin(sock: socket.socket) -> None:
            read_exactly(sock, 4)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
            release.wait(SECONDS)
            sock.sendall(b"cd")

        with (
            server(origin) as address,
            socket.create_connection(("127.0.0.1", daemon.port), SECONDS) as client,
        ):
            client.sendall(b"GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n" % str(address).encode())
            head = b""
            while not head.endswith(b"ab"):
                head += client.recv(100)
            (row,) = tell("connections")
            assert (row["target"], row["received"]) == (str(address), len(head))
            release.set()
            assert client.recv(10) == b"cd"
            wait_until(lambda: not tell("connections"))


class TestSessions:
    def test_killed_session_is_replaced_by_the_next_datagram(
        self, daemon: Running, tell: Callable[..., Any]
    ) -> None:
        with UdpPort() as target, UdpClient(daemon.port) as client:
            first = client.check_echo(target, b"ping")
            wait_until(lambda: tell("sessions")[0]["received"])
            (row,) = tell("sessions")
            assert (
                row["network"],
                row["target"],
                row["datagrams_sent"],
                row["datagrams_received"],
                row["sent"],
                row["received"],
            ) == ("udp", str(target.address), 1, 1, 4, 4)
            assert tell("kill", ids=[row["id"]]) == {"killed": 1}
            assert tell("sessions") == []
            wait_until(lambda: [record.ended for record in daemon.log.records] == ["killed"])
            client.to(target.address, b"again")
            assert target.expect(b"again") != first


class TestStatus:
    def test_status_has_state_listeners_and_counters(
        self, daemon: Running, tell: Callable[..., Any], echo: Address
    ) -> None:
        with Tunnel(daemon.port, echo) as tunnel:
            tunnel.check()
            status = tell("status")
        assert (status["state"], status["connections"], status["log"]) == ("serving", 1, "info")
        assert status["listeners"] == [
            {
                "name": "main",
                "network": "tcp+udp",
                "address": f"127.0.0.1:{daemon.port}",
                "live": 1,
                "accepted": 1,
                "announced": [],
                "mappings": [],
            }
        ]
        assert ["connections", "accepted", 1] in status["counters"]
        assert status["lines"][0].startswith("connections=1 ")

    def test_traffic_has_totals_and_the_bytes_of_flows(
        self, daemon: Running, tell: Callable[..., Any], echo: Address
    ) -> None:
        with Tunnel(daemon.port, echo) as tunnel:
            tunnel.check()
            wait_until(lambda: tell("traffic")["bytes"] == {"up": 4, "down": 4})
            traffic = tell("traffic")
            assert (traffic["flows"], traffic["connections"]) == ([[1, 4, 4]], 1)


def test_start_counts_as_the_first_reload() -> None:
    """However late somebody first asks for statistics."""
    none: Any = None
    log: Any = RecordingLog()
    stats = Stats(none, none, log, time.monotonic() - 3600, none)
    assert stats.reloaded.at == pytest.approx(time.time() - 3600, abs=SECONDS)


def test_ids_that_are_no_numbers_are_refused() -> None:
    """Otherwise they would select all flows."""
    for ids in (5, ["all"], "all", {"1": 2}):
        with pytest.raises(CommandError, match="ids: not a list of numbers"):
            FlowFilter({"command": "kill", "ids": ids})


MISTAKES = [
    ({"usr": "alice"}, r"unknown filter 'usr' \(did you mean 'user'\?\)"),
    ({"port": "80"}, r"unknown filter 'port' \(known: ids, user, client"),
    ({"user": 5}, "user: not a text, or empty"),
    ({"user": ""}, "user: not a text, or empty"),
    ({"client": "alice"}, "client: 'alice' is not an address"),
    ({"target": "a.example:443"}, "target: 'a.example:443' has a port: write the host alone"),
    ({"user": "alise"}, r"there is no user 'alise' \(did you mean 'alice'\?\)"),
    ({"listener": "mian"}, r"there is no listener 'mian' \(did you mean 'main'\?\)"),
    ({"upstream": "far"}, r"there is no upstream 'far' \(known: gone, direct, block, auto\)"),
]


@pytest.mark.parametrize("command", ["connections", "sessions", "flows", "kill"])
@pytest.mark.parametrize(("filters", "why"), MISTAKES)
def test_filter_that_is_a_mistake_is_refused(
    daemon: Running, tell: Callable[..., Any], command: str, filters: dict[str, Any], why: str
) -> None:
    with pytest.raises(CommandError, match=why):
        tell(command, ids=[1], **filters)


def test_filters_read_addresses_in_any_spelling(
    daemon: Running, tell: Callable[..., Any], echo: Address
) -> None:
    with Tunnel(daemon.port, echo):
        for filters in ({"client": "::ffff:127.0.0.1"}, {"target": "::ffff:127.0.0.1"}):
            assert len(tell("connections", **filters)) == 1
    assert tell("connections", client="fe80::1%eth0", listener="tunnel-agent") == []


OUTLANDISH = [10**40, -(10**40), 1e300, True, [10**40], {"a": {"b": []}}, "\0", None]
KEYS_OF_REQUESTS = (
    *("ids", "user", "client", "listener", "upstream", "target", "flow", "about", "level"),
    *("via", "servers", "settings", "reset", "name", "for", "clear", "udp"),
)


@pytest.mark.parametrize("value", OUTLANDISH, ids=str)
def test_outlandish_values_are_answered_or_refused(
    daemon: Running, tell: Callable[..., Any], value: object
) -> None:
    """JSON has numbers of any length, and a client may write any value behind any key."""
    commands = ("status", "connections", "kill", "explain", "why", "test", "nat", "verdicts")
    for command in (*commands, "log", "limit", "ban", "unban", "traffic", "users", "clients"):
        try:
            tell(command, **dict.fromkeys(KEYS_OF_REQUESTS, value))
        except CommandError as error:
            assert "internal error" not in str(error), command
    assert not daemon.log.faults


def test_number_or_nesting_that_json_cannot_hold_is_no_request(
    daemon: Running, tmp_path: Path
) -> None:
    for line in (b"9" * 5000, b"[" * 50_000, b'{"command": "log", "level": ' + b"[" * 9000):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SECONDS)
            client.connect(str(tmp_path / "control"))
            client.sendall(line + b"\n")
            assert b'"error": "unknown command' in client.recv(4096)


@pytest.mark.parametrize("answer", [b"5", b"[" * 50_000, b"9" * 5000, b"{}", b'{"result": ['])
def test_answer_of_another_program_is_told(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "other"))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(answer + b"\n")

        task = Task(serve)
        with pytest.raises(NotRunning, match="no answer|is no netproxyd"):
            ask(str(tmp_path / "other"), "status")
        task.result()


def request(port: int, line: bytes) -> tuple[str, str]:
    """Send an HTTP request; return the field Netproxy-Id of the answer, and its text."""
    with socket.create_connection(("127.0.0.1", port), SECONDS) as client:
        client.sendall(line + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        head, _, text = read_to_end(client).decode().partition("\r\n\r\n")
    found = re.search(r"^Netproxy-Id: (\S+)$", head.replace("\r", ""), re.M)
    return found[1] if found else "", text


class TestWhy:
    def test_failed_dial_is_found_by_the_id_that_the_client_was_told(
        self, daemon: Running, tell: Callable[..., Any]
    ) -> None:
        with listen() as sock:
            target = f"127.0.0.1:{sock.getsockname()[1]}"
        name, text = request(daemon.port, f"GET http://{target}/".encode())
        assert name and text == f"connection refused (id {name})\n"
        (row,) = tell("why", about=name)["incidents"]
        assert (row["kind"], row["asked"], row["reason"]) == ("failed", target, text[:18])
        assert (row["rule"], row["upstream"]) == ("default", "direct")
        assert row["tried"] == [[target, "connection refused"]] and row["advice"]
        assert tell("why", about=target)["incidents"] == [row]
        assert tell("why", about="10.0.0.1")["incidents"] == []

    @pytest.mark.parametrize(
        "line, kind, said",
        [
            (b"CONNECT 127.0.0.1:25", "refused", "CONNECT to port 25 is not allowed"),
            (b"GET http://%s/", "failed", "the connection would loop back to this proxy"),
        ],
    )
    def test_refused_request_has_one_record_one_id_and_one_incident(
        self, daemon: Running, tell: Callable[..., Any], line: bytes, kind: str, said: str
    ) -> None:
        if b"%s" in line:
            line %= str(metrics_address(daemon)).encode()
        name, text = request(daemon.port, line)
        assert text == f"{said} (id {name})\n"
        (row,) = tell("why")["incidents"]
        assert (row["id"], row["kind"], row["listener"]) == (name, kind, "main")

    def test_client_with_a_wrong_login_is_told_no_id(
        self, daemon: Running, tell: Callable[..., Any]
    ) -> None:
        line = b"GET http://x/ HTTP/1.1\r\nProxy-Authorization: Basic ZXZlOnNlY3JldA=="
        name, text = request(daemon.port, line)
        assert (name, "id " in text) == ("", False)
        assert tell("why")["incidents"] == []

    def test_answer_is_printed_as_text_and_as_json(
        self, daemon: Running, ctl: Callable[..., tuple[int, str, str]]
    ) -> None:
        name, _ = request(daemon.port, b"CONNECT 127.0.0.1:25")
        status, out, err = ctl("why", "127.0.0.1")
        assert (status, err) == (0, "") and out.startswith(f"{name}  refused, ")
        assert json.loads(ctl("why", name, "--json")[1])["incidents"][0]["id"] == name
        assert ctl("why", "10.9.9.9")[1].startswith("nothing of '10.9.9.9' is among the last 1 ")


class TestCommandLine:
    def test_lists_are_printed(
        self, daemon: Running, ctl: Callable[..., tuple[int, str, str]], echo: Address
    ) -> None:
        with Tunnel(daemon.port, echo), Tunnel(daemon.port, echo, ("alice", "secret")):
            status, out, err = ctl("connections", "--sort", "user", "-n", "1")
            assert (status, err, out.count("\n")) == (0, "", 2)
            assert (
                json.loads(ctl("connections", "--user", "alice", "--json")[1])[0]["user"] == "alice"
            )
            assert ctl("sessions")[1].startswith("id  listener")
            assert ctl("status")[1].startswith("netproxyd ")
            assert ctl("upstreams")[1].startswith("name ")
            assert ctl("top", "-b")[1].count("\n") == 6
            assert ctl("kill", "--user", "alice") == (0, "1 killed\n", "")
            assert ctl("kill", "77") == (1, "", "netproxyctl: no such flow\n")

    def test_level_of_the_log_is_printed_and_set(
        self, daemon: Running, ctl: Callable[..., tuple[int, str, str]]
    ) -> None:
        assert ctl("log") == (0, "info\n", "")
        assert ctl("log", "debug") == (0, "debug\n", "")
        assert daemon.log.level == "debug"
        with pytest.raises(SystemExit) as caught:
            ctl("log", "loud")
        assert caught.value.code == 64

    def test_negative_number_of_lines_is_a_usage_error(
        self, ctl: Callable[..., tuple[int, str, str]]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            ctl("connections", "-n", "-1")
        assert caught.value.code == 64

    def test_missing_daemon_is_status_3(
        self, ctl: Callable[..., tuple[int, str, str]], tmp_path: Path
    ) -> None:
        assert ctl("status") == (
            3,
            "",
            f"netproxyctl: {tmp_path / 'control'}: No such file or directory\n",
        )


class TestSignals:
    """What only the main thread may do.  The signal goes to the test, which does it."""

    @pytest.fixture
    def signals(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
        sent: list[int] = []
        monkeypatch.setattr(commands.os, "kill", lambda pid, number: sent.append(number))
        yield sent

    def test_reload_is_answered_with_its_errors(
        self, daemon: Running, signals: list[int], ctl: Callable[..., tuple[int, str, str]]
    ) -> None:
        answers: list[tuple[int, str, str]] = []
        for errors in ([], ["file:1:1: wrong", "file:2:1: wrong too"]):
            thread = threading.Thread(target=lambda: answers.append(ctl("reload")), name="test-ctl")
            thread.start()
            wait_until(lambda: signals)
            assert signals == [signal.SIGHUP]
            signals.clear()
            daemon.daemon.begin_reload()(errors)
            thread.join(SECONDS)
        assert [answer[0] for answer in answers] == [0, 1]
        assert answers[0][1] == "reloaded\n"
        assert answers[1][2] == "netproxyctl: file:1:1: wrong\nnetproxyctl: file:2:1: wrong too\n"
        assert "the last reload failed" in ctl("status")[1]
        assert value(daemon, "netproxy_config_last_reload_successful") == 0

    def test_drain_is_answered_before_it_begins(
        self, daemon: Running, signals: list[int], ctl: Callable[..., tuple[int, str, str]]
    ) -> None:
        assert ctl("drain") == (0, "draining: 0 connections may finish\n", "")
        wait_until(lambda: signals == [signal.SIGTERM])

    def test_second_drain_is_refused(
        self, daemon: Running, signals: list[int], ctl: Callable[..., tuple[int, str, str]]
    ) -> None:
        daemon.daemon.stop_accepting()
        assert ctl("drain") == (1, "", "netproxyctl: the daemon is draining\n")
        assert not signals

    def test_reload_is_refused_while_the_daemon_drains(
        self, daemon: Running, signals: list[int], ctl: Callable[..., tuple[int, str, str]]
    ) -> None:
        daemon.daemon.stop_accepting()
        assert ctl("reload") == (1, "", "netproxyctl: the daemon is draining\n")
        assert not signals
        assert get(daemon, "/readyz", "") == (503, "draining\n")


class TestFigures:
    def test_upstream_that_was_never_used_is_neither_up_nor_down(
        self, daemon: Running, tell: Callable[..., Any]
    ) -> None:
        rows = {row["name"]: row for row in tell("upstreams")}
        assert (rows["gone"]["state"], rows["gone"]["latency"]) == ("unused", None)
        text = get(daemon, "/metrics")[1]
        assert 'netproxy_upstream_unused{upstream="gone"} 1\n' in text
        assert 'netproxy_upstream_dials_total{upstream="gone"} 0\n' in text
        assert "netproxy_upstream_up{" not in text and "netproxy_upstream_latency" not in text
        tell("test", target="127.0.0.1:9", via="gone")
        text = get(daemon, "/metrics")[1]
        assert 'netproxy_upstream_up{upstream="gone"} 0\n' in text
        assert 'netproxy_upstream_unused{upstream="gone"} 0\n' in text

    def test_counters_of_ordinary_reasons_exist_from_the_start(self, daemon: Running) -> None:
        text = get(daemon, "/metrics")[1]
        for series in (
            'dial_failures_total{reason="timed out"}',
            'datagrams_dropped_total{reason="unknown sender"}',
            'authentication_failures_total{reason="refused"}',
            'tcp_bytes_total{listener="main",upstream="direct",direction="up"}',
            'udp_datagrams_total{listener="main",upstream="direct",direction="down"}',
            'dial_seconds_count{upstream="direct"}',
        ):
            assert f"netproxy_{series} 0\n" in text

    def test_every_panel_of_the_dashboard_has_data_from_the_first_scrape(
        self, daemon: Running
    ) -> None:
        found = set(re.findall(r"^(\w+)", get(daemon, "/metrics")[1], re.M))
        dashboard = json.loads((ROOT / "conf/grafana/netproxy.json").read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                names = set(re.findall(r"\b(?:netproxy|process)_[a-z_]+\b", target["expr"]))
                # Of an upstream, one of both is there.
                if "netproxy_upstream_unused" in names:
                    names -= {"netproxy_upstream_up"}
                assert names <= found, panel["title"]

    def test_status_tells_in_words_what_has_happened(
        self,
        daemon: Running,
        tell: Callable[..., Any],
        ctl: Callable[..., tuple[int, str, str]],
        echo: Address,
    ) -> None:
        request(daemon.port, b"CONNECT 127.0.0.1:25")
        with Tunnel(daemon.port, echo) as tunnel:
            tunnel.check(b"12345678")
            # Of a flow that is running.
            wait_until(lambda: tell("status")["bytes"] == {"up": 8, "down": 8})
            out = ctl("status")[1]
        assert "\n8 B to targets, 8 B to clients\n" in out
        assert re.search(r"^requests refused +forbidden +1$", out, re.M)
        assert "{" not in out


class TestMetrics:
    def test_metrics_of_connections(self, daemon: Running, echo: Address) -> None:
        labels = '{listener="main",upstream="direct"'
        with Tunnel(daemon.port, echo) as tunnel:
            tunnel.check(b"12345678")
            assert value(daemon, f"netproxy_tcp_flows{labels}}}") == 1
            assert value(daemon, f'netproxy_tcp_bytes_total{labels},direction="up"}}') == 8
            assert value(daemon, 'netproxy_connections{listener="main"}') == 1
        wait_until(lambda: not value(daemon, f"netproxy_tcp_flows{labels}}}"))
        assert value(daemon, f"netproxy_tcp_flows_total{labels}}}") == 1
        assert value(daemon, f'netproxy_tcp_bytes_total{labels},direction="down"}}') == 8
        assert value(daemon, 'netproxy_dial_seconds_count{upstream="direct"}') == 1
        assert value(daemon, 'netproxy_connections_total{listener="main"}') == 1

    def test_metrics_of_datagrams_while_their_session_runs(self, daemon: Running) -> None:
        with UdpPort() as target, UdpClient(daemon.port) as client:
            for _ in range(3):
                client.to(target.address, b"ping")
                target.expect(b"ping")
            labels = '{listener="main",upstream="direct"'
            assert value(daemon, f'netproxy_udp_datagrams_total{labels},direction="up"}}') == 3
            assert value(daemon, f'netproxy_udp_bytes_total{labels},direction="up"}}') == 12
            assert value(daemon, f"netproxy_udp_sessions{labels}}}") == 1

    def test_clients_and_targets_make_no_series(self, daemon: Running, echo: Address) -> None:
        """Hazard 117."""

        def series() -> set[str]:
            return {
                line.rpartition(" ")[0]
                for line in get(daemon, "/metrics")[1].splitlines()
                if not line.startswith("#")
            }

        def visit(port: int) -> None:
            with Tunnel(daemon.port, Address("127.0.0.1", port)):
                pass

        visit(echo.port)
        visit(1)
        wait_until(lambda: daemon.log.records and not daemon.daemon.flows.live())
        before = series()
        for port in range(2, 40):
            visit(port)
            visit(echo.port)
        wait_until(lambda: not daemon.daemon.flows.live())
        assert series() == before

    @pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
    def test_promtool_accepts_the_metrics_of_a_daemon(self, daemon: Running, echo: Address) -> None:
        with Tunnel(daemon.port, echo), Tunnel(daemon.port, Address("127.0.0.1", 1)):
            text = get(daemon, "/metrics")[1]
        result = subprocess.run(
            ["promtool", "check", "metrics"], input=text.encode(), capture_output=True, timeout=60
        )
        assert (result.returncode, result.stdout + result.stderr) == (0, b"")

    def test_no_answer_has_a_secret(
        self, daemon: Running, tell: Callable[..., Any], echo: Address
    ) -> None:
        """Hazard 111."""
        with (
            Tunnel(daemon.port, echo, ("alice", "secret")),
            Tunnel(daemon.port, echo, ("alice", "guessed-wrong")),
        ):
            told = (
                get(daemon, "/metrics")[1]
                + get(daemon, "/status.json")[1]
                + get(daemon, "/")[1]
                + json.dumps(
                    [
                        tell(command)
                        for command in ("status", "connections", "sessions", "upstreams", "traffic")
                    ]
                )
                + repr(daemon.log.lines)
            )
        for secret in (TOKEN, "secret", "guessed-wrong"):
            assert secret not in told
        assert "auth_failed client=127.0.0.1 user=alice listener=main" in daemon.log.lines


def test_metrics_listener_is_not_reached_through_the_proxy(daemon: Running) -> None:
    """Hazard 115."""
    with Tunnel(daemon.port, metrics_address(daemon)) as tunnel:
        assert tunnel.reply == socks5.REPLIES[Reason.LOOP]


class TestStatusPage:
    def test_status_json_has_flows_upstreams_and_trouble(
        self, daemon: Running, echo: Address
    ) -> None:
        with Tunnel(daemon.port, echo) as tunnel, Tunnel(daemon.port, Address("127.0.0.1", 1)):
            tunnel.check()
            wait_until(lambda: json.loads(get(daemon, "/status.json")[1])["bytes"]["down"])
            now = json.loads(get(daemon, "/status.json")[1])
        assert (now["state"], now["flows_live"], now["bytes"]) == (
            "serving",
            1,
            {"up": 4, "down": 4},
        )
        assert [row["target"] for row in now["flows"]] == [str(echo)]
        assert ["targets not reached", "connection refused", 1] in now["trouble"]
        assert now["failures"][0]["why"] == "connection refused"
        assert [row["name"] for row in now["upstreams"]] == ["default", "gone"]


class TestReload:
    def test_servers_follow_the_configuration(
        self, daemon: Running, text: str, tmp_path: Path, tell: Callable[..., Any]
    ) -> None:
        admin = daemon.daemon._admin
        before = admin.servers.metrics
        assert before is not None
        daemon.reload(text.replace(TOKEN, "f" * 20))
        assert admin.servers.metrics is before
        assert get(daemon, "/metrics")[0] == 401
        assert get(daemon, "/metrics", "f" * 20)[0] == 200
        daemon.reload("listeners: [{listen: '127.0.0.1:0', name: main}]")
        assert not before.server.thread.is_alive()
        with pytest.raises(NotRunning):
            tell("status")
        assert not (tmp_path / "control").exists()
        daemon.reload(text)
        assert get(daemon, "/metrics")[0] == 200
        assert tell("status")["state"] == "serving"
        assert not daemon.daemon.dead_thread()

    def test_new_metrics_listener_asks_for_its_own_token_at_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It answers before its configuration applies; the one before, on loopback, had none."""
        served, answered = "listeners: [{listen: '127.0.0.1:0'}]\n", []
        bind = Admin.bind

        def bind_and_ask(admin: Admin, config: Any) -> Any:
            prepared = bind(admin, config)
            ((_, address),) = prepared.sockets
            with socket.create_connection(address, SECONDS) as client:
                client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                answered.append(read_to_end(client).split(b" ")[1])
            return prepared

        monkeypatch.setattr(Admin, "bind", bind_and_ask)
        with running(f"metrics: 127.0.0.1:0\n{served}") as daemon:
            daemon.reload(f"metrics: 127.0.0.2:0\nmetrics_token: {TOKEN}\n{served}")
        assert answered == [b"200", b"401"]

    def test_reload_without_threads_changes_nothing(
        self, daemon: Running, text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 94."""

        def fail(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(ListenError, match="metrics 127.0.0.2:0: can't start new thread"):
                daemon.reload(text.replace("metrics: 127.0.0.1:0", "metrics: 127.0.0.2:0"))
        assert get(daemon, "/readyz", "") == (200, "serving\n")

    @pytest.mark.parametrize(
        "number, what",
        [
            (1, "control unix:.*/other"),
            (2, "metrics 127.0.0.2:0"),
            (3, "tunnel agent"),
            (4, "cannot start a listener"),
            (5, "cannot start a listener"),
        ],
    )
    def test_reload_without_its_nth_thread_changes_nothing(
        self,
        daemon: Running,
        text: str,
        tmp_path: Path,
        tell: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        number: int,
        what: str,
    ) -> None:
        """Hazard 94.  `number`: which of the threads that the reload starts."""
        started: list[threading.Thread] = []
        start = threading.Thread.start

        def fail(thread: threading.Thread) -> None:
            started.append(thread)
            if len(started) == number:
                raise RuntimeError("can't start new thread")
            start(thread)

        wanted = (
            text.replace("metrics: 127.0.0.1:0", "metrics: 127.0.0.2:0")
            .replace("/control", "/other")
            .replace("'127.0.0.1:0'", "'127.0.0.2:0'")
            + f"tunnel: {{agent: {{bridge: 'tcp://127.0.0.1:1', name: home, token: {TOKEN},"
            " exit: true}}\n"
        )
        before = daemon.daemon.summary()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(ListenError, match=f"{what}: can't start new thread"):
                daemon.reload(wanted)
        assert len(started) == number and not any(thread.is_alive() for thread in started)
        assert (tell("status")["state"], daemon.daemon.summary()) == ("serving", before)
        assert not (tmp_path / "other").exists()
        assert daemon.daemon.tunnels()["agent"] is None and not daemon.daemon.dead_thread()
        assert get(daemon, "/readyz", "") == (200, "serving\n")
        daemon.reload(wanted)
        assert daemon.daemon.tunnels()["agent"]["name"] == "home"
        assert ask(str(tmp_path / "other"), "status")["state"] == "serving"

    def test_reload_with_a_port_in_use_changes_nothing(
        self, daemon: Running, text: str, tmp_path: Path, tell: Callable[..., Any]
    ) -> None:
        with listen() as taken:
            port = taken.getsockname()[1]
            with pytest.raises(
                ListenError, match=f"metrics 127.0.0.1:{port}: Address already in use"
            ):
                daemon.reload(
                    text.replace("metrics: 127.0.0.1:0", f"metrics: 127.0.0.1:{port}").replace(
                        "/control", "/other"
                    )
                )
            with pytest.raises(ListenError, match=f"tcp 127.0.0.1:{port}"):
                daemon.reload(
                    text.replace("'127.0.0.1:0'", f"'127.0.0.1:{port}'").replace(
                        "/control", "/other"
                    )
                )
        assert not (tmp_path / "other").exists()
        assert tell("status")["state"] == "serving"
        assert get(daemon, "/readyz", "") == (200, "serving\n")
