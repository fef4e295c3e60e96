"""Sessions and flows of real daemons that outlive their TCP connections."""

from __future__ import annotations

import ctypes
import math
import socket
import struct
from typing import Any

import pytest

from netproxy.protocol import tunnel
from netproxy.tunnel.path import agent as agent_module
from netproxy.tunnel.path import bridge, sealing
from tests.support.certificates import Certificates, certificates
from tests.support.sockets import wait_until
from tests.tunnel.path.test_daemons import Pair, pair

pytestmark = pytest.mark.skipif(
    sealing.load_cipher() is None, reason="python3-cryptography is not installed"
)


@pytest.fixture(scope="module")
def files() -> Certificates:
    return certificates()


def own_session(both: Pair) -> Any:
    """Return the agent's session with its bridge (control.bridge_session)."""
    return both.agent.tunnels.agent._agent._session


def handshakes(both: Pair, outcome: str) -> int:
    return both.bridge.count("tunnel_handshakes", outcome)


def begin(both: Pair) -> None:
    """Begin a flow whose datagrams go both ways by UDP and by TCP."""
    wait_until(both.is_up)
    wait_until(lambda: own_session(both).is_resumable)
    both.check(10, 1000, 60000)


def is_anew(both: Pair, since: float) -> bool:
    """Return whether the bridge has another session than that of a time, with the path up."""
    agents = both.bridge.agents()
    return bool(agents) and agents[0]["since"] != since and both.is_up()


def cut_control(both: Pair) -> None:
    """End the control connection, of which both sides are told by TCP alone."""
    own_session(both).control.stream.socket.shutdown(socket.SHUT_RDWR)


def stream_of_flow(both: Pair, side: str) -> Any:
    """Return the framed stream of the only flow, on one side."""
    if side == "bridge":
        (path,) = both.bridge.tunnels.paths._offered
    else:
        (path,) = own_session(both).paths._paths.values()
    (flow,) = path.flows.all()
    return flow.gone.__self__


def fail(both: Pair, side: str) -> None:
    """Have the kernel of one side reset the flow's work connection."""
    # An address of no family ends a connection with RST (connect(2)).
    nowhere = struct.pack("@H14x", socket.AF_UNSPEC)
    assert not ctypes.CDLL(None).connect(stream_of_flow(both, side)._socket.fileno(), nowhere, 16)


def _lose(data: bytes) -> None:
    """Send nothing, as over a connection that is dead."""


def test_session_is_resumed(files: Certificates) -> None:
    """Hazard 173: flow, port, path and endpoint go on, and TCP has a new connection."""
    with pair(files) as both:
        begin(both)
        before = both.bridge.agents()[0]
        cut_control(both)
        both.check(10, 1000)
        wait_until(lambda: handshakes(both, "resumed") == 1)
        wait_until(lambda: handshakes(both, "attached") == 1)
        # What is on its way by the former connection is lost.
        both.check_soon(60000)
        both.check(10, 1000, 60000)
        after = both.bridge.wait_for_agent(1)
        assert len(set(both.echo.sources)) == 1
        assert after["since"] == before["since"] and after["client"] != before["client"]
        assert after["opened"] == before["opened"] == 1 == after["streams"]
        assert after["received"] >= before["received"] and after["sent"] >= before["sent"]
        assert both.bridge.count("tunnel_paths", "up") == 1 == handshakes(both, "agent")
        # Another time.
        cut_control(both)
        wait_until(lambda: handshakes(both, "attached") == 2)
        both.check_soon(60000)
        both.check(10, 60000)
        assert len(set(both.echo.sources)) == 1 and both.is_up()


@pytest.mark.parametrize("side", ["bridge", "agent"])
def test_flow_outlives_its_work_connection(files: Certificates, side: str) -> None:
    """Hazard 173: the agent attaches another one."""
    with pair(files) as both:
        begin(both)
        fail(both, side)
        both.check(10, 1000)
        wait_until(lambda: handshakes(both, "attached") == 1)
        both.check_soon(60000)
        both.check(10, 60000)
        assert len(set(both.echo.sources)) == 1
        assert handshakes(both, "resumed") == 0


@pytest.mark.parametrize("side", ["bridge", "agent"])
def test_flow_without_a_stream_ends_with_its_path(
    files: Certificates, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pair(files) as both:
        begin(both)
        monkeypatch.setattr(own_session(both).paths._attacher, "fill", lambda: None)
        framed = stream_of_flow(both, side)
        fail(both, side)
        wait_until(lambda: framed._stand_in is not None)
        both.check(10, 1000)
        (path,) = both.bridge.tunnels.paths._offered
        both.bridge.tunnels.paths.table.retire(path._keys.current)
        wait_until(lambda: framed.closed)
        # The next datagram begins another flow, by TCP.
        both.check_soon(5)
        assert len(set(both.echo.sources)) == 2


def test_agent_begins_anew_if_the_bridge_has_ended_the_session(files: Certificates) -> None:
    """Hazard 175: so does a bridge that was killed and started again."""
    with pair(files) as both:
        begin(both)
        since = both.bridge.agents()[0]["since"]
        (session,) = both.bridge.tunnels.bridge._sessions.all()
        both.bridge.tunnels.bridge._end(session, "a test ends it")
        wait_until(lambda: is_anew(both, since))
        assert handshakes(both, "agent") == 2 and handshakes(both, "resumed") == 0
        both.check_soon(5, 60000)


def test_agent_begins_anew_at_a_bridge_that_says_nothing_of_it(
    files: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bridge of before: it offers a path, and does not say that a session can be resumed."""

    def tell(offered: Any, offer: Any) -> None:
        offered.control.send(bridge.encode_offer(offer))

    monkeypatch.setattr(bridge, "_tell", tell)
    with pair(files) as both:
        wait_until(both.is_up)
        both.check(10)
        since = both.bridge.agents()[0]["since"]
        own_session(both).control.close(tunnel.STOPPING)
        wait_until(lambda: is_anew(both, since))
        assert handshakes(both, "agent") == 2 and handshakes(both, "resumed") == 0
        both.check_soon(5)


def test_agent_begins_anew_at_a_bridge_that_does_not_know_how(
    files: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bridge that was replaced by one of before closes the connection without an answer."""
    with pair(files) as both:
        begin(both)
        since = both.bridge.agents()[0]["since"]
        monkeypatch.setattr(tunnel, "ATTACH", tunnel.WORK)
        cut_control(both)
        wait_until(lambda: is_anew(both, since))
        assert handshakes(both, "agent") == 2 and handshakes(both, "resumed") == 0


def test_agent_of_before_begins_anew(files: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not set the flag, and the bridge ends its session with its connection."""
    monkeypatch.setattr(tunnel, "_FLAGS", (1, 2, 4, 0, 16))
    with pair(files) as both:
        wait_until(both.is_up)
        both.check(10)
        assert not own_session(both).is_resumable
        since = both.bridge.agents()[0]["since"]
        cut_control(both)
        wait_until(lambda: is_anew(both, since))
        assert handshakes(both, "agent") == 2 and handshakes(both, "resumed") == 0
        both.check_soon(5)


def test_reload_of_the_bridge_meanwhile_ends_the_path_for_the_agent(files: Certificates) -> None:
    """The agent cannot be told before it has another control connection."""
    with pair(files) as both:
        begin(both)
        (session,) = both.bridge.tunnels.bridge._sessions.all()
        paths = both.bridge.tunnels.paths
        before = session.path
        # As a reload does, while what is sent to the agent is lost.
        session.control.send = _lose
        session.takes_paths = False
        paths.offer(session)
        session.takes_paths = True
        paths.offer(session)
        assert session.path is not before
        # The agent finds out, and the bridge does not.
        own_session(both).control.last_received = -math.inf
        wait_until(lambda: handshakes(both, "resumed") == 1 and both.is_up())
        assert list(own_session(both).paths._paths) == [session.path.number]
        both.check_soon(5)


def test_socket_by_which_no_path_works_is_given_up(
    files: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been bound to the former address."""
    monkeypatch.setattr(agent_module, "AGAIN_SECONDS", 0.2)
    with pair(files) as both:
        begin(both)
        paths = own_session(both).paths
        (path,) = paths._paths.values()
        origin = paths.origin
        before = origin.conn
        # Nothing that the agent sends arrives any more.
        monkeypatch.setattr(before, "send", lambda arena, run, destination: None)
        path.remote.send = before.send
        wait_until(lambda: not path.up)
        # The agent finds out that its connection is dead, and the bridge does not.
        own_session(both).control.last_received = -math.inf
        wait_until(lambda: paths.origin not in (None, origin))
        wait_until(both.is_up)
        both.check_soon(10, 60000)
