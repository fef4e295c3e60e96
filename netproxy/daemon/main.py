"""Runs netproxyd with its options: checks or explains a configuration, or serves it.

netproxy.cli blocks the signals that the daemon obeys first of all; daemon.signals waits for them.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from functools import partial

from netproxy import __version__
from netproxy.config.schema import Config
from netproxy.daemon.build import build, build_for_questions
from netproxy.daemon.daemon import Daemon
from netproxy.daemon.runtime import Runtime, raise_descriptor_limit
from netproxy.daemon.process import late_modules
from netproxy.daemon.process.reading import ReadingFailed, configure, configure_apart
from netproxy.daemon.process.signals import FINE, INTERNAL, Served, hold_signals
from netproxy.errors import ConfigError, ListenError, NetProxyError
from netproxy.listener.pool import set_stack_size
from netproxy.observe import faults, notify
from netproxy.observe.escaping import escape
from netproxy.observe.log import Log
from netproxy.typed import TYPE_CHECKING, Iterable, TextIO

if TYPE_CHECKING:
    from netproxy.daemon.process.options import Options
    from netproxy.daemon.workers.parent import Parent

# Exit statuses of sysexits(3).
USAGE, CANNOT_LISTEN, CONFIGURATION = 64, 69, 78


def run(options: Options) -> int:
    """Check, explain or serve the configuration; return the exit status."""
    serves = options.explain is None and not options.check
    # Who has started the daemon may have ignored it: the kernel would reap its processes then.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        config = configure_apart(options, is_start=True) if serves else configure(options)
    except ConfigError as error:
        _print_error(error)
        return CONFIGURATION
    except ReadingFailed as error:  # another start may help
        _print_error(error)
        return INTERNAL
    if options.explain is not None:
        return _explain(config, options.explain)
    if options.check:
        return _check(config, options.quiet)
    return _serve(config, options)


def _print(lines: Iterable[str]) -> None:
    _write(sys.stdout, lines)


def _print_error(error: Exception | str) -> None:
    _write(sys.stderr, str(error).split("\n"))


def _write(file: TextIO, lines: Iterable[str]) -> None:
    try:
        print("\n".join(map(escape, lines)), file=file, flush=True)
    except OSError:  # the reader has ended, or the disk is full: nothing may be written at exit
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), file.fileno())


# -- questions


def _check(config: Config, quiet: bool) -> int:
    """Print what would listen and what each upstream can carry, for -t."""
    from netproxy.daemon.questions import PlanQuestions  # late: a daemon is seldom asked

    try:
        plan = build(config, Runtime(Log("error")), None)
    except ConfigError as error:
        _print_error(error)
        return CONFIGURATION
    for warning in plan.warnings:
        _print_error(f"warning: {warning}")
    if not quiet:
        _print([*PlanQuestions(plan).describe(), "OK"])
    return FINE


def _explain(config: Config, flow: str) -> int:
    """Print what would happen to a flow, for --explain."""
    from netproxy.daemon.questions import PlanQuestions  # late: as above

    runtime = Runtime(Log("error"))
    try:
        plan = build_for_questions(config, runtime)
        try:
            _print(PlanQuestions(plan).explain(flow))
        finally:
            plan.close()
    except NetProxyError as error:
        _print_error(error)
        return CONFIGURATION if isinstance(error, ConfigError) else USAGE
    finally:
        runtime.stop()
    return FINE


# -- serving


def _serve(config: Config, options: Options) -> int:
    late_modules.guard()
    faults.open_standard_descriptors()
    hold_signals()
    set_stack_size()
    raise_descriptor_limit()
    log = Log(*config.log)
    os.register_at_fork(after_in_child=log.begin_in_child)
    faults.report_to(log)
    if notify.Watchdog().seconds:
        # systemd sends SIGABRT if a ping is late: the log then tells what each thread was doing.
        # Workers inherit this, and get the signal as well.
        faulthandler.enable(2)
    try:
        return _run(config, options, log)
    except Exception:
        # Printing the exception would wait for the reader of standard error.
        log.exception("serving")
        return INTERNAL
    finally:
        log.close()


def _run(config: Config, options: Options, log: Log) -> int:
    """Start the daemon and serve until its end; return the exit status."""
    daemon = _daemon_of(config.workers, log)
    try:
        daemon.start(config)
    except (ConfigError, ListenError) as error:
        log.error("%s", error)
        daemon.stop()
        return CANNOT_LISTEN if isinstance(error, ListenError) else CONFIGURATION
    served = Served(daemon, config, partial(configure_apart, options), log)
    serving = f"netproxyd {__version__} serves {served.text}"
    log.warning("%s", serving) if config.log.level == "warning" else log.info("%s", serving)
    notify.ready(serving)
    return served.run()


def _daemon_of(workers: int, log: Log) -> Daemon | Parent:
    if workers == 1:
        return Daemon(log)
    from netproxy.daemon.workers.parent import Parent  # late: few daemons have several workers

    return Parent(log, workers)
