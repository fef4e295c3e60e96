"""UDP of real programs through SOCKS5: dig and QUIC behind v2ray, dig under socksify, and PySocks."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any, Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import Association, Endpoint, TcpEcho, UdpEcho, exactly
from tests.e2e.seccomp import without_batches
from tests.e2e.support import ANY_PORT, LOOPBACK, Netproxyd, environment, program, wait_for
from tests.support.ports import free_port

pytestmark = pytest.mark.e2e

ANSWER = "192.0.2.53"
QUIC_BYTES = random.Random(5).randbytes(5_000_000)
QUIC_SECONDS = 40.0
ALICE = "alice", "open sesame"
USERS = f"""
listeners: [{{protocol: sps, listen: "{LOOPBACK}:0"}}]
users: {{alice: {{password: open sesame}}}}
"""


def dns_answer(query: bytes) -> bytes:
    """ANSWER for any A, nothing for anything else; an OPT record behind the question is left out."""
    end = query.index(b"\0", 12) + 5
    found = query[end - 4 : end - 2] == b"\0\1"
    head = query[:2] + b"\x81\x80\0\1" + bytes([0, found]) + bytes(4)
    record = (
        b"\xc0\x0c\0\1\0\1" + (60).to_bytes(4, "big") + b"\0\4" + bytes(map(int, ANSWER.split(".")))
    )
    return head + query[12:end] + record * found


@pytest.fixture(scope="module")
def dns() -> Iterator[UdpEcho]:
    with UdpEcho(answer=dns_answer) as server:
        yield server


@pytest.fixture(scope="module")
def everybody(shared_netproxyd: Start) -> Netproxyd:
    return shared_netproxyd("-l", ANY_PORT)


@pytest.fixture(scope="module")
def users_only(shared_netproxyd: Start) -> Netproxyd:
    return shared_netproxyd(config=USERS, login=ALICE)


def dig(server: Endpoint, *before: str, name: str = "a.name.test", **run: Any) -> str:
    """What dig prints, +short, of one try."""
    command = [
        *before,
        program("dig"),
        f"@{server[0]}",
        "-p",
        str(server[1]),
        name,
        "A",
        "+short",
        "+tries=1",
        "+time=5",
    ]
    done = subprocess.run(
        command, **{"env": environment(), **run}, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# -- v2ray: any UDP client, by a port that leads to one target


class V2ray:
    """A dokodemo-door on `port` that leads through the proxy to `target`."""

    def __init__(
        self,
        directory: Path,
        proxy: Endpoint,
        target: Endpoint,
        login: tuple[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        server: dict[str, Any] = {"address": proxy[0], "port": proxy[1]}
        if login:
            server["users"] = [{"user": login[0], "pass": login[1]}]
        config = {
            "log": {"loglevel": "warning"},
            "inbounds": [
                {
                    "listen": LOOPBACK,
                    "port": self.port,
                    "protocol": "dokodemo-door",
                    "settings": {"address": target[0], "port": target[1], "network": "tcp,udp"},
                }
            ],
            "outbounds": [{"protocol": "socks", "settings": {"servers": [server]}}],
        }
        path, self._log = directory / "v2ray.json", directory / "v2ray.log"
        path.write_text(json.dumps(config))
        with open(self._log, "wb") as output:
            self._process = subprocess.Popen(
                [program("v2ray"), "-config", str(path)],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def __enter__(self) -> V2ray:
        try:
            wait_for(lambda: " started" in self._log.read_text(), 10.0, "v2ray has started")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def test_dig_through_v2ray(everybody: Netproxyd, dns: UdpEcho, tmp_path: Path) -> None:
    with V2ray(tmp_path, everybody.server, dns.address) as door:
        for number in range(3):
            assert dig((LOOPBACK, door.port), name=f"n{number}.test") == ANSWER
    assert everybody.said(f" network=udp target={LOOPBACK}:{dns.address[1]} ")


def test_dig_through_v2ray_with_password(
    users_only: Netproxyd, dns: UdpEcho, tmp_path: Path
) -> None:
    with V2ray(tmp_path, users_only.server, dns.address, ALICE) as door:
        assert dig((LOOPBACK, door.port)) == ANSWER
    assert users_only.said(f" user=alice network=udp target={LOOPBACK}:{dns.address[1]} ")


def test_quic_through_v2ray(everybody: Netproxyd, tmp_path: Path) -> None:
    pytest.importorskip("aioquic")
    from tests.e2e import quic

    with (
        quic.EchoServer(tmp_path) as server,
        V2ray(tmp_path, everybody.server, (LOOPBACK, server.port)) as door,
    ):
        assert quic.transfer(door.port, QUIC_BYTES, QUIC_SECONDS) == QUIC_BYTES
    record = everybody.said(f" network=udp target={LOOPBACK}:{server.port} ")[-1]
    sent, received = (int(record.split(f" {name}=")[1].split()[0]) for name in ("sent", "received"))
    assert min(sent, received) > len(QUIC_BYTES)


@pytest.mark.parametrize("hint", (("0.0.0.0", 0), (LOOPBACK, 53)), ids=("nothing", "the target"))
def test_two_that_do_not_name_their_port(everybody: Netproxyd, hint: Endpoint) -> None:
    """v2ray names the target, PySocks nothing: of two at once neither may end with the other's control connection."""
    with UdpEcho() as target, Association(everybody.server, hint=hint) as one:
        with Association(everybody.server, hint=hint) as other:
            for client in (one, other):
                client.echo(target.address, b"hello")
            associations = everybody.status()["associations"]
        wait_for(
            lambda: everybody.status()["associations"] == associations - 1,
            2.0,
            "the other has ended",
        )
        one.echo(target.address, b"still here")


# -- socksify: a program that knows nothing of proxies


@pytest.mark.parametrize("login", (None, ALICE), ids=("nobody", "alice"))
def test_socksify_dig(
    everybody: Netproxyd,
    users_only: Netproxyd,
    dns: UdpEcho,
    tmp_path: Path,
    login: tuple[str, str] | None,
) -> None:
    daemon = users_only if login else everybody
    conf = tmp_path / "socks.conf"
    conf.write_text(f"""
route {{
    from: 0.0.0.0/0 to: 0.0.0.0/0 via: {LOOPBACK} port = {daemon.port}
    proxyprotocol: socks_v5
    command: connect udpassociate
    method: {"username" if login else "none"}
}}
""")
    more = {"SOCKS_USERNAME": login[0], "SOCKS_PASSWORD": login[1]} if login else {}
    before = len(dns.sources)
    env = environment(SOCKS_CONF=str(conf), SOCKS_AUTOADD_LANROUTES="no", **more)
    assert dig(dns.address, program("socksify"), env=env, preexec_fn=without_batches()) == ANSWER
    assert len(dns.sources) == before + 1
    user = login[0] if login else "-"
    assert daemon.said(f" user={user} network=udp target={LOOPBACK}:{dns.address[1]} ")


# -- PySocks


@pytest.fixture
def socks() -> Any:
    return pytest.importorskip("socks", reason="PySocks is not installed")


def proxied(
    socks: Any, daemon: Netproxyd, version: str, kind: int, login: tuple[str, str] | None = None
) -> Any:
    sock = socks.socksocket(socks.socket.AF_INET, kind)
    sock.settimeout(5.0)
    user, password = login or (None, None)
    sock.set_proxy(getattr(socks, version), daemon.host, daemon.port, True, user, password)
    return sock


@pytest.mark.parametrize("host", (LOOPBACK, "localhost"))
@pytest.mark.parametrize("version", ("SOCKS4", "SOCKS5", "HTTP"))
def test_pysocks_tcp(socks: Any, everybody: Netproxyd, version: str, host: str) -> None:
    data = random.Random(1).randbytes(60_000)
    with TcpEcho() as target, proxied(socks, everybody, version, socks.socket.SOCK_STREAM) as sock:
        sock.connect((host, target.address[1]))
        sock.sendall(data)
        assert exactly(sock, len(data)) == data


@pytest.mark.parametrize("version", ("SOCKS5", "HTTP"))
def test_pysocks_tcp_with_password(socks: Any, users_only: Netproxyd, version: str) -> None:
    with (
        TcpEcho() as target,
        proxied(socks, users_only, version, socks.socket.SOCK_STREAM, ALICE) as sock,
    ):
        sock.connect(target.address)
        sock.sendall(b"hello")
        assert exactly(sock, 5) == b"hello"


@pytest.mark.parametrize("version", ("SOCKS4", "SOCKS5", "HTTP"))
@pytest.mark.parametrize("login", (None, ("alice", "wrong")), ids=("nobody", "wrong"))
def test_pysocks_tcp_refused(
    socks: Any, users_only: Netproxyd, version: str, login: tuple[str, str] | None
) -> None:
    with (
        TcpEcho() as target,
        proxied(socks, users_only, version, socks.socket.SOCK_STREAM, login) as sock,
    ):
        with pytest.raises(socks.ProxyError):
            sock.connect(target.address)


@pytest.mark.parametrize("host", (LOOPBACK, "localhost"))
@pytest.mark.parametrize("login", (None, ALICE), ids=("nobody", "alice"))
def test_pysocks_udp(
    socks: Any,
    everybody: Netproxyd,
    users_only: Netproxyd,
    host: str,
    login: tuple[str, str] | None,
) -> None:
    daemon = users_only if login else everybody
    with (
        UdpEcho() as target,
        proxied(socks, daemon, "SOCKS5", socks.socket.SOCK_DGRAM, login) as sock,
    ):
        for size in (1, 1200, 60_000):
            data = random.Random(size).randbytes(size)
            sock.sendto(data, (host, target.address[1]))
            assert sock.recvfrom(65535) == (data, target.address)
        assert len(set(target.sources)) == 1


def test_pysocks_udp_to_two_targets(socks: Any, everybody: Netproxyd) -> None:
    """Both see one and the same source port: endpoint-independent mapping."""
    with UdpEcho() as first, UdpEcho("127.0.0.2") as second:
        with proxied(socks, everybody, "SOCKS5", socks.socket.SOCK_DGRAM) as sock:
            for target in (first, second):
                sock.sendto(b"hello", target.address)
                assert sock.recvfrom(65535) == (b"hello", target.address)
        assert first.sources == second.sources


def test_pysocks_udp_refused(socks: Any, users_only: Netproxyd) -> None:
    with proxied(socks, users_only, "SOCKS5", socks.socket.SOCK_DGRAM, ("alice", "wrong")) as sock:
        with pytest.raises(socks.ProxyError):
            sock.sendto(b"hello", (LOOPBACK, 9))
