"""The rules of a draft, in their order, without those that could never match."""

from __future__ import annotations

from netproxy.ctl.convert.terms.conditions import ANY, Match, covers
from netproxy.ctl.convert.terms.networks import intersect
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Entry
    from netproxy.ctl.convert.notes import Directive

RULES_LIMIT = 1000
"""Rules of a configuration, as netproxy.config.sections.rules has it."""


class RuleList:
    """Adds rules to a draft."""

    def __init__(self, draft: Draft, clients: Sequence[str] = ()) -> None:
        """`clients`: the networks that may connect at all; () for everybody."""
        self._draft = draft
        self._clients = clients
        # The matches of rules that decide whatever the upstream.
        self._earlier: list[Match] = []

    @property
    def is_closed(self) -> bool:
        """True if a rule matches everything."""
        return any(match.is_any for match in self._earlier)

    def add(self, match: Match, via: str, *origins: Directive | None) -> Entry | None:
        """Add a rule and return it; None if an earlier one takes all of its flows."""
        if any(covers(earlier, match) for earlier in self._earlier):
            return None
        asked = match.wanted.get("client")
        if self._clients and asked and not intersect(asked, self._clients):
            return None
        self._earlier.append(match)
        return self._draft.rule(match.settings(via), *origins)

    def close(self, via: str, comment: str) -> None:
        """Add a rule for all flows that no rule decides."""
        entry = self.add(ANY, via)
        if entry is not None:
            entry.comments.append(comment)
