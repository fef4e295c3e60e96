"""Two daemons that stand for the workers of one, asked over one control socket."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from netproxy.admin.commands import all_commands
from netproxy.admin.control.ask import ask_with_warnings
from netproxy.admin.control.client import CommandError
from netproxy.admin.content import DaemonContent
from netproxy.admin.servers import Admin
from netproxy.admin.workers.content import PRELOADED, WorkersContent, preload
from netproxy.admin.workers.lines import WorkerLine, WorkerLines
from netproxy.admin.workers.questions import serve_questions
from netproxy.admin.workers.report import begin_in_child, worker_commands
from netproxy.admin.workers.reports import Reports
from netproxy.admin.workers.view import WorkerInfo
from netproxy.config.schema import Config
from netproxy.ctl import account_commands
from netproxy.interfaces.addresses import Address
from netproxy.observe.incidents import REFUSED
from netproxy.interfaces.services import DaemonState
from tests.daemon.test_daemon import Tunnel
from tests.support.handlers import RecordingLog
from tests.support.relays import UdpClient, UdpPort, running
from tests.support.sockets import SECONDS, wait_until
from tests.support.stun import Script, stun_server
from tests.support.workers import PATIENCE, Parent

pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[3]
TEXT = (
    "listeners: [{listen: '127.0.0.1:0', name: main, auth: optional}]\n"
    "users: {alice: {password: secret}, bob: {password: secret}}\n"
    "upstreams: {gone: 'socks5://127.0.0.1:1'}\n"
)
ALICE, BOB = ("alice", "secret"), ("bob", "secret")
Tell = Callable[..., Any]


class Whole:
    """The parent of two workers, which are threads here, with its control socket."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.daemons = [stack.enter_context(running(TEXT)) for _ in range(2)]
        self.parent = Parent()
        self.parent.config = self.daemons[0].daemon.config
        self.log: Any = RecordingLog()
        self.lines = WorkerLines()
        self.threads = []
        for index, daemon in enumerate(self.daemons):
            begin_in_child(daemon.daemon, index, len(self.daemons), 0)
            ours, theirs = socket.socketpair()
            log: Any = daemon.log
            commands = worker_commands(daemon.daemon, log)
            self.threads.append(serve_questions(theirs, commands, daemon.log))
            self.lines.replace(WorkerLine(index, ours))
        self.guard = threading.Lock()
        self.reports = Reports(self.parent, self.lines, self.log, self.guard)
        content = WorkersContent(self.parent, self.lines, self.reports, self.log, self.guard)
        self.admin = Admin(content, self.log)
        self.admin.bind(Config(control=str(path), listeners=())).commit()

    @property
    def ports(self) -> list[int]:
        return [daemon.port for daemon in self.daemons]

    def tunnels(self, echo: Address, *logins: tuple[str, str] | None) -> ExitStack:
        """Open a connection to each worker in turn."""
        stack = ExitStack()
        for number, login in enumerate(logins):
            port = self.ports[number % len(self.ports)]
            stack.enter_context(Tunnel(port, echo, login)).check()
        return stack

    def add_silent(self) -> None:
        """Add a worker that never answers."""
        ours, self.silent = socket.socketpair()
        self.lines.replace(WorkerLine(2, ours))
        self.parent.infos.append(WorkerInfo(2, 77, 1, True))

    def close(self) -> None:
        self.admin.stop()
        self.lines.close()
        for thread in self.threads:
            thread.join(SECONDS)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account_commands, "SECONDS", 0.0)


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Whole]:
    monkeypatch.setattr(WorkerLines.ask_all, "__defaults__", (PATIENCE,))
    with ExitStack() as stack:
        whole = Whole(tmp_path / "control", stack)
        stack.callback(whole.close)
        yield whole


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait long for what never comes."""
    monkeypatch.setattr(WorkerLines.ask_all, "__defaults__", (1.0,))


def test_commands_are_those_of_a_daemon_of_one_process() -> None:
    none: Any = None
    alone = DaemonContent(none, none).commands(none, none)
    merged = WorkersContent(none, none, none, none, none).commands(none, none)
    assert list(merged) == list(alone)
    # Users never see the command of the workers.
    assert "report" not in merged
    assert set(all_commands({}, none, none, none, none)) < set(merged)


class TestFlows:
    def test_connections_of_all_workers_are_listed_and_their_ids_differ(
        self, whole: Whole, tell: Tell, echo: Address
    ) -> None:
        with whole.tunnels(echo, None, None, ALICE, None):
            assert {row["id"] for row in tell("connections")} == {1, 2, 3, 4}
            assert {row["id"] for row in tell("flows", ids=[2, 3])} == {2, 3}
            assert [row["id"] for row in tell("connections", user="alice")] == [3]
        assert tell("sessions") == []

    def test_successor_gives_its_flows_other_ids(
        self, whole: Whole, tell: Tell, echo: Address
    ) -> None:
        begin_in_child(whole.daemons[1].daemon, 1, 2, 3)
        with whole.tunnels(echo, None, None):
            assert {row["id"] for row in tell("connections")} == {1, 6_000_002}

    def test_sessions_of_all_workers_are_listed(self, whole: Whole, tell: Tell) -> None:
        with (
            UdpPort() as target,
            UdpClient(whole.ports[0]) as one,
            UdpClient(whole.ports[1]) as other,
        ):
            one.check_echo(target, b"ping")
            other.check_echo(target, b"ping")
            assert len(tell("sessions")) == 2
            assert tell("status")["sessions"] == 2

    def test_flow_is_killed_wherever_it_is(self, whole: Whole, tell: Tell, echo: Address) -> None:
        with whole.tunnels(echo, None, None, ALICE, ALICE):
            assert tell("kill", ids=[2]) == {"killed": 1}
            wait_until(lambda: len(tell("connections")) == 3)
            assert tell("kill", user="alice") == {"killed": 2}
            with pytest.raises(CommandError, match=r"\Ano such flow\Z"):
                tell("kill", ids=[2])
            with pytest.raises(CommandError, match="nothing to kill"):
                tell("kill")
            with pytest.raises(CommandError, match="ids: not a list of numbers"):
                tell("kill", ids=["all"])

    def test_level_of_the_log_is_set_everywhere(self, whole: Whole, tell: Tell) -> None:
        assert tell("log") == {"level": "info"}
        assert tell("log", level="debug") == {"level": "debug"}
        levels = [whole.log.level, *(daemon.log.level for daemon in whole.daemons)]
        assert levels == ["debug"] * 3
        with pytest.raises(CommandError, match="unknown level"):
            tell("log", level="loud")

    def test_one_worker_explains(self, whole: Whole, tell: Tell) -> None:
        assert "rule: none matches; " in tell("explain", flow="127.0.0.1:1 on main")[1]
        with pytest.raises(CommandError, match="not a flow"):
            tell("explain", flow="no sense")

    def test_one_worker_asks_about_the_nat_of_an_upstream(self, whole: Whole, tell: Tell) -> None:
        with stun_server(["127.0.0.1"], Script(second=False)) as server:
            answer = tell("nat", via="direct", servers=[str(server.first)])
        assert (answer["works"], len(server.requests)) == (True, 2)
        with pytest.raises(CommandError, match="no upstream 'nowhere'"):
            tell("nat", via="nowhere", servers=["127.0.0.1"])

    def test_incidents_of_all_processes_are_found(self, whole: Whole, tell: Tell) -> None:
        fields = {"reason": "forbidden", "asked": "a.example:25"}
        own = whole.parent.incidents.add(REFUSED, "192.0.2.1", fields)
        names = [
            daemon.daemon.incidents.add(REFUSED, f"192.0.2.{number}", fields)
            for number, daemon in enumerate(whole.daemons, 2)
        ]
        answer = tell("why", about="a.example")
        assert [row["id"] for row in answer["incidents"]] == [own, *names]
        assert answer["remembered"] == 1 + len(names)
        assert [row["id"] for row in tell("why", about="192.0.2.3")["incidents"]] == names[1:2]
        assert [row["id"] for row in tell("why", about=own)["incidents"]] == [own]

    def test_one_worker_tests_a_target(self, whole: Whole, tell: Tell, echo: Address) -> None:
        answer = tell("test", target=f"udp {echo} on main")
        assert answer["fine"] and answer["steps"][-1]["step"] == "session"
        with pytest.raises(CommandError, match="no upstream 'nix'"):
            tell("test", target=str(echo), via="nix")

    def test_verdicts_and_tunnels_are_merged(self, whole: Whole, tell: Tell) -> None:
        assert tell("verdicts") == []
        assert tell("verdicts", clear=True) == {"cleared": 0}
        assert tell("tunnels") == {"agents": [], "agent": None, "direct": []}


class TestStatistics:
    def test_status_has_sums_and_a_row_for_each_worker(
        self, whole: Whole, tell: Tell, ctl: Callable[..., tuple[int, str, str]], echo: Address
    ) -> None:
        with whole.tunnels(echo, None, None, None):
            status = tell("status")
            assert (status["state"], status["connections"]) == ("serving", 3)
            (row,) = status["listeners"]
            assert (row["name"], row["live"], row["accepted"]) == ("main", 3, 3)
            assert ["connections", "accepted", 3] in status["counters"]
            assert [row["connections"] for row in status["workers"]] == [2, 1]
            assert [line[:10] for line in status["lines"] if "parked=" in line] == [
                "worker 0: ",
                "worker 1: ",
            ]
            printed = ctl("status")[1].splitlines()
        at = next(number for number, line in enumerate(printed) if line.startswith("worker "))
        assert printed[at].split()[:3] == ["worker", "state", "process"]
        assert [line.split()[:3] for line in printed[at + 1 : at + 3]] == [
            ["0", "serving", "1000"],
            ["1", "serving", "1001"],
        ]

    def test_top_has_the_flows_of_all_workers_and_a_line_of_them(
        self, whole: Whole, ctl: Callable[..., tuple[int, str, str]], echo: Address
    ) -> None:
        with whole.tunnels(echo, None, None):
            status, out, err = ctl("top", "-b")
        assert (status, err) == (0, "")
        assert re.search(r"^workers 0: \d+%, 1: \d+%$", out, re.M)
        assert out.count(" tcp 127.0.0.1:") == 2

    def test_metrics_are_those_of_one_daemon(self, whole: Whole, tell: Tell, echo: Address) -> None:
        tell("ban", name="bob")
        with whole.tunnels(echo, ALICE, ALICE, None):
            text = whole.admin.stats.metrics().decode()
            alone = whole.daemons[0].daemon._admin.stats.metrics().decode()
        lines = text.splitlines()
        series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
        assert len(series) == len(set(series))
        assert {
            'netproxy_connections_total{listener="main"} 3',
            'netproxy_tcp_flows{listener="main",upstream="direct"} 3',
            'netproxy_tcp_bytes_total{listener="main",upstream="direct",direction="up"} 12',
            'netproxy_dial_seconds_count{upstream="direct"} 3',
            "netproxy_ready 1",
            "netproxy_workers 2",
            "netproxy_worker_restarts_total 0",
            "netproxy_active_users 1",
            "netproxy_active_clients 1",
            "netproxy_banned_users 1",
        } <= set(lines)
        # Same families, in the same order, with the same help.
        of_workers = "netproxy_worker"
        heads = [line for line in lines if line.startswith("#") and of_workers not in line]
        assert heads == [line for line in alone.splitlines() if line.startswith("#")]

    def test_state_of_an_upstream_is_1_and_not_the_number_of_workers(
        self, whole: Whole, tell: Tell
    ) -> None:
        lines = whole.admin.stats.metrics().decode().splitlines()
        assert 'netproxy_upstream_unused{upstream="gone"} 1' in lines
        assert not [line for line in lines if line.startswith("netproxy_upstream_up{")]
        assert [row["name"] for row in tell("upstreams")] == [
            row["name"] for row in whole.daemons[0].daemon.upstreams()
        ]

    def test_status_page_shows_all_workers(self, whole: Whole, echo: Address) -> None:
        whole.daemons[1].log.recent = ()
        with whole.tunnels(echo, ALICE, BOB, None):
            whole.reports.renew()
            page = json.loads(json.dumps(whole.admin.stats.page()))
        assert {flow["id"] for flow in page["flows"]} == {1, 2, 3}
        assert (page["flows_live"], page["connections"], len(page["workers"])) == (3, 3, 2)
        assert {row["name"] for row in page["users"]} == {"alice", "bob"}
        assert [row["name"] for row in page["clients"]] == ["127.0.0.1"]
        assert page["history"] == {"seconds": 300.0, "samples": []}


class TestAccounts:
    def test_users_have_their_flows_from_workers_and_their_bytes_from_the_parent(
        self, whole: Whole, tell: Tell, ctl: Callable[..., tuple[int, str, str]], echo: Address
    ) -> None:
        whole.parent.usage.moved("alice", 500, 600)
        with whole.tunnels(echo, ALICE, BOB):
            rows = {row["name"]: row for row in tell("users")["users"]}
            (client,) = tell("clients")["clients"]
            assert ctl("users", "-n", "1")[1].count("\n") == 2
        assert (rows["alice"]["connections"], rows["bob"]["connections"]) == (1, 1)
        assert rows["alice"]["total"] == {"up": 500, "down": 600}
        # The test's workers share no ledger: the greatest number of one of them.
        assert (client["name"], client["connections"]) == ("127.0.0.1", 1)

    def test_ban_ends_flows_of_all_workers_and_holds_for_successors(
        self, whole: Whole, tell: Tell, echo: Address
    ) -> None:
        with whole.tunnels(echo, ALICE, ALICE, BOB):
            answer = tell("ban", name="alice")
            assert answer == {"kind": "user", "name": "alice", "until": None, "ended": 2}
            wait_until(lambda: len(tell("connections")) == 1)
        assert tell("ban") == [{"kind": "user", "name": "alice", "until": None}]
        assert whole.parent.standing.refusal("alice", "") == "user banned"
        for daemon in whole.daemons:
            assert daemon.daemon.standing.refusal("alice", "") == "user banned"
        assert whole.log.lines == ["banned user alice until the next start: 2 flows ended"]
        assert tell("unban", name="alice") == {"unbanned": "alice"}
        for daemon in whole.daemons:
            assert not daemon.daemon.standing.refusal("alice", "")
        with pytest.raises(CommandError, match="'alice' is not banned"):
            tell("unban", name="alice")

    def test_limit_holds_in_all_workers_and_for_successors(self, whole: Whole, tell: Tell) -> None:
        answer = tell("limit", user="alice", settings=["connections=7"])
        assert answer == {"user": "alice", "limits": {"connections": 7}, "overridden": True}
        books = [whole.parent.accounts, *(daemon.daemon.accounts for daemon in whole.daemons)]
        assert [book.limits("alice").connections for book in books] == [7, 7, 7]
        assert tell("limit", user="alice", reset=True)["limits"] == {}
        assert not any(book.is_overridden("alice") for book in books)
        for details in ({"user": "carol"}, {"user": "alice", "settings": ["speed=1"]}):
            with pytest.raises(CommandError):
                tell("limit", **details)

    def test_ban_waits_while_a_successor_is_forked(self, whole: Whole, tell: Tell) -> None:
        done = threading.Event()

        def ban() -> None:
            tell("ban", name="alice")
            done.set()

        with whole.guard:
            thread = threading.Thread(target=ban, name="test-ban")
            thread.start()
            assert not done.wait(0.05)
            assert not whole.parent.standing.bans()[0]
        thread.join(PATIENCE)
        assert whole.parent.standing.bans()[0]


class TestSilentWorker:
    def test_lists_name_it_and_have_the_rest(
        self,
        whole: Whole,
        hasty: None,
        tmp_path: Path,
        ctl: Callable[..., tuple[int, str, str]],
        echo: Address,
    ) -> None:
        whole.add_silent()
        with whole.silent, whole.tunnels(echo, None, None):
            answer, warnings = ask_with_warnings(str(tmp_path / "control"), "connections")
            assert (len(answer), warnings) == (2, ["worker 2 does not answer"])
            status, out, err = ctl("connections")
            assert (status, out.count("\n")) == (0, 3)
            assert err == "netproxyctl: worker 2 does not answer\n"
            assert re.search(r"^2 +silent +77 ", ctl("status")[1], re.M)

    def test_change_names_it(
        self, whole: Whole, hasty: None, ctl: Callable[..., tuple[int, str, str]]
    ) -> None:
        whole.add_silent()
        with whole.silent:
            status, out, err = ctl("ban", "alice")
            assert (status, err) == (0, "netproxyctl: worker 2 does not answer\n")
            assert out.startswith("user alice banned")
            assert ctl("kill", "99") == (
                1,
                "",
                "netproxyctl: no such flow; worker 2 does not answer\n",
            )

    def test_without_any_answer_lists_are_refused_and_status_is_not(
        self, whole: Whole, tell: Tell
    ) -> None:
        whole.reports.renew()
        for line in whole.lines.current():
            line.close()
        with pytest.raises(CommandError, match="worker 0 does not answer; worker 1 does not"):
            tell("connections")
        with pytest.raises(CommandError, match="worker 0 does not answer; worker 1 does not"):
            tell("explain", flow="127.0.0.1:1")
        assert [row["state"] for row in tell("status")["workers"]] == ["silent", "silent"]


class TestService:
    def test_reload_and_drain_are_refused_while_the_workers_do_not_serve(
        self, whole: Whole, tell: Tell
    ) -> None:
        whole.parent.state = DaemonState.DRAINING
        for command in ("reload", "drain"):
            with pytest.raises(CommandError, match="the daemon is draining"):
                tell(command)
        assert tell("status")["state"] == "draining"


def test_preloaded_modules_exist() -> None:
    preload()
    assert len(PRELOADED) == len(set(PRELOADED))


def test_key_of_rotation_is_made_before_the_first_fork() -> None:
    """All workers choose the same address for a client, also if a reload brings the first bind."""
    code = (
        "import sys; from netproxy.admin.workers.content import preload; preload()\n"
        "print('netproxy.dialer.plain.rotation' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True\n", done.stderr
