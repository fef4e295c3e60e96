"""The chain of gost: each -F is a hop, which may have several nodes."""

from __future__ import annotations

from netproxy.ctl.convert.command_lines import ssh, tls
from netproxy.ctl.convert.command_lines.gost import tags
from netproxy.ctl.convert.draft.draft import BLOCKED, Proxy
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.gost.nodes import Endpoint, Node
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Notes

_SCHEMES = {
    **{("http", False): "http", ("http", True): "https"},
    **{("socks5", False): "socks5h", ("socks5", True): "socks5h+tls"},
    ("socks4", False): "socks4a",
}
_NAMES = {"": "http", "auto": "http", "socks": "socks5", "socks4a": "socks4", "socks5h": "socks5"}
_DIRECT = ("direct", "virtual")
REFUSED = "refused"
"""The protocol of a node that stands for a chain which is not known; its maker notes why."""
BALANCES = {
    **{"": "round-robin", "round": "round-robin", "roundrobin": "round-robin"},
    **{"rand": "round-robin", "random": "round-robin", "fifo": "failover", "hash": "hash-client"},
    **{"parallel": "least-latency", "fastest": "least-latency"},
}
_DIFFERENT = {
    "rand": "the members take turns, rather than by chance",
    "random": "the members take turns, rather than by chance",
    "parallel": "the member that answered fastest is asked, rather than all at once",
}
_RESTS = "a member that fails rests for a second, then up to a minute"


class Chain:
    """The hops of a command, whose upstreams are added when they are first used."""

    def __init__(self, nodes: Sequence[Node], hops: Hops) -> None:
        self.nodes = nodes
        self._hops = hops
        self._names: list[str] = []

    def via(self, number: int) -> str:
        """Return the upstream that the first hops make; "direct" for none."""
        for node in self.nodes[len(self._names) : number]:
            self._names.append(self._hops.add(node))
        return self._hops.join(self._names[:number], self.nodes[:number])

    @property
    def whole(self) -> str:
        """The upstream of all hops."""
        return self.via(len(self.nodes))

    def without_hops(self) -> Chain:
        """Return a chain that leads directly to the target."""
        return Chain([], self._hops)


class Hops:
    """Adds the upstreams of hops."""

    def __init__(self, draft: Draft, notes: Notes, by_target: bool) -> None:
        self._draft, self._notes, self._by_target = draft, notes, by_target

    def add(self, node: Node) -> str:
        """Add the upstream of a hop and return its name."""
        draft, notes = self._draft, self._notes
        if node.others:
            return self._alternatives(node)
        if node.protocol == REFUSED:
            return "block"
        if node.protocol in _DIRECT:
            return _direct(node, draft, notes)
        protocol = _NAMES.get(node.protocol, node.protocol)
        if protocol == "sshd" or (protocol in ("forward", "direct") and node.transport == "ssh"):
            return _ssh(node, draft, notes)
        scheme = _SCHEMES.get((protocol, node.transport == "tls"), "")
        if not scheme or node.transport not in ("", "tcp", "tls"):
            return lose_upstream(node, notes)
        notes.carried(node.directive)
        options = _options(node)
        names = [self._proxy(node, end, scheme, options) for end in node.endpoints]
        _note_group(node, len(names))
        return self._group(node, names)

    def _alternatives(self, node: Node) -> str:
        """Return the upstream of a hop whose nodes are not alike."""
        others, node.others = node.others, []
        names = [self.add(other) for other in (node, *others)]
        node.others = others
        _note_group(node, len(names))
        # A node that cannot be carried is left out: the others do the same.
        return self._group(node, [name for name in names if name != "block"] or names[:1])

    def _group(self, node: Node, names: Sequence[str]) -> str:
        if len(names) < 2 or "block" in names:
            return "block" if "block" in names or not names else names[0]
        balance = BALANCES.get(node.text("strategy").lower(), "round-robin")
        if balance == "hash-client" and self._by_target:
            balance = "hash-target"
        members: list[Value] = [*names]
        group: dict[str, Value] = {"members": members, "balance": balance}
        return self._draft.upstream("group", group, node.directive)

    def join(self, names: Sequence[str], nodes: Sequence[Node]) -> str:
        """Return the upstream of several hops, one after the other."""
        if "block" in names:
            return "block"
        hops: list[Value] = [name for name in names if name != "direct"]
        if len(hops) < 2:
            return str(hops[0]) if hops else "direct"
        return self._draft.upstream("chain", hops, *(node.directive for node in nodes))

    def _proxy(self, node: Node, end: Endpoint, scheme: str, options: dict[str, Value]) -> str:
        draft, notes = self._draft, self._notes
        user, password = node.login or ("", "")
        if scheme == "socks4a" and password:
            notes.changed(node.directive, "SOCKS4 has no password")
            password = ""
        port = int(end.port) if end.port.isdigit() else 0
        try:
            url = Proxy(scheme, end.host or "127.0.0.1", port, user, password).url
        except ValueError as error:
            notes.lost(node.directive, f"the proxy cannot be an upstream: {error}", BLOCKED)
            return "block"
        value: Value = {"url": url, **options} if options else url
        name = draft.upstream(end.host or "localhost", value, node.directive)
        settings = options.get("tls")
        if isinstance(settings, dict) and settings.get("insecure"):
            comments = draft.upstreams[name].comments
            comments += [tls.UNVERIFIED] if tls.UNVERIFIED not in comments else []
        return name


def lose_upstream(node: Node, notes: Notes) -> str:
    """Note that a proxy cannot be an upstream."""
    why = tags.reason(node.protocol, node.transport)
    notes.lost(node.directive, why, tags.ADVICE.get(node.protocol, "") or BLOCKED)
    for key in node.rest():
        if key != "bypass":
            node.lost(key, tags.OF_TRANSPORT)
    return "block"


def _options(node: Node) -> dict[str, Value]:
    """Return the keys of an upstream beside its URL."""
    options: dict[str, Value] = {}
    if interface := node.text("interface"):
        options["bind"] = interface.split(",")[0]
        if "," in interface:
            node.changed("interface", "the first of them alone is bound")
    if mark := node.number("so_mark"):
        options["mark"] = mark
    if version := node.number("proxyProtocol"):
        options["send_proxy"] = "v2" if version == 2 else "v1"
    if timeout := node.text("timeout"):
        options["timeout"] = timeout if not timeout.isdigit() else f"{timeout}s"
    if node.transport != "tls":
        return options
    authorities, certificate = node.text("caFile"), node.text("certFile")
    settings: dict[str, Value] = {"ca": authorities, "server_name": node.text("serverName")}
    settings |= tls.files(certificate, node.text("keyFile"))
    if not node.flag("secure") and not authorities:
        # Gost verifies nothing unless it is told to.
        settings["insecure"] = True
    elif not node.flag("secure"):
        node.changed("caFile", "the certificate's name is checked as well (tls.server_name)")
    return tls.upstream_options(options, settings)


def _note_group(node: Node, members: int) -> None:
    """Note the parameters that choose among nodes."""
    strategy = node.text("strategy").lower()
    if members < 2:
        for key in ("strategy", "maxFails", "failTimeout"):
            node.unneeded(key, "there is one node")
        return
    if strategy in _DIFFERENT:
        node.changed("strategy", _DIFFERENT[strategy])
    elif strategy not in BALANCES:
        node.changed("strategy", "is not known: the members take turns")
    for key in ("maxFails", "failTimeout"):
        node.unneeded(key, _RESTS)


def _direct(node: Node, draft: Draft, notes: Notes) -> str:
    """Return the upstream of a node without a server."""
    notes.carried(node.directive)
    if node.text("action") == "reject":
        return "block"
    options = _options(node)
    if not options:
        return "direct"
    return draft.upstream("exit", {"url": "direct", **options}, node.directive)


def _ssh(node: Node, draft: Draft, notes: Notes) -> str:
    """Return the upstream of an SSH server that connects to the targets: a program."""
    ends = node.endpoints
    user, password = node.login or ("", "")
    if len(ends) != 1 or ends[0].host.startswith("-"):
        return lose_upstream(node, notes)
    notes.changed(node.directive, ssh.DIFFERENT)
    if password:
        notes.lost(node.directive, ssh.NO_PASSWORD, "let it use a key")
    node.lost("passphrase", "ssh(1) takes no pass phrase from a file", "write a key without one")
    host, port = ends[0].host or "127.0.0.1", ends[0].port
    command = ssh.ssh_command(host, port, user, node.text("privateKeyFile"))
    return draft.upstream(host, {"command": command}, node.directive)
