"""What becomes of each directive of a configuration that is converted, and why.

A Note is for people: it names the file, the line, the reason, and what to do.  Pure.
"""

from __future__ import annotations

from enum import Enum

from netproxy.typed import Iterator, NamedTuple

SHOWN_LIMIT = 72
"""Characters of a directive that comments and messages repeat: with its place it fits a line."""


class Kind(Enum):
    """What became of a directive."""

    CARRIED = "carried"
    """The configuration says the same."""
    UNNEEDED = "not needed"
    """The same holds without a setting, or the service manager does it."""
    CHANGED = "changed"
    """The configuration says the same, with a difference that the note names."""
    LOST = "not carried"
    """The configuration does not say it."""


_ORDER = tuple(Kind)


class Directive(NamedTuple):
    """One directive of the old configuration."""

    number: int
    """In the order of reading."""
    file: str
    line: int
    """From 1; 0 for what is on no line, such as a word of a command line."""
    text: str
    """The directive as it is written, without its secrets."""

    @property
    def place(self) -> str:
        """Where it is written: "danted.conf:12"."""
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def shown(self) -> str:
        """Its place and the beginning of its text."""
        text = " ".join(self.text.split())
        short = text if len(text) <= SHOWN_LIMIT else text[: SHOWN_LIMIT - 3] + "..."
        return f"{self.place}: {short}"


class Note(NamedTuple):
    """One thing to know about a directive."""

    directive: Directive | None
    """None for the configuration as a whole."""
    kind: Kind
    why: str
    advice: str = ""
    """What to do; "" for nothing."""


class Notes:
    """The directives of a conversion and the notes about them."""

    def __init__(self) -> None:
        self.directives: list[Directive] = []
        self.notes: list[Note] = []
        self._outcomes: dict[int, Kind] = {}

    def directive(self, file: str, line: int, text: str) -> Directive:
        """Count a directive and return it.  Its outcome must be noted later."""
        found = Directive(len(self.directives), file, line, text)
        self.directives.append(found)
        return found

    def carried(self, *directives: Directive) -> None:
        """Note that the configuration says the same as these directives."""
        for directive in directives:
            self._note(Note(directive, Kind.CARRIED, ""))

    def unneeded(self, directive: Directive, why: str) -> None:
        """Note that a directive needs no setting."""
        self._note(Note(directive, Kind.UNNEEDED, why))

    def changed(self, directive: Directive | None, why: str, advice: str = "") -> None:
        """Note a difference of what was carried."""
        self._note(Note(directive, Kind.CHANGED, why, advice))

    def lost(self, directive: Directive | None, why: str, advice: str = "") -> None:
        """Note what was not carried."""
        self._note(Note(directive, Kind.LOST, why, advice))

    def is_noted(self, directive: Directive) -> bool:
        """Return whether the outcome of a directive is known."""
        return directive.number in self._outcomes

    def outcome(self, directive: Directive) -> Kind:
        """Return the outcome of a directive: the worst that was noted."""
        return self._outcomes.get(directive.number, Kind.LOST)

    def counts(self) -> dict[Kind, int]:
        """Return how many directives have each outcome."""
        counts = dict.fromkeys(Kind, 0)
        for directive in self.directives:
            counts[self.outcome(directive)] += 1
        return counts

    def told(self) -> Iterator[Note]:
        """Yield the notes that people must know, in the order of the files."""
        unexplained = [
            Note(directive, Kind.LOST, "is not understood")
            for directive in self.directives
            if directive.number not in self._outcomes
        ]
        notes = [note for note in self.notes if note.kind in (Kind.CHANGED, Kind.LOST)]
        notes = list(dict.fromkeys(notes + unexplained))
        yield from sorted(notes, key=_position)

    def _note(self, note: Note) -> None:
        self.notes.append(note)
        if note.directive is not None:
            number = note.directive.number
            worst = max(note.kind, self._outcomes.get(number, note.kind), key=_ORDER.index)
            self._outcomes[number] = worst


def _position(note: Note) -> int:
    return note.directive.number if note.directive is not None else -1
