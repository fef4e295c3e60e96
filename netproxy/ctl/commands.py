"""Carries out the commands of netproxyctl: asks the daemon, prints the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping

from netproxy.admin.control_socket import ask
from netproxy.ctl import console

if TYPE_CHECKING:
    from argparse import Namespace


def run_command(options: Namespace, filters: Mapping[str, str]) -> None:
    """Run a command of netproxyctl and print its answer.  Raises NotRunning or CommandError."""

    def tell(command: str, **details: Any) -> Any:  # Any: JSON, of a kind for each command
        return ask(options.socket, command, **details)

    command = options.command
    if command == "top":
        from netproxy.ctl.top import Top

        top = Top(tell)
        print(top.once()) if options.batch else top.run()
    elif command == "kill":
        print(f"{tell('kill', ids=options.ids, **filters)['killed']} killed")
    elif command == "explain":
        print(console.lines_text(tell("explain", flow=options.flow)))
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


def _show(options: Namespace, answer: Any) -> None:  # Any: JSON, of a kind for each command
    """Print the answer of a command, as a table or as JSON."""
    command = options.command
    if command in ("connections", "sessions"):
        answer = console.sort_flows(answer, options.sort)[: options.number]
    if options.json:
        import json

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
