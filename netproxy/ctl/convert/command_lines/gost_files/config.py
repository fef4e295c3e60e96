"""Reads the configuration files of gost: those of version 3 (YAML, JSON), and of version 2 (JSON).

Services, and the nodes of chains, become the nodes that -L and -F would be, with the lists that
they refer to as parameters.
"""

from __future__ import annotations

import re

from netproxy.ctl.convert.command_lines.gost.chain import REFUSED
from netproxy.ctl.convert.command_lines.gost.nodes import Node
from netproxy.ctl.convert.command_lines.gost.options import note_option
from netproxy.ctl.convert.command_lines.gost_files.references import References
from netproxy.ctl.convert.command_lines.gost_files.tree import Tree, read_tree
from netproxy.ctl.convert.draft.draft import BLOCKED
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.source import Source

# Listeners that are TCP or UDP themselves: the handler says what is spoken.
_PLAIN = ("", "tcp", "udp", "red", "redu", "redir", "redirect", "rtcp", "rudp", "dns", "virtual")
_GROUP = "a chain is named by a service: a group of chains is a group of upstreams"
_RECORDS = "netproxyd counts and records all flows"
_LOST = {
    **dict.fromkeys(("recorders", "recorder", "observers", "observer", "loggers"), _RECORDS),
    **dict.fromkeys(("routers", "router", "ingresses", "sds"), "belongs to tunnels of gost"),
    **dict.fromkeys(("quotas",), "quotas are those of users (users.NAME.limits.quota)"),
    **dict.fromkeys(("rewriters",), "no content is changed"),
    **dict.fromkeys(("plugin", "redis", "http"), "lists are in files, or behind HTTPS"),
    **dict.fromkeys(("api",), "netproxyctl uses the control socket"),
    **dict.fromkeys(("probe",), "health_check of a group checks its members"),
    **dict.fromkeys(("matcher", "filter"), "rules lead by names: a node is not chosen by them"),
    **dict.fromkeys(("chainGroup",), _GROUP),
    "header": "no field of a message is changed",
    "nameservers": "write it beside the server in dns.servers",
    "forwarder": "a listener has one target: the first",
    "metrics": "its path is /metrics; metrics_token guards it",
    "backup": "balance: failover asks the members in their order",
}
_UNNEEDED = {
    **dict.fromkeys(("name", "names"), "is a name alone"),
    **dict.fromkeys(("output", "format", "rotation", "profiling"), "the service manager does this"),
    **dict.fromkeys(("reload",), "netproxyctl reload reads files again"),
    **dict.fromkeys(("validity", "commonName", "organization"), "openssl makes certificates"),
    **dict.fromkeys(("Retries", "retries"), "netproxyd has a fixed value that suits"),
    **dict.fromkeys(("type",), "is so"),
    **dict.fromkeys(
        ("bypasses", "admissions", "hosts", "hops", "chains", "resolvers", "authers")
        + ("limiters", "climiters", "rlimiters", "tls", "whitelist"),
        "nothing that is carried uses it",
    ),
}


class Part(NamedTuple):
    """Services with one chain."""

    services: list[Node]
    chain: list[Node]


def is_config(source: Source) -> bool:
    """Return whether a text is a file of configuration, rather than commands."""
    text = source.text.lstrip()
    is_compose = re.search(r"(?m)^\s+image:", text) is not None
    return not source.words and (
        text.startswith("{") or (re.search(r"(?m)^services:", text) is not None and not is_compose)
    )


class File(NamedTuple):
    """A file of configuration that has been read."""

    tree: Tree
    parts: list[Part]


def read_config(source: Source, draft: Draft, notes: Notes) -> File:
    """Return the services of a file with their chains.  Raises ConversionError."""
    tree = read_tree(source, notes)
    if "ServeNodes" in source.text:
        return File(tree, _Version2(tree, notes).parts())
    return File(tree, _Version3(tree, source, draft, notes).parts())


def note_rest(tree: Tree, notes: Notes) -> None:
    """Note the texts of a file that nothing has used."""
    for _, directive in tree.leaves():
        if not notes.is_noted(directive):
            _note(directive, notes)


def _note(directive: Directive, notes: Notes) -> None:
    """Note a text that nothing has used."""
    path = directive.text.partition(":")[0].split(".")
    for key in reversed(path):
        if key in _LOST:
            notes.lost(directive, _LOST[key])
            return
        if key in _UNNEEDED:
            notes.unneeded(directive, _UNNEEDED[key])
            return
    notes.lost(directive, "is not a key that is carried")


class _Version2:
    """ServeNodes and ChainNodes, which are as -L and -F."""

    def __init__(self, tree: Tree, notes: Notes) -> None:
        self._tree, self._notes = tree, notes

    def parts(self) -> list[Part]:
        routes = [self._tree, *self._tree.elements("Routes")]
        keys = ("ServeNodes", "ChainNodes")
        return [Part(*(self._nodes(tree, key) for key in keys)) for tree in routes]

    def _nodes(self, tree: Tree, key: str) -> list[Node]:
        leaves = list(tree.inner(key).leaves())
        return [Node(str(leaf.value), directive, self._notes) for leaf, directive in leaves]


class _Version3:
    """Services, chains, and the lists that they refer to."""

    def __init__(self, tree: Tree, source: Source, draft: Draft, notes: Notes) -> None:
        self._tree, self._draft, self._notes = tree, draft, notes
        self._references = References(tree, source, notes)
        self._chains = {chain.text("name"): self._chain(chain) for chain in tree.elements("chains")}

    def parts(self) -> list[Part]:
        """Return the services, each with its chain."""
        self._settings()
        parts = []
        for service in self._tree.elements("services"):
            node = self._service(service)
            if node is not None:
                parts.append(Part([node], self._chain_of(service)))
        return parts

    def _chain_of(self, service: Tree) -> list[Node]:
        """Return the chain that a service names; one that refuses all if it is not known."""
        for part in ("handler", "listener"):
            if (group := service.directive(part, "chainGroup")) is not None:
                self._notes.lost(group, _GROUP, BLOCKED)
                return [Node(f"{REFUSED}://", group, self._notes)]
        name = service.text("handler", "chain") or service.text("listener", "chain")
        directive = service.directive("handler", "chain") or service.directive("listener", "chain")
        if name not in self._chains and directive is not None:
            self._notes.lost(directive, "the file has no chain of this name", BLOCKED)
            return [Node(f"{REFUSED}://", directive, self._notes)]
        return self._chains.get(name, [])

    def _settings(self) -> None:
        if level := self._tree.text("log", "level"):
            known = {"trace": "debug", "warn": "warning", "fatal": "error", "panic": "error"}
            level = known.get(level, level)
            if level in ("debug", "info", "warning", "error"):
                self._draft.put("log.level", level, self._tree.directive("log", "level"))
        directive = self._tree.directive("metrics", "addr")
        if directive is not None:
            login = "x@" if self._tree.inner("metrics", "auth").keys() else ""
            address = self._tree.inner("metrics", "addr").node
            value = str(address.value) if address is not None else ""
            note_option("metrics", login + value, directive, self._draft, self._notes)

    def _service(self, tree: Tree) -> Node | None:
        """Return the node that -L would be."""
        directive = tree.directive("addr") or tree.directive()
        if directive is None:
            return None
        handler, listener = tree.text("handler", "type"), tree.text("listener", "type")
        targets = ",".join(part.text("addr") for part in tree.elements("forwarder", "nodes"))
        scheme = _scheme(handler or "auto", listener)
        text = f"{scheme}://{tree.text('addr')}{f'/{targets}' if targets else ''}"
        node = Node(text, directive, self._notes)
        node.login = _login(tree.inner("handler", "auth")) or _login(tree.inner("listener", "auth"))
        node.users = self._references.users(tree.inner("handler"), tree.inner("listener"))
        for path in (("listener", "metadata"), ("handler", "metadata"), ("metadata",)):
            self._put_all(node, tree.inner(*path), path[0])
        self._put_tls(node, tree.inner("listener", "tls"))
        self._put_selector(node, tree.inner("forwarder"))
        if (servers := tree.directive("handler", "dns")) is not None:
            node.put("dns", tree.text("handler", "dns"), servers)
        self._put_common(node, tree)
        self._references.put_limits(node, tree)
        self._references.put_list(node, "admission", tree, guards=True)
        self._references.put_list(node, "bypass", tree, guards=True)
        return node

    def _chain(self, tree: Tree) -> list[Node]:
        """Return the nodes that -F would be, one for each hop."""
        known = {hop.text("name"): hop for hop in self._tree.elements("hops")}
        hops = []
        for hop in tree.elements("hops"):
            if not hop.elements("nodes"):
                hop = known.get(hop.text("name"), hop)
            nodes = [node for part in hop.elements("nodes") if (node := self._node(part))]
            if not nodes:
                continue
            first, *first.others = nodes
            self._put_common(first, hop)
            self._references.put_list(first, "bypass", hop, guards=False)
            self._put_selector(first, hop)
            hops.append(first)
        return hops

    def _node(self, tree: Tree) -> Node | None:
        directive = tree.directive("addr") or tree.directive()
        if directive is None:
            return None
        connector, dialer = tree.text("connector", "type"), tree.text("dialer", "type")
        text = f"{_scheme(connector or 'http', dialer)}://{tree.text('addr')}"
        node = Node(text, directive, self._notes)
        node.login = _login(tree.inner("connector", "auth")) or _login(tree.inner("dialer", "auth"))
        for path in (("connector", "metadata"), ("dialer", "metadata"), ("metadata",)):
            self._put_all(node, tree.inner(*path), "")
        self._put_tls(node, tree.inner("dialer", "tls"))
        self._put_common(node, tree)
        self._references.put_list(node, "bypass", tree, guards=False)
        return node

    # -- parameters

    def _put_all(self, node: Node, tree: Tree, scope: str) -> None:
        for key in tree.keys():
            directive = tree.directive(key)
            if directive is not None:
                is_scoped = scope == "handler" and key == "proxyProtocol"
                value = ",".join(str(leaf.value) for leaf, _ in tree.inner(key).leaves())
                node.put(f"handler.{key}" if is_scoped else key, value, directive)

    def _put_tls(self, node: Node, tree: Tree) -> None:
        self._put_all(node, tree, "")
        if not tree.keys() and node.transport == "tls":
            self._put_all(node, self._tree.inner("tls"), "")

    def _put_selector(self, node: Node, tree: Tree) -> None:
        self._put_all(node, tree.inner("selector"), "")

    def _put_common(self, node: Node, tree: Tree) -> None:
        """Add what services, hops and nodes have in common."""
        for key, path in (("interface", ("interface",)), ("so_mark", ("sockopts", "mark"))):
            directive = tree.directive(*path)
            if directive is not None:
                node.put(key, tree.text(*path), directive)
        self._references.put_names(node, tree)


def _scheme(first: str, second: str) -> str:
    return first if second in _PLAIN or second == first else f"{first}+{second}"


def _login(tree: Tree) -> tuple[str, str] | None:
    name = tree.text("username")
    return (name, tree.text("password")) if name else None
