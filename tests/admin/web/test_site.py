"""What the metrics listener answers, and to whom."""

from __future__ import annotations

import importlib.resources
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from netproxy.admin.web.http_server import HttpAnswer
from netproxy.config.schema import Config, MetricsConfig
from netproxy.admin.web.site import Site, is_own_name, read_page
from netproxy.protocol.http1 import HttpRequest
from tests.support.doubles import Counts, Lines

TOKEN = "0123456789abcdef"
BEARER = {"authorization": f"Bearer {TOKEN}"}


class Content:
    """A SiteContent."""

    def __init__(self) -> None:
        self.state = "serving"

    def metrics(self) -> bytes:
        return b"metrics\n"

    def page(self) -> dict[str, object]:
        return {"is": "fine"}


def configuration(token: str, page: bool) -> Config:
    """Return a configuration with a metrics listener."""
    return Config((), metrics=MetricsConfig(None, token, page))


class Rig:
    """A site with its content, log and counters."""

    def __init__(self, token: str = "", page: bool = False) -> None:
        self.log, self.counts, self.content = Lines(), Counts(), Content()
        self.site = Site(self.content, self.counts, self.log)
        self.site.configure(configuration(token, page))

    @property
    def refused(self) -> int:
        """The wrong tokens that were counted."""
        return self.counts.of("authentication", "metrics token")

    def ask(self, path: str, method: str = "GET", minor: int = 1, **fields: str) -> HttpAnswer:
        encoded = [
            (name.encode(), value.encode("latin-1"))
            for name, value in {"host": "127.0.0.1:9180", **fields}.items()
        ]
        request = HttpRequest(method.encode(), path.encode(), minor, encoded)
        return self.site.answer(request, "192.0.2.7")


class TestHealth:
    def test_ready_only_while_the_daemon_serves(self) -> None:
        rig = Rig(TOKEN)
        for state, status in (("starting", 503), ("serving", 200), ("draining", 503)):
            rig.content.state = state
            assert rig.ask("/readyz") == HttpAnswer(status, f"{state}\n".encode())
            assert rig.ask("/healthz").status == 200

    def test_health_is_told_under_any_host_name(self) -> None:
        assert Rig().ask("/readyz", host="proxy.internal").status == 200
        assert Rig().ask("/readyz", "HEAD", 0, host="").status == 200


class TestAuthorization:
    """Hazards 115 and 116."""

    def test_metrics_without_a_token_are_for_everybody(self) -> None:
        answer = Rig().ask("/metrics")
        assert (answer.status, answer.body, answer.content_type) == (
            200,
            b"metrics\n",
            "text/plain; version=0.0.4; charset=utf-8",
        )

    @pytest.mark.parametrize("path", ["/metrics", "/status.json"])
    def test_statistics_need_the_token(self, path: str) -> None:
        rig = Rig(TOKEN, True)
        assert (rig.ask(path).status, rig.refused) == (401, 0)
        assert rig.ask(path).fields == ((b"WWW-Authenticate", b"Bearer"),)
        assert rig.ask(path, **BEARER).status == 200
        assert rig.ask(path, authorization=f"bearer  {TOKEN}").status == 200

    @pytest.mark.parametrize(
        "shown", ["Bearer 0123456789abcdeF", "Bearer x", f"Basic {TOKEN}", "Bearer \xff"]
    )
    def test_wrong_token_is_counted_and_logged(self, shown: str) -> None:
        rig = Rig(TOKEN, True)
        assert rig.ask("/metrics", authorization=shown).status == 401
        assert rig.refused == 1
        assert rig.log.of("auth_failed") == ["192.0.2.7  metrics"]
        assert TOKEN not in repr(rig.log)

    def test_token_in_the_path_authorizes_nothing(self) -> None:
        assert Rig(TOKEN, True).ask(f"/metrics?token={TOKEN}").status == 404

    @pytest.mark.parametrize(
        "host, own",
        [
            ("127.0.0.1:9180", True),
            ("[::1]:9180", True),
            ("[fe80::1]:9180", True),
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
    def test_foreign_host_name_is_refused(self, host: str, own: bool) -> None:
        assert is_own_name(host) is own
        assert Rig().ask("/metrics", host=host).status == (200 if own else 403)

    def test_token_allows_any_host_name(self) -> None:
        assert Rig(TOKEN).ask("/metrics", host="proxy.internal:9180", **BEARER).status == 200

    def test_http_1_0_client_may_name_no_host(self) -> None:
        assert Rig().ask("/metrics", minor=0, host="").status == 200

    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_script_of_another_site_is_refused(self, method: str) -> None:
        rig = Rig(TOKEN, True)
        assert rig.ask("/status.json", method, origin="http://evil.example", **BEARER).status == 403
        assert rig.ask("/status.json", method, origin="null", **BEARER).status == 403
        assert rig.ask("/status.json", origin="http://127.0.0.1:9180", **BEARER).status == 200

    def test_only_get_and_head_are_allowed(self) -> None:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE"):
            answer = Rig().ask("/metrics", method)
            assert (answer.status, answer.fields) == (405, ((b"Allow", b"GET, HEAD"),))


class TestPage:
    def test_page_is_there_only_if_enabled(self) -> None:
        assert Rig(TOKEN).ask("/").status == 404
        assert Rig(TOKEN).ask("/status.json", **BEARER).status == 404
        answer = Rig(TOKEN, True).ask("/")
        assert (answer.status, answer.content_type) == (200, "text/html; charset=utf-8")

    def test_page_is_package_data(self) -> None:
        page = importlib.resources.files("netproxy.admin.web").joinpath("page.html")
        assert page.read_text(encoding="utf-8") == read_page()
        assert read_page().count("NONCE") == 2
        setup = Path(__file__).resolve().parents[3] / "setup.py"
        assert '"netproxy.admin.web": ["page.html"]' in setup.read_text()

    def test_only_the_pages_own_script_runs(self) -> None:
        rig = Rig(TOKEN, True)
        policies = []
        for _ in range(2):
            answer = rig.ask("/")
            policy = dict(answer.fields)[b"Content-Security-Policy"].decode()
            nonce = re.findall(r"script-src 'nonce-(\w{32})'", policy)[0]
            assert answer.body.decode().count(f'nonce="{nonce}"') == 2
            assert "default-src 'none'" in policy and "unsafe" not in policy
            policies.append(policy)
        assert policies[0] != policies[1]

    def test_page_loads_nothing_and_makes_no_markup_of_names(self) -> None:
        page = read_page()
        assert not re.search(r"https?://|src=|@import|url\(", page)
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", page
        )

    def test_status_is_json(self) -> None:
        answer = Rig(TOKEN, True).ask("/status.json", **BEARER)
        assert (json.loads(answer.body), answer.content_type) == (
            {"is": "fine"},
            "application/json",
        )

    def test_other_paths_are_not_found(self) -> None:
        rig = Rig(TOKEN, True)
        for path in ("/index.html", "/..", "//", "/metrics/", "/status"):
            assert rig.ask(path, **BEARER).status == 404


def test_new_token_applies_at_once() -> None:
    rig = Rig(TOKEN)
    rig.site.configure(configuration("f" * 16, False))
    assert rig.ask("/metrics", **BEARER).status == 401


def test_statistics_are_not_read_for_health() -> None:
    class NoStatistics(Content):
        def metrics(self) -> Any:
            raise AssertionError

        page = metrics

    site = Site(NoStatistics(), Counts(), Lines())
    assert site.answer(HttpRequest(b"GET", b"/readyz", 0, []), "").status == 200
