"""What the metrics listener answers, and to whom."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import pytest

from netproxy.admin.page import HTML
from netproxy.admin.site import Site, Sources, own_name
from netproxy.admin.http_server import Answer, Request
from tests.support.doubles import Lines

TOKEN = "0123456789abcdef"
BEARER = {"authorization": f"Bearer {TOKEN}"}


class Rig:
    def __init__(self, token: str = "", page: bool = False) -> None:
        self.log = Lines()
        self.state = "serving"
        self.refused = 0
        self.site = Site(
            Sources(lambda: self.state, lambda: b"figures\n", lambda: {"is": "fine"}),
            self._refused,
            self.log,
        )
        self.site.configure(token, page)

    def _refused(self) -> None:
        self.refused += 1

    def ask(self, path: str, method: str = "GET", minor: int = 1, **fields: str) -> Answer:
        return self.site.answer(
            Request(method, path, minor, {"host": "127.0.0.1:9180", **fields}, "192.0.2.7")
        )


class TestHealth:
    def test_ready_only_while_it_serves(self) -> None:
        rig = Rig(TOKEN)
        for state, status in (("starting", 503), ("serving", 200), ("draining", 503)):
            rig.state = state
            assert rig.ask("/readyz") == Answer(status, f"{state}\n".encode())
            assert rig.ask("/healthz").status == 200

    def test_asked_for_by_any_name(self) -> None:
        assert Rig().ask("/readyz", host="proxy.internal").status == 200
        assert Rig().ask("/readyz", "HEAD", 0, host="").status == 200


class TestWhoMayAsk:
    """Hazards 115 and 116."""

    def test_without_a_token_metrics_are_for_whoever_reaches_them(self) -> None:
        answer = Rig().ask("/metrics")
        assert (answer.status, answer.body, answer.content_type) == (
            200,
            b"figures\n",
            "text/plain; version=0.0.4; charset=utf-8",
        )

    @pytest.mark.parametrize("path", ["/metrics", "/status.json"])
    def test_a_token_is_for_everything_that_tells_a_figure(self, path: str) -> None:
        rig = Rig(TOKEN, True)
        assert (rig.ask(path).status, rig.refused) == (401, 0)
        assert rig.ask(path).fields == (("WWW-Authenticate", "Bearer"),)
        assert rig.ask(path, **BEARER).status == 200
        assert rig.ask(path, authorization=f"bearer  {TOKEN}").status == 200

    @pytest.mark.parametrize(
        "shown", ["Bearer 0123456789abcdeF", "Bearer x", f"Basic {TOKEN}", "Bearer \xff"]
    )
    def test_a_wrong_token_is_counted_and_said(self, shown: str) -> None:
        rig = Rig(TOKEN, True)
        assert rig.ask("/metrics", authorization=shown).status == 401
        assert rig.refused == 1
        assert rig.log.of("auth_failed") == ["192.0.2.7  metrics"]
        assert TOKEN not in repr(rig.log)

    def test_a_token_in_the_address_opens_nothing(self) -> None:
        assert Rig(TOKEN, True).ask(f"/metrics?token={TOKEN}").status == 404

    @pytest.mark.parametrize(
        "host, own",
        [
            ("127.0.0.1:9180", True),
            ("[::1]:9180", True),
            ("[fe80::1%25eth0]:9180", True),
            ("192.168.1.1", True),
            ("localhost:9180", True),
            ("LOCALHOST", True),
            (socket.gethostname(), True),
            ("evil.example:9180", False),
            ("127.0.0.1.evil.example", False),
            ("", False),
            ("[evil]", False),
        ],
    )
    def test_under_a_foreign_name_nothing_is_told(self, host: str, own: bool) -> None:
        assert own_name(host) is own
        assert Rig().ask("/metrics", host=host).status == (200 if own else 403)

    def test_who_shows_the_token_may_use_any_name(self) -> None:
        assert Rig(TOKEN).ask("/metrics", host="proxy.internal:9180", **BEARER).status == 200

    def test_an_old_client_names_no_host(self) -> None:
        assert Rig().ask("/metrics", minor=0, host="").status == 200

    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_another_sites_script_is_refused(self, method: str) -> None:
        rig = Rig(TOKEN, True)
        assert rig.ask("/status.json", method, origin="http://evil.example", **BEARER).status == 403
        assert rig.ask("/status.json", method, origin="null", **BEARER).status == 403
        assert rig.ask("/status.json", origin="http://127.0.0.1:9180", **BEARER).status == 200

    def test_only_get_and_head(self) -> None:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE"):
            answer = Rig().ask("/metrics", method)
            assert (answer.status, answer.fields) == (405, (("Allow", "GET, HEAD"),))


class TestPage:
    def test_is_there_where_it_is_wanted(self) -> None:
        assert Rig(TOKEN).ask("/").status == 404
        assert Rig(TOKEN).ask("/status.json", **BEARER).status == 404
        answer = Rig(TOKEN, True).ask("/")
        assert (answer.status, answer.content_type) == (200, "text/html; charset=utf-8")

    def test_its_own_script_runs_and_no_other(self) -> None:
        rig = Rig(TOKEN, True)
        policies = []
        for _ in range(2):
            answer = rig.ask("/")
            policy = dict(answer.fields)["Content-Security-Policy"]
            nonce = re.findall(r"script-src 'nonce-(\w{32})'", policy)[0]
            assert answer.body.decode().count(f'nonce="{nonce}"') == 2
            assert "default-src 'none'" in policy and "unsafe" not in policy
            policies.append(policy)
        assert policies[0] != policies[1]

    def test_takes_nothing_from_elsewhere_and_makes_no_markup_of_names(self) -> None:
        assert not re.search(r"https?://|src=|@import|url\(", HTML)
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", HTML
        )

    def test_figures_are_json(self) -> None:
        answer = Rig(TOKEN, True).ask("/status.json", **BEARER)
        assert (json.loads(answer.body), answer.content_type) == (
            {"is": "fine"},
            "application/json",
        )

    def test_nothing_else_is_there(self) -> None:
        rig = Rig(TOKEN, True)
        for path in ("/index.html", "/..", "//", "/metrics/", "/status"):
            assert rig.ask(path, **BEARER).status == 404


def test_a_token_that_changes_holds_at_once() -> None:
    rig = Rig(TOKEN)
    rig.site.configure("f" * 16, False)
    assert rig.ask("/metrics", **BEARER).status == 401


def test_the_sources_are_asked_only_when_they_are_wanted() -> None:
    def never() -> Any:
        raise AssertionError

    site = Site(Sources(lambda: "serving", never, never), never, Lines())
    assert site.answer(Request("GET", "/readyz", 0, {}, "")).status == 200
