"""Counts what becomes of the example commands in the documents of gost and goproxy.

    python3 -m tests.ctl.convert.shares gost FILE.md...
    python3 -m tests.ctl.convert.shares gost-files FILE.md...

Each command, or file in YAML, is converted by itself; one that stands in several places counts
once.
docs/MOVING.md has the result.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Iterable, Iterator

from netproxy.ctl.convert.command import convert
from netproxy.ctl.convert.command_lines.goproxy.convert import COMMANDS
from netproxy.ctl.convert.notes import Kind, Notes
from netproxy.ctl.convert.source import ConversionError, Source

EXAMPLES = {
    "gost": re.compile(r"(?m)^[ \t]*(?:\$ )?((?:sudo )?gost[ \t]+-[A-Za-z].*)$"),
    "gost-files": re.compile(r"(?ms)^[ \t]*```+ ?yaml[^\n]*\n(.*?)^[ \t]*```"),
    "goproxy": re.compile(rf"(?im)^[ \t]*`?((?:agent |proxy(?:\.exe)? )(?:{COMMANDS})\b[^`\n]*)"),
}
UNTOLD = ("is not understood", "is not known", "is neither", "that is known", "a key that is carr")
"""What reasons say that are no reasons."""


def examples(program: str, texts: Iterable[str]) -> Iterator[str]:
    """Yield the commands of documents, each once."""
    seen = set()
    for text in texts:
        if program == "gost-files":
            text = text.replace("\t", "    ")
        else:
            text = re.sub(r"[ \t]*\\[ \t]*\n\s*", " ", text)
        text = re.sub(r"\[-F=[^\]]*\]|(?<= )\.\.\.(?= )", "", text)
        for command in EXAMPLES[program].findall(text):
            is_file = program == "gost-files"
            command = textwrap.dedent(command) if is_file else " ".join(command.split())
            if is_file and not re.search("(?m)^services:", command):
                continue
            if command not in seen:
                seen.add(command)
                yield command


def outcomes(program: str, command: str) -> Counter[str]:
    """Return the number of directives by outcome; "untold": not carried, without a reason."""
    try:
        path = "gost.yml" if program == "gost-files" else ""
        _, notes = convert(program.removesuffix("-files"), Source(path, command))
    except ConversionError:
        return Counter({"refused": 1})
    counts = Counter({kind.value: count for kind, count in notes.counts().items()})
    counts["untold"] = len(untold(notes))
    return counts


def untold(notes: Notes) -> list[str]:
    """Return the directives that are not carried, and whose note gives no reason."""
    return [
        note.directive.text
        for note in notes.told()
        if note.kind is Kind.LOST and note.directive and any(part in note.why for part in UNTOLD)
    ]


def main(program: str, paths: list[str]) -> None:
    """Print the counts."""
    total: Counter[str] = Counter()
    commands = list(examples(program, (Path(path).read_text() for path in paths)))
    for command in commands:
        total += outcomes(program, command)
    directives = sum(total[kind.value] for kind in Kind)
    print(f"{program}: {len(commands)} examples, {directives} directives")
    for word, count in total.items():
        print(f"{count:5} {100 * count / max(directives, 1):5.1f} % {word}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
