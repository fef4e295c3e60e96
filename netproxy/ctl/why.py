"""What netproxyctl why prints: refusals and failures, each with what has decided.  Pure."""

from __future__ import annotations

import time

from netproxy.ctl.console import duration_text
from netproxy.observe.escaping import escape
from netproxy.typed import TYPE_CHECKING, Iterator

if TYPE_CHECKING:
    from netproxy.interfaces.answers import ExplainedIncident, WhyAnswer

_KINDS = {
    "refused": "refused",
    "login": "login refused",
    "failed": "failed",
    "ended": "ended by the daemon or by a fault",
}


def why_text(answer: WhyAnswer, about: str, number: int, now: float) -> str:
    """Return the last `number` incidents as paragraphs, the newest first.

    `now`: seconds since the epoch.
    """
    incidents = answer["incidents"]
    if not incidents:
        return escape(_nothing_text(answer, about))
    shown = list(reversed(incidents))[:number]
    paragraphs = ["\n".join(map(escape, _lines(row, now))) for row in shown]
    if len(incidents) > len(shown):
        paragraphs.append(f"{len(incidents) - len(shown)} more: -n {len(incidents)}")
    return "\n\n".join(paragraphs)


def _nothing_text(answer: WhyAnswer, about: str) -> str:
    last = f"the last {answer['remembered']} refusals and failures"
    if not answer["remembered"]:
        return "nothing was refused, and nothing has failed"
    return f"nothing of '{about}' is among {last}; to see what would happen: netproxyctl explain"


def _lines(row: ExplainedIncident, now: float) -> Iterator[str]:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["at"]))
    ago = duration_text(max(0.0, now - row["at"]))
    yield f"{row['id']}  {_KINDS.get(row['kind'], row['kind'])}, {at}, {ago} ago"
    user = f"{row['user']}@" if row["user"] else ""
    asked = row["asked"] or "(nothing yet)"
    seen = f" ({row['name']})" if row["name"] else ""
    listener = f" on {row['listener']}" if row["listener"] else ""
    network = f"{row['network']} " if row["network"] else ""
    yield f"  flow:     {network}{user}{row['client'] or '?'} -> {asked}{seen}{listener}"
    if row["rule"]:
        upstream = f", upstream {row['upstream']}" if row["upstream"] else ""
        yield f"  rule:     {row['rule']}{_in(row['rule_place'])}{upstream}"
    yield from verdict_lines(row)


def verdict_lines(row: ExplainedIncident) -> Iterator[str]:
    """Yield the lines about the reason of a failure: what has decided, and what to do."""
    took = f" after {row['seconds']:.3f} s" if row["seconds"] else ""
    yield f"  reason:   {row['reason']}{took}"
    if row["decided"] and row["decided"] != row["reason"]:
        yield f"  decided:  {row['decided']}{_in(row['place'])}"
    if row["outdated"]:
        yield "  (the configuration has been read again since then)"
    if row["hop"]:
        yield f"  hop:      {row['hop']}"
    for address, failure in row["tried"]:
        yield f"  tried:    {address}: {failure}"
    if row["addresses"] and not row["tried"]:
        yield f"  found:    {', '.join(row['addresses'])}"
    if row["advice"]:
        yield f"  to do:    {row['advice']}"


def _in(place: str) -> str:
    return f" ({place})" if place else ""
