"""curl, wget, Chromium and a raw client meet each limit: reply, record and counter."""

from __future__ import annotations

import re
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from tests.e2e.browser import Loaded, find_browser
from tests.e2e.conftest import Start
from tests.e2e.limit_clients import CLOSED, PROGRAMS, Proxy, Reply, ban, browse
from tests.e2e.peers import CONNECT, TcpEcho, echo, socks5
from tests.e2e.support import LOOPBACK, PROCESSES, Netproxyd

pytestmark = [pytest.mark.e2e, pytest.mark.long]

ALICE, BOB = ("alice", "secret"), ("bob", "secret")
# A browser asks for no port such as 9.
URL = f"http://{LOOPBACK}:8000/"


class Limit(NamedTuple):
    """A limit, and what a request that meets it gets and leaves."""

    reply: Reply
    counter: str
    record: str
    """A regular expression."""
    user: str = ""
    """Keys of the user alice."""
    listener: str = ""
    """Keys of the listener "open", which wants no login."""
    more: str = ""
    """Of the configuration."""
    first: bool = True
    """Whether a first connection is served, which uses the limit up."""

    @property
    def config(self) -> str:
        """The configuration of a daemon with this limit."""
        alice = f"{{password: secret, {self.user}}}"
        return (
            f"listeners:\n- {{name: main, listen: '{LOOPBACK}:0', auth: required}}\n"
            f"- {{name: open, listen: '{LOOPBACK}:0', auth: none, {self.listener}}}\n"
            f"users: {{alice: {alice}, bob: {{password: secret}}}}\n{self.more}\n"
        )


def refused(reason: str, decided: str) -> str:
    """Return the expression for the record of a refused request."""
    return f'msg=refused reason="{reason}" .*decided={decided} id='


# Errors of Chromium, which its error page names.
CONNECTION_RESET, TUNNEL_FAILED, EMPTY_RESPONSE = -101, -111, -324
COUNTERS = ("connections_refused", "requests_refused", "dial_failures")
# Of one client, one counter and one reason in a minute.
RECORDS = 5
TOO_MANY, FORBIDDEN = (429, "Too Many Requests"), (403, "Forbidden")
CONNECTION_LIMIT = "connection limit of the user"
CONNECTION_RATE = "connection rate of the user"
LIMITS = {
    "connections": Limit(
        Reply(*TOO_MANY, CONNECTION_LIMIT),
        f"requests_refused{{{CONNECTION_LIMIT}}}",
        refused(CONNECTION_LIMIT, "users.alice.limits.connections"),
        "limits: {connections: 1}",
    ),
    "connection_rate": Limit(
        Reply(*TOO_MANY, CONNECTION_RATE),
        f"requests_refused{{{CONNECTION_RATE}}}",
        refused(CONNECTION_RATE, "users.alice.limits.connection_rate"),
        "limits: {connection_rate: 1/h}",
    ),
    "quota": Limit(
        Reply(*FORBIDDEN, "quota used up"),
        "requests_refused{quota used up}",
        refused("quota used up", "users.alice.limits.quota"),
        "limits: {quota: 8B}",
        more="state: {state}",
    ),
    "expires": Limit(
        Reply(*FORBIDDEN, "user expired"),
        "requests_refused{user expired}",
        refused("user expired", "users.alice.expires"),
        "expires: 2020-01-31",
        first=False,
    ),
    "ban": Limit(
        Reply(*FORBIDDEN, "user banned"),
        "requests_refused{user banned}",
        refused("user banned", '"netproxyctl ban"'),
        more="control: unix:{state}/control",
    ),
    "hours": Limit(
        Reply(*FORBIDDEN, "not allowed by the rules"),
        "dial_failures{not allowed by the rules}",
        r'msg=finished .*rule=rules\[0\] .*ended="not allowed by the rules" decided=rules\[0\] id=',
        more='rules: [{user: alice, hours: "00:00-24:00", via: block}]',
        first=False,
    ),
    "clients_deny": Limit(
        CLOSED,
        "connections_refused{client not allowed}",
        refused("client not allowed", "clients_deny"),
        listener="clients_deny: [127.0.0.0/8]",
        first=False,
    ),
    "connection_rate_per_client": Limit(
        CLOSED,
        "connections_refused{client connection rate}",
        refused("client connection rate", "limits.connection_rate_per_client"),
        listener="limits: {connection_rate_per_client: 1/h}",
    ),
}


class Limited:
    """A daemon with a limit that is used up, and the port where it holds."""

    def __init__(self, start: Start, directory: Path, limit: Limit) -> None:
        state = directory / "state"
        state.mkdir()
        self.limit, self._state = limit, state
        self.daemon: Netproxyd = start(
            config=limit.config.replace("{state}", str(state)), login=BOB
        )
        main, without_login = self.daemon.tcp_ports
        self.proxy = Proxy((LOOPBACK, main), ALICE)
        if limit.listener:
            self.proxy = Proxy((LOOPBACK, without_login), None)

    def use_up(self, target: TcpEcho, stack: ExitStack) -> None:
        """Open the connection that is served, and keep it if the limit does."""
        if not self.limit.first:
            return
        address, login = self.proxy.address, self.proxy.login
        held = stack.enter_context(closing(socks5(address, CONNECT, target.address, login)[0]))
        echo(held, b"eight by")
        ended = ""
        if "quota" in self.limit.user:
            ended = 'ended="quota used up" decided=users.alice.limits.quota id='
        if "control" in self.limit.more:
            ban(self._state / "control", ALICE[0])
            ended = 'ended="user banned" decided="netproxyctl ban" id='
        if ended:
            self.daemon.said(f"msg=finished .*user=alice .*sent=8 received=8 .*{ended}")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def limited(netproxyd: Start, tmp_path: Path, stack: ExitStack, name: str) -> Limited:
    daemon = Limited(netproxyd, tmp_path, LIMITS[name])
    daemon.use_up(stack.enter_context(TcpEcho()), stack)
    return daemon


@pytest.mark.parametrize("name", LIMITS)
def test_each_program_gets_the_reply_of_its_protocol(limited: Limited) -> None:
    limit, daemon = limited.limit, limited.daemon
    for check in PROGRAMS:
        check(limited.proxy, limit.reply)
    assert daemon.counted(limit.counter, len(PROGRAMS)) == len(PROGRAMS)
    # Nothing is counted twice: what a limit refuses is no failed dial.
    assert [key for key in daemon.status() if key.startswith(COUNTERS)] == [limit.counter]
    # Each has one record, and at most five refusals for one reason in one process have.
    records = daemon.all_lines("msg=(refused|finished) .*(decided=|:9 )")
    records = [line for line in records if "sent=8" not in line]
    if "msg=refused" not in limit.record:
        assert len(records) == len(PROGRAMS)
    elif PROCESSES == 1:
        assert len(records) == RECORDS
    else:
        assert RECORDS <= len(records) <= min(RECORDS * PROCESSES, len(PROGRAMS))
    assert daemon.lines(limit.record) == records


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


def net_errors(loaded: Loaded) -> set[int]:
    """Return the errors of the browser's connections."""
    return {int(number) for number in re.findall(r'"net_error":(-\d+)', loaded.net_log)}


@pytest.mark.any_workers
@pytest.mark.parametrize("name", LIMITS)
def test_browser_shows_the_answer(browser: str, limited: Limited, tmp_path: Path) -> None:
    limit, daemon = limited.limit, limited.daemon
    shown = browse(browser, tmp_path, limited.proxy, URL)
    if limit.reply is CLOSED:
        assert net_errors(shown) & {EMPTY_RESPONSE, CONNECTION_RESET}
    else:
        text = re.escape(limit.reply.text)
        assert re.search(rf">{text}( \(id [0-9a-z]{{6}}\))?\n</pre>", shown.dom), shown.dom
    # A browser may ask again.
    daemon.counted(limit.counter, 1)
    daemon.said(limit.record)


@pytest.mark.any_workers
@pytest.mark.parametrize("name", ["connections", "expires"])
def test_browser_says_that_there_is_no_tunnel(
    browser: str, limited: Limited, tmp_path: Path
) -> None:
    shown = browse(browser, tmp_path, limited.proxy, URL.replace("http:", "https:"))
    assert TUNNEL_FAILED in net_errors(shown)
    status, phrase, _ = limited.limit.reply
    assert f'"HTTP/1.1 {status} {phrase}"' in shown.net_log
    limited.daemon.said(limited.limit.record)
