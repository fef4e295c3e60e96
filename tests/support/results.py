"""Notes what a program of the tests has shown, for docs/PROOFS.md, which tests/proofs makes.

Nothing is noted unless the environment variable NETPROXY_PROOFS names a folder.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "NETPROXY_PROOFS"


def note(what: str, passed: bool, command: str = "", **figures: object) -> None:
    """Add a line of JSON to the file of `what`. `command` is this program's if it is ""."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    result = {
        "what": what,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command or own_command(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "kernel": os.uname().release.partition("-")[0],
        "processors": len(os.sched_getaffinity(0)),
        "passed": passed,
        "figures": figures,
    }
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / f"{what}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def own_command() -> str:
    """Return the command of this program, as one types it in the checkout."""
    program = Path(sys.argv[0]).resolve()
    name = str(program.relative_to(ROOT)) if program.is_relative_to(ROOT) else program.name
    return shlex.join(["python3", name, *sys.argv[1:]])
