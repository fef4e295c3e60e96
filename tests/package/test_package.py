"""The package itself: built, installed, booted.  Minutes, root and a network for the first time; see README.md here."""

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
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )  # type: ignore[call-overload]
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NETPROXY_PACKAGE, or built now: twice, with equal bits, and lintian content."""
    given = os.environ.get("NETPROXY_PACKAGE")
    if given:
        return Path(given).resolve()
    target = tmp_path_factory.mktemp("package")
    run(HERE / "build", target)
    return next(target.glob("netproxyd_*.deb"))


def test_builds_the_same_twice(package: Path) -> None:
    assert package.is_file()


@pytest.mark.parametrize("suite", SUITES)
def test_installs_upgrades_and_goes(package: Path, suite: str) -> None:
    run(HERE / "scratch", suite, package)


@pytest.mark.parametrize("suite", SUITES)
def test_serves_under_systemd(package: Path, suite: str) -> None:
    run(HERE / "boot", suite, package)


@pytest.mark.parametrize("suite", SUITES)
def test_its_own_tests_pass_where_it_is_installed(package: Path, suite: str) -> None:
    run(HERE / "installed", suite, package)


@pytest.mark.parametrize("suite", SUITES)
def test_purging_it_leaves_nothing(package: Path, suite: str) -> None:
    run(HERE / "piuparts", suite, package)


@pytest.mark.parametrize("suite", SUITES)
def test_the_unit_tests_pass_under_its_python(suite: str) -> None:
    run(HERE / "python", suite)


def test_pip_gives_the_same_two_commands(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".git", ".venv", "debian")
    )
    run(sys.executable, "-m", "venv", "--system-site-packages", tmp_path / "venv")
    pip = [
        tmp_path / "venv/bin/python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    run(*pip, "setuptools", "wheel")
    run(*pip, "--no-build-isolation", tmp_path / "source")
    assert run(tmp_path / "venv/bin/netproxyd", "-V", cwd="/").startswith("netproxyd ")
    assert "hash-password" in run(tmp_path / "venv/bin/netproxyctl", "--help", cwd="/")
