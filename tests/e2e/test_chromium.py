"""Headless Chromium loads a page of fifty resources through netproxyd.

The page itself counts the resources that arrived with the right bytes. The tests are skipped
without Chromium.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from tests.e2e.browser import find_browser, load
from tests.e2e.conftest import Start
from tests.e2e.site import INDEX, PNG_MAGIC, RESOURCES, Site, serving_site, tls_context
from tests.e2e.support import ANY_PORT, LOOPBACK, SECONDS, Netproxyd, wait_for
from tests.support.certificates import certificates

pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]

# A name, so that the proxy has to look it up.
HOST = "localhost"
# To the origin. A browser keeps six connections at a time open, and so must the proxy.
MOST_CONNECTIONS = 12
ALL_BYTES = sum(len(resource.body) for resource in (INDEX, *RESOURCES.values()))
# How a good connection may end: the browser resets idle ones when it ends.
ENDS = {"closed", "reset", "client reset", "done"}
_RECORD = re.compile(
    r" msg=finished .* target=(\S+) .*upstream=direct sent=(\d+) received=(\d+) .*ended=(.*)$"
)


class Route(NamedTuple):
    """How the browser loads the page."""

    proxy: str
    """Scheme of the proxy, as Chromium calls it."""
    origin: str
    """Scheme of the page."""
    target: str
    """The host that the browser asks the proxy for."""


ROUTES = {
    "socks5": Route("socks5", "http", HOST),
    "socks4": Route("socks4", "http", LOOPBACK),
    "forward": Route("http", "http", HOST),
    "socks5-https": Route("socks5", "https", HOST),
    "connect-https": Route("http", "https", HOST),
    "tls-forward": Route("https", "http", HOST),
    "tls-connect-https": Route("https", "https", HOST),
}


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


class Record(NamedTuple):
    """An access record of the daemon."""

    target: str
    sent: int
    received: int
    ended: str


def _records(daemon: Netproxyd) -> list[Record]:
    matches = filter(None, map(_RECORD.search, daemon.log.splitlines()))
    return [
        Record(match[1], int(match[2]), int(match[3]), match[4].strip('"')) for match in matches
    ]


@pytest.fixture
def daemon(netproxyd: Start, route: str) -> Netproxyd:
    """A daemon, with a second listener with TLS if the route needs one."""
    if ROUTES[route].proxy != "https":
        return netproxyd("-l", ANY_PORT)
    tls = f"{{name: tls, listen: '{LOOPBACK}:0', tls: {certificates().listener()}}}"
    return netproxyd(config=f"listeners: [{{name: plain, listen: '{LOOPBACK}:0'}}, {tls}]\n")


@pytest.fixture
def site(route: str) -> Iterator[Site]:
    context = tls_context() if ROUTES[route].origin == "https" else None
    with serving_site(Site(context)) as server:
        yield server


@pytest.mark.parametrize("route", ROUTES)
def test_chromium_loads_a_page_of_fifty_resources(
    browser: str, daemon: Netproxyd, site: Site, tmp_path: Path, route: str
) -> None:
    proxy, origin, target = ROUTES[route]
    loaded = load(
        browser,
        tmp_path,
        f"{proxy}://{LOOPBACK}:{daemon.tcp_ports[-1]}",
        f"{origin}://{HOST}:{site.port}/",
    )
    count = f"{len(RESOURCES)} of {len(RESOURCES)}"
    assert f"<title>{count}</title>" in loaded.dom, loaded.errors + loaded.dom
    assert f'<div id="box" class="all">{count}</div>' in loaded.dom
    assert loaded.screenshot.startswith(PNG_MAGIC), loaded.errors
    assert sorted(site.paths) == sorted(["/", *RESOURCES])
    assert 1 < len(site.clients) <= MOST_CONNECTIONS
    # A record for each forwarded request, or for each tunnelled connection.
    records = len(site.paths) if route.endswith("forward") else len(site.clients)
    _check_records(daemon, f"{target}:{site.port}", records)


def _check_records(daemon: Netproxyd, target: str, count: int) -> None:
    """Wait for at least `count` access records, which together have received the whole page."""

    def complete() -> bool:
        records = _records(daemon)
        return (
            sum(record.sent > 0 for record in records) >= count
            and sum(record.received for record in records) >= ALL_BYTES
        )

    wait_for(
        complete, SECONDS, f"{count} access records with {ALL_BYTES} bytes:\n{daemon.log[-3000:]}"
    )
    assert {record.target for record in _records(daemon)} == {target}
    assert {record.ended for record in _records(daemon)} <= ENDS
