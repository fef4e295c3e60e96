"""Compares rules: finds out whether one rule admits every flow that another one does.

Pure, and careful: what cannot be compared, such as two expressions, is taken for different.
"""

from __future__ import annotations

from netproxy.interfaces.networks import IpNetwork
from netproxy.router.patterns import APEX, BELOW, KEYWORD, SUFFIX, DomainPattern
from netproxy.typed import Iterable, Iterator, Mapping, NamedTuple, Protocol, TypeVar

Scoped = TypeVar("Scoped")
"""A rule, or what else has conditions in an order."""
COMPARED_LIMIT = 300
"""Rules that each later rule is compared with: the time grows with the square of them."""


class ValueSet(Protocol):
    """The values of one condition."""

    def covers(self, other: ValueSet, /) -> bool:
        """Return whether all that the other set admits is admitted here."""


class Scope(NamedTuple):
    """The flows that a rule admits: conditions that must hold, and others that must not."""

    wanted: Mapping[str, ValueSet]
    """By what they look at, such as "port"."""
    unwanted: Mapping[str, ValueSet]

    def covers(self, other: Scope) -> bool:
        """Return whether this rule admits every flow that the other one admits."""
        return all(
            kind in other.wanted and values.covers(other.wanted[kind])
            for kind, values in self.wanted.items()
        ) and all(
            kind in other.unwanted and other.unwanted[kind].covers(values)
            for kind, values in self.unwanted.items()
        )


def unreachable(scopes: Iterable[tuple[Scoped, Scope]]) -> Iterator[tuple[Scoped, Scoped]]:
    """Yield each rule whose flows an earlier one takes all, with that one; in their order."""
    earlier: list[tuple[Scoped, Scope]] = []
    for scoped, scope in scopes:
        taken_by = next((other for other, outer in earlier if outer.covers(scope)), None)
        if taken_by is not None:
            yield scoped, taken_by
        elif len(earlier) < COMPARED_LIMIT or not (scope.wanted or scope.unwanted):
            earlier.append((scoped, scope))


class Words:
    """Words that must be equal: users, listeners, commands, networks tcp and udp."""

    def __init__(self, words: Iterable[str], every: str = "") -> None:
        """`every`: the word that stands for all words; "" for none."""
        self._words = frozenset(words)
        self._has_all = bool(every) and every in self._words

    def covers(self, other: ValueSet) -> bool:
        """Return whether all words of the other set are here."""
        return isinstance(other, Words) and (self._has_all or other._words <= self._words)


class Ranges:
    """Ranges of numbers: ports, or minutes of the week."""

    def __init__(self, ranges: Iterable[range]) -> None:
        self._ranges: list[range] = []
        for span in sorted(ranges, key=lambda span: span.start):
            last = self._ranges[-1] if self._ranges else range(-1, -1)
            if span.start <= last.stop:
                self._ranges[-1:] = [range(last.start, max(last.stop, span.stop))]
            else:
                self._ranges.append(span)

    def covers(self, other: ValueSet) -> bool:
        """Return whether each range of the other set is within one of these."""
        return isinstance(other, Ranges) and all(
            any(outer.start <= inner.start and inner.stop <= outer.stop for outer in self._ranges)
            for inner in other._ranges
        )


class Networks:
    """Networks, and the files and countries that stand for further ones."""

    def __init__(self, networks: Iterable[IpNetwork], sources: Iterable[str] = ()) -> None:
        self._networks = frozenset(networks)
        self._sources = frozenset(sources)

    def covers(self, other: ValueSet) -> bool:
        """Return whether each network of the other set is within one of these."""
        return (
            isinstance(other, Networks)
            and other._sources <= self._sources
            and all(map(self._has, other._networks))
        )

    def _has(self, inner: IpNetwork) -> bool:
        bits = inner.size * 8
        return any(
            IpNetwork(inner.size, inner.prefix >> wider, inner.shift + wider) in self._networks
            for wider in range(bits - inner.shift + 1)
        )


class Names:
    """Patterns of names, and the files with further ones."""

    def __init__(self, patterns: Iterable[DomainPattern], files: Iterable[str]) -> None:
        self._files = frozenset(files)
        self._patterns = tuple(dict.fromkeys(patterns))
        self._bits: dict[str, int] = {}
        """APEX and BELOW of each name."""
        for kind, text in self._patterns:
            if kind & SUFFIX:
                self._bits[text] = self._bits.get(text, 0) | kind
        self._keywords = tuple(text for kind, text in self._patterns if kind == KEYWORD)
        self._exact = frozenset(self._patterns)

    def covers(self, other: ValueSet) -> bool:
        """Return whether each pattern of the other set matches nothing that none here matches."""
        return (
            isinstance(other, Names)
            and other._files <= self._files
            and all(map(self._has, other._patterns))
        )

    def _has(self, pattern: DomainPattern) -> bool:
        if pattern in self._exact:
            return True
        kind, text = pattern
        if not kind & SUFFIX:
            return kind == KEYWORD and any(keyword in text for keyword in self._keywords)
        if any(keyword in text for keyword in self._keywords):
            return True
        bits = self._bits.get(text, 0)
        _, dot, parent = text.partition(".")
        while dot and not bits & SUFFIX == SUFFIX:
            if self._bits.get(parent, 0) & BELOW:
                bits |= APEX | BELOW
            _, dot, parent = parent.partition(".")
        return kind & bits == kind
