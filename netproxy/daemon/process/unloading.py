"""Builds a plan, and unloads what only builds and checks, so that its memory serves again.

The next reload loads it anew.  A reload reads the file with modules that are late as well
(daemon.process.late_modules): after an upgrade of the package it is refused there.  Thread: main.
"""

from __future__ import annotations

import gc
import sys

from netproxy.config.schema import Config
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.daemon.plan import Plan
    from netproxy.daemon.runtime import Runtime

# No object of these modules stays in a plan.
BUILDER = "netproxy.daemon.build"
CHECKS = "netproxy.daemon.checks."
"""Begins the names of the modules that check a whole configuration."""
PROBLEMS = "netproxy.config.tree.problems"
"""Needed by the checks alone: another process reads the file."""


def build_and_unload(config: Config, runtime: Runtime, previous: Plan | None) -> Plan:
    """Return the plan of a configuration, as daemon.build does.  Raises ConfigError.

    Fetched lists come into force without a reading of the file: with lists the modules stay, so
    that an upgrade of the package does not hold the lists up.
    """
    plan = _build(config, runtime, previous)
    if not config.lists:
        _unload()
    if previous is None:
        # What a start loads next takes the memory.  A running daemon may have a lot to collect.
        gc.collect()
    return plan


def build_first(runtime: Runtime) -> Plan:
    """Return a plan that has nothing; what builds stays loaded for the one that follows."""
    return _build(Config(()), runtime, None)


def _build(config: Config, runtime: Runtime, previous: Plan | None) -> Plan:
    # late: see above.  A function of its own, which holds on to nothing once it has returned.
    from netproxy.daemon.build import build

    return build(config, runtime, previous)


def loaded_modules() -> list[str]:
    """Return the names of the modules that are loaded, and may be unloaded."""
    single = (BUILDER, PROBLEMS)
    return [name for name in sys.modules if name in single or name.startswith(CHECKS)]


def _unload() -> None:
    for name in loaded_modules():
        del sys.modules[name]
        package, _, module = name.rpartition(".")
        # The package would keep it alive.
        vars(sys.modules[package]).pop(module, None)
