"""The socks rules and routes of danted.conf, as rules of the configuration.

Dante asks its rules twice for datagrams and for BIND: about the request, and about what comes
back (udpreply, bindreply), whose `from` is the remote end.  Here one rule looks at both.
"""

from __future__ import annotations

from netproxy.ctl.convert.terms import networks
from netproxy.ctl.convert.draft.draft import is_user_name
from netproxy.ctl.convert.terms.conditions import ANY, CannotCombine, Match, both, covers, wanting
from netproxy.ctl.convert.dante.addresses import LAST, DanteAddress, parse_address
from netproxy.ctl.convert.dante.logins import LOGINS
from netproxy.ctl.convert.terms.interfaces import LOOPBACK
from netproxy.ctl.convert.draft.rule_list import RuleList
from netproxy.typed import TYPE_CHECKING, Iterable, Iterator, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.dante.routes import Routes
    from netproxy.ctl.convert.dante.statements import Block, Statement
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.notes import Notes

COMMANDS = {"connect": "connect", "bind": "bind", "udpassociate": "udp"}
_REPLIES = {"udp": "udpreply", "bind": "bindreply"}
ALL = ("connect", "bind", "udp")
_WITHOUT_MEANING = {
    "log": "records have every flow",
    "proxyprotocol": "listeners speak SOCKS4 and SOCKS5",
    **dict.fromkeys(("from", "to", "command", "protocol", "user", "socksmethod", "method"), ""),
}
_UNSUPPORTED = {
    "group": "groups of the system are not known",
    "libwrap": "netproxyd asks no libwrap",
    "bandwidth": "rates belong to users and listeners, not to rules (limits of users)",
    "redirect": "addresses are not rewritten",
    "bsdauth.stylename": "netproxyd asks auth.command",
    "pam.servicename": "the PAM service is that of the program in auth.command",
}
_NAMES = "names match what clients ask for by name; danted compares their addresses as well"
_BY_NAME = "clients are known by their addresses, not by names"


class Context(NamedTuple):
    """What the rules need of the rest of the file."""

    draft: Draft
    notes: Notes
    methods: tuple[str, ...]
    """The global socksmethod."""
    is_ipv4: bool
    """True if clients come over IPv4 alone."""
    clients: tuple[str, ...]
    """The networks that any listener lets in."""
    leaves_ipv4: bool
    """True if targets are reached over IPv4 alone."""
    external: str
    """The address that connections leave from; "" if it is not known."""


class _Rule(NamedTuple):
    """A socks rule, for requests and for replies."""

    block: Block
    commands: frozenset[str]
    """As the file names them, those for replies as well."""
    requester: Match
    """The client and the user of a request."""
    target: Match
    destination: DanteAddress
    reply: Match
    """The target that answers, and the client that gets the answer."""


class _Outcome(NamedTuple):
    commands: tuple[str, ...]
    match: Match
    via: str


def add_rules(blocks: Sequence[Block], routes: Routes, context: Context) -> set[str]:
    """Add the rules, and a last one that refuses everything else.

    Return the commands, of ALL, that any rule permits.
    """
    rules = [rule for block in blocks if (rule := _read_rule(block, context))]
    added = RuleList(context.draft, context.clients)
    permitted: set[str] = set()
    for rule in rules:
        try:
            outcomes = list(_merged(_outcomes(rule, rules, context)))
        except CannotCombine as error:
            context.notes.lost(rule.block.directive, str(error))
            continue
        for outcome in outcomes:
            origin, is_led = rule.block.directive, bool(routes) and outcome.via == "direct"
            for routed, via, route in routes.leading(outcome.match) if is_led else ():
                commands = tuple(c for c in outcome.commands if c in route.commands)
                if commands:
                    added.add(with_commands(routed, commands), via, origin, route.directive)
                    permitted |= set(commands)
            # With routes, what no route leads is refused.
            match = with_commands(outcome.match, outcome.commands)
            last = added.add(match, "block" if is_led else outcome.via, origin)
            if last is not None and last.settings["via"] == "direct":
                permitted |= set(outcome.commands)
    added.close("block", "danted refuses everything else")
    return permitted


def _outcomes(rule: _Rule, rules: Sequence[_Rule], context: Context) -> Iterator[_Outcome]:
    """Yield what a rule decides, for each command on its own."""
    whole = both(rule.requester, rule.target)
    if whole is not None and "connect" in rule.commands:
        yield _Outcome(("connect",), whole, "direct" if rule.block.passes else "block")
    requests = {"udp": whole, "bind": rule.requester if _binds(rule, context) else None}
    for command, match in requests.items():
        asked = "udpassociate" if command == "udp" else command
        if match is None or asked not in rule.commands:
            continue
        if rule.block.passes:
            yield from _answered(command, match, rules)
        else:
            yield _Outcome((command,), match, "block")


def _answered(command: str, match: Match, rules: Sequence[_Rule]) -> Iterator[_Outcome]:
    """Yield what is decided about requests that are permitted: their answers may not be."""
    earlier: list[Match] = []
    for reply in (other for other in rules if _REPLIES[command] in other.commands):
        gated = both(match, reply.reply)
        if gated is None or any(covers(before, gated) for before in earlier):
            continue
        earlier.append(gated)
        yield _Outcome((command,), gated, "direct" if reply.block.passes else "block")
        if gated == match:
            return
    yield _Outcome((command,), match, "block")


def _binds(rule: _Rule, context: Context) -> bool:
    """Return whether a rule may match BIND, whose `to` is the address that danted listens on."""
    ports, hosts = rule.destination.ports, rule.destination.hosts
    if ports and not networks.intersect_ports(ports, [f"1024-{LAST}"]):
        return False
    return not rule.destination.name and (
        not hosts or not context.external or bool(networks.intersect([context.external], hosts))
    )


def _merged(outcomes: Iterable[_Outcome]) -> Iterator[_Outcome]:
    """Join outcomes that differ in their commands alone."""
    joined: dict[str, _Outcome] = {}
    kept: list[_Outcome] = list(outcomes)
    # Only if each command has one outcome: several of them are in an order.
    if len({outcome.commands for outcome in kept}) < len(kept):
        yield from kept
        return
    for outcome in kept:
        key = repr((outcome.match, outcome.via))
        earlier = joined.get(key)
        commands = (earlier.commands if earlier else ()) + outcome.commands
        joined[key] = outcome._replace(commands=commands)
    yield from joined.values()


def with_commands(match: Match, commands: Sequence[str]) -> Match:
    """Return the match of these commands alone."""
    if set(commands) == set(ALL):
        return match
    return Match({"command": tuple(commands), **match.wanted}, match.unwanted)


# -- reading rules


def _read_rule(block: Block, context: Context) -> _Rule | None:
    """Return a rule; None if it can never match, or cannot be said."""
    notes = context.notes
    notes.carried(block.directive)
    sayable = all([_note_statement(statement, block, notes) for statement in block.statements])
    requester = _requester(block, context)
    try:
        source, destination = _address(block, "from"), _address(block, "to")
    except ValueError as error:
        notes.lost(block.directive, str(error))
        return None
    if source.name:
        notes.lost(block.directive, _BY_NAME, "write their networks")
        return None
    if destination.name:
        notes.changed(block.directive, _NAMES)
    if requester is None or not sayable:
        return None
    if source.ports and set(_commands(block)) & set(COMMANDS):
        notes.changed(block.directive, "the ports of clients are not compared")
    client = both(requester, clients_of(source, context))
    if client is None:
        return None
    target, sender = (targets_of(address, context) for address in (destination, source))
    if not block.passes and destination.interface == LOOPBACK:
        # The interface has one address of its network, but all lead to this machine.
        target = Match({**target.wanted, "ip": LOOPBACK.networks})
    reply = Match({**sender.wanted, **clients_of(destination, context).wanted})
    commands = frozenset(_commands(block))
    if destination.ports or destination.name:
        # The port that a client gets its answers at is one of many.
        commands -= set(_REPLIES.values())
    return _Rule(block, commands, client, target, destination, reply)


def _note_statement(statement: Statement, block: Block, notes: Notes) -> bool:
    """Note a statement of a rule; return whether the rule can be said with it."""
    key, directive = statement.key, statement.directive
    if _WITHOUT_MEANING.get(key):
        notes.unneeded(directive, _WITHOUT_MEANING[key])
    elif key in _WITHOUT_MEANING:
        notes.carried(directive)
    elif key in _UNSUPPORTED:
        notes.lost(directive, _UNSUPPORTED[key])
    elif key.startswith("timeout."):
        notes.lost(directive, "times belong to all flows (timeouts)")
    elif key.startswith("session."):
        notes.lost(directive, "sessions are limited for users and listeners, not for rules")
    elif key == "udp.portrange":
        notes.lost(directive, "is for listeners", "write udp: {relay_port: FIRST-LAST}")
    else:
        notes.lost(directive, "is not supported")
    # A condition that cannot be said: the rule would match more than it should.
    return key != "group" and not (key == "redirect" and block.passes)


def _commands(block: Block) -> list[str]:
    """Return the commands that a rule is for."""
    protocols = block.words("protocol") or ["tcp", "udp"]
    valid = [*(["connect", "bind", "bindreply"] if "tcp" in protocols else [])]
    valid += ["udpassociate", "udpreply"] if "udp" in protocols else []
    asked = block.words("command")
    return [command for command in valid if command in asked] if asked else valid


def _requester(block: Block, context: Context) -> Match | None:
    """Return the condition about the login; None if no login can match."""
    methods = block.words("socksmethod", "method") or list(context.methods)
    # Replies need no login.
    if not set(_commands(block)) & set(COMMANDS):
        return ANY
    users = [word for statement in block.all("user") for word in statement.words]
    if not all(map(is_user_name, users)):
        context.notes.lost(block.directive, "names a user with a name that no user can have")
        return None
    if users:
        return wanting("user", users)
    if "none" in methods:
        return ANY
    if set(methods) & set(LOGINS):
        return wanting("user", ["*"])
    others = ", ".join(methods) or "no socksmethod"
    context.notes.changed(block.directive, f"matches nobody: {others}")
    return None


def _address(block: Block, key: str) -> DanteAddress:
    """Return the address of a keyword.  Raises ValueError."""
    statements = block.all(key)
    return parse_address(statements[-1].text) if statements else DanteAddress()


def clients_of(address: DanteAddress, context: Context) -> Match:
    """Return the match of clients at an address."""
    everybody = context.is_ipv4 and address.hosts == ("0.0.0.0/0",)
    admitted = context.clients and all(networks.covers(address.hosts, c) for c in context.clients)
    if not address.hosts or everybody or admitted:
        return ANY
    return wanting("client", address.hosts)


def targets_of(address: DanteAddress, context: Context) -> Match:
    """Return the match of targets at an address."""
    if context.leaves_ipv4 and address.hosts == ("0.0.0.0/0",):
        address = address._replace(hosts=())
    return _endpoint(address)


def _endpoint(address: DanteAddress) -> Match:
    wanted: dict[str, tuple[str, ...]] = {}
    if address.name:
        wanted["domain"] = (address.name,)
    elif address.hosts:
        wanted["ip"] = address.hosts
    if address.ports:
        wanted["port"] = address.ports
    return Match(wanted)
