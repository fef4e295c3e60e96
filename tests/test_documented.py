"""Everything that a user may write is in the man pages, and every key in the full example.

The program itself tells what there is: the configuration reader its keys, the parsers of the
command lines their options and commands.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Iterator

import pytest

from netproxy import cli
from netproxy.config.tree.parse import parse_text
from netproxy.config.tree.hints import SECTIONS
from netproxy.config.tree.node import MapReader, Source
from netproxy.config.tree.problems import Problems
from netproxy.config.read import check, read_config
from netproxy.ctl import command_line
from netproxy.daemon.runtime import Runtime
from netproxy.interfaces.flows import Traffic
from netproxy.observe.exposition import text_format
from netproxy.observe.flows import FlowTotal, TotalKey
from netproxy.observe.process import ProcessUse
from netproxy.protocol import uot
from tests.support.handlers import RecordingLog

pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
FULL = ROOT / "conf" / "examples" / "full.yaml"
# Mappings whose keys are names that the user chooses.
NAMES = re.compile(
    r"^(users|upstreams|tunnel\.bridge\.agents|tunnel\.agent\.services)\.[^.\[]+|^(dns\.hosts)\..*"
)
# Keys that stand for each other: the example has one, and names the other in a comment.
ALTERNATIVES = {"auth.url": "auth.command"}
# The same keys in two places, described once.
SAME = {
    "rules[].not.": "rules[].",
    "dns.rules[].servers[].": "dns.servers[].",
    "tunnel.bridge.agents.NAME.ports[].limits.": "listeners[].limits.",
}
# An upstream is everywhere a mapping as in `upstreams`, and its keys are described there.
UPSTREAMS = re.compile(
    r"^(default|dns\.servers\[\]\.upstream|listeners\[\]\.upstream|rules\[\]\.(via|upstream)"
    r"|tunnel\.agent\.upstream|users\.NAME\.upstream|upstreams\.NAME\.members\[\](\.via)?"
    r"|upstreams\.NAME\[\])\."
)


def known_keys() -> set[str]:
    """Return the keys that the reader asks for while it reads the full example.

    Keys that are commented out there are included, keys that hold other keys are not.
    """
    asked: set[str] = set()

    def noting(method: Any) -> Any:
        def ask(reader: MapReader, key: str, *rest: Any) -> Any:
            asked.add(general(f"{reader.path}.{key}" if reader.path else key))
            return method(reader, key, *rest)

        return ask

    with pytest.MonkeyPatch.context() as patch:
        for name in ("take", "has", "is_empty_list"):
            patch.setattr(MapReader, name, noting(getattr(MapReader, name)))
        problems = Problems()
        read_config(parse_text(whole_text().encode(), Source(str(FULL))), problems)
    assert not problems.errors, problems.errors
    asked = {key for key in asked if not UPSTREAMS.match(key)}
    return {
        key
        for key in asked
        if not any(other.startswith((f"{key}.", f"{key}[]")) for other in asked)
    }


def general(path: str) -> str:
    """Return a key with NAME for names that the user chooses, and without indexes."""
    path = NAMES.sub(r"\1\2.NAME", re.sub(r"\[\d+\]", "[]", path))
    for inner, outer in SAME.items():
        path = path.replace(inner, outer)
    return path


def whole_text() -> str:
    """Return the full example with its commented keys.

    In prose one blank follows the "#"; in front of a key there is none, or the indentation.
    """
    return re.sub(r"^#(?=[a-z]|  )", "", FULL.read_text(), flags=re.M)


def given_keys() -> set[str]:
    """Return the keys of the full example."""

    def walk(node: Any, path: str) -> Iterator[str]:
        if isinstance(node.value, dict):
            for key, value in node.value.items():
                yield from [
                    general(f"{path}.{key}" if path else key),
                    *walk(value, f"{path}.{key}" if path else key),
                ]
        elif isinstance(node.value, list):
            for at, item in enumerate(node.value):
                yield from walk(item, f"{path}[{at}]")

    return set(walk(parse_text(whole_text().encode(), Source(str(FULL))), ""))


KEYS = sorted(known_keys())


def page(name: str) -> str:
    """Return the source of a man page without fonts and escapes."""
    text = (ROOT / "man" / name).read_text()
    text = re.sub(r"\\&|\.\\&", lambda match: "." if match[0].startswith(".") else "", text)
    return re.sub(r" Ns (Ar|Cm) ", "", text)


def test_known_keys_are_recorded() -> None:
    assert {
        "listeners[].udp.relay_port",
        "users.NAME.limits.sessions",
        "upstreams.NAME.health_check.path",
    } <= set(KEYS)
    assert len(KEYS) > 60


@pytest.mark.parametrize("key", KEYS)
def test_key_is_in_the_man_page(key: str) -> None:
    entry = re.search(rf"^\.It Cm {re.escape(key)} ", page("netproxyd.yaml.5"), re.M)
    assert entry, f"man/netproxyd.yaml.5 has no entry for {key}"


@pytest.mark.parametrize("key", KEYS)
def test_key_is_in_the_full_example(key: str) -> None:
    shown = ALTERNATIVES.get(key, key)
    assert shown in given_keys(), f"conf/examples/full.yaml does not show {key}"
    assert f"{key.rpartition('.')[2]}:" in FULL.read_text() or key == shown


def test_man_page_has_no_unknown_key() -> None:
    holders = {
        key.partition(rest)[0] for key in KEYS for rest in re.findall(r"(?=((?:\.|\[\]).*))", key)
    }
    entries = set(re.findall(r"^\.It Cm ([a-z_]+(?:[\[.]\S*)?) : ", page("netproxyd.yaml.5"), re.M))
    assert entries and entries - set(KEYS) - holders == set()


@pytest.mark.parametrize("path", ["docs/UPSTREAMS.md", "man/netproxyd.yaml.5"])
def test_both_names_of_udp_over_tcp_are_documented(path: str) -> None:
    text = (ROOT / path).read_text()
    assert uot.MAGIC in text and uot.MAGIC_V1 in text


def test_sections_that_errors_suggest_have_their_keys() -> None:
    suggested = {f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys}
    missing = {
        name
        for name in suggested
        if not any(key == name or key.startswith((f"{name}.", f"{name}[]")) for key in KEYS)
    }
    assert missing == set()


def test_full_example_is_valid(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    # A copy that other users cannot read.
    path = tmp_path / FULL.name
    path.write_text(FULL.read_text())
    assert cli.main(["-t", "-c", str(path)]) == 0
    captured = capsys.readouterr()
    assert (captured.err, captured.out.endswith("OK\n")) == ("", True)
    problems = Problems()
    check(read_config(parse_text(whole_text().encode(), Source(str(FULL))), problems), problems)


def options(parser: argparse.ArgumentParser) -> list[list[str]]:
    """Return the names of each option."""
    return [list(action.option_strings) for action in parser._actions if action.option_strings]


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the commands of netproxyctl."""
    return next(
        action.choices
        for action in command_line.control_parser(cli.DEFAULT_FILE)._actions
        if isinstance(action, argparse._SubParsersAction)
    )


def written(names: list[str]) -> set[str]:
    """Return how a man page writes the names of an option: -x, --xyz."""
    return {
        f"Fl {name[1:]}" if not name.startswith("--") else f"Fl Fl {name[2:]}" for name in names
    }


@pytest.mark.parametrize("names", options(cli.daemon_parser()), ids=lambda names: names[-1])
def test_option_of_netproxyd_is_in_its_man_page(names: list[str]) -> None:
    entries = re.findall(r"^\.It (Fl .*)$", page("netproxyd.8"), re.M)
    assert any(
        all(re.search(rf"{re.escape(text)}\b", entry) for text in written(names))
        for entry in entries
    )


@pytest.mark.parametrize("name", commands())
def test_command_of_netproxyctl_is_in_its_man_page(name: str) -> None:
    text = page("netproxyctl.1")
    assert re.search(rf"^\.It Cm {name}\b", text, re.M)
    for names in options(commands()[name]):
        if "--help" not in names:
            in_page = [re.search(rf"{option}[ \n]", text) for option in written(names)]
            assert any(in_page), f"{name} {names}"


def test_common_options_of_netproxyctl_are_in_its_man_page() -> None:
    for names in options(command_line.control_parser(cli.DEFAULT_FILE)):
        assert any(f"{text} " in page("netproxyctl.1") for text in written(names)), names


def test_sort_columns_and_filters_are_in_the_man_page() -> None:
    text = page("netproxyctl.1")
    filters = command_line.FILTERS
    for word in (
        *filters,
        *command_line.SORTS,
        *command_line.USER_SORTS,
        *command_line.CLIENT_SORTS,
    ):
        assert re.search(rf"\b{word}\b", text)


# -- what reads the metrics

MONITORING = (ROOT / "conf/grafana/netproxy.json", ROOT / "conf/prometheus/netproxy.rules.yml")


def known_metrics() -> set[str]:
    """Return the names that /metrics may have."""
    numbers = {"live": 0, "dialled": 0, "failed": 0, "latency": 0.0}
    upstream = {"name": "a", "state": "up", **numbers, "groups": []}
    totals = {
        TotalKey(network, "main", "direct"): FlowTotal(1, 1, Traffic(1, 1, 1, 1))
        for network in ("tcp", "udp")
    }
    metrics = [
        *text_format.flow_families(totals),
        *text_format.upstream_families([upstream]),
        *text_format.process_families(0.0, ProcessUse(1.0, 1, 0, 1, 1, 1)),
        *text_format.user_families(()),
    ]
    names = {f"netproxy_{name}" for name, _ in text_format.COUNTER_METRICS.values()} | {
        family.name if family.name.startswith("process_") else f"netproxy_{family.name}"
        for family in metrics
    }
    folder = ROOT / "netproxy" / "admin" / "stats"
    source = "".join((folder / name).read_text() for name in ("stats.py", "families.py"))
    names |= {f"netproxy_{name}" for name in re.findall(r'(?:single|Family)\(\s*"(\w+)"', source)}
    log: Any = RecordingLog()
    for pool in Runtime(log).pools:
        names |= {f"netproxy_{pool}_pool_threads", f"netproxy_{pool}_pool_tasks"}
    return names | {f"netproxy_dial_seconds{end}" for end in ("_bucket", "_sum", "_count")}


@pytest.mark.parametrize("path", MONITORING, ids=lambda path: path.name)
def test_dashboard_and_alerts_use_known_metrics(path: Path) -> None:
    asked = set(re.findall(r"\b(?:netproxy|process)_[a-z_]+\b", path.read_text()))
    assert len(asked) > 8
    assert asked - known_metrics() == set()


def test_panels_of_the_dashboard_have_targets_and_fit() -> None:
    dashboard = json.loads(MONITORING[0].read_text())
    assert all(
        panel["targets"] and panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for panel in dashboard["panels"]
    )
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_accepts_the_alerts() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", MONITORING[1]], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


# Log lines, each with the address that is to be banned.
BAN_LINES = {
    "2026-11-27T03:36:24+0000 warning msg=auth_failed client=203.0.113.9"
    ' user="<b> x" listener=main': "203.0.113.9",
    "Nov 27 03:36:24 box netproxyd[77]: msg=auth_failed client=2001:db8::7"
    " user=bob listener=main": "2001:db8::7",
    "2026-11-27T03:36:24+0000 warning msg=auth_failed client=203.0.113.8"
    r' user="x\nmsg=auth_failed client=192.0.2.1 user=y" listener=main': "203.0.113.8",
    "2026-11-27T03:36:24+0000 info msg=finished listener=main client=127.0.0.1:1"
    ' user="warning msg=auth_failed client=192.0.2.1 user=z"': "",
}


@pytest.mark.parametrize("line", BAN_LINES)
def test_fail2ban_finds_the_client_and_no_other_address(line: str, tmp_path: Path) -> None:
    program = shutil.which("fail2ban-regex")
    if not program:
        pytest.skip("fail2ban is not installed")
    (tmp_path / "log").write_text(line + "\n")
    done = subprocess.run(
        [program, "-o", "ip", str(tmp_path / "log"), str(ROOT / "conf/fail2ban/netproxy.conf")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == BAN_LINES[line]
