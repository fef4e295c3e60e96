"""netproxyd and netproxyctl: from the command line to an exit status.

What reads the options is unloaded before the daemon is loaded, so that its memory
serves again: argparse and what it brings are a tenth of an idle daemon.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any, Sequence

from netproxy import __version__

FINE, USAGE = 0, 64  # sysexits(3)
REFUSED, NOT_RUNNING = 1, 3  # of netproxyctl
CONTROL_SOCKET = "/run/netproxy/control.sock"
DEFAULT_FILE = "/etc/netproxy/netproxyd.yaml"
DEFAULT_LISTENER = "sps://127.0.0.1:1080"
FILTERS = ("user", "client", "listener", "target", "upstream")  # of flows, as the daemon knows them
SORTS = (
    "id",
    "listener",
    "client",
    "user",
    "target",
    "upstream",
    "age",
    "idle",
    "sent",
    "received",
    "bytes",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """netproxyd.  Returns the exit status."""
    before = set(sys.modules)
    options = _parse(arguments)
    for name in set(sys.modules) - before:
        del sys.modules[name]
    gc.collect()
    from netproxy.daemon.main import run  # late: into the memory that is free now

    return run(options)


def control_main(arguments: Sequence[str] | None = None) -> int:
    """netproxyctl.  Returns the exit status."""
    options = control_parser().parse_args(arguments)
    if options.command == "hash-password":
        return _hash_password()
    from netproxy.admin.control_socket import (
        CommandError,
        NotRunning,
    )  # late, as those below: netproxyd needs none of them

    try:
        return _control(options)
    except (NotRunning, CommandError) as error:
        for line in str(error).split("\n"):
            print(f"netproxyctl: {line}", file=sys.stderr)
        return NOT_RUNNING if isinstance(error, NotRunning) else REFUSED
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE


def control_parser() -> Any:
    """Of netproxyctl's command line."""
    parser = _parser(
        "netproxyctl",
        "Control a running netproxyd.",
        "Exit status: 0 success, 1 refused, 3 not running, 64 usage error.",
    )
    parser.add_argument(
        "-s",
        "--socket",
        metavar="SOCKET",
        default=CONTROL_SOCKET,
        help=f"the daemon's control socket (default: {CONTROL_SOCKET})",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {
        name: commands.add_parser(name, help=text, description=text)
        for name, text in (
            ("status", "print the state, the listeners and all counters"),
            ("connections", "list the running TCP flows"),
            ("sessions", "list the running UDP sessions"),
            ("upstreams", "list the upstreams: state, latency, running flows and failures"),
            ("tunnels", "list the connected agents, and the daemon's own: ports, streams, bytes"),
            (
                "explain",
                "print which rule and which upstream a flow would meet, "
                "e.g. 'udp alice@192.168.1.5 -> example.com:443 on main'",
            ),
            ("auto", "list what `via: auto` has found out about targets, and for how long it holds"),
            ("top", "show the busiest flows, once a second; q quits"),
            ("reload", "read the configuration again; print its errors"),
            ("drain", "accept nothing new, let running connections finish, then stop"),
            ("kill", "end flows by id or by filter"),
            ("log", "print the level of the log, or set it until the next reload"),
            ("hash-password", "read a password and print its hash for the configuration"),
        )
    }
    made["explain"].add_argument(
        "flow", metavar="FLOW", help="[tcp|udp] [[user@]client] -> host:port [on listener]"
    )
    made["auto"].add_argument("--clear", action="store_true", help="forget all of it")
    for name in ("status", "connections", "sessions", "upstreams", "tunnels", "auto"):
        made[name].add_argument("--json", action="store_true", help="print the answer as JSON")
    for name in ("connections", "sessions", "kill"):
        for option in FILTERS:
            made[name].add_argument(
                f"--{option}", help=f"only flows of this {option}"
            )
    for name in ("connections", "sessions"):
        made[name].add_argument(
            "--sort",
            choices=SORTS,
            default="id",
            metavar="COLUMN",
            help=f"one of {', '.join(SORTS)}",
        )
        made[name].add_argument(
            "-n", "--number", type=number, metavar="NUMBER", help="print at most this many lines"
        )
    made["kill"].add_argument(
        "ids", metavar="ID", type=int, nargs="*", help="the id in the output of connections and sessions"
    )
    made["log"].add_argument(
        "level",
        metavar="LEVEL",
        nargs="?",
        choices=("debug", "info", "warning", "error"),
        help="debug, info, warning or error",
    )
    made["top"].add_argument(
        "-b", "--batch", action="store_true", help="print once, after a second, and exit"
    )
    return parser


def number(text: str) -> int:
    """Of lines: argparse makes a usage error of ValueError."""
    if (value := int(text)) < 0:
        raise ValueError
    return value


def _control(options: Any) -> int:
    from netproxy.admin.control_socket import ask
    from netproxy.ctl.top import Top

    def tell(command: str, **details: Any) -> Any:
        return ask(options.socket, command, **details)

    command = options.command
    if command == "top":
        top = Top(tell)
        print(top.once()) if options.batch else top.run()
        return FINE
    filters = {name: getattr(options, name) for name in FILTERS if getattr(options, name, None)}
    if command == "kill":
        print(f"{tell('kill', ids=options.ids, **filters)['killed']} killed")
    elif command == "explain":
        print("\n".join(tell("explain", flow=options.flow)))
    elif command == "auto" and options.clear:
        print(f"{tell('verdicts', clear=True)['cleared']} cleared")
    elif command == "auto":
        _show(options, tell("verdicts"))
    elif command == "log":
        print(tell("log", level=options.level)["level"])
    elif command == "reload":
        tell("reload")
        print("reloaded")
    elif command == "drain":
        print(f"draining: {tell('drain')['connections']} connections may finish")
    else:
        _show(options, tell(command, **filters))
    return FINE


def _show(options: Any, answer: Any) -> None:
    import json
    from netproxy.ctl import console

    command = options.command
    if command in ("connections", "sessions"):
        answer = console.sort_flows(answer, options.sort)[: options.number]
    if options.json:
        print(json.dumps(answer, indent=2))
    elif command == "status":
        print(console.status_text(answer))
    elif command == "upstreams":
        print(console.upstreams_text(answer))
    elif command == "tunnels":
        print(console.tunnels_text(answer))
    elif command == "auto":
        print(console.verdicts_text(answer))
    else:
        print(console.flows_text(answer, command == "sessions"))


def daemon_parser() -> Any:
    """Of netproxyd's command line."""
    parser = _parser(
        "netproxyd",
        "One proxy port that does everything: SOCKS4, SOCKS5 with UDP, and HTTP.",
        "Exit status: 0 fine, 64 usage, 69 cannot listen, 78 configuration.  See netproxyd(8).",
    )
    add = parser.add_argument
    add(
        "-c",
        "--config",
        metavar="FILE",
        help=f"default {DEFAULT_FILE} where it exists, else {DEFAULT_LISTENER}",
    )
    add(
        "-l",
        "--listen",
        metavar="URL",
        action="append",
        default=[],
        help="listen there, e.g. sps://127.0.0.1:1080 or sps://:1080?announce=203.0.113.5&clients=192.168.0.0/16; "
        "may repeat; replaces the file's listeners",
    )
    add(
        "-u",
        "--upstream",
        metavar="URL",
        help="everything leaves through it; a comma-separated list is a chain",
    )
    add(
        "-t",
        "--check",
        action="store_true",
        help="read everything, print what would be done, start nothing",
    )
    add(
        "--explain",
        metavar="FLOW",
        help="print which rule and which way out a flow would meet, e.g. "
        "'udp alice@192.168.1.5 -> example.com:443 on main'; start nothing",
    )
    loud = parser.add_mutually_exclusive_group()
    loud.add_argument("-v", "--verbose", action="store_true", help="log more")
    loud.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")
    add("--log-format", choices=("text", "json"), help="of the log on standard error")
    add("-V", "--version", action="version", version=f"netproxyd {__version__}")
    return parser


def _parse(arguments: Sequence[str] | None) -> Any:
    options = daemon_parser().parse_args(arguments)
    options.config = options.config or (DEFAULT_FILE if os.path.exists(DEFAULT_FILE) else "")
    options.default = DEFAULT_LISTENER
    return options


def _parser(program: str, description: str, epilog: str = "") -> Any:
    import argparse  # late: 1.4 MiB that nothing else here needs

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            self.exit(USAGE, f"{self.prog}: {message} (try --help)\n")

    return Parser(prog=program, description=description, epilog=epilog)


def _hash_password() -> int:
    from netproxy.access.users import hash_password

    if sys.stdin.isatty():
        import getpass

        password = getpass.getpass("Password: ")
    else:
        password = sys.stdin.readline().rstrip("\n")
    if not 0 < len(password.encode()) < 256:
        print("netproxyctl: a password has 1 to 255 bytes", file=sys.stderr)
        return USAGE
    print(hash_password(password))
    return FINE
