"""A bridge alone, and agents that a test plays by hand over real sockets."""

from __future__ import annotations

from typing import Any, Callable

from netproxy.errors import ListenError
from netproxy.net.stream import Stream
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import Hello, Service
from netproxy.tunnel.bridge import Bridge, PortRange, Rights
from netproxy.tunnel.dialer import TunnelDialer
from netproxy.tunnel.sessions import AgentSessions
from tests.support.sockets import SECONDS
from tests.support.tcp import TcpRig

TOKEN, OTHER_TOKEN = b"the token of home", b"the token of away"
NONCE = bytes(range(32))


class BridgeRig(TcpRig):
    """The bridge behind a real listener, pool and parker; ports are opened in name only."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions = AgentSessions()
        self.opened: list[tuple[str, Service, str]] = []
        self.shut: list[Service] = []
        self.busy: set[int] = set()  # ports that cannot be bound
        self.bridge = Bridge(self.sessions, self._open, self.counts, self.log)
        self.bridge.configure(
            {
                "home": Rights(
                    TOKEN,
                    (
                        PortRange("tcp", "127.0.0.1", 8022, 8030),
                        PortRange("udp", "0.0.0.0", 53, 53),
                    ),
                ),
                "away": Rights(OTHER_TOKEN),
            }
        )
        self.listener.configure(self.bridge, self.door, 5.0)
        self.listener.start()
        self.dialer = TunnelDialer("home", self.sessions, 3.0, self.counts)

    def _open(self, agent: str, service: Service, host: str) -> Callable[[], None]:
        if service.port in self.busy:
            raise ListenError(f"tcp {host}:{service.port}: Address already in use")
        self.opened.append((agent, service, host))
        return lambda: self.shut.append(service)

    def agent(self, name: str = "home", token: bytes = TOKEN) -> Played:
        """One that is welcome."""
        return Played(self, Hello(tunnel.CONTROL, name, NONCE), token).welcome()

    def work(self, agent: Played, token: bytes = TOKEN) -> Played:
        return Played(
            self, Hello(tunnel.WORK, agent.hello.name, NONCE, agent.session), token
        ).welcome()

    def close(self) -> None:
        self.bridge.stop()
        super().close()


class Played:
    """An agent's connection: the hello is sent, and the challenge answered."""

    def __init__(self, rig: BridgeRig, hello: Hello, token: bytes) -> None:
        self.hello = hello
        self.socket = rig.connect()
        self.stream = Stream(self.socket, limited=SECONDS)
        self.stream.write(tunnel.encode_hello(hello))
        self.nonce = tunnel.read_challenge(self.stream)
        assert isinstance(self.nonce, bytes)
        self.proof = tunnel.agent_proof(token, hello, self.nonce)
        self.stream.write(self.proof)
        self._token = token
        self.session = b""

    def answer(self) -> Any:
        return tunnel.read_welcome(self.stream)

    def welcome(self) -> Played:
        answer = self.answer()
        assert not isinstance(answer, int), f"refused: {answer}"
        self.session = answer.session
        assert answer.proof == tunnel.bridge_proof(
            self._token, self.hello, self.nonce, self.session
        )
        return self

    def send(self, data: bytes) -> None:
        self.stream.write(data)

    def read(self, kind: int) -> bytes:
        """The value of the next message, which is of that kind; pings are answered by nobody."""
        while True:
            message = tunnel.read_message(self.stream)
            if message.kind == kind:
                return message.value
            assert message.kind == tunnel.PING, message

    def read_ping(self) -> bytes:
        message = tunnel.read_message(self.stream)
        assert message.kind == tunnel.PING
        return message.value

    def register(self, *services: Service, leads_out: bool = False) -> dict[Service, int]:
        self.send(tunnel.encode_register(services, leads_out))
        return dict(tunnel.parse_registered(self.read(tunnel.REGISTERED)))

    def ended(self) -> bool:
        """Whether the bridge closes it, whatever it says before."""
        self.socket.settimeout(SECONDS)
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        self.socket.close()
