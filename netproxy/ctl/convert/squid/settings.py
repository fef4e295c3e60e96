"""Tags of squid.conf that set one thing of the configuration each."""

from __future__ import annotations

import re

from netproxy.ctl.convert.squid.access import allowed_matches
from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.squid.acls import Acls
    from netproxy.ctl.convert.squid.lines import Line

_UNITS = {
    **{"ms": 0.001, "millisecond": 0.001, "second": 1, "minute": 60, "hour": 3600},
    **{"day": 86400, "week": 604800, "fortnight": 1209600, "month": 2592000, "year": 31536000},
}
_TIMES = {
    "connect_timeout": "timeouts.connect",
    "peer_connect_timeout": "timeouts.connect",
    "read_timeout": "timeouts.tcp_idle",
    "request_timeout": "timeouts.handshake",
    "request_start_timeout": "timeouts.handshake",
    "shutdown_lifetime": "timeouts.drain",
}
_LOG_FILE = "/var/log/netproxy/access.log"
_DELAY = ("delay_pools", "delay_class", "delay_access", "delay_parameters")


class Settings:
    """Carries tags that stand alone."""

    def __init__(self, draft: Draft, notes: Notes) -> None:
        self._draft, self._notes = draft, notes
        self._readers: dict[str, Callable[[Line], None]] = {
            **dict.fromkeys(_TIMES, self._time),
            **dict.fromkeys(("via", "forwarded_for"), self._field),
            "access_log": self._access_log,
            "client_ip_max_connections": self._client_connections,
            "dns_nameservers": self._name_servers,
            "dns_v4_first": self._prefer_ipv4,
            "workers": self._workers,
            "http_reply_access": self._reply_access,
        }

    def read(self, line: Line) -> bool:
        """Carry a tag; return whether there is a reader for it."""
        reader = self._readers.get(line.tag)
        if reader is not None:
            reader(line)
        return reader is not None

    def read_delay_pools(self, lines: Mapping[str, Sequence[Line]], acls: Acls) -> None:
        """Carry one delay pool of class 1 or 2 that is for everybody."""
        found = [line for tag in _DELAY for line in lines.get(tag, ())]
        if not lines.get("delay_class"):
            for line in found:
                self._notes.unneeded(line.directive, "there is no pool")
            return
        classes = [line.words[1:2] for line in lines.get("delay_class", ())]
        access = [line for line in lines.get("delay_access", ()) if len(line.words) > 1]
        is_general = classes in ([("1",)], [("2",)]) and [
            match.is_any for match, _ in allowed_matches(access, acls, self._notes, 1)
        ] == [True]
        rates = [_rate(line.words[1:]) for line in lines.get("delay_parameters", ())]
        if not is_general or len(rates) != 1 or rates[0] is None:
            advice = "limits of users and listeners have rates"
            for line in found:
                self._notes.lost(line.directive, "rates are not limited by rules", advice)
            return
        for entry in self._draft.listeners:
            limits = entry.settings.setdefault("limits", {})
            assert isinstance(limits, dict)
            limits |= rates[0]
            entry.comes_from(*(line.directive for line in lines["delay_parameters"]))
        for line in found:
            self._notes.changed(line.directive, "limits both directions, squid that to the client")

    def _time(self, line: Line) -> None:
        seconds = parse_time(line.words)
        if not seconds:
            self._notes.lost(line.directive, "is not a time")
            return
        self._notes.carried(line.directive)
        self._draft.put(_TIMES[line.tag], f"{seconds:g}s", line.directive)

    def _field(self, line: Line) -> None:
        is_kept = line.tag == "via"
        if (line.word == "on") is is_kept:
            self._notes.unneeded(line.directive, "is so")
        elif is_kept:
            self._notes.lost(line.directive, "RFC 9110 asks for Via, which netproxyd always adds")
        elif line.word in ("off", "delete", "transparent"):
            self._notes.unneeded(line.directive, "no X-Forwarded-For is added")
        else:
            why = "no X-Forwarded-For is added"
            self._notes.lost(line.directive, why, "send_proxy of an upstream names the client")

    def _access_log(self, line: Line) -> None:
        if line.word == "none":
            self._draft.put("log.access", False, line.directive)
            self._notes.carried(line.directive)
            return
        why = f"finished connections go to standard error; log.file: {_LOG_FILE} is a file for them"
        advice = "access_format: squid writes squid's form, for sarg and the like"
        self._notes.changed(line.directive, why, advice)

    def _client_connections(self, line: Line) -> None:
        if not line.word.isdigit() or not int(line.word):
            self._notes.unneeded(line.directive, "is no limit")
            return
        self._notes.carried(line.directive)
        limit_clients(self._draft, int(line.word), line)

    def _name_servers(self, line: Line) -> None:
        servers: list[Value] = [word for word in line.words if networks.is_host(word)]
        if len(servers) < len(line.words) or not servers:
            self._notes.lost(line.directive, "has a server that is not an address")
            return
        self._notes.carried(line.directive)
        self._draft.put("dns.servers", servers, line.directive)

    def _prefer_ipv4(self, line: Line) -> None:
        self._notes.carried(line.directive)
        if line.word == "on":
            self._draft.put("dns.prefer", "ipv4", line.directive)

    def _workers(self, line: Line) -> None:
        if line.word.isdigit() and 0 < int(line.word) <= WORKERS_LIMIT:
            self._draft.put("workers", int(line.word), line.directive)
            self._notes.carried(line.directive)
        else:
            self._notes.lost(line.directive, f"is not a number of processes up to {WORKERS_LIMIT}")

    def _reply_access(self, line: Line) -> None:
        if line.words[:1] == ("allow",):
            self._notes.unneeded(line.directive, "answers always pass")
        else:
            self._notes.lost(line.directive, "answers always pass")


WORKERS_LIMIT = 64
"""As many as `workers` of the configuration takes."""


def limit_clients(draft: Draft, number: int, line: Line) -> None:
    """Limit the connections of each client address."""
    for entry in draft.listeners:
        limits = entry.settings.setdefault("limits", {})
        assert isinstance(limits, dict)
        limits["connections_per_client"] = number
        entry.comes_from(line.directive)


def parse_time(words: Sequence[str]) -> float:
    """Return the seconds of "30 seconds" or "1.5 hours"; 0 for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", " ".join(words).lower())
    if not match:
        return 0
    unit = match[2].removesuffix("s") if match[2] not in ("ms", "") else match[2] or "second"
    return float(match[1]) * _UNITS.get(unit, 0)


def _rate(words: Sequence[str]) -> dict[str, Value] | None:
    """Return the limits of delay_parameters of class 1 or 2; None if they are not understood."""
    limits: dict[str, Value] = {}
    for key, word in zip(("rate", "rate_per_client"), words, strict=False):
        match = re.fullmatch(r"(-?\d+)/(-?\d+)|none", word)
        if not match:
            return None
        if match[1] and int(match[1]) > 0:
            limits[key] = f"{match[1]}B/s"
    return limits
