"""Lists of rules that are fetched: paths of their copies, and mistakes."""

from __future__ import annotations

import pytest

from netproxy.interfaces.services import DOMAINS, NETWORKS, FetchedPath
from tests.config.reading import errors, read

URL = "https://lists.example/ads.txt"
DIGEST = "AB" * 32


def test_url_becomes_the_path_of_a_copy() -> None:
    config = read(f"state: /s\nrules: [{{domain_file: '{URL}', ip_file: '{URL}', via: block}}]")
    names, networks = config.lists
    assert (names.url, names.kind, networks.kind) == (URL, DOMAINS, NETWORKS)
    assert (names.refresh, names.sha256) == (86400.0, "")
    assert names.path.startswith("/s/lists/") and names.path.endswith("-ads.txt")
    conditions = config.rules[0].conditions
    assert conditions.domain_file == (names.path,)
    assert conditions.ip_file == (networks.path,) != (names.path,)
    assert isinstance(conditions.domain_file[0], FetchedPath)


def test_files_and_lists_can_be_mixed() -> None:
    config = read(
        f"state: /s\nrules: [{{domain_file: [/a, {{url: '{URL}', refresh: 1h, sha256: {DIGEST}}}],"
        " via: block}]\ndns: {servers: 192.0.2.1, rules: "
        f"[{{domain_file: {{url: '{URL}', refresh: 60m, sha256: {DIGEST}}}, block: true}}]}}"
    )
    (item,) = config.lists
    assert (item.refresh, item.sha256) == (3600.0, DIGEST.lower())
    assert config.rules[0].conditions.domain_file == (item.path, "/a")
    assert config.dns.rules[0].domain_file == (item.path,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("http://lists.example/a", "is not the URL of a list (expected https://host/path)"),
        ("https:///a", "is not the URL of a list"),
        ("https://user:secret@lists.example/a", "cannot have a user or a password"),
        ("{refresh: 1h}", "rules[0].domain_file.url: is missing"),
        (f"{{url: '{URL}', refresh: 1s}}", "refresh: must be at least 300 s"),
        (f"{{url: '{URL}', sha256: abc}}", "must have 64 hexadecimal digits"),
        (f"{{url: '{URL}', every: 1h}}", "every: unknown key"),
    ],
)
def test_mistake_is_told(value: str, message: str) -> None:
    (error,) = errors(f"state: /s\nrules: [{{domain_file: {value}, via: block}}]")
    assert message in error and "secret" not in error


def test_one_list_has_one_set_of_values() -> None:
    rules = f"{{domain_file: '{URL}', via: block}}, {{domain_file: {{url: '{URL}', refresh: 1h}}"
    (error,) = errors(f"state: /s\nrules: [{rules}, via: block}}]")
    assert "rules[1].domain_file.url: another rule has this list with other values" in error


def test_list_needs_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    text = f"rules: [{{domain_file: '{URL}', via: block}}]"
    (error,) = errors(text)
    assert "needs a folder for the copy of the list: set state" in error
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/a:/b")
    assert read(text).lists[0].path.startswith("/var/lib/a/lists/")
