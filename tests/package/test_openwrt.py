"""The package for OpenWrt: its init script under a small shell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from netproxy import __version__

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "conf" / "openwrt"
# What /etc/rc.common and procd give the script: here a section is a file with "NAME VALUE" lines.
LIBRARY = """
config_load() { :; }
config_foreach() { "$1" "$SECTION"; }
config_get() { eval "$1=\\$(sed -n \\"s|^$3 ||p\\" \\"$2\\" | head -n 1)"; }
config_get_bool() { config_get "$1" "$2" "$3"; eval "[ -n \\"\\$$1\\" ] || $1=$4"; }
config_list_foreach() {
    while read -r name value; do [ "$name" != "$2" ] || "$3" "$value"; done <"$1"
}
procd_open_instance() { echo open; }
procd_close_instance() { echo close; }
procd_set_param() { echo "$@"; }
procd_add_reload_trigger() { :; }
chown() { :; }
mkdir() { :; }
"""


@pytest.fixture
def shell() -> list[str]:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed")
    return [busybox, "sh"]


def start(shell: list[str], folder: Path, section: str, status: int = 0) -> tuple[int, list[str]]:
    """Return the status of start_service, and what it said to procd and to the check."""
    program = folder / "netproxyd"
    program.write_text(f'#!/bin/sh\necho checked "$@"\nexit {status}\n')
    program.chmod(0o755)
    (folder / "section").write_text(section)
    script = (FOLDER / "netproxyd.init").read_text()
    script = script.replace("PROG=/usr/sbin/netproxyd", f"PROG={program}")
    text = f"SECTION={folder}/section\n{LIBRARY}\n{script}\nstart_service\n"
    done = subprocess.run([*shell, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.returncode, done.stdout.replace(str(program), "netproxyd").splitlines()


def test_options_become_listeners_and_a_chain(shell: list[str], tmp_path: Path) -> None:
    section = (
        "enabled 1\nlisten sps://192.168.1.1:1080\nlisten 10.0.0.1:1080?announce=10.0.0.9\n"
        "clients 192.168.1.0/24\nclients 10.0.0.0/8\nupstream socks5://a:1\nupstream http://b:2\n"
    )
    networks = "clients=192.168.1.0/24,10.0.0.0/8"
    options = (
        f"-l sps://192.168.1.1:1080?{networks} "
        f"-l sps://10.0.0.1:1080?announce=10.0.0.9&{networks} -u socks5://a:1,http://b:2"
    )
    status, lines = start(shell, tmp_path, section)
    assert (status, lines[:2]) == (0, [f"checked -t -q {options}", "open"])
    assert f"command netproxyd {options}" in lines and "reload_signal HUP" in lines
    assert not any(line.startswith("file ") for line in lines)


def test_file_replaces_the_options(shell: list[str], tmp_path: Path) -> None:
    section = "enabled 1\nlisten 192.168.1.1:1080\nconfig /etc/netproxy/netproxyd.yaml\n"
    status, lines = start(shell, tmp_path, section)
    assert lines[0] == "checked -t -q -c /etc/netproxy/netproxyd.yaml"
    assert "command netproxyd -c /etc/netproxy/netproxyd.yaml" in lines
    assert "file /etc/netproxy/netproxyd.yaml" in lines


def test_options_with_errors_start_nothing(shell: list[str], tmp_path: Path) -> None:
    assert start(shell, tmp_path, "enabled 1\nlisten a\n", 78) == (1, ["checked -t -q -l sps://a"])


def test_disabled_section_starts_nothing(shell: list[str], tmp_path: Path) -> None:
    assert start(shell, tmp_path, "listen 192.168.1.1:1080\n") == (0, [])


def test_package_has_this_version_and_files_that_exist() -> None:
    text = (FOLDER / "Makefile").read_text()
    assert f"PKG_VERSION:={__version__}\n" in text
    named = set(re.findall(r" \./(?!files/)(\S+) ", text))
    assert named and all((FOLDER / name).is_file() for name in named)
    for name in ("menu.json", "acl.json"):
        json.loads((FOLDER / "luci" / name).read_text())
