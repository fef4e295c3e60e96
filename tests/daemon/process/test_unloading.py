"""What builds a plan and checks its configuration is unloaded behind it."""

from __future__ import annotations

from importlib import import_module
from typing import Iterator

import pytest

import netproxy.daemon
from netproxy.config.schema import Config
from netproxy.daemon.process.unloading import BUILDER, build_and_unload, loaded_modules
from netproxy.daemon.runtime import Runtime
from netproxy.interfaces.services import FetchedPath, RemoteList
from netproxy.observe.log import Log


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    runtime = Runtime(Log("error"))
    yield runtime
    runtime.stop()


def test_builder_and_checks_are_unloaded(runtime: Runtime) -> None:
    build_and_unload(Config(()), runtime, None).close()
    assert loaded_modules() == [] and not hasattr(netproxy.daemon, "build")


def test_builder_and_checks_are_loaded_again(runtime: Runtime) -> None:
    before = import_module(BUILDER)
    plan = build_and_unload(Config(()), runtime, None)
    build_and_unload(Config(()), runtime, plan).close()
    assert import_module(BUILDER) is not before


def test_builder_and_checks_stay_with_fetched_lists(runtime: Runtime) -> None:
    """Fetched lists come into force although the package was upgraded.  Hazard 174."""
    import_module(BUILDER)
    before = loaded_modules()
    lists = (RemoteList("https://lists.example/", FetchedPath("/nowhere/ads"), "domains", 60.0),)
    build_and_unload(Config((), lists=lists), runtime, None).close()
    assert loaded_modules() == before
