"""Converts the URLs of proxies: a listener of this machine that leads to them.

The URLs of one line are a chain, first hop first, as in -u; several lines are a group.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from netproxy.config.read import check, read_config
from netproxy.config.tree.node import Node as ConfigNode
from netproxy.config.tree.problems import Problems
from netproxy.ctl.convert.command_lines import tls
from netproxy.ctl.convert.command_lines.gost.nodes import ALIASES, Node, decoded_login, shown_node
from netproxy.ctl.convert.draft.draft import BLOCKED, Proxy
from netproxy.ctl.convert.source import ConversionError
from netproxy.errors import ConfigError
from netproxy.typed import TYPE_CHECKING, Iterator

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.source import Source

LISTEN = "127.0.0.1:1080"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# A comma, an arrow or a blank before the next URL.
_BETWEEN = re.compile(r"(?:\s*,\s*|\s*-+>\s*|\s+)(?=[A-Za-z][A-Za-z0-9+.-]*://)")
_SCHEMES = {
    **{name: name for name in ("socks4", "socks4a", "socks5", "socks5h", "http", "https")},
    **{"socks": "socks5h", "socks5s": "socks5h+tls", "sockss": "socks5h+tls"},
    **{"socks5+tls": "socks5+tls", "socks5h+tls": "socks5h+tls", "http+tls": "https"},
}
_PORTS = {"http": 80, "https": 443}
_SOCKS_PORT = 1080
_OPTIONS = ("udp", "timeout", "keepalive", "bind", "mark", "send_proxy", "rotate")
_TLS = ("ca", "certificate", "key", "server_name")
_NO_LOGIN = ("", "")
_PATH = "it has a path: it is not the URL of a proxy (that of a PAC file leads to one)"
_UNKNOWN = "the scheme is not one of an upstream: write socks5, http or https, or TLS around them"


def is_url(text: str) -> bool:
    """Return whether a text begins as a URL."""
    return bool(_URL.match(text))


def convert(source: Source, draft: Draft, notes: Notes) -> None:
    """Fill the draft with a listener and the upstream.  Raises ConversionError."""
    chains = [chain for line in _lines(source) if (chain := _chain(line, source, draft, notes))]
    if not chains:
        raise ConversionError(f"{source.name}: has no URL of a proxy")
    draft.listener({"protocol": "sps", "listen": LISTEN})
    if len(chains) == 1:
        draft.put("default", chains[0])
        return
    members: list[Value] = [*dict.fromkeys(chains)]
    if "block" in members:
        members.remove("block")
    group: dict[str, Value] = {"members": members}
    draft.put("default", draft.upstream("pool", group) if members else "block")


def _lines(source: Source) -> Iterator[tuple[int, str]]:
    if source.words:
        yield 0, " ".join(source.words)
        return
    for number, line in enumerate(source.text.splitlines(), 1):
        text = line.strip().strip("\"'")
        if text and not text.startswith("#"):
            yield number, text


def _chain(line: tuple[int, str], source: Source, draft: Draft, notes: Notes) -> str:
    """Return the upstream of a line, "" if the line has none."""
    number, text = line
    names: list[str] = []
    for part in _BETWEEN.split(text):
        directive = notes.directive(source.name, number, shown_node(part.partition("#")[0]))
        if not is_url(part):
            notes.lost(directive, "is not the URL of a proxy")
            continue
        names.append(_upstream(part, directive, draft, notes))
    if not names:
        return ""
    if len(names) == 1 or "block" in names:
        return "block" if "block" in names else names[0]
    hops: list[Value] = [*names]
    return draft.upstream("chain", hops)


def _upstream(text: str, directive: Directive, draft: Draft, notes: Notes) -> str:
    url, _, label = text.partition("#")
    node = Node(url, directive, notes)
    scheme = _SCHEMES.get(url.partition("://")[0].lower(), "")
    if not scheme:
        notes.lost(directive, _UNKNOWN, BLOCKED)
        return "block"
    ends = node.endpoints
    host = ends[0].host if ends else ""
    port = _port(ends[0].port if ends else "", scheme)
    if ends and not ends[0].port:
        notes.changed(directive, f"has no port: {port} is taken")
    if node.path.strip("/"):
        notes.lost(directive, _PATH, BLOCKED)
        return "block"
    user, password = node.login or _NO_LOGIN
    if user and not password and (login := decoded_login(user)):
        # Programs for phones write user and password in base64, and ":" for none.
        user, password = login if login[1] or login == _NO_LOGIN else (user, password)
    try:
        proxy = Proxy(scheme, host, port, user, password).url
    except ValueError as error:
        notes.lost(directive, f"the proxy cannot be an upstream: {error}", BLOCKED)
        return "block"
    notes.carried(directive)
    options = _options(node, scheme, proxy)
    value: Value = {"url": proxy, **options} if options else proxy
    return draft.upstream(unquote(label) or host, value, directive)


def _error(proxy: str, options: dict[str, str]) -> str:
    """Return why an upstream cannot have these options, "" if it can."""
    upstream = {key: ConfigNode(value, "") for key, value in (("url", proxy), *options.items())}
    tree = {"listeners": ConfigNode([], ""), "default": ConfigNode(upstream, "")}
    problems = Problems()
    try:
        check(read_config(ConfigNode(tree, ""), problems), problems)
    except ConfigError as error:
        return str(error).splitlines()[0].removeprefix("default.")
    return ""


def _port(text: str, scheme: str) -> int:
    if not text:
        return _PORTS.get(scheme, _SOCKS_PORT)
    return int(text) if re.fullmatch(r"[0-9]{1,5}", text) else 0


def _options(node: Node, scheme: str, proxy: str) -> dict[str, Value]:
    """Return the options of an upstream that stand behind the "?"."""
    texts: dict[str, str] = {}
    for key in _OPTIONS:
        # As the node calls it.
        name = ALIASES.get(key, key)
        if not node.has(name):
            continue
        fresh = {**texts, key: node.text(name)}
        if error := _error(proxy, fresh):
            node.lost(name, error)
        else:
            texts = fresh
    options: dict[str, Value] = {**texts}
    settings: dict[str, Value] = {}
    if scheme.endswith(("https", "+tls")):
        settings = {key: node.text(f"tls.{key}") for key in _TLS if node.has(f"tls.{key}")}
        if node.flag("tls.insecure"):
            settings["insecure"] = True
    for key in node.rest():
        node.lost(key, "is not an option of an upstream")
    return tls.upstream_options(options, settings)
