"""What the metrics listener answers: /metrics, /healthz, /readyz, and where it is wanted the status page.

Where a token is set, every figure needs it, as "Authorization: Bearer": never in
an address, a cookie or a log.  The page itself holds no figure: it asks its reader
for the token and fetches /status.json with it.  A site that a browser was led to
under a foreign name (DNS rebinding), or asked by another site's script, is refused.
Runs on the thread of observe.web.
"""

from __future__ import annotations

import os
import socket
from typing import Any, Callable, NamedTuple

from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.services import DaemonState, Log
from netproxy.observe.exposition import CONTENT_TYPE
from netproxy.admin.http_server import Answer, Request

LISTENER = "metrics"  # what it is called in a log
_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Sources(NamedTuple):
    state: Callable[[], DaemonState]
    metrics: Callable[[], bytes]
    status: Callable[[], dict[str, Any]]  # for the page


class Site:
    def __init__(self, sources: Sources, refused: Callable[[], None], log: Log) -> None:
        """`refused` counts a wrong token."""
        self._sources = sources
        self._refused = refused
        self._log = log
        self._token = b""
        self._page = False

    def configure(self, token: str, page: bool) -> None:
        self._token, self._page = token.encode(), page

    def answer(self, request: Request) -> Answer:
        host = request.fields.get("host", "")
        if (
            (origin := request.fields.get("origin")) is not None
            and origin != f"http://{host}"
            and origin != f"https://{host}"
        ):
            return _refusal("another site's script may not ask here")
        if request.method not in ("GET", "HEAD"):
            return Answer(405, fields=(("Allow", "GET, HEAD"),))
        if request.path == "/healthz":
            return Answer(200, b"ok\n")
        if request.path == "/readyz":
            state = self._sources.state()
            return Answer(200 if state == DaemonState.SERVING else 503, f"{state}\n".encode())
        known = self._knows(request)
        if not known and not own_name(host) and (host or request.minor):
            return _refusal(f"this is not {host[:80]!a}: ask by address, or with the token")
        return self._figures(request, known)

    def _figures(self, request: Request, known: bool) -> Answer:
        if self._page and request.path == "/":
            return page()
        if (
            request.path not in ("/metrics", "/status.json")
            or request.path == "/status.json"
            and not self._page
        ):
            return Answer(404)
        if self._token and not known:
            return Answer(401, b"the token is needed\n", fields=(("WWW-Authenticate", "Bearer"),))
        if request.path == "/metrics":
            return Answer(200, self._sources.metrics(), CONTENT_TYPE)
        import json  # late: few have the page

        return Answer(200, json.dumps(self._sources.status()).encode(), "application/json")

    def _knows(self, request: Request) -> bool:
        """Whether it shows the token; a wrong one is said in the log."""
        scheme, _, shown = request.fields.get("authorization", "").partition(" ")
        if not self._token or not shown:
            return False
        import hmac  # late: it brings libcrypto

        if scheme.lower() == "bearer" and hmac.compare_digest(
            shown.strip().encode("latin-1"), self._token
        ):
            return True
        self._refused()
        self._log.auth_failed(request.peer, "", LISTENER)
        return False


def page() -> Answer:
    """The page, with a nonce that lets its own script and style run, and no other."""
    from netproxy.admin.page import HTML  # late: few have it

    nonce = os.urandom(16).hex()
    return Answer(
        200,
        HTML.replace("NONCE", nonce).encode(),
        "text/html; charset=utf-8",
        (("Content-Security-Policy", _POLICY.format(nonce)), ("X-Frame-Options", "DENY")),
    )


def own_name(host: str) -> bool:
    """Whether a Host field names this machine in a way that no stranger's name server can: an address, or its own name."""
    name = host.lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] or name
    return pack_ip(name.partition("%")[0]) is not None or name in (
        "localhost",
        socket.gethostname().lower(),
    )


def _refusal(why: str) -> Answer:
    return Answer(403, f"{why}\n".encode())
