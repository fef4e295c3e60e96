"""Files that are packaged beside the program: unit, scripts, examples, completion, manual pages.

The tests install nothing.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from netproxy import cli
from netproxy.admin.control.server import ControlServer
from tests.support.doubles import Lines

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "debian/netproxyd.service"
# The highest exposure of the unit, in the tenths that systemd-analyze counts in.
EXPOSURE = 18
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
    """Return the path in the checkout."""
    return str(path.relative_to(ROOT))


def program(name: str) -> str:
    """Return the path of a program. Skip the test if it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output."""
    return subprocess.run(command, capture_output=True, text=True)


class TestUnit:
    def test_unit_is_accepted_by_systemd(self, tmp_path: Path) -> None:
        """netproxyd need not be installed: another program stands in for it."""
        unit = tmp_path / UNIT.name
        unit.write_text(UNIT.read_text().replace("/usr/sbin/netproxyd", "/bin/true"))
        process = run(program("systemd-analyze"), "verify", "--man=no", unit)
        lines = [line for line in process.stderr.splitlines() if UNIT.name in line]
        assert (process.returncode, lines) == (0, [])

    def test_unit_exposes_little(self) -> None:
        """Hazard 130."""
        options = ("--offline=true", f"--threshold={EXPOSURE}", "--no-pager")
        process = run(program("systemd-analyze"), "security", *options, UNIT)
        if "unrecognized option" in process.stderr:
            pytest.skip("an older systemd")
        assert process.returncode == 0, process.stdout[-200:] + process.stderr

    def test_socket_unit_and_its_example_use_the_same_name(self, tmp_path: Path) -> None:
        text = (ROOT / "conf/systemd/netproxyd.socket").read_text()
        name = re.search(r"^FileDescriptorName=(\w+)$", text, re.M)
        assert name
        example = (ROOT / "conf/systemd/socket.yaml").read_text()
        assert f"listen: systemd:{name[1]}\n" in example
        (tmp_path / "netproxyd.socket").write_text(text)
        (tmp_path / UNIT.name).write_text(
            UNIT.read_text().replace("/usr/sbin/netproxyd", "/bin/true")
        )
        unit = tmp_path / "netproxyd.socket"
        process = run(program("systemd-analyze"), "verify", "--man=no", unit)
        assert process.returncode == 0 and unit.name not in process.stderr, process.stderr


class TestScripts:
    @pytest.mark.parametrize("path", SHELL, ids=name_of)
    @pytest.mark.parametrize("shell", [("sh",), ("busybox", "sh")], ids=" ".join)
    def test_shell_script_has_no_syntax_error(self, path: Path, shell: tuple[str, ...]) -> None:
        process = run(program(shell[0]), *shell[1:], "-n", path)
        assert (process.returncode, process.stderr) == (0, "")

    @pytest.mark.parametrize("path", BASH, ids=name_of)
    def test_bash_script_has_no_syntax_error(self, path: Path) -> None:
        process = run(program("bash"), "-n", path)
        assert (process.returncode, process.stderr) == (0, "")

    @pytest.mark.parametrize("path", [*SHELL, *BASH], ids=name_of)
    def test_program_is_executable(self, path: Path) -> None:
        assert (
            path.suffix in (".sh", ".postinst", ".postrm", ".init")
            or path.parent.name == "bash-completion"
            or os.access(path, os.X_OK)
        )


class TestCompletion:
    """Bash runs the completion functions with the commands of the checkout."""

    def complete(self, folder: Path, *words: str) -> set[str]:
        """Return the completions of the last word."""
        for name, function in (("netproxyd", "main"), ("netproxyctl", "control_main")):
            (folder / name).write_text(
                f"#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -c "
                f'\'import sys; sys.argv[0] = "{name}"; from netproxy.cli import {function}; '
                f'raise SystemExit({function}())\' "$@"\n'
            )
            (folder / name).chmod(0o755)
        script = (
            'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); "_$1" "$1"; '
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        completion = ROOT / "conf/bash-completion" / words[0]
        process = subprocess.run(
            [program("bash"), "-c", script, "bash", completion, *words],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        )
        assert process.stderr == ""
        return set(process.stdout.split())

    @staticmethod
    def help_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
        """Return what the command prints with --help."""
        with pytest.raises(SystemExit):
            (cli.main if command[0] == "netproxyd" else cli.control_main)([*command[1:], "--help"])
        return capsys.readouterr().out

    def commands(self, capsys: pytest.CaptureFixture[str]) -> set[str]:
        """Return the commands of netproxyctl as --help lists them."""
        text = self.help_of(["netproxyctl"], capsys)
        return set(re.findall(r"^    ([a-z][a-z-]*)(?: |$)", text, re.M))

    @staticmethod
    def options(text: str) -> set[str]:
        """Return the options in a text of --help."""
        lines = re.findall(r"^  (-.*?)(?:   |  |$)", text, re.M)
        return set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", " ".join(lines)))

    def test_every_option_of_netproxyd_is_completed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = self.options(self.help_of(["netproxyd"], capsys))
        assert {"-c", "--config", "-l", "-u", "-t", "-v", "-q", "-V", "--log-format"} <= options
        assert self.complete(tmp_path, "netproxyd", "") == options
        assert self.complete(tmp_path, "netproxyd", "--c") == {"--config", "--check"}

    def test_values_of_options_are_completed(self, tmp_path: Path) -> None:
        assert self.complete(tmp_path, "netproxyd", "--log-format", "") == {"text", "json"}
        (tmp_path / "mine.yaml").touch()
        assert self.complete(tmp_path, "netproxyd", "-c", "mi") == {"mine.yaml"}

    def test_every_command_of_netproxyctl_is_completed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        commands = self.commands(capsys)
        options = self.options(self.help_of(["netproxyctl"], capsys))
        assert {"status", "upstreams", "hash-password"} <= commands
        assert self.complete(tmp_path, "netproxyctl", "") == commands | options
        assert self.complete(tmp_path, "netproxyctl", "-s", "control.sock", "stat") == {"status"}
        levels = {"debug", "info", "warning", "error"}
        assert self.complete(tmp_path, "netproxyctl", "log", "") == levels

    def test_every_option_of_every_command_is_completed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for command in sorted(self.commands(capsys)):
            options = self.options(self.help_of(["netproxyctl", command], capsys))
            assert self.complete(tmp_path, "netproxyctl", "--socket", "x", command, "-") == options

    def test_names_of_the_running_daemon_are_completed(self, tmp_path: Path) -> None:
        """A name is a text: bash expands nothing in it."""
        known = {
            "users": ["alice", "alan", "bob", "$(touch${IFS}made)"],
            "listeners": ["main"],
            "upstreams": ["office", "tunnel://home"],
            "agents": ["home"],
        }
        server = ControlServer(str(tmp_path / "s"), {"known": lambda request: known}, Lines())
        server.start()
        ctl = ("netproxyctl", "-s", str(tmp_path / "s"))
        try:
            assert self.complete(tmp_path, *ctl, "limit", "al") == {"alice", "alan"}
            assert self.complete(tmp_path, *ctl, "kill", "--upstream", "") == {
                "office",
                "tunnel://home",
            }
            assert self.complete(tmp_path, *ctl, "sessions", "--listener", "m") == {"main"}
            assert len(self.complete(tmp_path, *ctl, "ban", "")) == 4
            assert self.complete(tmp_path, *ctl, "nft", "--user", "al") == set()
            assert self.complete(tmp_path, "netproxyctl", "names", "a") == {"agents"}
        finally:
            server.stop()
        assert not (tmp_path / "made").exists()
        # There is no daemon.
        assert self.complete(tmp_path, *ctl, "limit", "al") == set()


class TestExamples:
    def test_examples_exist(self) -> None:
        examples = {path.stem for path in EXAMPLES}
        assert {"minimal", "router", "two-offices-branch", "two-offices-head"} <= examples
        assert {"bridge", "agent", "public", "chain", "users", "tls"} <= examples
        assert {"group", "announce", "dns", "full"} <= examples

    def test_installed_configuration_listens_on_loopback_only(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Hazard 129."""
        pytest.importorskip("yaml")
        assert cli.main(["-t", "-c", str(ROOT / "conf/netproxyd.yaml")]) == 0
        assert set(re.findall(r"^listen (\S+)", capsys.readouterr().out, re.M)) == {
            "127.0.0.1:1080"
        }

    def test_installed_configuration_sets_nothing_that_a_file_of_conf_d_could(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        yaml = pytest.importorskip("yaml")
        text = (ROOT / "conf/netproxyd.yaml").read_text()
        assert yaml.safe_load(text) == {"include": "conf.d/*.yaml"}
        (tmp_path / "conf.d").mkdir()
        (tmp_path / "netproxyd.yaml").write_text(text)
        (tmp_path / "conf.d/local.yaml").write_text(
            "listeners: [{listen: '127.0.0.1:1081'}]\ndefault: block\n"
            "control: unix:/run/other\nlog: {level: error}\n"
        )
        assert cli.main(["-t", "-c", str(tmp_path / "netproxyd.yaml")]) == 0
        assert "listen 127.0.0.1:1081 tcp+udp sps 'sps-1081' upstream block" in (
            capsys.readouterr().out
        )

    def test_commented_defaults_of_the_installed_configuration_are_the_defaults(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("yaml")
        text = (ROOT / "conf/netproxyd.yaml").read_text()
        _, _, defaults = text.partition("# Without any setting")
        defaults, _, _ = defaults.partition("# To send traffic")
        written = re.sub(r"^#(?=[a-z]|  )", "", defaults, flags=re.M).partition("\n")[2]
        plans = []
        for name, content in (("none", ""), ("written", written)):
            path = tmp_path / f"{name}.yaml"
            path.write_text(content)
            assert cli.main(["-t", "-c", str(path)]) == 0
            plans.append(capsys.readouterr())
        assert plans[0] == plans[1]


class TestScaleOut:
    """haproxy and keepalived check the configurations in conf/scale-out, without opening ports."""

    def test_haproxy_accepts_its_configuration(self) -> None:
        process = run(program("haproxy"), "-c", "-f", ROOT / "conf/scale-out/haproxy.cfg")
        assert process.returncode == 0 and "WARNING" not in process.stderr, process.stderr

    def test_keepalived_accepts_its_configuration(self) -> None:
        process = run(program("keepalived"), "-t", "-f", ROOT / "conf/scale-out/keepalived.conf")
        assert process.returncode == 0, process.stdout + process.stderr


class TestManualPages:
    @pytest.mark.parametrize("path", PAGES, ids=name_of)
    def test_mandoc_has_no_warning(self, path: Path) -> None:
        process = run(program("mandoc"), "-T", "lint", "-W", "warning", path)
        assert (process.returncode, process.stdout) == (0, "")

    @pytest.mark.parametrize("path", PAGES, ids=name_of)
    def test_groff_has_no_warning(self, path: Path) -> None:
        process = run(program("groff"), "-mdoc", "-ww", "-z", path)
        assert (process.returncode, process.stderr) == (0, "")


def test_versions_uses_each_python_once_and_none_that_is_too_old(tmp_path: Path) -> None:
    """Hazard 132."""
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho 3.9\nexit 1\n")
    old.chmod(0o755)
    process = subprocess.run(
        [ROOT / "tests/versions", "--list"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONS": f"{old} {tmp_path / 'none'} {sys.executable} {sys.executable}",
        },
    )
    version = "%d.%d" % sys.version_info[:2]
    assert (process.returncode, process.stderr) == (
        0,
        f"tests/versions: Python {version}: {sys.executable}\n",
    )
    process = subprocess.run(
        [ROOT / "tests/versions", "--list"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONS": str(old)},
    )
    assert (process.returncode, process.stderr) == (
        1,
        "tests/versions: no Python 3.10 or later is installed\n",
    )


def test_modules_that_the_tests_of_a_build_import_are_build_dependencies() -> None:
    """A build has only Build-Depends: what is missing there fails the build, or is skipped."""
    rules = (ROOT / "debian/rules").read_text()
    folders = re.search(r"^TESTS = (.+)$", rules, re.MULTILINE)
    source = (ROOT / "debian/control").read_text().split("\n\n")[0]
    assert folders is not None
    files = [ROOT / "tests/conftest.py"]
    for name in folders[1].split():
        path = ROOT / name
        files += [path] if path.is_file() else path.rglob("*.py")
    needed = set().union(*(required_modules(path) for path in files))
    assert needed >= {"hypothesis", "pytest"}
    missing = {f"python3-{module}" for module in needed} - set(re.findall(r"[\w.+-]+", source))
    assert not missing, missing


def required_modules(path: Path) -> set[str]:
    """Return the modules of other projects that a file cannot be imported without."""
    names: set[str] = set()
    text = path.read_text()
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            names.add(statement.module or "")
    # Without such a module the file is skipped.
    skipped = set(re.findall(r'^pytest\.importorskip\("(\w+)', text, re.MULTILINE))
    ours = {"netproxy", "tests", *sys.stdlib_module_names}
    return {name.partition(".")[0] for name in names} - skipped - ours
