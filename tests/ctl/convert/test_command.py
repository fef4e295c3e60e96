"""The command: its arguments, what it prints, and its exit status."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from netproxy import cli
from netproxy.ctl.convert.arguments import NAMES
from netproxy.ctl.convert.registry import FORMATS

pytest.importorskip("yaml")

TINYPROXY = "Port 8888\nAllow 127.0.0.1\nXTinyproxy Yes\nBasicAuth bob s3cret\n"


def run(*arguments: str) -> int:
    return cli.control_main(["convert", *arguments])


@pytest.fixture(name="old")
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "tinyproxy.conf"
    path.write_text(TINYPROXY)
    return path


def test_formats_of_the_arguments_are_those_that_can_be_converted() -> None:
    assert tuple(FORMATS) == NAMES


def test_configuration_is_on_standard_output_and_notes_on_standard_error(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(old)) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("# Made by netproxyctl convert from tinyproxy.conf.\n")
    assert "tinyproxy.conf:3: XTinyproxy Yes: not carried: " in printed.err
    assert printed.err.endswith("4 directives: 3 carried, 0 not needed, 0 changed, 1 not carried\n")
    assert "s3cret" not in printed.err


def test_note_about_the_whole_is_no_outcome_of_a_directive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "danted.conf"
    path.write_text(
        "internal: 127.0.0.1 port = 1080\nexternal: 127.0.0.1\n"
        "clientmethod: none\nsocksmethod: none\n"
        "client pass { from: 127.0.0.1/32 to: 0.0.0.0/0 }\n"
        "socks pass { from: 127.0.0.1/32 to: 127.0.0.0/8 command: connect }\n"
        "socks pass { from: 127.0.0.1/32 to: 127.0.0.0/8 port = 53 command: udpassociate }\n"
    )
    assert run(str(path)) == 0
    printed = capsys.readouterr().err
    assert "danted.conf as a whole: changed: no rule passes udpassociate" in printed
    assert " 0 changed, " in printed


def test_json_has_the_configuration_and_the_notes(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--json", str(old)) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["format"] == "tinyproxy"
    assert answer["outcomes"] == {"carried": 3, "not needed": 0, "changed": 0, "not carried": 1}
    [note] = [note for note in answer["notes"] if note["outcome"] == "not carried"]
    assert (note["file"], note["line"]) == ("tinyproxy.conf", 3)
    assert answer["configuration"].count("bob: {password: s3cret}") == 1
    assert "s3cret" not in json.dumps(answer["notes"])


def test_output_is_a_new_file_for_its_owner(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "netproxyd.yaml"
    assert run("-o", str(path), str(old)) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_text()
    assert run("-o", str(path), str(old)) == 1
    assert path.read_text() == before
    refusal = f"{path} exists and is not replaced: move it away, or name another file with -o"
    assert f"netproxyctl: {refusal}\n" in capsys.readouterr().err
    assert cli.main(["-t", "-c", str(path)]) == 0


def test_format_is_guessed_from_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.conf"
    path.write_text(TINYPROXY)
    assert run(str(path)) == 0
    path.write_text("internal: 127.0.0.1 port = 1080\nsocks pass { from: 0/0 to: 0/0 }\n")
    assert run("--json", str(path)) == 0
    assert '"format": "dante"' in capsys.readouterr().out

    class Input:
        buffer = io.BytesIO(TINYPROXY.encode())

    monkeypatch.setattr("builtins.open", lambda *_, **__: io.BytesIO(TINYPROXY.encode()))
    assert run("--from", "tinyproxy", "-") == 0
    assert "standard input:3: XTinyproxy" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ((), 64, "name a file"),
        (("/nonexistent",), 66, "/nonexistent: No such file or directory"),
        (("/dev/null",), 66, "null: unknown format: say --from "),
        (("--from", "apache", "/dev/null"), 64, "--from apache: unknown (one of "),
        (("/etc/hosts", "--json"), 64, "write options before the file: --json"),
    ],
)
def test_mistakes_have_one_line(
    arguments: tuple[str, ...], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == status
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, form",
    [
        (("--", "gost", "-L", ":8080", "--", "-L", ":8081"), "gost"),
        (("/usr/bin/gost", "-L=:8080"), "gost"),
        (("--from", "gost", "--", "-L", ":8080"), "gost"),
        (("--", "./proxy", "http", "-p", ":80"), "goproxy"),
        (("socks5://192.0.2.1:1080",), "url"),
        (("http://192.0.2.1:80", "socks5://192.0.2.2:1080"), "url"),
    ],
)
def test_commands_and_urls_are_arguments(
    arguments: tuple[str, ...], form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--json", *arguments)
    assert run(*options) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["format"] == form
    assert answer["configuration"].startswith("# Made by netproxyctl convert from command line.\n")


@pytest.mark.parametrize(
    "name, text, form",
    [
        ("start.sh", "#!/bin/sh\nexec /opt/gost -L :8080 -F http://192.0.2.1:80\n", "gost"),
        ("gost.service", "[Service]\nExecStart=/usr/bin/gost -L=:8080\n", "gost"),
        ("run.txt", "http\n-t tcp\n-p :33080\n", "goproxy"),
        ("run.sh", "nohup ./proxy socks -t tcp -p :33080 &\n", "goproxy"),
        ("list.txt", "socks5://192.0.2.1:1080\nhttp://192.0.2.2:3128\n", "url"),
    ],
)
def test_files_of_commands_and_urls_are_known(
    name: str, text: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert run("--json", str(tmp_path / name)) == 0
    assert json.loads(capsys.readouterr().out)["format"] == form
