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

FINE, USAGE = 0, 64                         # sysexits(3)
REFUSED, NOT_RUNNING = 1, 3                 # of netproxyctl
CONTROL_SOCKET = "/run/netproxy/control.sock"
DEFAULT_FILE = "/etc/netproxy/netproxyd.yaml"
DEFAULT_LISTENER = "sps://127.0.0.1:1080"


def main(arguments: Sequence[str] | None = None) -> int:
    """netproxyd.  Returns the exit status."""
    before = set(sys.modules)
    options = _parse(arguments)
    for name in set(sys.modules) - before:
        del sys.modules[name]
    gc.collect()
    from netproxy.service import run    # late: into the memory that is free now
    return run(options)


def control_main(arguments: Sequence[str] | None = None) -> int:
    """netproxyctl.  Returns the exit status."""
    parser = _parser("netproxyctl", "Looks after netproxyd.", "Exit status: 0 fine, 1 refused, 3 not running, 64 usage.")
    parser.add_argument("-s", "--socket", metavar="SOCKET", default=CONTROL_SOCKET,
                        help=f"the daemon's control socket (default: {CONTROL_SOCKET})")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("hash-password", help="read a password, print its hash for the configuration")
    for name, text in (("status", "what listens, what lives, and all counters"),
                       ("upstreams", "each way out: its state, latency, live flows and failures"),
                       ("tunnels", "agents that are connected, and this daemon's own: ports, streams, bytes")):
        commands.add_parser(name, help=text).add_argument("--json", action="store_true", help="print the answer as JSON")
    options = parser.parse_args(arguments)
    return _hash_password() if options.command == "hash-password" else _ask(options)


def _ask(options: Any) -> int:
    import json     # late, as these: netproxyd needs none of them to serve
    from netproxy.observe.console import status_text, tunnels_text, upstreams_text
    from netproxy.observe.control import CommandError, NotRunning, ask
    try:
        answer = ask(options.socket, options.command)
    except (NotRunning, CommandError) as error:
        print(f"netproxyctl: {error}", file=sys.stderr)
        return NOT_RUNNING if isinstance(error, NotRunning) else REFUSED
    texts = {"status": status_text, "upstreams": upstreams_text, "tunnels": tunnels_text}
    print(json.dumps(answer, indent=2) if options.json else texts[options.command](answer))
    return FINE


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = _parser("netproxyd", "One proxy port that does everything: SOCKS4, SOCKS5 with UDP, and HTTP.",
                     "Exit status: 0 fine, 64 usage, 69 cannot listen, 78 configuration.  See netproxyd(8).")
    add = parser.add_argument
    add("-c", "--config", metavar="FILE", help=f"default {DEFAULT_FILE} where it exists, else {DEFAULT_LISTENER}")
    add("-l", "--listen", metavar="URL", action="append", default=[],
        help="listen there, e.g. sps://127.0.0.1:1080 or sps://:1080?announce=203.0.113.5&clients=192.168.0.0/16; "
             "may repeat; replaces the file's listeners")
    add("-u", "--upstream", metavar="URL", help="everything leaves through it; a comma-separated list is a chain")
    add("-t", "--check", action="store_true", help="read everything, print what would be done, start nothing")
    add("--explain", metavar="FLOW", help="print which rule and which way out a flow would meet, e.g. "
        "'udp alice@192.168.1.5 -> example.com:443 on main'; start nothing")
    loud = parser.add_mutually_exclusive_group()
    loud.add_argument("-v", "--verbose", action="store_true", help="log more")
    loud.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")
    add("--log-format", choices=("text", "json"), help="of the log on standard error")
    add("-V", "--version", action="version", version=f"netproxyd {__version__}")
    options = parser.parse_args(arguments)
    options.config = options.config or (DEFAULT_FILE if os.path.exists(DEFAULT_FILE) else "")
    options.default = DEFAULT_LISTENER
    return options


def _parser(program: str, description: str, epilog: str = "") -> Any:
    import argparse     # late: 1.4 MiB that nothing else here needs

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
