"""UDP of other programs through SOCKS5: dig and QUIC behind v2ray, dig under socksify, PySocks."""

from __future__ import annotations

import json
import random
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import Association, Endpoint, TcpEcho, UdpEcho, exactly
from tests.e2e.seccomp import without_batches
from tests.e2e.support import ANY_PORT, LOOPBACK, SECONDS, Netproxyd, environment, program, wait_for
from tests.e2e.upstreams import Programs
from tests.support.ports import free_port

pytestmark = pytest.mark.e2e

ANSWER = "192.0.2.53"
QUIC_BYTES = random.Random(5).randbytes(5_000_000)
QUIC_SECONDS = 90.0
ALICE = "alice", "open sesame"
USERS = f"""
listeners: [{{protocol: sps, listen: "{LOOPBACK}:0"}}]
users: {{alice: {{password: open sesame}}}}
"""


def dns_answer(query: bytes) -> bytes:
    """Return ANSWER for A, no record for any other type. An OPT record of the query is ignored."""
    end = query.index(b"\0", 12) + 5
    is_a = query[end - 4 : end - 2] == b"\0\1"
    head = query[:2] + b"\x81\x80\0\1" + bytes([0, is_a]) + bytes(4)
    record = (
        b"\xc0\x0c\0\1\0\1" + (60).to_bytes(4, "big") + b"\0\4" + bytes(map(int, ANSWER.split(".")))
    )
    return head + query[12:end] + record * is_a


@pytest.fixture(scope="module")
def dns() -> Iterator[UdpEcho]:
    with UdpEcho(answer=dns_answer) as server:
        yield server


@pytest.fixture(scope="module")
def open_daemon(shared_netproxyd: Start) -> Netproxyd:
    return shared_netproxyd("-l", ANY_PORT)


@pytest.fixture(scope="module")
def users_daemon(shared_netproxyd: Start) -> Netproxyd:
    return shared_netproxyd(config=USERS, login=ALICE)


def dig(server: Endpoint, *before: str, name: str = "a.name.test", **run: Any) -> str:
    """Run dig with one try, and return what +short prints. `before` is a wrapper program."""
    options = ("-p", str(server[1]), name, "A", "+short", "+tries=1", "+time=20")
    command = [*before, program("dig"), f"@{server[0]}", *options]
    run.setdefault("env", environment())
    process = subprocess.run(command, **run, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout.strip()


# -- v2ray: any UDP client, through a port with a fixed target


@contextmanager
def v2ray_port(
    directory: Path, proxy: Endpoint, target: Endpoint, login: tuple[str, str] | None = None
) -> Iterator[int]:
    """Run v2ray. Yield a port that leads through the proxy to the target."""
    port = free_port()
    server: dict[str, Any] = {"address": proxy[0], "port": proxy[1]}
    if login:
        server["users"] = [{"user": login[0], "pass": login[1]}]
    settings = {"address": target[0], "port": target[1], "network": "tcp,udp"}
    inbound = {"listen": LOOPBACK, "port": port, "protocol": "dokodemo-door", "settings": settings}
    config = {
        "log": {"loglevel": "warning"},
        "inbounds": [inbound],
        "outbounds": [{"protocol": "socks", "settings": {"servers": [server]}}],
    }
    path = program("v2ray")
    with Programs(directory) as programs:
        file = programs.write("v2ray.json", json.dumps(config))
        programs.start(port, path, "-config", file, required=True)
        yield port


def test_dig_behind_v2ray_is_answered(open_daemon: Netproxyd, dns: UdpEcho, tmp_path: Path) -> None:
    with v2ray_port(tmp_path, open_daemon.server, dns.address) as port:
        for number in range(3):
            assert dig((LOOPBACK, port), name=f"n{number}.test") == ANSWER
    assert open_daemon.said(f" network=udp target={LOOPBACK}:{dns.address[1]} ")


def test_dig_behind_v2ray_with_a_password_is_answered(
    users_daemon: Netproxyd, dns: UdpEcho, tmp_path: Path
) -> None:
    with v2ray_port(tmp_path, users_daemon.server, dns.address, ALICE) as port:
        assert dig((LOOPBACK, port)) == ANSWER
    assert users_daemon.said(f" user=alice network=udp target={LOOPBACK}:{dns.address[1]} ")


@pytest.mark.any_workers
def test_quic_behind_v2ray_is_relayed(open_daemon: Netproxyd, tmp_path: Path) -> None:
    pytest.importorskip("aioquic")
    from tests.e2e import quic

    with (
        quic.EchoServer(tmp_path) as server,
        v2ray_port(tmp_path, open_daemon.server, (LOOPBACK, server.port)) as port,
    ):
        assert quic.transfer(port, QUIC_BYTES, QUIC_SECONDS) == QUIC_BYTES
    record = open_daemon.said(f" network=udp target={LOOPBACK}:{server.port} ")[-1]
    sent, received = (int(record.split(f" {name}=")[1].split()[0]) for name in ("sent", "received"))
    assert min(sent, received) > len(QUIC_BYTES)


@pytest.mark.parametrize("hint", (("0.0.0.0", 0), (LOOPBACK, 53)), ids=("nothing", "the target"))
def test_associations_that_do_not_name_their_port_are_told_apart(
    open_daemon: Netproxyd, hint: Endpoint
) -> None:
    """Hazard 26. v2ray names the target, PySocks nothing.

    An association does not end with the control connection of another.
    """
    with UdpEcho() as target, Association(open_daemon.server, hint=hint) as first:
        with Association(open_daemon.server, hint=hint) as second:
            for client in (first, second):
                client.echo(target.address, b"hello")
            associations = open_daemon.status()["associations"]
        wait_for(
            lambda: open_daemon.status()["associations"] == associations - 1,
            SECONDS,
            "the second has ended",
        )
        first.echo(target.address, b"still here")


# -- socksify: a program without support for proxies


@pytest.mark.parametrize("login", (None, ALICE), ids=("no login", "alice"))
def test_dig_under_socksify_is_answered(
    open_daemon: Netproxyd,
    users_daemon: Netproxyd,
    dns: UdpEcho,
    tmp_path: Path,
    login: tuple[str, str] | None,
) -> None:
    daemon = users_daemon if login else open_daemon
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
    """Return a socket of PySocks that uses the daemon."""
    sock = socks.socksocket(socks.socket.AF_INET, kind)
    sock.settimeout(SECONDS)
    user, password = login or (None, None)
    sock.set_proxy(getattr(socks, version), daemon.host, daemon.port, True, user, password)
    return sock


@pytest.mark.parametrize("host", (LOOPBACK, "localhost"))
@pytest.mark.parametrize("version", ("SOCKS4", "SOCKS5", "HTTP"))
def test_pysocks_connects_to_a_target(
    socks: Any, open_daemon: Netproxyd, version: str, host: str
) -> None:
    data = random.Random(1).randbytes(60_000)
    with (
        TcpEcho() as target,
        proxied(socks, open_daemon, version, socks.socket.SOCK_STREAM) as sock,
    ):
        sock.connect((host, target.address[1]))
        sock.sendall(data)
        assert exactly(sock, len(data)) == data


@pytest.mark.parametrize("version", ("SOCKS5", "HTTP"))
def test_pysocks_connects_with_a_password(
    socks: Any, users_daemon: Netproxyd, version: str
) -> None:
    with (
        TcpEcho() as target,
        proxied(socks, users_daemon, version, socks.socket.SOCK_STREAM, ALICE) as sock,
    ):
        sock.connect(target.address)
        sock.sendall(b"hello")
        assert exactly(sock, 5) == b"hello"


@pytest.mark.parametrize("version", ("SOCKS4", "SOCKS5", "HTTP"))
@pytest.mark.parametrize("login", (None, ("alice", "wrong")), ids=("no login", "wrong password"))
def test_pysocks_without_the_password_is_refused(
    socks: Any, users_daemon: Netproxyd, version: str, login: tuple[str, str] | None
) -> None:
    with (
        TcpEcho() as target,
        proxied(socks, users_daemon, version, socks.socket.SOCK_STREAM, login) as sock,
    ):
        with pytest.raises(socks.ProxyError):
            sock.connect(target.address)


@pytest.mark.parametrize("host", (LOOPBACK, "localhost"))
@pytest.mark.parametrize("login", (None, ALICE), ids=("no login", "alice"))
def test_pysocks_sends_datagrams(
    socks: Any,
    open_daemon: Netproxyd,
    users_daemon: Netproxyd,
    host: str,
    login: tuple[str, str] | None,
) -> None:
    daemon = users_daemon if login else open_daemon
    with (
        UdpEcho() as target,
        proxied(socks, daemon, "SOCKS5", socks.socket.SOCK_DGRAM, login) as sock,
    ):
        for size in (1, 1200, 60_000):
            data = random.Random(size).randbytes(size)
            sock.sendto(data, (host, target.address[1]))
            assert sock.recvfrom(65535) == (data, target.address)
        assert len(set(target.sources)) == 1


def test_pysocks_has_one_source_port_for_two_targets(socks: Any, open_daemon: Netproxyd) -> None:
    """Hazard 36."""
    with UdpEcho() as first, UdpEcho("127.0.0.2") as second:
        with proxied(socks, open_daemon, "SOCKS5", socks.socket.SOCK_DGRAM) as sock:
            for target in (first, second):
                sock.sendto(b"hello", target.address)
                assert sock.recvfrom(65535) == (b"hello", target.address)
        assert first.sources == second.sources


def test_pysocks_with_a_wrong_password_sends_no_datagram(
    socks: Any, users_daemon: Netproxyd
) -> None:
    with proxied(
        socks, users_daemon, "SOCKS5", socks.socket.SOCK_DGRAM, ("alice", "wrong")
    ) as sock:
        with pytest.raises(socks.ProxyError):
            sock.sendto(b"hello", (LOOPBACK, 9))
