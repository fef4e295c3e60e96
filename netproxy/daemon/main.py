"""Runs netproxyd with its options: checks a configuration, or serves it and obeys signals.

The main thread waits for signals with sigwait, so that no signal handler interrupts anything.
SIGHUP reloads the file; running connections continue, and a file with errors changes nothing.
SIGTERM and SIGINT stop accepting and let running connections finish, for at most `timeouts.drain`;
a second one stops at once.  SIGUSR1 writes the status to the log.  netproxy.cli blocks SIGHUP
and SIGUSR1 first of all; they are obeyed once the daemon serves.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from typing import Iterable, NamedTuple, Sequence, TextIO

from netproxy import __version__
from netproxy.config.tree.load import load_file
from netproxy.config.tree.node import Node
from netproxy.config.tree.problems import Problems
from netproxy.config.read import check, read_config
from netproxy.config.schema import Config
from netproxy.config.url import listener_node
from netproxy.daemon.build import build, build_for_questions
from netproxy.daemon.daemon import Daemon
from netproxy.daemon.runtime import Runtime, raise_descriptor_limit
from netproxy.errors import ConfigError, ListenError, NetProxyError
from netproxy.listener.pool import set_stack_size
from netproxy.observe import faults, notify
from netproxy.observe.escaping import escape
from netproxy.observe.log import Log

# Exit statuses of sysexits(3).
FINE, USAGE, CANNOT_LISTEN, INTERNAL, CONFIGURATION = 0, 64, 69, 70, 78
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
SIGNALS = STOP_SIGNALS | {signal.SIGHUP, signal.SIGUSR1}
LOOK_SECONDS = 2.0
"""Between two looks whether all threads are alive."""
DRAIN_STEP = 0.1
"""Seconds between two looks whether all connections have ended."""
END_SECONDS = 15.0
"""How long the service manager is asked to wait for what comes after the drain."""
NO_RELOAD = "the daemon is draining"


class Options(NamedTuple):
    """The command line of netproxyd."""

    config: str
    """The configuration file, "" for none."""
    listen: Sequence[str]
    """URLs of listeners that replace those of the file."""
    default_listener: str
    """The URL of the listener if neither option nor file names one."""
    default_control: str
    """The path of the control socket if the file names none; "" for none."""
    upstream: str | None
    """URLs of a chain that replaces all upstreams of the file, and its rules."""
    check: bool
    explain: str | None
    verbose: bool
    quiet: bool
    log_format: str | None


def run(options: Options) -> int:
    """Check, explain or serve the configuration; return the exit status."""
    try:
        config = _configure(options)
    except ConfigError as error:
        _print_error(error)
        return CONFIGURATION
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
    except OSError:
        # The reader has ended, or the disk is full.  Nothing may be written at exit either.
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), file.fileno())


# -- configuration


def _configure(options: Options) -> Config:
    """Read the file and apply the options to it.  Raises ConfigError."""
    path = options.config
    root = load_file(path) if path else Node({}, "built-in configuration")
    if not isinstance(root.value, dict):
        raise ConfigError("must be a mapping of keys to values", root.place)
    tree, problems = dict(root.value), Problems()
    if options.listen or "listeners" not in tree or tree["listeners"].value == "":
        urls = options.listen or [options.default_listener]
        tree["listeners"] = Node(_listeners(urls, problems), "-l")
    if options.default_control and "control" not in tree:
        tree["control"] = Node(f"unix:{options.default_control}", "RUNTIME_DIRECTORY")
    if options.upstream is not None:
        hops = [Node(hop.strip(), "-u") for hop in options.upstream.split(",")]
        tree["default"] = Node(hops, "-u")
    config = check(read_config(Node(tree, root.place), problems), problems)
    if options.upstream is not None:
        listeners = tuple(listener._replace(upstream=None) for listener in config.listeners)
        users = {name: user._replace(upstream=None) for name, user in config.users.items()}
        auth = config.auth._replace(names_upstreams=False)
        config = config._replace(listeners=listeners, rules=(), users=users, auth=auth)
    level = "debug" if options.verbose else "warning" if options.quiet else config.log.level
    log_format = options.log_format or config.log.format
    return config._replace(log=config.log._replace(level=level, format=log_format))


def _listeners(urls: Sequence[str], problems: Problems) -> list[Node]:
    nodes = []
    for number, url in enumerate(urls):
        place = f"-l[{number}]"  # not the URL: it may hold a secret
        try:
            nodes.append(listener_node(url, place))
        except ValueError as error:
            problems.add(str(error), place)
    return nodes


def _check(config: Config, quiet: bool) -> int:
    """Print what would listen and what each upstream can carry, for -t."""
    try:
        plan = build(config, Runtime(Log("error")), None)
    except ConfigError as error:
        _print_error(error)
        return CONFIGURATION
    for warning in plan.warnings:
        _print_error(f"warning: {warning}")
    if not quiet:
        _print([*plan.describe(), "OK"])
    return FINE


def _explain(config: Config, flow: str) -> int:
    """Print what would happen to a flow, for --explain."""
    runtime = Runtime(Log("error"))
    try:
        plan = build_for_questions(config, runtime)
        try:
            _print(plan.explain(flow))
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
    _open_standard_descriptors()
    # Every thread inherits the mask, so that only sigwait gets the signals.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    set_stack_size()
    raise_descriptor_limit()
    log = Log(*config.log)
    os.register_at_fork(after_in_child=log.begin_in_child)
    faults.report_to(log)
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
    daemon = Daemon(log)
    try:
        daemon.start(config)
    except (ConfigError, ListenError) as error:
        log.error("%s", error)
        daemon.stop()
        return CANNOT_LISTEN if isinstance(error, ListenError) else CONFIGURATION
    serving = f"netproxyd {__version__} serves {_serving(daemon)}"
    log.warning("%s", serving) if config.log.level == "warning" else log.info("%s", serving)
    notify.ready(serving)
    return _wait(daemon, config, options, log)


def _serving(daemon: Daemon) -> str:
    return f"{daemon.summary()}, upstream {daemon.default_upstream}"


def _open_standard_descriptors() -> None:
    """Open those of descriptors 0 to 2 that are closed.

    Otherwise the next socket would get the number 2, and the log would be written into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _wait(daemon: Daemon, config: Config, options: Options, log: Log) -> int:
    """Obey signals until one ends the daemon, or a thread that must live has died."""
    watchdog = notify.Watchdog()
    if watchdog.seconds:
        # systemd sends SIGABRT if a ping is late: the log then tells what each thread was doing.
        faulthandler.enable(2)
    while True:
        received = signal.sigtimedwait(SIGNALS, min(LOOK_SECONDS, watchdog.seconds or LOOK_SECONDS))
        if dead := daemon.dead_thread():
            log.error("the thread '%s' has died", dead)
            daemon.stop()
            return INTERNAL
        watchdog.ping(time.monotonic())
        if received is None:
            continue
        if received.si_signo == signal.SIGHUP:
            config = _reload(daemon, config, options, log)
        elif received.si_signo == signal.SIGUSR1:
            _log_status(daemon, log)
        else:
            _drain(daemon, config.timeouts.drain, log)
            return FINE


def _reload(daemon: Daemon, config: Config, options: Options, log: Log) -> Config:
    """Read the file again and apply it; return the configuration that is in force then."""
    notify.reloading()
    ended = daemon.begin_reload()
    errors: list[str] = []
    try:
        fresh = _configure(options)
        daemon.reload(fresh)
    except NetProxyError as error:
        errors = str(error).split("\n")
        for line in errors:
            log.error("not reloaded: %s", line)
        fresh, outcome = config, "not reloaded, "
    else:
        log.configure(*fresh.log)
        log.info("reloaded; serves %s", _serving(daemon))
        outcome = ""
    ended(errors)
    notify.ready(f"{outcome}serves {daemon.summary()}")
    return fresh


def _log_status(daemon: Daemon, log: Log) -> None:
    for line in daemon.status():
        log.answer("%s", line)


def _drain(daemon: Daemon, seconds: float, log: Log) -> None:
    """Let running connections finish, for `seconds` or until a second stop signal; then stop."""
    notify.stopping(seconds + END_SECONDS)
    daemon.stop_accepting()
    deadline = time.monotonic() + seconds
    if daemon.live:
        log.info("stopping: %d connections may finish within %g s", daemon.live, seconds)
        notify.status(f"stopping: connections may finish within {seconds:g} s")
    while daemon.live and time.monotonic() < deadline:
        received = signal.sigtimedwait(SIGNALS, DRAIN_STEP)
        if received is not None and received.si_signo in STOP_SIGNALS:
            break
        _obey_while_draining(received, daemon, log)
    # Signals that came with the end, at most one of each: more of them cannot put the end off.
    for _ in SIGNALS:
        _obey_while_draining(signal.sigtimedwait(SIGNALS, 0), daemon, log)
    daemon.stop()
    log.info("stopped")


def _obey_while_draining(received: signal.struct_siginfo | None, daemon: Daemon, log: Log) -> None:
    if received is None:
        return
    if received.si_signo == signal.SIGUSR1:
        _log_status(daemon, log)
    elif received.si_signo == signal.SIGHUP:
        log.error("not reloaded: %s", NO_RELOAD)
        # A client of the control socket may have asked for the reload just before the drain.
        daemon.begin_reload()([NO_RELOAD])
