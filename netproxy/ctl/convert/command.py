"""The command `netproxyctl convert`: writes a configuration from that of another program.

Needs no running daemon, and opens no network connection.
"""

from __future__ import annotations

import json
import os
import sys

from netproxy.config.read import check, read_config
from netproxy.config.tree.node import Source as ConfigSource
from netproxy.config.tree.parse import parse_text
from netproxy.config.tree.problems import Problems
from netproxy.ctl.convert.draft.draft import Draft
from netproxy.ctl.convert.notes import Kind, Notes
from netproxy.ctl.convert.registry import FORMATS, form_of_words, guess
from netproxy.ctl.convert.source import ConversionError, Source, read_source
from netproxy.ctl.convert.draft.rule_list import RULES_LIMIT
from netproxy.ctl.convert.draft.writer import yaml_text
from netproxy.errors import ConfigError
from netproxy.observe.escaping import escape
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from argparse import Namespace

_UNSET = "environment variable"
"""What an error says that is none of ours: the old file had the variable as well."""
OF_WORDS = ("gost", "goproxy", "url")
"""The formats that may stand in the arguments themselves."""
FINE, REFUSED, USAGE, INPUT, INTERNAL = 0, 1, 64, 66, 70
"""Exit statuses; the last three are those of sysexits(3)."""


def run(options: Namespace) -> int:
    """Carry out the command; return the exit status."""
    words = _words(options.words)
    form = options.format or form_of_words(words)
    if wrong := _wrong_usage(words, form):
        _say(wrong)
        return USAGE
    try:
        source = _source(words, form)
        form = form or guess(source)
        text, notes = convert(form, source)
    except ConversionError as error:
        _say(str(error))
        return INPUT
    if options.json:
        answer = report(form, notes) | ({} if options.output else {"configuration": text})
        print(json.dumps(answer, indent=2))
    else:
        for line in report_lines(source, notes):
            print(escape(line), file=sys.stderr)
    if options.output:
        return _write(options.output, text) or _check(text)
    if not options.json:
        print(text, end="")
    return _check(text)


def convert(form: str, source: Source) -> tuple[str, Notes]:
    """Return the configuration and what became of each directive.  Raises ConversionError."""
    draft, notes = Draft(), Notes()
    FORMATS[form].converter(source, draft, notes)
    if len(draft.rules) > RULES_LIMIT:
        count = f"{len(draft.rules)} rules, more than {RULES_LIMIT}"
        raise ConversionError(f"{source.name}: would become {count}: combine its access lists")
    draft.remarks += [
        f"Made by netproxyctl convert from {source.name}.",
        "Check it with: netproxyd -t -c FILE",
    ]
    lost = [note for note in notes.told() if note.kind is Kind.LOST]
    for note in lost:
        where = f"{note.directive.shown}: " if note.directive else ""
        draft.remarks.append(f"Not carried over: {where}{note.why}")
    return yaml_text(draft), notes


def report(form: str, notes: Notes) -> dict[str, object]:
    """Return the outcomes for programs."""
    return {
        "format": form,
        "directives": len(notes.directives),
        "outcomes": {kind.value: count for kind, count in notes.counts().items()},
        "notes": [
            {
                "file": note.directive.file if note.directive else "",
                "line": note.directive.line if note.directive else 0,
                "directive": note.directive.text if note.directive else "",
                "outcome": note.kind.value,
                "why": note.why,
                "advice": note.advice,
            }
            for note in notes.told()
        ],
    }


def report_lines(source: Source, notes: Notes) -> list[str]:
    """Return the outcomes for people."""
    lines = []
    for note in notes.told():
        # The counts are those of directives: a note about the whole is none of them.
        where = note.directive.shown if note.directive else f"{source.name} as a whole"
        advice = f" ({note.advice})" if note.advice else ""
        lines.append(f"{where}: {note.kind.value}: {note.why}{advice}")
    counts = ", ".join(f"{count} {kind.value}" for kind, count in notes.counts().items())
    lines.append(f"{source.name}: {len(notes.directives)} directives: {counts}")
    return lines


def _words(words: Sequence[str]) -> list[str]:
    """Return the arguments without the "--" that stands before a command line."""
    return [*words[1:]] if words[:1] == ["--"] else [*words]


def _wrong_usage(words: Sequence[str], form: str) -> str:
    """Return what is wrong with the arguments, "" for nothing."""
    if form and form not in FORMATS:
        return f"--from {form}: unknown (one of {', '.join(FORMATS)})"
    if not words:
        return "name a file, a URL, or a command line behind -- (try convert --help)"
    if len(words) > 1 and form not in OF_WORDS:
        return f"write options before the file: {words[1]}"
    return ""


def _source(words: Sequence[str], form: str) -> Source:
    """Return what the arguments name.  Raises ConversionError."""
    if form in OF_WORDS and (len(words) > 1 or form_of_words(words)):
        return Source("", " ".join(words), tuple(words))
    return read_source(words[0])


def _write(path: str, text: str) -> int:
    """Write a new file, for its owner alone because it may have passwords."""
    try:
        # Another file is never replaced: it may be the one that a daemon runs with.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        _say(f"{path} exists and is not replaced: move it away, or name another file with -o")
        return REFUSED
    except OSError as error:
        _say(f"{path}: {error.strerror}")
        return REFUSED
    return FINE


def _check(text: str) -> int:
    """Read the configuration as the daemon does; tell its errors, which are our mistakes."""
    problems = Problems()
    try:
        tree = parse_text(text.encode(), ConfigSource("converted"))
        check(read_config(tree, problems), problems)
    except ConfigError as error:
        lines = str(error).splitlines()
        mistakes = [line for line in lines if _UNSET not in line]
        for line in lines:
            _say(f"the result {'has a mistake' if line in mistakes else 'needs this'}: {line}")
        return INTERNAL if mistakes else FINE
    return FINE


def _say(text: str) -> None:
    print(f"netproxyctl: {escape(text)}", file=sys.stderr)
