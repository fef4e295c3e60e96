"""netproxyd through programs: ssh -W to a real sshd, and what is left when they are ended."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.origin import BIG, HELLO, Origin, serving
from tests.e2e.peers import exactly
from tests.e2e.support import LOOPBACK, SECONDS, Netproxyd, program, wait_for
from tests.e2e.upstreams import SSH_OPTIONS, SSHD, Programs, _user
from tests.support.ports import free_port

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The command of an upstream: ssh -W to a sshd of this machine."""
    sshd, keygen, client = program("sshd"), program("ssh-keygen"), program("ssh")
    directory, port = tmp_path_factory.mktemp("ssh"), free_port()
    if os.getuid() == 0:
        # sshd needs this directory. Its package leaves it to systemd to create.
        os.makedirs("/run/sshd", 0o755, exist_ok=True)
    subprocess.run(
        (keygen, "-q", "-t", "ed25519", "-N", "", "-f", "key"),
        cwd=directory,
        check=True,
        timeout=SECONDS,
    )
    with Programs(directory) as programs:
        config = programs.write("sshd.conf", SSHD.format(directory=directory, port=port))
        programs.start(port, sshd, "-D", "-e", "-f", config)
        words = [client, "-F", "/dev/null", "-i", str(directory / "key"), "-p", str(port)]
        words += [word for option in SSH_OPTIONS for word in ("-o", option)]
        words += ["-W", "[%h]:%p", f"{_user()}@{LOOPBACK}"]
        yield f"[{', '.join(repr(word) for word in words)}]"


def start(netproxyd: Start, command: str, more: str = "", *arguments: str) -> Netproxyd:
    return netproxyd(
        *arguments,
        config=f"listeners: [{{listen: '{LOOPBACK}:0'}}, "
        f"{{name: through, listen: '{LOOPBACK}:0', upstream: program}}]\n"
        f"upstreams: {{program: {{command: {command}{more}}}}}\n",
    )


def curl(daemon: Netproxyd, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    proxy = f"socks5h://{LOOPBACK}:{daemon.tcp_ports[1]}"
    command = (program("curl"), "-q", "-sS", "--noproxy", "", "-m", "50", "-x", proxy, *arguments)
    return subprocess.run(command, capture_output=True, timeout=60)


def children(daemon: Netproxyd) -> set[int]:
    """Return the processes that the daemon, or a worker of it, has started as programs."""
    numbers: set[int] = set()
    for pid in daemon.processes():
        for task in Path(f"/proc/{pid}/task").iterdir():
            numbers |= set(map(int, (task / "children").read_text().split()))
    return numbers - set(daemon.workers())


def test_transfers_through_ssh(netproxyd: Start, ssh: str, origin: Origin, tmp_path: Path) -> None:
    daemon = start(netproxyd, ssh)
    assert curl(daemon, origin.url()).stdout == HELLO
    assert curl(daemon, origin.url("/big")).stdout == BIG
    upload = tmp_path / "upload"
    upload.write_bytes(BIG)
    answer = curl(daemon, "-T", str(upload), origin.url())
    assert answer.stdout == hashlib.sha256(BIG).hexdigest().encode(), answer.stderr
    assert len(daemon.said("listener=through .*upstream=program .*ended=closed", 3)) == 3
    wait_for(lambda: not children(daemon), SECONDS, "end of the programs")


def test_error_of_ssh_is_in_the_log(netproxyd: Start) -> None:
    command = f"[ssh, -F, /dev/null, -p, '{free_port()}', -W, '[%h]:%p', {LOOPBACK}]"
    daemon = start(netproxyd, command)
    assert curl(daemon, "http://192.0.2.1/").returncode
    daemon.said("'program' .command:ssh.: ssh: connect to host .*: Connection refused")
    daemon.said("upstream=program .*ended=")


def test_reset_of_the_client_ends_the_program(netproxyd: Start) -> None:
    daemon = start(netproxyd, "[sleep, '1000']")
    with socket.create_connection((LOOPBACK, daemon.tcp_ports[1]), SECONDS) as client:
        client.sendall(b"\5\1\0\5\1\0\3\1a\0\x50")
        (number,) = wait_for(lambda: children(daemon), SECONDS, "the program")
        # Not MSG_WAITALL: a socket with a timeout returns what is there.
        exactly(client, 12)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    wait_for(lambda: not children(daemon), SECONDS, "end of the program")
    assert not Path(f"/proc/{number}").exists()


def test_programs_at_the_limit_are_refused(netproxyd: Start, origin: Origin) -> None:
    # Each worker counts its own.
    daemon = start(netproxyd, "[cat]", ", processes: 1", "-w", "1")
    with subprocess.Popen(
        (program("curl"), "-q", "-sS", "--noproxy", "", "-m", "50")
        + ("-x", f"socks5h://{LOOPBACK}:{daemon.tcp_ports[1]}", "telnet://target.example:1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as first:
        wait_for(lambda: children(daemon), SECONDS, "the program")
        assert curl(daemon, origin.url()).returncode == 97  # SOCKS refused
        daemon.said("ended=.*1 programs run already")
        assert first.stdin is not None
        first.kill()


def test_stop_leaves_no_program(netproxyd: Start) -> None:
    script = "trap : TERM; while :; do sleep 1000; done"
    daemon = start(netproxyd, f"[sh, -c, {script!r}]", ", processes: 4")
    with subprocess.Popen(
        (program("curl"), "-q", "-sS", "--noproxy", "", "-m", "50")
        + ("-x", f"socks5h://{LOOPBACK}:{daemon.tcp_ports[1]}", "http://target.example/"),
        stderr=subprocess.DEVNULL,
    ):
        numbers = wait_for(lambda: children(daemon), SECONDS, "the program")
        daemon.signal(15)
        daemon.said("stopping: ")
        daemon.signal(15)
        daemon.wait(SECONDS)
    assert not [number for number in numbers if Path(f"/proc/{number}").exists()]
