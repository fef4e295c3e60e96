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

# As in typing, which takes longer to import than all the rest.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser
    from typing import NoReturn, Sequence

USAGE = 64
"""The exit status of sysexits(3) for a wrong option."""
CONTROL_SOCKET = "/run/netproxy/control.sock"
DEFAULT_FILE = "/etc/netproxy/netproxyd.yaml"
DEFAULT_LISTENER = "sps://127.0.0.1:1080"
EXAMPLE_FLOW = "udp alice@192.168.1.5 -> example.com:443 on main"
HELD_SIGNALS = (_signal.SIGHUP, _signal.SIGUSR1)
"""Signals that would end a daemon that has not said yet what they mean to it."""
FILTERS = ("user", "client", "listener", "target", "upstream")
"""What flows can be filtered by; the daemon knows them by the same names."""
LEVELS = ("debug", "info", "warning", "error")
SORTS = (
    *("id", "listener", "client", "user", "target", "upstream"),
    *("age", "idle", "sent", "received", "bytes"),
)
USER_SORTS = ("name", "flows", "rate", "today", "month", "total", "left")
CLIENT_SORTS = ("name", "flows", "rate", "bytes")
VIEWS = ("flow", "user", "client")
"""What netproxyctl top can show."""
COMMANDS = {
    "status": "show listeners, connections and all counters",
    "connections": "list running TCP flows",
    "sessions": "list running UDP sessions",
    "upstreams": "list the upstreams: state, latency, running flows and failures",
    "tunnels": "list connected agents, and this daemon's own: ports, streams, bytes",
    "explain": f"show which rule and which upstream a flow would meet, e.g. '{EXAMPLE_FLOW}'",
    "auto": "list what via: auto has found out about targets, and for how long that is valid",
    "top": "show the flows, users or clients that carry most, redrawn every second; q ends it",
    "reload": "read the configuration again; print its errors",
    "drain": "accept nothing new, let running connections finish, then stop",
    "kill": "end flows, by id or by filter",
    "users": "list users: flows, rates, bytes of today and this month, quota left, limits",
    "clients": "list client addresses: flows, rates, bytes",
    "limit": "show or change the limits of a user, until the next start",
    "ban": "refuse a user or a client address and end its flows, until the next start; list bans",
    "unban": "take a ban back",
    "log": "show or set the level of the log, until the next reload",
    "hash-password": "read a password, print its hash for the configuration",
}
"""The commands of netproxyctl, with their help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run netproxyd; return its exit status."""
    # First of all: from now on they are remembered, and obeyed once the daemon serves.
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, HELD_SIGNALS)
    # late: behind the line above.  The daemon needs them, too, so that they are not unloaded.
    import signal
    import typing  # noqa: F401

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
    from netproxy.daemon.main import Options, run

    options["config"] = options["config"] or (DEFAULT_FILE if os.path.exists(DEFAULT_FILE) else "")
    # Of several directories, with colons between them, the first.
    folder = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    control = f"{folder}/control.sock" if folder else ""
    return run(Options(default_listener=DEFAULT_LISTENER, default_control=control, **options))


def control_main(arguments: Sequence[str] | None = None) -> int:
    """Run netproxyctl; return its exit status."""
    options = control_parser().parse_args(arguments)
    filters = {name: value for name in FILTERS if (value := getattr(options, name, None))}
    # late, as all that only netproxyctl needs
    from netproxy.ctl.commands import run

    return run(options, filters)


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
        "sps://:1080?announce=203.0.113.5&clients=192.168.0.0/16; "
        "may be repeated; replaces the listeners of the file",
    )
    add(
        "-u",
        "--upstream",
        metavar="URL",
        help="send everything through the proxy URL; a comma-separated list is a chain",
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


def control_parser() -> ArgumentParser:
    """Return the parser of netproxyctl's command line."""
    parser = _parser(
        "netproxyctl",
        "Control a running netproxyd.",
        "Exit status: 0 success, 1 refused by the daemon, 3 not running, 64 usage.",
    )
    parser.add_argument(
        "-s",
        "--socket",
        metavar="SOCKET",
        default=CONTROL_SOCKET,
        help=f"the daemon's control socket (default: {CONTROL_SOCKET})",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers: dict[str, ArgumentParser] = {
        name: commands.add_parser(name, help=text, description=text)
        for name, text in COMMANDS.items()
    }
    _add_list_options(parsers)
    _add_arguments(parsers)
    return parser


def _add_list_options(parsers: dict[str, ArgumentParser]) -> None:
    """Add the options that several commands of netproxyctl share."""
    listing = ("status", "connections", "sessions", "upstreams", "tunnels", "auto")
    for name in (*listing, "users", "clients", "limit", "ban"):
        parsers[name].add_argument("--json", action="store_true", help="print the answer as JSON")
    for name in ("connections", "sessions", "kill"):
        for key in FILTERS:
            parsers[name].add_argument(f"--{key}", help=f"only flows with this {key}")
    sorts = (
        ("connections", SORTS, "id"),
        ("sessions", SORTS, "id"),
        ("users", USER_SORTS, "rate"),
        ("clients", CLIENT_SORTS, "rate"),
    )
    for name, columns, default in sorts:
        parsers[name].add_argument(
            "--sort",
            choices=columns,
            default=default,
            metavar="COLUMN",
            help=f"sort by a column: {', '.join(columns)} (default: {default})",
        )
        parsers[name].add_argument(
            "-n", "--number", type=number, metavar="NUMBER", help="print at most so many lines"
        )


def _add_arguments(parsers: dict[str, ArgumentParser]) -> None:
    """Add the arguments that one command of netproxyctl has."""
    parsers["explain"].add_argument(
        "flow", metavar="FLOW", help="[tcp|udp] [[user@]client] -> host:port [on listener]"
    )
    parsers["auto"].add_argument("--clear", action="store_true", help="forget all of it")
    parsers["kill"].add_argument(
        "ids", metavar="ID", type=int, nargs="*", help="as printed by connections and sessions"
    )
    parsers["log"].add_argument(
        "level", metavar="LEVEL", nargs="?", choices=LEVELS, help=", ".join(LEVELS)
    )
    parsers["hash-password"].add_argument(
        "--cost",
        metavar="N",
        default="",
        help="scrypt's N, a power of two: a check takes N KiB and N / 300 ms (default: 16384)",
    )
    parsers["hash-password"].add_argument(
        "--user", metavar="NAME", help="print a line for a users file: NAME:HASH"
    )
    parsers["top"].add_argument(
        "-b", "--batch", action="store_true", help="print once, after a second, and end"
    )
    parsers["top"].add_argument(
        "--by", choices=VIEWS, default="flow", help="what to list: flows, users or clients"
    )
    _add_account_arguments(parsers)


def _add_account_arguments(parsers: dict[str, ArgumentParser]) -> None:
    """Add the arguments of the commands about users and clients."""
    parsers["limit"].add_argument("user", metavar="USER", help="as in the configuration")
    parsers["limit"].add_argument(
        "settings",
        metavar="LIMIT",
        nargs="*",
        help="connections=50, sessions=64, connection_rate=20/s, rate=5Mbit/s, rate_up=, "
        "rate_down= or burst=1MiB; 0 takes a limit away",
    )
    parsers["limit"].add_argument(
        "--reset", action="store_true", help="the configured limits are in force again"
    )
    parsers["ban"].add_argument(
        "words",
        metavar="NAME",
        nargs="*",
        help="a user or an address, and perhaps for how long: alice for 1h",
    )
    parsers["ban"].add_argument(
        "--for", dest="duration", metavar="DURATION", help="how long, e.g. 1h; else no end"
    )
    parsers["unban"].add_argument("name", metavar="NAME", help="as ban lists it")


def number(text: str) -> int:
    """Return a number of lines.  argparse makes a usage error of ValueError."""
    if (value := int(text)) < 0:
        raise ValueError
    return value


def _parser(program: str, description: str, epilog: str) -> ArgumentParser:
    """Return a parser that ends with USAGE after a wrong option, with one line of text."""
    import argparse  # late: 1.4 MiB, see above

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(USAGE, f"{self.prog}: {message} (try --help)\n")

    return Parser(prog=program, description=description, epilog=epilog)
