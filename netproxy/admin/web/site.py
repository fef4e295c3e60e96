"""What the metrics listener answers: /metrics, /healthz, /readyz and, if enabled, the status page.

If a token is configured, all statistics need it, as "Authorization: Bearer".  It is never taken
from an address or a cookie, and never logged.  The page itself holds no statistics: it asks its
reader for the token and fetches /status.json with it.  Requests that come from another site's
script, or under a foreign host name (DNS rebinding), are refused.
Runs on the thread of admin.web.http_server, except configure().
"""

from __future__ import annotations

import os
import socket

from netproxy.admin.web.http_server import HttpAnswer
from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.services import DaemonState
from netproxy.observe.exposition.text_format import CONTENT_TYPE
from netproxy.protocol.http1 import field_values
from netproxy.typed import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from netproxy.config.schema import Config
    from netproxy.interfaces.answers import JsonObject
    from netproxy.interfaces.services import Counter, Log
    from netproxy.protocol.http1 import HttpRequest

LISTENER = "metrics"
"""The name of this listener in the log."""
PAGE_FILE = os.path.join(os.path.dirname(__file__), "page.html")
# "{0}" is the nonce.
_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class SiteContent(Protocol):
    """What the site shows.  Thread: any."""

    @property
    def state(self) -> DaemonState:
        """Whether the daemon serves."""

    def metrics(self) -> bytes:
        """Return the text of /metrics."""

    def page(self) -> JsonObject:
        """Return the content of /status.json."""


class Site:
    """Decides who may see what, and answers."""

    def __init__(self, content: SiteContent, counter: Counter, log: Log) -> None:
        """Count wrong tokens with `counter`, as authentication failures."""
        self._content = content
        self._counter = counter
        self._log = log
        self._token = b""
        self._page = False
        # The text of page.html, once it has been asked for.
        self._html = ""

    def configure(self, config: Config) -> None:
        """Use the token of a configuration, and show the page if it says so.  Thread: any."""
        self._token, self._page = config.metrics.token.encode(), config.metrics.page

    def answer(self, request: HttpRequest, peer: str) -> HttpAnswer:
        """Answer a request of the client with the address `peer`."""
        host = _field(request, b"host") or b""
        origin = _field(request, b"origin")
        if origin not in (None, b"http://" + host, b"https://" + host):
            return _refusal("scripts of other sites may not ask here")
        if request.method not in (b"GET", b"HEAD"):
            return HttpAnswer(405, fields=((b"Allow", b"GET, HEAD"),))
        if request.target == b"/healthz":
            return HttpAnswer(200, b"ok\n")
        if request.target == b"/readyz":
            state = self._content.state
            return HttpAnswer(200 if state == DaemonState.SERVING else 503, f"{state}\n".encode())
        authorized = self._shows_token(request, peer)
        # HTTP/1.0 clients may leave the Host field out.
        nameless = not host and not request.minor
        if not authorized and not nameless and not is_own_name(host.decode("latin-1")):
            shown = host[:80].decode("latin-1")
            return _refusal(f"{shown!a} is not this machine: ask by address, or with the token")
        return self._answer_path(request.target, authorized)

    def _answer_path(self, path: bytes, authorized: bool) -> HttpAnswer:
        if path == b"/" and self._page:
            return self._answer_page()
        if path != b"/metrics" and not (path == b"/status.json" and self._page):
            return HttpAnswer(404)
        if self._token and not authorized:
            challenge = ((b"WWW-Authenticate", b"Bearer"),)
            return HttpAnswer(401, b"the token is needed\n", fields=challenge)
        if path == b"/metrics":
            return HttpAnswer(200, self._content.metrics(), CONTENT_TYPE)
        # Imported late: few daemons have the page.
        import json

        return HttpAnswer(200, json.dumps(self._content.page()).encode(), "application/json")

    def _answer_page(self) -> HttpAnswer:
        """Return the page with a nonce: only its own script and style run."""
        if not self._html:
            self._html = read_page()
        nonce = os.urandom(16).hex()
        policy = _POLICY.format(nonce).encode()
        return HttpAnswer(
            200,
            self._html.replace("NONCE", nonce).encode(),
            "text/html; charset=utf-8",
            ((b"Content-Security-Policy", policy), (b"X-Frame-Options", b"DENY")),
        )

    def _shows_token(self, request: HttpRequest, peer: str) -> bool:
        """Return whether a request has the token; count and log a wrong one."""
        scheme, _, shown = (_field(request, b"authorization") or b"").partition(b" ")
        if not self._token or not shown:
            return False
        # Imported late: it brings libcrypto.
        import hmac

        if scheme.lower() == b"bearer" and hmac.compare_digest(shown.strip(), self._token):
            return True
        self._counter.count("authentication", "metrics token")
        self._log.auth_failed(peer, "", LISTENER)
        return False


def read_page() -> str:
    """Return the text of page.html, in which NONCE stands for the nonce."""
    with open(PAGE_FILE, encoding="utf-8") as file:
        return file.read()


def is_own_name(host: str) -> bool:
    """Return whether the value of a Host field is an address or this machine's own name.

    No stranger's name server can make a browser send such a name.
    """
    name = host.lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] or name
    return pack_ip(name) is not None or name in ("localhost", socket.gethostname().lower())


def _field(request: HttpRequest, name: bytes) -> bytes | None:
    """Return the value of a field that comes at most once, None without it."""
    return next(iter(field_values(request.fields, name)), None)


def _refusal(why: str) -> HttpAnswer:
    return HttpAnswer(403, f"{why}\n".encode())
