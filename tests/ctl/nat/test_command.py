"""The command netproxyctl nat: its servers, what it asks the daemon, its exit status."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Callable

import pytest

from netproxy import cli
from netproxy.admin.nat import sockets
from netproxy.admin.nat.report import ADDRESS_DEPENDENT, ENDPOINT_INDEPENDENT, Lifetime, Report
from netproxy.interfaces.addresses import Address
from netproxy.ctl.account_commands import WrongUsage
from netproxy.ctl.command_line import control_parser
from netproxy.ctl.nat import command
from netproxy.ctl.nat.command import run
from tests.support.stun import Script, stun_server

Ctl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ctl(capsys: pytest.CaptureFixture[str]) -> Ctl:
    """Run netproxyctl nat; return its exit status, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        return (cli.control_main(["nat", *arguments]), *capsys.readouterr())

    return run


def ask_with(report: Report, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Run the command through a daemon that answers with `report`; return what it was asked."""
    asked: list[dict[str, Any]] = []

    def ask(name: str, **details: Any) -> Any:
        asked.append({"command": name, **details})
        return json.loads(json.dumps(report.as_json()))

    options = control_parser(cli.DEFAULT_FILE).parse_args(["nat", *arguments])
    return run(options, ask), asked


def test_machine_is_tested_without_a_daemon(ctl: Ctl) -> None:
    with stun_server() as server:
        status, out, err = ctl("--server", str(server.first))
    assert (status, err) == (0, "")
    assert out.startswith("IPv4 from this machine\n\nserver ")
    assert "\nNAT               no\n" in out


def test_results_are_printed_as_json(ctl: Ctl) -> None:
    with stun_server() as server:
        status, out, _ = ctl("--server", str(server.first), "--json")
    (result,) = json.loads(out)
    assert (status, result["via"], result["family"], result["nat"]) == (0, "", "IPv4", False)
    assert result["mapping"] == result["filtering"] == ENDPOINT_INDEPENDENT
    assert result["servers"][0]["software"] == "scripted"


def test_name_of_a_server_is_looked_up(ctl: Ctl) -> None:
    with stun_server(["127.0.0.1"], Script(second=False)) as server:
        port = server.first.port
        status, out, err = ctl("--server", f"localhost:{port}", "--server", f"127.0.0.1:{port}")
    assert (status, err) == (0, "")
    assert f"127.0.0.1:{port}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server", "a b"], "nat: --server: 'a b' is not a server"),
        (["--server", "a"] * 9, "nat: --server: expected 1 to 8 servers"),
    ],
)
def test_wrong_servers_are_an_error_of_usage(ctl: Ctl, arguments: list[str], message: str) -> None:
    status, out, err = ctl(*arguments)
    assert (status, out) == (64, "")
    assert err.startswith(f"netproxyctl: {message}")


class TestServersOfTheDaemon:
    """Without --server those of its listeners are asked."""

    REPORT = Report([], works=True, mapping=ENDPOINT_INDEPENDENT)

    def ask(self, *servers: str) -> Callable[..., Any]:
        def ask(name: str, **details: Any) -> Any:
            if name == "known":
                return {"stun": list(servers)}
            self.details = details
            return self.REPORT.as_json()

        return ask

    @pytest.mark.parametrize("count", [1, 20])
    def test_at_most_eight_of_them_are_asked(self, count: int) -> None:
        servers = [f"192.0.2.{number}:3478" for number in range(count)]
        options = control_parser(cli.DEFAULT_FILE).parse_args(["nat", "--via", "x", "--json"])
        assert run(options, self.ask(*servers)) == 0
        assert self.details == {"via": "x", "servers": servers[:8]}

    def test_daemon_without_any_is_an_error_of_usage(self) -> None:
        options = control_parser(cli.DEFAULT_FILE).parse_args(["nat"])
        with pytest.raises(WrongUsage, match="give --server HOST .* or set 'stun' of a listener"):
            run(options, self.ask())

    def test_daemon_that_does_not_run_has_none(self, tmp_path: Path, capsys: Any) -> None:
        missing = str(tmp_path / "control")
        assert cli.control_main(["-s", missing, "nat"]) == 64
        assert "no server to ask" in capsys.readouterr().err
        assert cli.control_main(["-s", missing, "nat", "--via", "office"]) == 3


def test_unknown_name_is_told(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert ctl("--server", "nosuch.invalid") == (
        1,
        "",
        "netproxyctl: nosuch.invalid: Name or service not known\n",
    )


def test_machine_without_sockets_of_a_family_is_told(
    ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(sockets.SocketTransport, "_open", refuse)
    status, _, err = ctl("--server", "[::1]")
    assert (status, err) == (1, "netproxyctl: IPv6: Address family not supported by protocol\n")


def test_family_without_a_route_is_left_out(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    send = sockets.SocketTransport.send

    def refuse_ipv6(self: Any, port: int, target: Any, data: bytes) -> None:
        if ":" in target.host:
            raise command.ServerError("network is unreachable")
        send(self, port, target, data)

    monkeypatch.setattr(sockets.SocketTransport, "send", refuse_ipv6)
    with stun_server() as server:
        status, out, _ = ctl("--server", str(server.first), "--server", "[2001:db8::1]", "--json")
    assert (status, [result["family"] for result in json.loads(out)]) == (0, ["IPv4"])
    # Without another family the error is the result.
    assert ctl("--server", "[2001:db8::1]")[0] == 5


def test_daemon_is_asked_about_an_upstream(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report([], works=True, external=["203.0.113.5:1"], mapping=ENDPOINT_INDEPENDENT)
    servers = ["--server", "stun.example", "--server", "[2001:db8::1]:1"]
    status, asked = ask_with(report, "--via", "office", *servers)
    assert status == 0
    assert asked == [
        {"command": "nat", "via": "office", "servers": ["stun.example:3478", "[2001:db8::1]:1"]}
    ]
    assert capsys.readouterr().out.startswith("UDP through upstream 'office'\n")


@pytest.mark.parametrize(
    ("report", "status"),
    [
        (Report([]), 5),
        (Report([], works=True), 0),
        (Report([], works=True, mapping=ENDPOINT_INDEPENDENT), 0),
        (Report([], works=True, mapping=ADDRESS_DEPENDENT), 4),
    ],
)
def test_exit_status_tells_the_result(report: Report, status: int) -> None:
    assert ask_with(report, "--via", "office", "--server", "a", "--json")[0] == status


class TestLifetime:
    @pytest.fixture(autouse=True)
    def _measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Address] = []

        def measure(server: Address, transport: object) -> Lifetime:
            self.asked.append(server)
            return Lifetime(25, 35)

        monkeypatch.setattr(command, "measure_lifetime", measure)

    def test_lifetime_is_measured_behind_a_nat(
        self, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def behind_a_nat(self: object, target: object) -> list[Address]:
            return [Address("10.0.0.2", 1), Address("10.0.0.2", 2)]

        monkeypatch.setattr(sockets.SocketTransport, "local", behind_a_nat)
        with stun_server(["127.0.0.1"], Script(second=False)) as lone, stun_server() as server:
            servers = ("--server", str(lone.first), "--server", str(server.first))
            status, out, err = ctl(*servers, "--lifetime", "--json")
        assert (status, self.asked) == (0, [server.first])
        assert err == "netproxyctl: IPv4: waiting for mappings to expire: up to 5 minutes\n"
        (result,) = json.loads(out)
        assert result["lifetime"] == {"alive": 25, "expired": 35, "unknown": ""}

    def test_machine_without_nat_has_no_mappings(self, ctl: Ctl) -> None:
        with stun_server() as server:
            status, out, err = ctl("--server", str(server.first), "--lifetime", "--json")
        assert (status, err, self.asked) == (0, "", [])
        assert json.loads(out)[0]["lifetime"] is None

    def test_upstream_is_not_measured(self, ctl: Ctl) -> None:
        status, _, err = ctl("--server", "a", "--via", "office", "--lifetime")
        assert (status, "not for --via" in err) == (64, True)


def test_interrupt_ends_the_command(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "probe_nat", interrupt)
    assert ctl("--server", "127.0.0.1") == (130, "", "")


def test_upstream_without_a_daemon_is_an_error(tmp_path: Path) -> None:
    missing = str(tmp_path / "control")
    assert cli.control_main(["-s", missing, "nat", "--via", "office", "--server", "a"]) == 3
