"""What is packaged beside the program: unit, scripts, examples, completion, manual pages.  Nothing is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from netproxy import cli
from tests.support.certificates import certificates

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "debian/netproxyd.service"
EXPOSURE = 18  # tenths, as systemd-analyze counts; INTERFACE: at most 1.8
SHELL = [
    path
    for path in (
        *ROOT.glob("debian/*.*inst"),
        *ROOT.glob("debian/*.*rm"),
        *ROOT.glob("debian/*.init"),
        *ROOT.glob("conf/openwrt/*.init"),
        *ROOT.glob("conf/busybox/*"),
        ROOT / "tests/package/inside-scratch",
    )
]
BASH = [
    *ROOT.glob("conf/bash-completion/*"),
    ROOT / "debian/tests/proxy",
    ROOT / "tests/package/common.sh",
    *(
        ROOT / "tests" / name
        for name in (
            "run",
            "versions",
            "package/build",
            "package/scratch",
            "package/boot",
            "package/installed",
            "package/python",
            "package/piuparts",
        )
    ),
]
EXAMPLES = sorted(ROOT.glob("conf/**/*.yaml"))
PAGES = sorted((ROOT / "man").iterdir())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def program(name: str) -> str:
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


class TestUnit:
    def test_systemd_takes_it(self, tmp_path: Path) -> None:
        """The programs are not installed where this runs: others stand for them."""
        unit = tmp_path / UNIT.name
        unit.write_text(UNIT.read_text().replace("/usr/sbin/netproxyd", "/bin/true"))
        done = subprocess.run(
            [program("systemd-analyze"), "verify", "--man=no", unit], capture_output=True, text=True
        )
        said = [line for line in done.stderr.splitlines() if UNIT.name in line]
        assert (done.returncode, said) == (0, [])

    def test_little_is_exposed(self) -> None:
        done = subprocess.run(
            [
                program("systemd-analyze"),
                "security",
                "--offline=true",
                f"--threshold={EXPOSURE}",
                "--no-pager",
                UNIT,
            ],
            capture_output=True,
            text=True,
        )
        if "unrecognized option" in done.stderr:
            pytest.skip("an older systemd")
        assert done.returncode == 0, done.stdout[-200:] + done.stderr

    def test_the_sockets_are_taken_by_the_example(self, tmp_path: Path) -> None:
        text = (ROOT / "conf/systemd/netproxyd.socket").read_text()
        name = re.search(r"^FileDescriptorName=(\w+)$", text, re.M)
        assert (
            name
            and f"listen: systemd:{name[1]}\n" in (ROOT / "conf/systemd/socket.yaml").read_text()
        )
        (tmp_path / "netproxyd.socket").write_text(text)
        (tmp_path / UNIT.name).write_text(
            UNIT.read_text().replace("/usr/sbin/netproxyd", "/bin/true")
        )
        done = subprocess.run(
            [program("systemd-analyze"), "verify", "--man=no", tmp_path / "netproxyd.socket"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "netproxyd.socket" not in done.stderr, done.stderr


class TestScripts:
    @pytest.mark.parametrize("path", SHELL, ids=name_of)
    @pytest.mark.parametrize("shell", [("sh",), ("busybox", "sh")], ids=" ".join)
    def test_a_shell_reads_it(self, path: Path, shell: tuple[str, ...]) -> None:
        done = subprocess.run(
            [program(shell[0]), *shell[1:], "-n", path], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("path", BASH, ids=name_of)
    def test_bash_reads_it(self, path: Path) -> None:
        done = subprocess.run([program("bash"), "-n", path], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("path", [*SHELL, *BASH], ids=name_of)
    def test_what_is_run_may_be_run(self, path: Path) -> None:
        assert (
            path.suffix in (".sh", ".postinst", ".postrm", ".init")
            or path.parent.name == "bash-completion"
            or os.access(path, os.X_OK)
        )


class TestCompletion:
    """Bash runs the functions, and they the commands of the checkout."""

    def complete(self, folder: Path, *words: str) -> set[str]:
        for name, function in (("netproxyd", "main"), ("netproxyctl", "control_main")):
            (folder / name).write_text(
                f"#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -c "
                f'\'import sys; sys.argv[0] = "{name}"; from netproxy.cli import {function}; '
                f'raise SystemExit({function}())\' "$@"\n'
            )
            (folder / name).chmod(0o755)
        script = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); "_$1" "$1"; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(
            [
                program("bash"),
                "-c",
                script,
                "bash",
                ROOT / "conf/bash-completion" / words[0],
                *words,
            ],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        )
        assert done.stderr == ""
        return set(done.stdout.split())

    @staticmethod
    def said_by(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
        with pytest.raises(SystemExit):
            (cli.main if command[0] == "netproxyd" else cli.control_main)([*command[1:], "--help"])
        return capsys.readouterr().out

    def commands(self, capsys: pytest.CaptureFixture[str]) -> set[str]:
        return set(
            re.findall(r"^    ([a-z][a-z-]*)(?: |$)", self.said_by(["netproxyctl"], capsys), re.M)
        )

    @staticmethod
    def options(text: str) -> set[str]:
        """Those of the list in which each begins a line."""
        lines = re.findall(r"^  (-.*?)(?:   |  |$)", text, re.M)
        return set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", " ".join(lines)))

    def test_every_option_of_netproxyd(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = self.options(self.said_by(["netproxyd"], capsys))
        assert {"-c", "--config", "-l", "-u", "-t", "-v", "-q", "-V", "--log-format"} <= options
        assert self.complete(tmp_path, "netproxyd", "") == options
        assert self.complete(tmp_path, "netproxyd", "--c") == {"--config", "--check"}

    def test_values_of_netproxyd(self, tmp_path: Path) -> None:
        assert self.complete(tmp_path, "netproxyd", "--log-format", "") == {"text", "json"}
        (tmp_path / "mine.yaml").touch()
        assert self.complete(tmp_path, "netproxyd", "-c", "mi") == {"mine.yaml"}

    def test_every_command_of_netproxyctl(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        commands, options = (
            self.commands(capsys),
            self.options(self.said_by(["netproxyctl"], capsys)),
        )
        assert {"status", "upstreams", "hash-password"} <= commands
        assert self.complete(tmp_path, "netproxyctl", "") == commands | options
        assert self.complete(tmp_path, "netproxyctl", "-s", "control.sock", "stat") == {"status"}
        assert self.complete(tmp_path, "netproxyctl", "log", "") == {
            "debug",
            "info",
            "warning",
            "error",
        }

    def test_every_option_of_every_command(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for command in sorted(self.commands(capsys)):
            options = self.options(self.said_by(["netproxyctl", command], capsys))
            assert self.complete(tmp_path, "netproxyctl", "--socket", "x", command, "-") == options


class TestExamples:
    def test_they_are_there(self) -> None:
        assert {
            "minimal",
            "router",
            "two-offices-branch",
            "two-offices-head",
            "bridge",
            "agent",
            "public",
            "chain",
            "users",
            "tls",
            "group",
            "announce",
            "dns",
            "full",
        } <= {path.stem for path in EXAMPLES}

    @pytest.mark.parametrize("path", [ROOT / "conf/netproxyd.yaml", *EXAMPLES], ids=name_of)
    def test_netproxyd_takes_it(
        self, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Files that it names in /etc/netproxy are made for it."""
        pytest.importorskip("yaml")
        text = path.read_text()
        for name in set(re.findall(r"/etc/netproxy/([\w./-]*\w)", text)):
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            made = (
                certificates().path(f"server{file.suffix}")
                if file.suffix in (".pem", ".key")
                else ""
            )
            file.write_text(Path(made).read_text() if made else "a secret of twenty bytes\n")
        (tmp_path / path.name).write_text(text.replace("/etc/netproxy", str(tmp_path)))
        assert cli.main(["-t", "-c", str(tmp_path / path.name)]) == 0, capsys.readouterr().err
        said = capsys.readouterr()
        assert said.out.endswith("OK\n") and not said.err

    def test_as_installed_it_serves_this_machine_only(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("yaml")
        assert cli.main(["-t", "-c", str(ROOT / "conf/netproxyd.yaml")]) == 0
        assert set(re.findall(r"^listen (\S+)", capsys.readouterr().out, re.M)) == {
            "127.0.0.1:1080"
        }


class TestScaleOut:
    """What the balancers say of the recipes; their ports are not opened."""

    def test_haproxy_takes_it(self) -> None:
        done = subprocess.run(
            [program("haproxy"), "-c", "-f", ROOT / "conf/scale-out/haproxy.cfg"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr

    def test_keepalived_takes_it(self) -> None:
        done = subprocess.run(
            [program("keepalived"), "-t", "-f", ROOT / "conf/scale-out/keepalived.conf"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


class TestPages:
    @pytest.mark.parametrize("path", PAGES, ids=name_of)
    def test_mandoc_is_content(self, path: Path) -> None:
        done = subprocess.run(
            [program("mandoc"), "-T", "lint", "-W", "warning", path], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, "")

    @pytest.mark.parametrize("path", PAGES, ids=name_of)
    def test_groff_is_content(self, path: Path) -> None:
        done = subprocess.run(
            [program("groff"), "-mdoc", "-ww", "-z", path], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_versions_takes_each_python_once_and_none_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho 3.9\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        [ROOT / "tests/versions", "--list"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONS": f"{old} {tmp_path / 'none'} {sys.executable} {sys.executable}",
        },
    )
    version = "%d.%d" % sys.version_info[:2]
    assert (done.returncode, done.stderr) == (
        0,
        f"tests/versions: Python {version}: {sys.executable}\n",
    )
    done = subprocess.run(
        [ROOT / "tests/versions", "--list"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONS": str(old)},
    )
    assert (done.returncode, done.stderr) == (
        1,
        "tests/versions: no Python 3.10 or later is installed\n",
    )
