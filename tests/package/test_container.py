"""The container image: built by buildah on a Debian root, run as its user; and its manifests."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Iterator

import pytest

from netproxy import cli
from tests.e2e.peers import CONNECT, Association, TcpEcho, UdpEcho, echo, socks5
from tests.e2e.support import LOOPBACK, SECONDS, program, wait_for

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "conf" / "container"
PORT = 1080
PACKAGES = "python3,python3-yaml,ca-certificates"
UNUSED = ("doc", "locale", "man")
CACHE = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
ROOTS = Path(os.environ.get("NETPROXY_ROOTS") or f"{CACHE}/netproxy-roots")
BUILD_SECONDS = 600

pytestmark = pytest.mark.long


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def configurations() -> Iterator[Any]:
    for name in ("netproxyd.yaml", "announce.yaml"):
        yield pytest.param((FOLDER / name).read_text(), id=name)
    for name in ("kubernetes.yaml", "sidecar.yaml"):
        for document in documents(name):
            if document["kind"] == "ConfigMap":
                yield pytest.param(document["data"]["netproxyd.yaml"], id=name)


@pytest.mark.parametrize("text", list(configurations()))
def test_configuration_is_valid(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANNOUNCE", "203.0.113.5")
    monkeypatch.setenv("NODE_ADDRESS", "192.0.2.9")
    users = (ROOT / "conf/examples/users-file").read_text()
    for name, content in (("users", users), ("netproxyd.yaml", text)):
        (tmp_path / name).write_text(content.replace("/etc/netproxy", str(tmp_path)))
        (tmp_path / name).chmod(0o600)
    status = cli.main(["-t", "-c", str(tmp_path / "netproxyd.yaml")])
    captured = capsys.readouterr()
    assert (captured.err, status) == ("", 0)


def test_manifests_publish_tcp_and_udp_of_one_port_and_need_no_root() -> None:
    daemon_set = next(item for item in documents("kubernetes.yaml") if item["kind"] == "DaemonSet")
    service = next(item for item in documents("kubernetes.yaml") if item["kind"] == "Service")
    (container,) = daemon_set["spec"]["template"]["spec"]["containers"]
    assert {(port["containerPort"], port["protocol"]) for port in container["ports"]} == {
        (PORT, "TCP"),
        (PORT, "UDP"),
    }
    assert {(port["port"], port["protocol"]) for port in service["spec"]["ports"]} == {
        (PORT, "TCP"),
        (PORT, "UDP"),
    }
    security = container["securityContext"]
    assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"]
    (compose,) = documents("compose.yaml")
    assert compose["services"]["netproxy"]["ports"] == ["1080:1080/tcp", "1080:1080/udp"]


class Image:
    """The image, built in a store of its own."""

    def __init__(self, folder: Path) -> None:
        store = [
            "--storage-driver",
            "vfs",
            "--root",
            f"{folder}/store",
            "--runroot",
            f"{folder}/run",
        ]
        self._buildah = [program("buildah"), *store]
        root = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", root, str(self._base()), "/")
        self.buildah("commit", "--quiet", root, "debian:bookworm-slim")
        build = ["--isolation", "chroot", "--pull-never", "--quiet", "-t", "netproxy"]
        self.buildah("bud", *build, "-f", str(FOLDER / "Containerfile"), str(ROOT))
        self.container = self.buildah("from", "--pull-never", "localhost/netproxy")

    def _base(self) -> Path:
        """Return the archive of a small Debian system, which is fetched once (README.md)."""
        base = ROOTS / "bookworm-image.tar"
        if not base.exists():
            base.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=base.parent) as folder:
                new = Path(folder) / base.name
                options = ["--quiet", "--variant=apt", f"--include={PACKAGES}"]
                options += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in UNUSED]
                self._run(program("mmdebstrap"), *options, "bookworm", str(new))
                new.replace(base)
        return base

    def buildah(self, *arguments: str) -> str:
        return self._run(*self._buildah, *arguments)

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs a program in the container, in this network."""
        return [*self._buildah, "run", "--isolation", "chroot", self.container, "--", *arguments]

    @staticmethod
    def _run(*command: str) -> str:
        # The image keeps its bytecode where Python always does.
        variables = {**os.environ}
        variables.pop("PYTHONPYCACHEPREFIX", None)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=BUILD_SECONDS, env=variables
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_image_is_built_and_serves_tcp_and_udp_as_its_own_user(tmp_path: Path) -> None:
    image = Image(tmp_path)
    log = tmp_path / "log"
    url = f"sps://{LOOPBACK}:0"
    with open(log, "wb") as output:
        command = image.command("netproxyd", "-l", url)
        daemon = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        serves = re.compile(rf"serves .*tcp {LOOPBACK}:(\d+)")
        found = wait_for(lambda: serves.search(log.read_text()), SECONDS, "the daemon")
        server = LOOPBACK, int(found[1])
        with TcpEcho() as tcp, UdpEcho() as udp, Association(server) as client:
            sock, _ = socks5(server, CONNECT, tcp.address)
            with sock:
                echo(sock, b"hello")
            assert client.echo(udp.address, b"hello") == (udp.address, client.bound)
        users = image.buildah("run", "--isolation", "chroot", image.container, "--", "id", "-u")
        assert users == "10080"
        version = image.command("netproxyctl", "--help")
        assert subprocess.run(version, capture_output=True, timeout=60).returncode == 0
    finally:
        daemon.terminate()
        daemon.wait(SECONDS)
