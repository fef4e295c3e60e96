"""Carries out the commands of netproxyctl: asks the daemon and prints its answer."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial

from netproxy.admin.control.ask import ANSWER_SECONDS, NotRunning, ask, ask_with_warnings
from netproxy.admin.control.client import CommandError
from netproxy.ctl.account_commands import COMMANDS as ACCOUNT_COMMANDS
from netproxy.ctl.account_commands import WrongUsage
from netproxy.ctl.console import (
    flows_text,
    lines_text,
    sort_flows,
    status_text,
    tunnels_text,
    upstreams_text,
    verdicts_text,
)
from netproxy.ctl.daemons import find_socket
from netproxy.ctl.dial_steps import steps_text
from netproxy.ctl.why import why_text
from netproxy.errors import LoginUnavailable
from netproxy.typed import TYPE_CHECKING, Mapping, Sequence

if TYPE_CHECKING:
    from argparse import Namespace

    from netproxy.ctl.top import Ask
    from netproxy.interfaces.answers import JsonValue

# Exit statuses; USAGE is that of sysexits(3).
FINE, REFUSED, NOT_RUNNING, USAGE = 0, 1, 3, 64
COMPLETION_SECONDS = 2.0
"""For the daemon to answer a shell, whose user waits for the rest of a word."""


def run(options: Namespace, filters: Mapping[str, str]) -> int:
    """Carry out a command of a parsed command line; return the exit status.

    `filters` are those options that select flows, by name.
    """
    if options.command == "hash-password":
        return _hash_password(options.cost, options.user)
    if options.command == "nft":
        # Late: reads a configuration, which no other command does.
        from netproxy.ctl.nft.command import run as run_nft

        return run_nft(options)
    if options.command == "convert":
        # Late: no other command needs the converters.
        from netproxy.ctl.convert.command import run as run_convert

        return run_convert(options)
    try:
        return _control(options, filters)
    except WrongUsage as error:
        print(f"netproxyctl: {error}", file=sys.stderr)
        return USAGE
    except (NotRunning, CommandError) as error:
        _warn(str(error).split("\n"))
        return NOT_RUNNING if isinstance(error, NotRunning) else REFUSED
    except BrokenPipeError:
        # The reader of our output has ended.  Nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE


def _control(options: Namespace, filters: Mapping[str, str]) -> int:
    """Have the daemon carry out a command.

    Raises NotRunning, CommandError or WrongUsage.
    """
    tell = partial(_tell, options)
    command = options.command
    if command == "top":
        # Late: only this command needs a terminal.
        from netproxy.ctl.top import Top

        # The picture shows which workers do not answer.
        top = Top(partial(ask, options.socket or find_socket()), options.by)
        print(top.once()) if options.batch else top.run()
    elif command == "nat":
        # Late: no other command needs sockets of its own.
        from netproxy.ctl.nat.command import run as run_nat

        return run_nat(options, tell)
    elif command in ACCOUNT_COMMANDS:
        print(ACCOUNT_COMMANDS[command](options, tell))
    elif command == "kill":
        print(f"{tell('kill', ids=options.ids, **filters)['killed']} killed")
    elif command == "names":
        path = options.socket or find_socket()
        answer, _ = ask_with_warnings(path, "known", COMPLETION_SECONDS)
        print(lines_text(answer[options.kind]))
    elif command == "explain":
        print(lines_text(tell("explain", flow=options.flow)))
    elif command == "test":
        return _test(options, tell)
    elif command == "why":
        answer = tell("why", about=options.about)
        text = why_text(answer, options.about, options.number, time.time())
        print(json.dumps(answer, indent=2) if options.json else text)
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


def _tell(options: Namespace, command: str, **details: object) -> JsonValue:
    """Return the daemon's answer; print what is missing in it.

    Raises NotRunning or CommandError.
    """
    path = options.socket or find_socket()
    answer, warnings = ask_with_warnings(path, command, ANSWER_SECONDS, **details)
    _warn(warnings)
    return answer


def _test(options: Namespace, tell: Ask) -> int:
    """Have the daemon dial a target, and print what came of it."""
    wishes = {key: getattr(options, key) for key in ("via", "user", "listener", "udp")}
    answer = tell("test", target=options.target, **wishes)
    print(json.dumps(answer, indent=2) if options.json else steps_text(answer))
    return FINE if answer["fine"] else REFUSED


def _warn(lines: Sequence[str]) -> None:
    """Print lines to standard error."""
    if lines:
        print(lines_text([f"netproxyctl: {line}" for line in lines]), file=sys.stderr)


def _show(options: Namespace, answer: JsonValue) -> None:
    """Print the answer of a command, as a table or as JSON."""
    command = options.command
    if command in ("connections", "sessions"):
        answer = sort_flows(answer, options.sort)[: options.number]
    if options.json:
        print(json.dumps(answer, indent=2))
    elif command == "status":
        print(status_text(answer))
    elif command == "upstreams":
        print(upstreams_text(answer))
    elif command == "tunnels":
        print(tunnels_text(answer))
    elif command == "auto":
        print(verdicts_text(answer))
    else:
        print(flows_text(answer, command == "sessions"))


def _hash_password(cost: str, user: str | None) -> int:
    """Read a password and print its hash, or a user's line; return the exit status."""
    # Late: few commands need it.
    from netproxy.access.users import COST, hash_password, parse_cost, users_file_line

    option = "--user"
    try:
        if user is not None:
            users_file_line(user, "")
        option = "--cost"
        number = parse_cost(cost) if cost else COST
    except ValueError as error:
        print(f"netproxyctl: {option}: {error}", file=sys.stderr)
        return USAGE

    if sys.stdin.isatty():
        import getpass

        password = getpass.getpass("Password: ")
    else:
        password = sys.stdin.readline().rstrip("\n")
    if not 0 < len(password.encode()) < 256:
        print("netproxyctl: a password has 1 to 255 bytes", file=sys.stderr)
        return USAGE
    try:
        hashed = hash_password(password, number)
    except LoginUnavailable as error:
        print(f"netproxyctl: {error}", file=sys.stderr)
        return REFUSED
    print(hashed if user is None else users_file_line(user, hashed))
    return FINE
