"""The routes of danted.conf: the paths that connections take, direct or through other proxies.

If there are routes, what none of them leads is refused.  Through proxies danted leads CONNECT
alone; a route that is direct is for other commands if it names them.
"""

from __future__ import annotations

from netproxy.ctl.convert.terms.conditions import Match, both
from netproxy.ctl.convert.dante.addresses import DanteAddress, parse_address
from netproxy.ctl.convert.dante.rules import COMMANDS, clients_of, targets_of
from netproxy.ctl.convert.draft.draft import Proxy, add_proxy
from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.dante.rules import Context
    from netproxy.ctl.convert.dante.statements import Block
    from netproxy.ctl.convert.notes import Directive

_CARRIED = ("from", "to", "via", "command", "protocol", "proxyprotocol")
_LOGIN = "danted passes on the name and the password of its client"
_SCHEMES = {"http": "http", "http_v1.0": "http", "socks_v4": "socks4", "socks_v5": "socks5"}
_ORDER = ("direct", "socks4", "socks5", "http")
"""The routes of one kind are looked at before those of the next."""


class Route(NamedTuple):
    """One route."""

    directive: Directive
    match: Match
    scheme: str
    """One of _ORDER."""
    via: DanteAddress
    commands: tuple[str, ...]
    """What it is for: some of dante.rules.ALL."""


class Routes:
    """The routes of a file."""

    def __init__(self, blocks: Sequence[Block], context: Context) -> None:
        self._context = context
        routes = [route for block in blocks if (route := self._read(block))]
        self._routes = sorted(routes, key=_rank)

    def __bool__(self) -> bool:
        """Return whether there are routes."""
        return bool(self._routes)

    def leading(self, match: Match) -> Iterator[tuple[Match, str, Route]]:
        """Yield what of the flows that match takes a route, its upstream and the route."""
        for route in self._routes:
            led = both(match, route.match)
            if led is not None:
                yield led, self._upstream(route, led), route

    def _upstream(self, route: Route, match: Match) -> str:
        if route.scheme == "direct":
            return "direct"
        host = route.via.name or (route.via.hosts or ("",))[0]
        # A rule that looks at addresses has the name looked up here; else the proxy does it.
        suffix = {"socks5": "h", "socks4": "a"}.get(route.scheme, "")
        scheme = route.scheme if match.looks_at_target else route.scheme + suffix
        proxy = Proxy(scheme, host, route.via.port_number)
        return add_proxy(self._context.draft, self._context.notes, proxy, route.directive)

    def _read(self, block: Block) -> Route | None:
        """Return a route; None if it cannot be said."""
        notes = self._context.notes
        self._note_statements(block)
        try:
            source, target, via = (
                parse_address(words[-1].text) if (words := block.all(key)) else DanteAddress()
                for key in ("from", "to", "via")
            )
        except ValueError as error:
            notes.lost(block.directive, str(error))
            return None
        if source.name:
            notes.lost(block.directive, "clients are known by their addresses, not by names")
            return None
        protocols = [_SCHEMES[word] for word in block.words("proxyprotocol") if word in _SCHEMES]
        scheme = "socks5" if "socks5" in protocols or not protocols else protocols[0]
        asked = [COMMANDS[word] for word in block.words("command") if word in COMMANDS]
        commands = tuple(asked or ("connect",))
        if via.name == "direct":
            scheme = "direct"
        elif set(commands) != {"connect"}:
            notes.changed(block.directive, "danted leads nothing but CONNECT through a proxy")
            commands = ("connect",) if "connect" in commands else ()
        reached = targets_of(target, self._context)
        if not reached.is_any:
            # Danted looks for the route of UDP ASSOCIATE, which names no target.
            commands = tuple(command for command in commands if command != "udp")
        match = both(clients_of(source, self._context), reached)
        return Route(block.directive, match or Match(), scheme, via, commands)

    def _note_statements(self, block: Block) -> None:
        notes = self._context.notes
        notes.carried(block.directive)
        for statement in block.statements:
            if statement.key in _CARRIED:
                notes.carried(statement.directive)
            elif statement.key not in ("method", "socksmethod"):
                notes.lost(statement.directive, "is not supported for a route")
            elif set(statement.words) - {"none"}:
                advice = "write user and password into the upstream's URL"
                notes.lost(statement.directive, _LOGIN, advice)
            else:
                notes.carried(statement.directive)


def _rank(route: Route) -> int:
    return _ORDER.index(route.scheme)
