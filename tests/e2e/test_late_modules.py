"""The package is replaced while a daemon runs: no module of the other one is loaded."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import netproxy
from netproxy.daemon.process import late_modules
from netproxy.daemon.process.late_modules import LateModules, PackageReplaced
from netproxy.errors import CannotLoad
from tests.e2e.conftest import Start
from tests.e2e.peers import TcpEcho, echo, socks5, CONNECT
from tests.e2e.support import ROOT

NAME = "netproxy.config.tree.hints"
FILE = "listeners: [{listen: '127.0.0.1:0'}]\ndefault: %s\n"


def replace(package: Path) -> None:
    """Replace the file with the version, as installers do."""
    fresh = package / "new"
    fresh.write_text((package / "__init__.py").read_text())
    fresh.replace(package / "__init__.py")


@pytest.mark.any_workers
class TestLateModules:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "__init__.py").write_text('__version__ = "1"\n')
        monkeypatch.setattr(netproxy, "__file__", str(tmp_path / "__init__.py"))
        return tmp_path

    def test_modules_of_the_same_package_are_loaded(self, package: Path) -> None:
        LateModules().find_spec(NAME)

    def test_modules_of_another_package_are_refused(self, package: Path) -> None:
        """Hazard 174.  Other packages are not looked at."""
        modules = LateModules()
        replace(package)
        modules.find_spec("json")
        with pytest.raises(PackageReplaced, match="restart netproxyd"):
            modules.find_spec(NAME)

    def test_modules_of_a_removed_package_are_refused(self, package: Path) -> None:
        """Hazard 174."""
        modules = LateModules()
        (package / "__init__.py").unlink()
        with pytest.raises(PackageReplaced):
            modules.find_spec(NAME)

    def test_module_for_which_there_is_no_descriptor_is_refused_in_these_words(
        self, package: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 188."""

        def fail(path: str, flags: int) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        modules = LateModules()
        without = SimpleNamespace(open=fail, close=os.close, stat=os.stat, O_RDONLY=0, O_CLOEXEC=0)
        monkeypatch.setattr(late_modules, "os", without)
        with pytest.raises(CannotLoad, match="^json cannot be loaded: Too many open files$"):
            modules.find_spec("json")
        modules.find_spec("errno")


@pytest.mark.e2e
@pytest.mark.any_workers
def test_reload_without_descriptors_is_refused_and_succeeds_later(netproxyd: Start) -> None:
    """Hazard 188.  The first reload needs modules that the daemon has not loaded."""
    config = FILE % "direct"
    daemon = netproxyd(config=config)
    before = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    # No new descriptor has a number below.
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    daemon.provoked = "not reloaded"
    daemon.reload()
    daemon.said("error not reloaded: netproxy.* cannot be loaded: Too many open files")
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, before)
    daemon.reload()
    daemon.said("info reloaded")
    assert "internal error" not in daemon.log


@pytest.mark.e2e
@pytest.mark.parametrize("control", ("none", "unix:{}/ctl"))
def test_daemon_of_a_replaced_package_serves_and_refuses_a_reload(
    netproxyd: Start, tmp_path: Path, control: str
) -> None:
    """Hazard 174.  It stops in order, too."""
    pytest.importorskip("yaml")
    shutil.copytree(ROOT / "netproxy", tmp_path / "netproxy")
    path = tmp_path / "c.yaml"
    file = FILE + f"control: {control.format(tmp_path)}\n"
    path.write_text(file % "direct")
    daemon = netproxyd("-c", str(path), cwd=tmp_path, python=(sys.executable, "-B"))
    daemon.provoked = "netproxy was upgraded"
    replace(tmp_path / "netproxy")
    path.write_text(file % "block")
    daemon.reload()
    daemon.said("error not reloaded: netproxy was upgraded or removed while it runs: restart")
    with TcpEcho() as target:
        sock, _ = socks5(daemon.server, CONNECT, target.address)
        with sock:
            echo(sock, b"still here")
