"""The commands netproxyd and netproxyctl: from the command line to an exit status.

Everything that reads options is unloaded before the daemon is loaded, so that its memory
serves again: argparse and what it imports are a tenth of an idle daemon.
"""

from __future__ import annotations

# Built into the interpreter: the module signal imports others for some milliseconds, in which a
# signal would still end the process.
import _signal  # type: ignore[import-not-found]  # it has no stub
import gc
import os
import sys

from netproxy import __version__

# As in netproxy.typed, without a module to load before signals are held back.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser
    from typing import NoReturn, Sequence

USAGE = 64
"""The exit status of sysexits(3) for a wrong option."""
DEFAULT_FILE = "/etc/netproxy/netproxyd.yaml"
DEFAULT_LISTENER = "sps://127.0.0.1:1080"
EXAMPLE_FLOW = "udp alice@192.168.1.5 -> example.com:443 on main"
HELD_SIGNALS = (_signal.SIGHUP, _signal.SIGUSR1, _signal.SIGUSR2)
"""Signals that would end a daemon that has not said yet what they mean to it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run netproxyd; return its exit status."""
    # First of all: from now on they are remembered, and obeyed once the daemon serves.
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, HELD_SIGNALS)
    # late: behind the line above.  The daemon needs it, too, so that it is not unloaded.
    import signal

    serves = False
    before = set(sys.modules)
    try:
        options = vars(daemon_parser().parse_args(arguments))
        serves = not options["check"] and options["explain"] is None
    finally:
        if not serves:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for name in set(sys.modules) - before:
        del sys.modules[name]
    gc.collect()
    # late: into the memory that is free now
    from netproxy.admin.control.places import default_control
    from netproxy.daemon.main import run
    from netproxy.daemon.process.options import Options

    control = default_control(os.environ, os.geteuid(), alone=not options["config"])
    options["config"] = options["config"] or (DEFAULT_FILE if os.path.exists(DEFAULT_FILE) else "")
    return run(Options(default_listener=DEFAULT_LISTENER, default_control=control, **options))


def control_main(arguments: Sequence[str] | None = None) -> int:
    """Run netproxyctl; return its exit status."""
    # late, as all that only netproxyctl needs
    from netproxy.ctl.command_line import run

    return run(arguments, DEFAULT_FILE)


# -- the command lines


def daemon_parser() -> ArgumentParser:
    """Return the parser of netproxyd's command line."""
    parser = _parser(
        "netproxyd",
        "One proxy port that does everything: SOCKS4, SOCKS5 with UDP, and HTTP.",
        "Exit status: 0 success, 64 usage, 69 cannot listen, 70 internal error, "
        "78 configuration.  See netproxyd(8).",
    )
    add = parser.add_argument
    add(
        "-c",
        "--config",
        metavar="FILE",
        help=f"configuration file (default: {DEFAULT_FILE} if it exists, "
        f"otherwise listen on {DEFAULT_LISTENER})",
    )
    add(
        "-l",
        "--listen",
        metavar="URL",
        action="append",
        default=[],
        help="listen on URL, e.g. sps://127.0.0.1:1080 or "
        "'sps://:1080?clients=192.168.0.0/16&announce=203.0.113.5'; "
        "may be repeated; replaces the listeners of the file",
    )
    add(
        "-u",
        "--upstream",
        metavar="URL",
        help="send everything through the proxy URL; a comma-separated list is a chain",
    )
    add(
        "-w",
        "--workers",
        metavar="N",
        help="share the listeners among N processes, or auto for one on each processor; "
        "replaces `workers` of the file",
    )
    _add_modes(parser)
    return parser


def _add_modes(parser: ArgumentParser) -> None:
    """Add the options of netproxyd that check or explain, and those of the log."""
    add = parser.add_argument
    add(
        "-t",
        "--check",
        action="store_true",
        help="check the configuration, print what would be done, start nothing",
    )
    add(
        "--explain",
        metavar="FLOW",
        help="print which rule and which upstream a flow would meet, start nothing; "
        f"e.g. '{EXAMPLE_FLOW}'",
    )
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help="log more")
    loudness.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")
    add("--log-format", choices=("text", "json"), help="format of the log on standard error")
    add("-V", "--version", action="version", version=f"netproxyd {__version__}")


def _parser(program: str, description: str, epilog: str) -> ArgumentParser:
    """Return a parser that ends with USAGE after a wrong option, with one line of text."""
    import argparse  # late: 1.4 MiB, see above

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            is_file = message.endswith((".yaml", ".yml"))
            hint = "write -c before the name of a configuration file" if is_file else "try --help"
            self.exit(USAGE, f"{self.prog}: {message} ({hint})\n")

    columns = _columns()
    return Parser(
        prog=program,
        description=description,
        epilog=epilog,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=columns - 2),
    )


def _columns() -> int:
    """Return the width of the terminal, as shutil does, which loads libraries of 0.3 MiB."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isascii() and columns.isdigit() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size().columns or 80
    except OSError:  # no terminal
        return 80
