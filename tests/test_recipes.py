"""Configurations that people copy are complete: the examples, and those in the pages and man pages.

`netproxyd -t` accepts each as it is written, in a folder with nothing but what its own comments
tell to make: a line "# $ command" is run there first.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from netproxy import cli
from netproxy.ctl import command_line

pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
PASSWORD = "correct horse battery staple"
SECONDS = 60
# What a snippet of a man page begins with if it is a whole configuration.
SECTIONS = (
    *("listeners", "upstreams", "default", "rules", "auto", "destinations", "dns", "users", "auth"),
    *("users_file", "tunnel", "metrics", "workers", "state", "log", "timeouts", "control"),
)
# What this machine lacks, such as a route or an interface, is no matter of a recipe.
OF_THIS_MACHINE = ("netproxyctl nft", "there is no interface", "until it is fetched")


class Recipe(NamedTuple):
    name: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands in its comments; a backslash at the end continues one."""
        lines = re.sub(r"\\\n#\s*", "", self.text).splitlines()
        return [line.removeprefix("# $ ") for line in lines if line.startswith("# $ ")]


def recipes() -> Iterator[Recipe]:
    for path in sorted(ROOT.glob("conf/**/*.yaml")):
        if path.parent.name == "container":
            continue  # tests/package/test_container.py: manifests, and variables of containers
        yield Recipe(str(path.relative_to(ROOT)), path.read_text())
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = re.findall(r"^```yaml\n(.*?)^```$", path.read_text(), re.M | re.S)
        for number, block in enumerate(blocks, 1):
            yield Recipe(f"{path.relative_to(ROOT)}-{number}", block)
    for path in sorted((ROOT / "man").iterdir()):
        blocks = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed$", path.read_text(), re.M | re.S)
        for number, block in enumerate(blocks, 1):
            text = block.replace(r"\&", "").replace(r"\(dq", '"').replace(r"\e", "\\")
            if re.match(rf"(#.*\n)*({'|'.join(SECTIONS)}):", text):
                yield Recipe(f"{path.relative_to(ROOT)}-{number}", text)


RECIPES = list(recipes())


def local(text: str, folder: Path) -> str:
    """Return a text with folders of the system replaced; all examples are in this checkout."""
    text = text.replace("/usr/share/doc/netproxyd/examples", str(ROOT / "conf/examples"))
    text = re.sub("/(etc|var/lib)/netproxy", str(folder), text)
    return text.replace(" conf/", f" {ROOT}/conf/")


class Kitchen:
    """Runs each command once, and gives its files to all recipes that have it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, list[Path]] = {}
        programs = {
            "netproxyctl": f"PYTHONPATH={ROOT} exec {sys.executable} -m netproxy ctl",
            # From the other machine of a pair: what the recipe of that machine has made.
            "scp": f'f() {{ cp {folder}/"$(basename "$1")" "$2"; }}; f',
        }
        (folder / "bin").mkdir()
        for name, command in programs.items():
            (folder / "bin" / name).write_text(f'#!/bin/sh\n{command} "$@"\n')
            (folder / "bin" / name).chmod(0o755)

    def files_of(self, command: str) -> list[Path]:
        if command not in self.made:
            place = self.folder / f"run{len(self.made)}"
            place.mkdir()
            done = subprocess.run(
                ["/bin/sh", "-ec", local(command, place)],
                cwd=place,
                input=f"{PASSWORD}\n",
                capture_output=True,
                text=True,
                timeout=SECONDS,
                umask=0o077,
                env={**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"},
            )
            assert done.returncode == 0, done.stderr
            self.made[command] = list(place.iterdir())
            assert self.made[command], f"no file was made by {command}"
            if not command.startswith("scp "):
                for path in self.made[command]:
                    shutil.copy(path, self.folder)
        return self.made[command]


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Kitchen:
    return Kitchen(tmp_path_factory.mktemp("kitchen"))


def test_recipes_are_found() -> None:
    names = [recipe.name for recipe in RECIPES]
    for start in ("conf/examples/", "README.md", "docs/USERS.md", "man/netproxyd.yaml.5"):
        assert len([name for name in names if name.startswith(start)]) > 3


def check(capsys: pytest.CaptureFixture[str], path: Path) -> tuple[int, str, list[str]]:
    """Return the status, the last line, and the errors of netproxyd -t."""
    status = cli.main(["-t", "-c", str(path)])
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if not any(map(line.count, OF_THIS_MACHINE))]
    return status, said.out[-3:], errors


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipe_is_complete_with_what_its_commands_make(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kitchen: Kitchen, recipe: Recipe
) -> None:
    if any(command.startswith("scp ") for command in recipe.commands):
        for other in RECIPES:
            for command in other.commands:
                if command.startswith(("openssl", "head")):
                    kitchen.files_of(command)
    for command in recipe.commands:
        for file in kitchen.files_of(command):
            shutil.copy(file, tmp_path)
    path = tmp_path / "netproxyd.yaml"
    path.write_text(local(recipe.text, tmp_path))
    # It may have a password: only its owner reads it.
    path.chmod(0o600)
    assert check(capsys, path) == (0, "OK\n", [])


def test_file_of_users_in_a_page_is_valid(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page, example = (ROOT / "docs/USERS.md").read_text(), ROOT / "conf/examples/users-file"
    (lines,) = re.findall(r"^```users\n(.*?)^```$", page, re.M | re.S)
    hashed = re.search(r"scrypt[^:\s]+", example.read_text())[0]
    path = tmp_path / "netproxyd.yaml"
    path.write_text(f"users_file: users\nstate: {tmp_path}\n")
    for text in (lines.replace("HASH", hashed), example.read_text()):
        (tmp_path / "users").write_text(text)
        for name in ("users", "netproxyd.yaml"):
            (tmp_path / name).chmod(0o600)
        assert check(capsys, path) == (0, "OK\n", [])


def command_lines(program: str) -> list[str]:
    """Return the command lines of a program in the pages and in the examples of man pages."""
    found = {}
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "man").iterdir()):
        text = path.read_text().replace("\\\n", " ")
        if path.parent.name == "man":
            text = "\n".join(re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed$", text, re.M | re.S))
        for line in re.findall(rf"^ *(?:{program}) (.+)$", text, re.M):
            found[shlex.join(words_of(line))] = None
    return list(found)


def words_of(line: str) -> list[str]:
    """Return the words of a command, up to a pipe, another command, or a comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(itertools.takewhile(lambda word: word.strip("|&;<>()"), lexer))


@pytest.mark.parametrize("line", command_lines("netproxyctl|python3 -m netproxy ctl"))
def test_command_of_netproxyctl_in_a_page_is_known(line: str) -> None:
    command_line.control_parser(cli.DEFAULT_FILE).parse_args(shlex.split(line))


@pytest.mark.parametrize("line", command_lines("netproxyd|python3 -m netproxy(?! ctl)"))
def test_command_of_netproxyd_in_a_page_is_accepted(
    capsys: pytest.CaptureFixture[str], line: str
) -> None:
    """A file that it names is the reader's own."""
    words = shlex.split(line)
    if "-c" in words or ".ca=" in line:
        cli.daemon_parser().parse_args(words)
    else:
        assert cli.main([*words, "-t"]) == 0, capsys.readouterr().err
