"""Answers why something was refused or has failed, from the incidents that are remembered.

Finds them by id, client or target; adds the place of what has decided and what to do.  Thread: that
of the client that asks.
"""

from __future__ import annotations

import re

from netproxy.admin.diagnosis.advice import advice
from netproxy.interfaces.fairness import client_key
from netproxy.observe.incidents import ENDED, FAILED, LIMIT
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.config.schema import Config
    from netproxy.interfaces.answers import ExplainedIncident, IncidentRow, WhyAnswer
    from netproxy.observe.incidents import Incidents

ANSWERED = 20
"""Incidents of one answer: the last ones."""
_RULE = re.compile(r"(?:dns\.)?rules\[([0-9]+)\]")
_USER = re.compile(r"users\.(.+?)(?:\.limits\.[a-z_.]+|\.expires|\.upstream|\.bind)?\Z")


def find(incidents: Incidents, about: str) -> list[IncidentRow]:
    """Return the last incidents with this id, or of this client or target, the newest last.

    With "" they are the last of all.
    """
    rows = incidents.rows()
    if of_id := [row for row in rows if row["id"] == about]:
        return of_id
    about = about.lower()
    if about.startswith("[") and about.endswith("]"):
        about = about[1:-1]
    return [row for row in rows if not about or about in _names(row)][-ANSWERED:]


def answer(rows: Sequence[IncidentRow], remembered: int, config: Config) -> WhyAnswer:
    """Return the answer to `why`, with what the configuration tells of each incident."""
    last = sorted(rows, key=_time)[-ANSWERED:]
    explained = [explain_incident(row, config) for row in last]
    return {"incidents": explained, "remembered": remembered, "limit": LIMIT}


def _names(row: IncidentRow) -> set[str]:
    """Return what somebody may ask for: the client and the target, with and without port."""
    asked = row["asked"].lower().rpartition(" ")[2]
    client = row["client"].lower()
    names = {client, _host(client), asked, _host(asked), row["name"].lower(), row["user"].lower()}
    names |= {client_key(_host(client))}
    for address, _ in row["tried"]:
        names |= {address, _host(address)}
    return names - {""}


def _host(text: str) -> str:
    """Return the host of "host:port", "[host]:port" or a host."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    host, colon, _ = text.rpartition(":")
    return host if colon and ":" not in host else text


def explain_incident(row: IncidentRow, config: Config) -> ExplainedIncident:
    """Return an incident with the places of what has decided, and what to do."""
    outdated = row["outdated"]
    place = "" if outdated else place_of(row["decided"], row["listener"], config)
    rule_place = "" if outdated else place_of(row["rule"], row["listener"], config)
    text = advice(row["reason"], row["decided"], row["kind"] in (FAILED, ENDED), row["hop"])
    return {**row, "place": place, "rule_place": rule_place, "advice": text}


def place_of(key: str, listener: str, config: Config) -> str:
    """Return where a key of the configuration is written, "file:line:column"; "" if unknown."""
    if match := _RULE.match(key):
        rules = config.dns.rules if key.startswith("dns.") else config.rules
        number = int(match[1])
        return rules[number].place if number < len(rules) else ""
    if (match := _USER.match(key)) and match[1] in config.users:
        return config.users[match[1]].place
    if key.startswith("destinations") and config.destinations is not None:
        return config.destinations.place
    if key.startswith(("clients", "limits.", "auth", "udp.", "listener")):
        of_listener = [item for item in config.listeners if item.name == listener]
        # All Places are equal; a plain text is not.
        return str(of_listener[0].place) if of_listener else ""
    return ""


def _time(row: IncidentRow) -> float:
    return row["at"]
