"""The server settings of danted.conf."""

from __future__ import annotations

from netproxy.ctl.convert.terms import networks
from netproxy.ctl.convert.dante.addresses import parse_address
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.dante.statements import Statement
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.notes import Directive, Notes

FOREVER = "3650d"
"""The longest time that the configuration takes."""
_UNNEEDED = {
    "user.privileged": "the service manager gives the daemon its user and capabilities",
    "user.notprivileged": "the service manager gives the daemon its user",
    "user.unprivileged": "the service manager gives the daemon its user",
    "user.libwrap": "nothing is asked of libwrap",
    "udp.connectdst": "is about speed",
    "internal.tcp.tcp_nodelay": "is on",
    "external.tcp.tcp_nodelay": "is on",
    "internal.socket.so_keepalive": "is on",
    "external.socket.so_keepalive": "is on",
}
_LOST = {
    "extension": ("BIND is answered once, as RFC 1928 says", ""),
    "srchost": ("the names of clients are not looked up", ""),
    "libwrap.hosts_access": (
        "netproxyd asks no libwrap",
        "write the networks of hosts.allow into clients",
    ),
    "internal.protocol": ("a listener has the family of its address", ""),
}
_TIMES = {
    "timeout.negotiate": "timeouts.handshake",
    "timeout.connect": "timeouts.connect",
    "timeout.io": "timeouts.tcp_idle",
    "timeout.io.tcp": "timeouts.tcp_idle",
    "timeout.tcp_fin_wait": "timeouts.half_close",
}
_HANDLED = ("internal", "external", "socksmethod", "method", "external.rotation")
_OF_THE_LOG = "netproxyd writes its log to standard error, which the service manager keeps"


class Settings:
    """The settings of a file: those that stand alone are noted at once."""

    def __init__(self, statements: Sequence[Statement], draft: Draft, notes: Notes) -> None:
        self._statements, self._draft, self._notes = statements, draft, notes
        for statement in statements:
            if statement.key not in _HANDLED:
                self._note(statement)
        self._bind = self._find_bind()

    def of(self, *keys: str) -> list[Statement]:
        """Return the statements with one of the keywords."""
        return [statement for statement in self._statements if statement.key in keys]

    def bind(self) -> tuple[str, Directive | None]:
        """Return what connections leave from, "" if the system chooses."""
        return self._bind

    def _note(self, statement: Statement) -> None:
        key, directive, notes = statement.key, statement.directive, self._notes
        if key in _UNNEEDED:
            notes.unneeded(directive, _UNNEEDED[key])
        elif key in _LOST:
            notes.lost(directive, *_LOST[key])
        elif key in _TIMES:
            self._time(statement)
        elif key in ("logoutput", "errorlog"):
            self._log(statement)
        elif key == "debug":
            is_on = statement.text.strip() not in ("", "0")
            if is_on:
                self._draft.put("log.level", "debug", directive)
            notes.carried(directive)
        elif key == "clientmethod":
            if set(statement.words) <= {"none"}:
                notes.carried(directive)
            else:
                notes.lost(directive, "clients log in by SOCKS alone")
        elif key == "compatibility":
            if statement.words == ("reuseaddr",):
                notes.unneeded(directive, "is on")
            else:
                notes.lost(directive, "the system chooses the ports of connections")
        elif key == "external.protocol":
            family = statement.text.strip()
            self._draft.put("dns.prefer", family, directive)
            notes.changed(directive, f"{family} is tried first, and the other family afterwards")
        elif key.startswith("cpu."):
            notes.changed(
                directive, "is for the service manager", "CPUSchedulingPolicy=, CPUAffinity="
            )
        else:
            notes.lost(directive, "is not supported")

    def _time(self, statement: Statement) -> None:
        path, number = _TIMES[statement.key], statement.text.strip()
        if not number.isdigit():
            self._notes.lost(statement.directive, "is not a number of seconds")
            return
        self._notes.carried(statement.directive)
        if number != "0":
            self._draft.put(path, f"{number}s", statement.directive)
        elif path in ("timeouts.tcp_idle", "timeouts.handshake"):
            # 0 is for ever; for the other times it means those of the system.
            self._draft.put(path, FOREVER, statement.directive)

    def _log(self, statement: Statement) -> None:
        if all(word.startswith(("std", "syslog")) for word in statement.words):
            self._notes.unneeded(statement.directive, _OF_THE_LOG)
        else:
            advice = "log.file is a file for finished connections"
            self._notes.changed(statement.directive, _OF_THE_LOG, advice)

    def _find_bind(self) -> tuple[str, Directive | None]:
        rotations = self.of("external.rotation")
        for statement in rotations:
            self._notes.carried(statement.directive)
        externals = self.of("external")
        for statement in externals:
            self._notes.carried(statement.directive)
        rotation = rotations[-1].text.strip() if rotations else "none"
        if rotation == "same-same":
            return "incoming", rotations[-1].directive
        if rotation == "route" or not externals:
            return "", None
        for statement in externals[1:]:
            why = "a listener has one address to bind: the first, as danted uses it"
            self._notes.unneeded(statement.directive, why)
        try:
            address = parse_address(externals[0].text)
        except ValueError as error:
            self._notes.lost(externals[0].directive, str(error))
            return "", None
        if address.interface is not None:
            return address.interface.name, externals[0].directive
        host = address.name or address.hosts[0]
        if not networks.is_network(host):
            self._notes.lost(externals[0].directive, "is not an address or an interface")
            return "", None
        # Every address is what the system chooses from.
        is_any = host in ("0.0.0.0", "::", *networks.EVERYBODY)
        return ("" if is_any else host), externals[0].directive
