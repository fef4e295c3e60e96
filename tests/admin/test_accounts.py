"""Users, clients, limits and bans, as netproxyctl sees and changes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from netproxy.admin.accounts import as_client, parse_limits
from netproxy.admin.control.client import CommandError
from netproxy.admin.stats.account_rows import subject_uses, user_rows
from netproxy.access.accounts.subject import USER
from netproxy.ctl import account_commands
from netproxy.errors import Reason
from netproxy.interfaces.addresses import Address
from netproxy.protocol import socks5
from tests.daemon.test_daemon import Tunnel
from tests.support.relays import Running, UdpClient, UdpPort, running
from tests.support.sockets import wait_until

pytest.importorskip("yaml")
Tell = Callable[..., Any]
Ctl = Callable[..., tuple[int, str, str]]
ALICE, BOB = ("alice", "secret"), ("bob", "secret")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account_commands, "SECONDS", 0.0)


@pytest.fixture
def text(tmp_path: Path) -> str:
    return (
        f"control: unix:{tmp_path / 'control'}\nstate: {tmp_path / 'state'}\n"
        "listeners: [{listen: '127.0.0.1:0', name: main, auth: optional}]\n"
        "users:\n"
        "  alice: {password: secret, limits: {connections: 5, quota: {day: 1MB, total: 900kB}}}\n"
        "  bob: {password: secret}\n"
    )


@pytest.fixture
def daemon(text: str, tmp_path: Path) -> Iterator[Running]:
    (tmp_path / "state").mkdir()
    with running(text) as daemon:
        yield daemon


def row_of(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (row,) = (row for row in rows if row["name"] == name)
    return row


class TestUsers:
    def test_users_have_their_flows_amounts_and_limits(
        self, daemon: Running, tell: Tell, echo: Address
    ) -> None:
        with Tunnel(daemon.port, echo, ALICE) as tunnel:
            tunnel.check(b"x" * 1000)
            wait_until(lambda: row_of(tell("users")["users"], "alice")["total"]["down"] == 1000)
            alice, bob = tell("users")["users"]
        moved = {"up": 1000, "down": 1000}
        assert alice == {
            "name": "alice",
            "connections": 1,
            "sessions": 0,
            "today": moved,
            "month": moved,
            "total": moved,
            "left": 898_000,
            "limits": {"connections": 5},
            "refused": "",
        }
        assert bob["name"] == "bob"
        assert (bob["connections"], bob["left"], bob["limits"]) == (0, None, {})

    def test_users_are_printed_by_rate_and_as_json(
        self, daemon: Running, ctl: Ctl, echo: Address
    ) -> None:
        with Tunnel(daemon.port, echo, BOB):
            status, out, err = ctl("users", "--sort", "flows", "-n", "1")
            assert (status, err) == (0, "")
            head, line = out.splitlines()
            assert head.startswith("user  connections") and line.startswith("bob   1 ")
            rows = json.loads(ctl("users", "--json")[1])
        assert [row["name"] for row in rows] == ["alice", "bob"]
        assert {"rate_up", "rate_down", "total"} <= rows[0].keys()

    def test_no_answer_has_a_password(self, daemon: Running, tell: Tell, text: str) -> None:
        """Hazard 111."""
        told = json.dumps([tell(command) for command in ("users", "clients", "ban")])
        assert "secret" not in told + json.dumps(tell("limit", user="alice"))
        assert "secret" not in repr(daemon.log.lines)


class TestClients:
    def test_clients_have_connections_sessions_and_bytes(
        self, daemon: Running, tell: Tell, ctl: Ctl, echo: Address
    ) -> None:
        with (
            Tunnel(daemon.port, echo) as tunnel,
            UdpPort() as target,
            UdpClient(daemon.port) as client,
        ):
            tunnel.check(b"x" * 100)
            client.check_echo(target, b"ping")
            wait_until(lambda: tell("clients")["clients"][0]["down"] == 104)
            assert tell("clients")["clients"] == [
                {
                    "name": "127.0.0.1",
                    "connections": 1,
                    "sessions": 1,
                    "up": 104,
                    "down": 104,
                    "refused": "",
                }
            ]
            assert ctl("clients", "--sort", "bytes")[1].splitlines()[1].startswith("127.0.0.1  1 ")
            assert json.loads(ctl("clients", "--json")[1])[0]["rate_up"] == 0.0


class TestMetrics:
    def metrics(self, daemon: Running) -> list[str]:
        text = daemon.daemon._admin.stats.metrics().decode()
        return [line for line in text.splitlines() if not line.startswith("#")]

    def test_metrics_count_users_and_name_none(
        self, daemon: Running, tell: Tell, echo: Address
    ) -> None:
        """Hazard 117."""
        with Tunnel(daemon.port, echo, ALICE), Tunnel(daemon.port, echo):
            tell("ban", name="bob")
            tell("ban", name="192.0.2.1")
            told = self.metrics(daemon)
        assert {
            "netproxy_active_users 1",
            "netproxy_active_clients 1",
            "netproxy_banned_users 1",
            "netproxy_banned_clients 1",
            "netproxy_users_over_quota 0",
        } <= set(told)
        assert not any("alice" in line or "bob" in line for line in told)

    def test_metrics_name_users_if_that_is_configured(
        self, daemon: Running, text: str, echo: Address
    ) -> None:
        daemon.reload(f"{text}metrics: 127.0.0.1:0\nmetrics_users: true\n")
        with Tunnel(daemon.port, echo, ALICE) as tunnel:
            tunnel.check(b"x" * 1_000_000)
            up = 'netproxy_user_bytes_total{user="alice",direction="up"} 1000000'
            wait_until(lambda: up in self.metrics(daemon))
            wait_until(lambda: "netproxy_users_over_quota 1" in self.metrics(daemon))
        assert 'netproxy_user_sessions{user="bob"} 0' in self.metrics(daemon)


class TestStatusPage:
    def test_page_has_users_clients_bans_refusals_and_the_history(
        self, daemon: Running, tell: Tell, echo: Address
    ) -> None:
        tell("ban", name="bob")
        with Tunnel(daemon.port, echo, ALICE) as tunnel, Tunnel(daemon.port, echo, BOB):
            tunnel.check()
            page = json.loads(json.dumps(daemon.daemon._admin.stats.page()))
        assert [row["name"] for row in page["users"]] == ["alice", "bob"]
        assert page["clients"][0]["name"] == "127.0.0.1"
        assert page["bans"] == [{"kind": "user", "name": "bob", "until": None}]
        assert page["history"] == {"seconds": 300.0, "samples": []}
        last = page["refusals"][-1]
        assert last["at"] > 0 and (last["user"], last["client"]) == ("bob", "127.0.0.1")
        assert "secret" not in json.dumps(page)

    def test_page_has_a_bounded_number_of_users_those_with_flows_first(
        self, daemon: Running, text: str, echo: Address
    ) -> None:
        more = "".join(f"  a{number}: {{password: secret}}\n" for number in range(100))
        daemon.reload(text + more)
        with Tunnel(daemon.port, echo, BOB) as tunnel:
            tunnel.check()
            rows = user_rows(daemon.daemon, subject_uses(daemon.daemon, USER), 10)
        assert len(rows) == 10 and rows[0]["name"] == "bob"


class TestLimit:
    def test_limit_applies_to_new_flows_until_reset(
        self, daemon: Running, ctl: Ctl, echo: Address
    ) -> None:
        assert ctl("limit", "alice") == (0, "alice: connections=5\n", "")
        set_here = " (set by limit, until the next start)\n"
        assert ctl("limit", "alice", "connections=1", "rate=5Mbit/s") == (
            0,
            f"alice: connections=1 rate=5Mbit/s{set_here}",
            "",
        )
        with Tunnel(daemon.port, echo, ALICE) as first, Tunnel(daemon.port, echo, ALICE) as second:
            first.check()
            assert second.reply == socks5.REPLIES[Reason.LIMIT]
            # A limit that is not given stays.
            assert ctl("limit", "alice", "connections=0")[1] == f"alice: rate=5Mbit/s{set_here}"
            with Tunnel(daemon.port, echo, ALICE) as third:
                third.check()
        assert ctl("limit", "alice", "--reset") == (0, "alice: connections=5\n", "")
        assert "limits of user alice: as configured" in daemon.log.lines

    def test_limit_outlives_a_reload(self, daemon: Running, ctl: Ctl, text: str) -> None:
        ctl("limit", "alice", "rate_up=1MB/s", "burst=64KiB", "connection_rate=30/m")
        daemon.reload(text)
        assert json.loads(ctl("limit", "alice", "--json")[1]) == {
            "user": "alice",
            "limits": {
                "connections": 5,
                "connection_rate": 0.5,
                "rate_up": 1_000_000,
                "burst": 65536,
            },
            "overridden": True,
        }

    @pytest.mark.parametrize(
        "arguments, error",
        [
            (["alice", "rate=fast"], "rate: 'fast' is not a rate (expected 20Mbit/s, "),
            (["alice", "sessions=-1"], "sessions: '-1' is not a whole number (0 is no limit)"),
            (["alice", "speed=1"], "'speed=1' is not a limit (expected connections=, sessions=, "),
            (["alice", "rate"], "'rate' is not a limit (expected connections="),
            (["alice", "rate=1MB/s", "--reset"], "give either limits or a reset, not both"),
            (["carol"], "unknown user 'carol': the configuration has no such user"),
        ],
    )
    def test_mistake_is_one_line_and_changes_nothing(
        self, daemon: Running, ctl: Ctl, arguments: list[str], error: str
    ) -> None:
        status, out, err = ctl("limit", *arguments)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(f"netproxyctl: {error}")
        assert ctl("limit", "alice")[1] == "alice: connections=5\n"

    def test_request_that_is_not_ours_is_refused(self, daemon: Running, tell: Tell) -> None:
        for details in ({}, {"user": 5}, {"user": ""}, {"user": "alice", "settings": "rate=1"}):
            with pytest.raises(CommandError):
                tell("limit", **details)

    def test_single_direction_overrules_both(self) -> None:
        assert parse_limits(["rate_up=1MB/s", "rate=8Mbit/s", "rate_down=0"]) == {
            "rate_up": 1_000_000,
            "rate_down": None,
        }

    def test_any_user_may_be_limited_without_configured_users(
        self, tmp_path: Path, tell: Tell
    ) -> None:
        with running(
            f"control: unix:{tmp_path / 'control'}\nlisteners: [{{listen: '127.0.0.1:0'}}]\n"
        ):
            answer = tell("limit", user="carol", settings=["sessions=3"])
        assert answer["limits"] == {"sessions": 3}


class TestBan:
    def test_ban_of_a_user_ends_flows_and_refuses_new_ones(
        self, daemon: Running, ctl: Ctl, tell: Tell, echo: Address
    ) -> None:
        with Tunnel(daemon.port, echo, ALICE) as tunnel, Tunnel(daemon.port, echo, BOB) as other:
            tunnel.check()
            assert ctl("ban", "alice", "for", "1h") == (
                0,
                "user alice banned for 1h, 1 flows ended\n",
                "",
            )
            assert tunnel.socket.recv(1) == b""
            wait_until(lambda: [record.ended for record in daemon.log.records] == ["user banned"])
            with Tunnel(daemon.port, echo, ALICE) as refused:
                assert refused.reply not in (0, 255)
            other.check()
            assert row_of(tell("users")["users"], "alice")["refused"] == "user banned"
            assert "banned user alice for 1h: 1 flows ended" in daemon.log.lines
            assert ctl("unban", "alice") == (0, "alice: no longer banned\n", "")
            with Tunnel(daemon.port, echo, ALICE) as tunnel:
                tunnel.check()

    def test_ban_of_an_address_ends_connections_and_sessions(
        self, daemon: Running, ctl: Ctl, tell: Tell, echo: Address
    ) -> None:
        with (
            Tunnel(daemon.port, echo) as tunnel,
            UdpPort() as target,
            UdpClient(daemon.port) as client,
        ):
            tunnel.check()
            client.check_echo(target, b"ping")
            done = ctl("ban", "127.0.0.1", "--for", "30m")
            assert done[1] == "client 127.0.0.1 banned for 30m, 2 flows ended\n"
            assert tunnel.socket.recv(1) == b""
            wait_until(
                lambda: [record.ended for record in daemon.log.records] == ["client banned"] * 2
            )
            assert tell("clients")["clients"][0]["refused"] == "client banned"

    def test_bans_are_listed(self, daemon: Running, ctl: Ctl) -> None:
        ctl("ban", "alice")
        ctl("ban", "2001:DB8::7", "for", "2h")
        kinds = [(ban["kind"], ban["name"]) for ban in json.loads(ctl("ban", "--json")[1])]
        assert kinds == [("user", "alice"), ("client", "2001:db8::/64")]
        lines = ctl("ban")[1].splitlines()
        assert lines[0].split() == ["kind", "name", "how", "long"]
        assert lines[1].split() == ["user", "alice", "until", "the", "next", "start"]
        for name in ("2001:db8::/64", "alice"):
            assert ctl("unban", name)[0] == 0
        assert ctl("ban")[1].splitlines() == ["kind  name  how long"]

    def test_flow_that_was_being_dialled_is_ended_later(
        self, daemon: Running, tell: Tell, echo: Address
    ) -> None:
        """A dial has no running flow that the ban could end at once."""
        standing = daemon.daemon.standing
        with Tunnel(daemon.port, echo, ALICE) as tunnel:
            tunnel.check()
            # As if the flow had begun while the ban was being made.
            standing.ban_user("alice")
            for ending in daemon.daemon.accounts.expire(0.0):
                ending()
            assert tunnel.socket.recv(1) == b""

    @pytest.mark.parametrize(
        "arguments, status, error",
        [
            (["carol"], 1, "unknown user 'carol': the configuration has no such user"),
            (["alice", "for", "ever"], 1, "for: 'ever' is not a duration (expected 500ms, "),
            (["alice", "for", "0"], 1, "for: must be longer than 0 s"),
            (["alice", "1h"], 64, "ban: write USER or ADDRESS, and if it is to end, for DURATION"),
            (["--for", "1h"], 64, "ban: write USER or ADDRESS"),
        ],
    )
    def test_mistake_is_one_line_and_bans_nobody(
        self, daemon: Running, ctl: Ctl, arguments: list[str], status: int, error: str
    ) -> None:
        done = ctl("ban", *arguments)
        assert (done[0], done[1], done[2].count("\n")) == (status, "", 1)
        assert done[2].startswith(f"netproxyctl: {error}")
        assert daemon.daemon.standing.bans() == ([], [])

    def test_unban_without_a_ban_is_refused(self, daemon: Running, ctl: Ctl) -> None:
        assert ctl("unban", "alice") == (1, "", "netproxyctl: 'alice' is not banned\n")

    @pytest.mark.parametrize(
        "name, client",
        [
            ("192.0.2.1", "192.0.2.1"),
            ("2001:db8::7", "2001:db8::/64"),
            ("2001:DB8::/64", "2001:db8::/64"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("fe80::1%eth0", "fe80::1%eth0"),
            ("alice", ""),
            ("10.0.0.0/8", ""),
            ("192.0.2.1/64", ""),
            ("alice1", ""),
        ],
    )
    def test_addresses_are_clients_and_other_names_users(self, name: str, client: str) -> None:
        assert as_client(name) == client
