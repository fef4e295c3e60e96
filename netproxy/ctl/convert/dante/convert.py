"""Converts danted.conf(5), the configuration of Dante's server."""

from __future__ import annotations

from netproxy.ctl.convert.terms import networks
from netproxy.ctl.convert.dante.addresses import DanteAddress, parse_address
from netproxy.ctl.convert.dante.logins import LOGINS, set_login
from netproxy.ctl.convert.dante.routes import Routes
from netproxy.ctl.convert.dante.rules import Context, add_rules
from netproxy.ctl.convert.dante.settings import Settings
from netproxy.ctl.convert.dante.statements import Block, Statement, parse
from netproxy.ctl.convert.draft.listeners import permit, tell_of_guarded_targets
from netproxy.typed import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.source import Source

DEFAULT_PORT = 1080
_NOBODY = "no client rule passes anybody: only this machine may connect"
_UNUSED = "has no listener to belong to: the file has no internal"


class _Internal(NamedTuple):
    """An address to listen on."""

    host: str
    port: int
    statement: Statement


def convert(source: Source, draft: Draft, notes: Notes) -> None:
    """Fill the draft with what the file says.  Raises ConversionError."""
    statements, blocks = parse(source, notes)
    settings = Settings(statements, draft, notes)
    internals = _internals(settings.of("internal"), notes)
    by_kind = {kind: [b for b in blocks if b.kind == kind] for kind in ("client", "socks", "route")}
    for block in blocks:
        if block.kind not in by_kind:
            for directive in (block.directive, *(inner.directive for inner in block.statements)):
                notes.lost(directive, f"{block.kind or 'such'} blocks are not supported")
    for internal in internals:
        _add_listener(internal, settings, by_kind["client"], draft, notes)
    for block in by_kind["client"]:
        _note_client_block(block, draft, notes)
    methods = _methods(settings, notes)
    if internals:
        context = _context(methods, settings, internals, draft, notes)
        permitted = add_rules(by_kind["socks"], Routes(by_kind["route"], context), context)
        _limit_networks(permitted, draft, notes)
        set_login(methods, by_kind["socks"], draft, notes)
    else:
        _note_unused([*by_kind["socks"], *by_kind["route"]], notes)
    tell_of_guarded_targets(draft, notes)


def _note_unused(blocks: Sequence[Block], notes: Notes) -> None:
    """Note the rules of a file without an internal address: danted does not start with it."""
    for block in blocks:
        for directive in (
            block.directive,
            *(statement.directive for statement in block.statements),
        ):
            notes.unneeded(directive, _UNUSED)


def _internals(statements: Sequence[Statement], notes: Notes) -> list[_Internal]:
    found: list[_Internal] = []
    for statement in statements:
        notes.carried(statement.directive)
        try:
            address = parse_address(statement.text)
        except ValueError as error:
            notes.lost(statement.directive, str(error))
            continue
        hosts = address.hosts or (address.name,)
        if address.interface is not None and not hosts[0]:
            why = f"this machine has no address at {address.interface.name}"
            notes.lost(statement.directive, why, "write the address in place of 127.0.0.1")
            hosts = ("127.0.0.1",)
        port = address.port_number or DEFAULT_PORT
        found += [_Internal(host, port, statement) for host in hosts]
    return found


def _methods(settings: Settings, notes: Notes) -> tuple[str, ...]:
    """Return the global methods of socks rules."""
    statements = settings.of("socksmethod", "method")
    for statement in statements:
        notes.carried(statement.directive)
        if unknown := set(statement.words) - {*LOGINS, "none"}:
            why = f"the method {', '.join(sorted(unknown))} is not supported"
            notes.lost(statement.directive, why)
    return tuple(word for statement in statements for word in statement.words)


def _context(
    methods: tuple[str, ...],
    settings: Settings,
    internals: Sequence[_Internal],
    draft: Draft,
    notes: Notes,
) -> Context:
    external, _ = settings.bind()
    # An interface may have addresses of both families, and so may the machine.
    is_address = networks.is_network(external)
    listed = [entry.settings.get("clients") for entry in draft.listeners]
    clients = [str(c) for names in listed if isinstance(names, list) for c in names]
    return Context(
        draft=draft,
        notes=notes,
        methods=methods,
        is_ipv4=all(":" not in internal.host for internal in internals),
        # A listener without the key lets everybody in.
        clients=tuple(c for c in clients if c[0] != "!") if all(listed) else (),
        leaves_ipv4=is_address and ":" not in external,
        external=external if is_address else "",
    )


# -- listeners


def _add_listener(
    internal: _Internal, settings: Settings, blocks: Sequence[Block], draft: Draft, notes: Notes
) -> None:
    """Add a listener, with the client rules about its address, in their order."""
    values: dict[str, Value] = {"protocol": "socks5"}
    values["listen"] = networks.listen_text(internal.host, internal.port)
    entry = draft.listener(values, internal.statement.directive)
    bind, origin = settings.bind()
    if bind:
        values["bind"] = bind
        entry.comes_from(origin)
    rules: list[tuple[bool, str]] = []
    for block in blocks:
        hosts = _clients_of(block, internal.host, notes)
        if hosts:
            rules += [(block.passes, host) for host in hosts]
            entry.comes_from(block.directive)
    clients = networks.first_match(rules)
    if clients is None:
        notes.changed(None, _NOBODY)
    permit(entry, ["127.0.0.1"] if clients is None else clients)


def _clients_of(block: Block, host: str, notes: Notes) -> Sequence[str]:
    """Return the networks that a client rule is about, at a listener; () for none."""
    try:
        sources, accepted = (
            parse_address(found[-1].text) if (found := block.all(key)) else DanteAddress()
            for key in ("from", "to")
        )
    except ValueError as error:
        notes.lost(block.directive, str(error))
        return ()
    if sources.name or accepted.name:
        why = "clients and listeners are known by their addresses, not by names"
        notes.lost(block.directive, why, "write their networks into clients")
        return ()
    if sources.ports:
        notes.changed(block.directive, "the ports of clients are not compared")
    is_any = not accepted.hosts or bool(set(accepted.hosts) & set(networks.EVERYBODY))
    if not is_any and host in ("0.0.0.0", "::"):
        why = "is about one address of a listener that has all"
        notes.lost(block.directive, why, "write a listener for this address")
        return ()
    if not is_any and networks.is_network(host) and not networks.covers(accepted.hosts, host):
        return ()
    return sources.hosts or networks.EVERYBODY


def _note_client_block(block: Block, draft: Draft, notes: Notes) -> None:
    notes.carried(block.directive)
    for statement in block.statements:
        key, directive = statement.key, statement.directive
        if key in ("from", "to", "protocol"):
            notes.carried(directive)
        elif key == "log":
            notes.unneeded(directive, "records have every flow, refused ones too")
        elif key in ("clientmethod", "method", "socksmethod") and set(statement.words) == {"none"}:
            notes.carried(directive)
        elif key == "session.max" and block.passes and statement.text.isdigit():
            for entry in draft.listeners:
                entry.settings["limits"] = {"connections": int(statement.text)}
                entry.comes_from(directive)
            notes.changed(directive, "counts for the listener, whatever the rule")
        else:
            notes.lost(directive, "is not supported for clients")


def _limit_networks(permitted: set[str], draft: Draft, notes: Notes) -> None:
    """Take UDP away from the listeners if no rule permits it."""
    if "udp" in permitted:
        return
    for entry in draft.listeners:
        entry.settings["network"] = ["tcp"]
    if permitted:
        why = "no rule passes udpassociate with its udpreply: the listeners have no UDP"
        notes.changed(None, why)
