"""Fixtures that start daemons, and check and end them after the test.

`netproxyd` is for one test, `shared_netproxyd` for all tests of a module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from tests.e2e.support import Netproxyd

Start = Callable[..., Netproxyd]


@pytest.fixture
def netproxyd(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a daemon.

    It takes the arguments of Netproxyd except `log`; `config` is the text of a file for -c.
    """
    yield from _daemons(tmp_path)


@pytest.fixture(scope="module")
def shared_netproxyd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Return a function as `netproxyd` does, whose daemons live until the end of the module."""
    yield from _daemons(tmp_path_factory.mktemp("netproxyd"))


def _daemons(directory: Path) -> Iterator[Start]:
    started: list[Netproxyd] = []

    def start(*arguments: str, config: str | None = None, **more: Any) -> Netproxyd:
        number = len(started) + 1
        if config is not None:
            path = directory / f"netproxyd{number}.yaml"
            path.write_text(config)
            arguments = ("-c", str(path), *arguments)
        daemon = Netproxyd(directory / f"netproxyd{number}.log", *arguments, **more)
        started.append(daemon)
        return daemon

    yield start
    faults = []
    for daemon in started:
        try:
            daemon.finish()
        except AssertionError as error:
            faults.append(str(error))
    assert not faults, "\n".join(faults)
