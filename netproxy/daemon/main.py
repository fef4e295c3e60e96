"""What netproxyd does once its options are known: reads the configuration, checks it or serves it, and obeys signals.

Signals are waited for on the main thread (sigwait), so that no handler ever
interrupts anything: TERM and INT drain and stop, a second one stops at once,
HUP reloads, USR1 writes the status to the log.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from typing import Any, Sequence

from netproxy import __version__
from netproxy.config.load import load_file
from netproxy.config.node import Node, Problems
from netproxy.config.read import check, read_config
from netproxy.config.schema import Config
from netproxy.config.url import listener_node
from netproxy.daemon.daemon import Daemon
from netproxy.daemon.runtime import raise_descriptor_limit
from netproxy.errors import ConfigError, ListenError, NetProxyError
from netproxy.listener.pool import set_stack_size
from netproxy.observe import notify
from netproxy.observe.log import Log

FINE, USAGE, CANNOT_LISTEN, INTERNAL, CONFIGURATION = 0, 64, 69, 70, 78  # sysexits(3)
ENDS = {signal.SIGTERM, signal.SIGINT}
SIGNALS = ENDS | {signal.SIGHUP, signal.SIGUSR1}
LOOK_SECONDS = 2.0  # between two looks at whether all threads live
DRAIN_STEP = 0.1  # seconds between two looks at whether all connections have ended
NO_RELOAD = "the daemon is draining"
END_SECONDS = 15.0  # that what comes after the drain may take


def run(options: Any) -> int:
    """Serves, or only checks, what the options of netproxyd say; the exit status."""
    try:
        config = _configure(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CONFIGURATION
    if options.explain is not None:
        return _explain(config, options.explain)
    if options.check:
        return _check(config, options.quiet)
    return _serve(config, options)


# -- configuration


def _configure(options: Any) -> Config:
    """The file's configuration, with what the options say instead; ConfigError."""
    path = options.config
    root = load_file(path) if path else Node({}, "built-in configuration")
    if not isinstance(root.value, dict):
        raise ConfigError("must be a mapping of keys to values", root.place)
    tree = dict(root.value)
    problems = Problems()
    if options.listen or "listeners" not in tree or tree["listeners"].value == "":
        tree["listeners"] = Node(_listeners(options.listen or [options.default], problems), "-l")
    if options.upstream is not None:
        tree["default"] = Node(
            [Node(hop.strip(), "-u") for hop in options.upstream.split(",")], "-u"
        )
    config = check(read_config(Node(tree, root.place), problems), problems)
    if options.upstream is not None:
        config = config._replace(
            listeners=tuple(one._replace(upstream=None) for one in config.listeners), rules=()
        )
    level = "debug" if options.verbose else "warning" if options.quiet else config.log.level
    return config._replace(
        log=config.log._replace(level=level, format=options.log_format or config.log.format)
    )


def _listeners(urls: Sequence[str], problems: Problems) -> list[Node]:
    nodes = []
    for at, url in enumerate(urls):
        place = f"-l[{at}]"  # not the URL itself: it may hold a secret
        try:
            nodes.append(listener_node(url, place))
        except ValueError as error:
            problems.add(str(error), place)
    return nodes


def _check(config: Config, quiet: bool) -> int:
    """-t: what would listen, and what each way out can carry."""
    try:
        report = Daemon(Log("error")).describe(config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CONFIGURATION
    for warning in config.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not quiet:
        print("\n".join([*report, "OK"]))
    return FINE


def _explain(config: Config, flow: str) -> int:
    """--explain: what would become of a flow."""
    daemon = Daemon(Log("error"))
    try:
        print("\n".join(daemon.explain(flow, config)))
    except NetProxyError as error:
        print(error, file=sys.stderr)
        return CONFIGURATION if isinstance(error, ConfigError) else USAGE
    finally:
        daemon.stop()
    return FINE


# -- serving


def _serve(config: Config, options: Any) -> int:
    _open_standard_descriptors()
    signal.pthread_sigmask(
        signal.SIG_BLOCK, SIGNALS
    )  # inherited by every thread: only sigwait gets them
    set_stack_size()
    raise_descriptor_limit()
    log = Log(config.log.level, config.log.format, config.log.access)
    daemon = Daemon(log)
    try:
        daemon.start(config)
    except (ConfigError, ListenError) as error:
        log.error("%s", error)
        daemon.stop()
        return CANNOT_LISTEN if isinstance(error, ListenError) else CONFIGURATION
    for warning in config.warnings:
        log.warning("%s", warning)
    serving = (
        f"netproxyd {__version__} serves {daemon.summary() or 'nothing'}, out by {daemon.way_out}"
    )
    log.warning("%s", serving) if config.log.level == "warning" else log.info("%s", serving)
    notify.ready(serving)
    return _wait(daemon, config, options, log)


def _open_standard_descriptors() -> None:
    """Where one of 0 to 2 came closed, the next socket would get its number, and the log would be written into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _wait(daemon: Daemon, config: Config, options: Any, log: Log) -> int:
    """Until a signal ends it, or a thread that must live has died."""
    watchdog = notify.Watchdog()
    if watchdog.seconds:
        faulthandler.enable(
            2
        )  # where it misses one it gets ABRT: the log then says what each thread was doing
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
            _say_status(daemon, log)
        else:
            _drain(daemon, config.timeouts.drain, log)
            return FINE


def _reload(daemon: Daemon, config: Config, options: Any, log: Log) -> Config:
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
        log.configure(fresh.log.level, fresh.log.format, fresh.log.access)
        for warning in fresh.warnings:
            log.warning("%s", warning)
        log.info("reloaded; serves %s, out by %s", daemon.summary(), daemon.way_out)
        outcome = ""
    ended(errors)
    notify.ready(f"{outcome}serves {daemon.summary()}")
    return fresh


def _say_status(daemon: Daemon, log: Log) -> None:
    for line in daemon.status():
        log.warning("%s", line)


def _drain(daemon: Daemon, seconds: float, log: Log) -> None:
    """Lets what lives come to its end, for `seconds` or until a second signal that ends; the others are obeyed as far as they can be."""
    notify.stopping(seconds + END_SECONDS)
    daemon.stop_accepting()
    deadline = time.monotonic() + seconds
    if daemon.live:
        log.info("stopping: %d connections may go on for %g s", daemon.live, seconds)
        notify.status(f"stopping: connections may go on for {seconds:g} s")
    while daemon.live and time.monotonic() < deadline:
        received = signal.sigtimedwait(SIGNALS, DRAIN_STEP)
        if received is not None and received.si_signo in ENDS:
            break
        _obey_draining(received, daemon, log)
    for _ in SIGNALS:  # what came with the end; no more, so that nobody can put it off
        _obey_draining(signal.sigtimedwait(SIGNALS, 0), daemon, log)
    daemon.stop()
    log.info("stopped")


def _obey_draining(received: signal.struct_siginfo | None, daemon: Daemon, log: Log) -> None:
    if received is None:
        return
    if received.si_signo == signal.SIGUSR1:
        _say_status(daemon, log)
    elif received.si_signo == signal.SIGHUP:
        log.error("not reloaded: %s", NO_RELOAD)
        daemon.begin_reload()([NO_RELOAD])  # somebody may have asked just before
