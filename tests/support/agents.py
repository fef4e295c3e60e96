"""A bridge alone, and agents that a test plays by hand over real sockets."""

from __future__ import annotations

from functools import partial

from netproxy.access.backoff import AGENT_SECONDS, BackOff
from netproxy.errors import ListenError
from netproxy.interfaces.listeners import AllowedClients
from netproxy.net.stream import Stream, complete
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import BridgePort, Hello, Registration, Welcome
from netproxy.tunnel.bridge import Bridge
from netproxy.tunnel.dialer import TunnelDialer
from netproxy.tunnel.ports import AgentRights, PortRange
from netproxy.tunnel.control.session import AgentSession
from netproxy.tunnel.control.sessions import AgentSessions
from tests.support.sockets import SECONDS
from tests.support.tcp import TcpRig

TOKEN, OTHER_TOKEN = b"the token of home", b"the token of away"
NONCE = bytes(range(32))


class RecordingOpener:
    """A PortOpener that opens ports in name only."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, BridgePort, str]] = []
        self.closed: list[BridgePort] = []
        self.clients: list[tuple[BridgePort, AllowedClients]] = []
        """Set after the ports were opened."""
        self.busy: set[int] = set()
        """Ports that cannot be bound."""

    def open(self, agent: str, port: BridgePort, allowed: PortRange) -> RecordedPort:
        if port.port in self.busy:
            raise ListenError(f"tcp {allowed.host}:{port.port}: Address already in use")
        self.opened.append((agent, port, allowed.host))
        return RecordedPort(self, port)


class RecordedPort:
    """A port that notes that it was closed."""

    def __init__(self, opener: RecordingOpener, port: BridgePort) -> None:
        self.close = partial(opener.closed.append, port)
        self._opener, self._port = opener, port

    def configure_range(self, allowed: PortRange) -> None:
        self._opener.clients.append((self._port, allowed.clients))


class BridgeRig(TcpRig):
    """The bridge behind a real listener, pool and poller, with a RecordingOpener."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions = AgentSessions()
        self.ports = RecordingOpener()
        back_off = BackOff(AGENT_SECONDS)
        self.bridge = Bridge(self.sessions, self.ports, back_off, self.counts, self.log)
        home = (PortRange("tcp", "127.0.0.1", 8022, 8030), PortRange("udp", "0.0.0.0", 53, 53))
        self.bridge.configure({"home": AgentRights(TOKEN, home), "away": AgentRights(OTHER_TOKEN)})
        self.listener.configure(self.bridge, self.admission, 5.0, 256)
        self.listener.start()
        self.dialer = TunnelDialer("home", self.sessions, 3.0, self.counts)

    def agent(self, name: str = "home", token: bytes = TOKEN) -> PlayedAgent:
        """Return a control connection that the bridge has welcomed."""
        return PlayedAgent(self, Hello(tunnel.CONTROL, name, NONCE), token).welcomed()

    def work(self, agent: PlayedAgent, token: bytes = TOKEN) -> PlayedAgent:
        """Return a work connection of an agent that the bridge has welcomed."""
        hello = Hello(tunnel.WORK, agent.hello.name, NONCE, agent.session)
        return PlayedAgent(self, hello, token).welcomed()

    def session(self, name: str = "home") -> AgentSession:
        """Return the session of a connected agent."""
        session = self.sessions.get(name)
        assert session is not None
        return session

    def close(self) -> None:
        self.bridge.stop()
        super().close()


class PlayedAgent:
    """A connection of an agent after its hello and its answer to the challenge."""

    def __init__(self, rig: BridgeRig, hello: Hello, token: bytes) -> None:
        self.hello = hello
        self.socket = rig.connect()
        self.stream = Stream(self.socket, limited=SECONDS)
        self.stream.write(tunnel.encode_hello(hello))
        nonce = complete(tunnel.read_challenge(self.stream))
        assert isinstance(nonce, bytes)
        self.nonce = nonce
        """The bridge's."""
        self.proof = tunnel.agent_proof(token, hello, self.nonce)
        self.stream.write(self.proof)
        self._token = token
        self.session = b""

    def answer(self) -> Welcome | int:
        """Read the bridge's welcome, or the reason of its refusal."""
        return complete(tunnel.read_welcome(self.stream))

    def welcomed(self) -> PlayedAgent:
        """Read the welcome and check the bridge's proof."""
        answer = self.answer()
        assert isinstance(answer, Welcome), f"refused: {answer}"
        self.session = answer.session
        expected = tunnel.bridge_proof(self._token, self.hello, self.nonce, self.session)
        assert answer.proof == expected
        return self

    def send(self, data: bytes) -> None:
        self.stream.write(data)

    def read(self, kind: int) -> bytes:
        """Return the value of the next message, which must be of this kind; pings are skipped."""
        while True:
            message = complete(tunnel.read_message(self.stream))
            if message.kind == kind:
                return message.value
            assert message.kind == tunnel.PING, message

    def read_ping(self) -> bytes:
        """Return the value of the next message, which must be a PING."""
        message = complete(tunnel.read_message(self.stream))
        assert message.kind == tunnel.PING
        return message.value

    def register(self, *services: BridgePort, is_exit: bool = False) -> dict[BridgePort, int]:
        """Register services; return their outcomes."""
        self.send(tunnel.encode_register(Registration(services, is_exit)))
        return dict(tunnel.parse_registered(self.read(tunnel.REGISTERED)))

    def is_closed(self) -> bool:
        """Wait until the bridge closes the connection, whatever it sends before."""
        self.socket.settimeout(SECONDS)
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        self.socket.close()
