"""The Debian package: built, installed, booted and removed.

These tests need minutes, root and, the first time, a network: see README.md in this folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SUITES = os.environ.get("NETPROXY_SUITES", "bookworm trixie").split()

pytestmark = [pytest.mark.package, pytest.mark.leaves_things_open]


def run(*command: str | Path, **options: object) -> str:
    """Run a command, which must succeed, and return its output."""
    process = subprocess.run(  # type: ignore[call-overload]
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    print(process.stdout)
    assert process.returncode == 0, process.stdout[-4000:]
    return str(process.stdout)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of NETPROXY_PACKAGE, or one that is built now."""
    given = os.environ.get("NETPROXY_PACKAGE")
    if given:
        return Path(given).resolve()
    target = tmp_path_factory.mktemp("package")
    run(HERE / "build", target)
    return next(target.glob("netproxyd_*.deb"))


def test_package_builds_reproducibly_and_lintian_accepts_it(package: Path) -> None:
    """tests/package/build checks both."""
    assert package.is_file()


@pytest.mark.parametrize("suite", SUITES)
def test_package_installs_upgrades_and_purges_without_systemd(package: Path, suite: str) -> None:
    """Hazard 129."""
    run(HERE / "scratch", suite, package)


@pytest.mark.parametrize("suite", SUITES)
def test_package_serves_under_systemd(package: Path, suite: str) -> None:
    """Hazards 107, 129 and 130."""
    run(HERE / "boot", suite, package)


@pytest.mark.parametrize("suite", SUITES)
def test_autopkgtest_passes_on_the_installed_package(package: Path, suite: str) -> None:
    run(HERE / "installed", suite, package)


@pytest.mark.parametrize("suite", SUITES)
def test_piuparts_finds_nothing_left_after_purge(package: Path, suite: str) -> None:
    """Hazard 129."""
    run(HERE / "piuparts", suite, package)


@pytest.mark.parametrize("suite", SUITES)
def test_unit_tests_pass_under_the_python_of_the_release(suite: str) -> None:
    """Hazard 132."""
    run(HERE / "python", suite)


def test_pip_installs_both_commands(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".git", ".venv", "debian")
    )
    run(sys.executable, "-m", "venv", "--system-site-packages", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "setuptools", "wheel")
    run(*pip, "--no-build-isolation", tmp_path / "source")
    assert run(tmp_path / "venv/bin/netproxyd", "-V", cwd="/").startswith("netproxyd ")
    assert "hash-password" in run(tmp_path / "venv/bin/netproxyctl", "--help", cwd="/")
