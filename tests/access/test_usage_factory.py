"""The folder of what is kept across restarts, and the store of usage there."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import pytest

from netproxy.access.accounts.usage_store import UsageStore
from netproxy.config.schema import Config
from netproxy.access.factory import make_usage_store
from netproxy.errors import ConfigError
from tests.config.reading import HASH, read
from tests.support.handlers import RecordingLog

pytest.importorskip("yaml")
QUOTA = f"users: {{alice: {{password: {HASH}, limits: {{quota: {{day: 1GB}}}}}}}}\n"


def opened(config: Config, running: UsageStore | None, directory: str = "") -> UsageStore:
    """Return the store of a configuration, which must need one."""
    store = make(config, running, directory)
    assert store is not None
    return store


def make(config: Config, running: UsageStore | None, directory: str = "") -> UsageStore | None:
    """Return the store of a configuration with a directory of the service manager."""
    environment = {"STATE_DIRECTORY": directory} if directory else {}
    return make_usage_store(config, environment, running, RecordingLog())


def test_store_of_the_configuration_is_opened(tmp_path: Path) -> None:
    with closing(opened(read(f"state: {tmp_path}"), None, "/nowhere")) as store:
        assert store.folder == str(tmp_path)


def test_quota_uses_the_directory_of_the_service_manager(tmp_path: Path) -> None:
    with closing(opened(read(QUOTA), None, f"{tmp_path}:/nowhere")):
        assert (tmp_path / "usage.sqlite").exists()


def test_nothing_is_opened_without_quotas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "netproxy.access.accounts.usage_store", None)
    assert make(read(""), None, str(tmp_path)) is None
    assert not list(tmp_path.iterdir())


def test_reload_keeps_the_store_of_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with closing(opened(read(f"state: {tmp_path}"), None)) as running:
        assert opened(read(f"state: {tmp_path}\n{QUOTA}"), running) is running
        with closing(opened(read(f"state: {tmp_path}/other"), running)) as other:
            assert other is not running
        assert make(read(""), running) is None


def test_quota_without_a_folder_is_an_error() -> None:
    with pytest.raises(ConfigError) as raised:
        make(read(QUOTA), None)
    place, _, message = str(raised.value).partition(": ")
    assert place.startswith("c.yaml:1:")
    assert message == "users.alice.limits.quota: needs state, a folder that keeps what was moved"


def test_folder_that_cannot_be_used_is_an_error_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        make(read(f"state: {tmp_path}/none"), None)
    assert str(raised.value) == (
        f"c.yaml:1:8: state: {tmp_path}/none is not a folder: make it, for the daemon's user"
    )
