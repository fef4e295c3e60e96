"""The command line of netproxyctl: its commands and their arguments."""

from __future__ import annotations

import argparse

from netproxy.admin.control.places import SYSTEM_SOCKET, USER_SOCKET
from netproxy.config.tree.hints import suggestion
from netproxy.ctl.commands import run as carry_out
from netproxy.ctl.nat.command import add_arguments as add_nat_arguments
from netproxy.ctl.convert.arguments import add_arguments as add_convert_arguments
from netproxy.ctl.nft.command import add_arguments as add_nft_arguments
from netproxy.typed import TYPE_CHECKING, Any, NoReturn, Sequence

if TYPE_CHECKING:
    from argparse import ArgumentParser

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
NAMES = ("users", "listeners", "upstreams", "agents")
"""What netproxyctl names can print."""
COMMANDS = {
    "status": "show listeners, connections and all counters",
    "connections": "list running TCP flows",
    "sessions": "list running UDP sessions",
    "upstreams": "list the upstreams: state, latency, running flows and failures",
    "tunnels": "list connected agents, and this daemon's own: ports, streams, bytes",
    "explain": "show which rule and which upstream a target, or a whole flow, would meet",
    "test": "dial a target through the daemon; show each step with its time, or why it fails",
    "why": "show why something was refused or has failed: by id, client, user or target",
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
    "names": "print names of the configuration, for the completion of a shell",
    "nat": "ask STUN servers what NAT this machine, or an upstream, is behind",
    "nft": "print the rules that lead flows to transparent listeners; needs no daemon",
    "convert": "write a configuration from that of another proxy; needs no daemon",
    "hash-password": "read a password, print its hash for the configuration",
}
"""The commands of netproxyctl, with their help."""
WHY_NUMBER = 3
"""Incidents that netproxyctl why prints: a screen."""
EXAMPLE_FLOW = "udp alice@192.168.1.5 -> example.com:443 on main"
USAGE = 64
"""The exit status of sysexits(3) for a wrong command line."""


def run(arguments: Sequence[str] | None, default_file: str) -> int:
    """Run netproxyctl; return its exit status."""
    options = control_parser(default_file).parse_args(arguments)
    filters = {
        name: value for name in FILTERS if (value := getattr(options, name, None)) is not None
    }
    return carry_out(options, filters)


def control_parser(default_file: str) -> ArgumentParser:
    """Return the parser of netproxyctl's command line.

    `default_file` is the configuration for commands that read it themselves.
    """
    parser = _Parser(
        prog="netproxyctl",
        description="Control a running netproxyd.",
        epilog="Exit status: 0 success, 1 refused by the daemon, 3 not running, 64 usage.",
    )
    parser.add_argument(
        "-s",
        "--socket",
        metavar="SOCKET",
        help="the daemon's control socket (default: the first at which a daemon answers of "
        f"$XDG_RUNTIME_DIR/{USER_SOCKET} and {SYSTEM_SOCKET})",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers: dict[str, ArgumentParser] = {
        name: commands.add_parser(name, help=text, description=text)
        for name, text in COMMANDS.items()
    }
    _add_list_options(parsers)
    _add_arguments(parsers)
    add_nat_arguments(parsers["nat"])
    add_nft_arguments(parsers["nft"], default_file)
    add_convert_arguments(parsers["convert"])
    return parser


def _add_list_options(parsers: dict[str, ArgumentParser]) -> None:
    """Add the options that several commands of netproxyctl share."""
    listing = ("status", "connections", "sessions", "upstreams", "tunnels", "auto")
    for name in (*listing, "test", "why", "users", "clients", "limit", "ban"):
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
        "flow",
        metavar="TARGET",
        help="example.com, example.com:443 or https://example.com/, or a whole flow: "
        f"'{EXAMPLE_FLOW}'",
    )
    _add_test_arguments(parsers["test"])
    parsers["why"].add_argument(
        "about",
        metavar="ID|CLIENT|TARGET",
        nargs="?",
        default="",
        help="an id of a record, an address, a user, or a target (default: the last of all)",
    )
    parsers["why"].add_argument(
        *("-n", "--number"),
        type=number,
        metavar="NUMBER",
        default=WHY_NUMBER,
        help=f"print at most so many, the newest first (default: {WHY_NUMBER})",
    )
    parsers["names"].add_argument("kind", metavar="KIND", choices=NAMES, help=", ".join(NAMES))
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


def _add_test_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command that dials."""
    parser.add_argument(
        "target",
        metavar="URL|HOST:PORT",
        help="https://example.com/, example.com:22 or 9.9.9.9:53, or a whole flow as for explain",
    )
    parser.add_argument(
        "--udp", action="store_true", help="open a UDP session; ask for an answer if the port is 53"
    )
    parser.add_argument("--via", metavar="UPSTREAM", help="by this upstream; no rule is asked")
    parser.add_argument("--user", help="as this user")
    parser.add_argument("--listener", help="as if it came in by this listener")


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


class _Parser(argparse.ArgumentParser):
    """A parser that ends with USAGE after a mistake, with one line of text."""

    def error(self, message: str) -> NoReturn:
        """Print the message and end."""
        hint = "" if message.endswith("?)") else " (try --help)"
        self.exit(USAGE, f"{self.prog}: {message}{hint}\n")

    def parse_known_args(  # type: ignore[override]  # argparse has overloads
        self,
        args: Sequence[str] | None = None,
        namespace: Any = None,  # Any: as argparse has it
    ) -> tuple[Any, list[str]]:
        """Return as argparse does; end with a suggestion if an option is unknown."""
        options, extras = super().parse_known_args(args, namespace)
        for word in extras:
            name = word.partition("=")[0]
            if name.startswith("--"):
                self.error(f"unknown option {name}{suggestion(name, self._options())}")
        return options, extras

    def _options(self) -> tuple[str, ...]:
        return tuple(name for action in self._actions for name in action.option_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:  # Any: as argparse has it
        """Raise ArgumentError, or end, if a value is none of the choices of an argument."""
        if action.choices is None or value in action.choices:
            return
        known = tuple(map(str, action.choices))
        near = suggestion(str(value), known) or _completion(str(value), known)
        if action.dest == "command":
            self.error(f"unknown command '{value}'{near}")
        others = f" (known: {', '.join(known)})"
        raise argparse.ArgumentError(action, f"unknown '{value}'{near or others}")


def _completion(word: str, known: Sequence[str]) -> str:
    """Return a suggestion, as suggestion() does, if one known word alone begins like this."""
    matches = [name for name in known if name.startswith(word)]
    return f" (did you mean '{matches[0]}'?)" if len(matches) == 1 else ""
