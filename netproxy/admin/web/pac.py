"""Answers browsers that ask for their proxy settings: /proxy.pac and /wpad.dat.

The script sends to the proxy whatever a rule might treat in another way than directly: what it
cannot tell is left to the proxy.  It names the hosts of the rules; browsers let no page of another
site read a file of this type.  Runs on the thread of admin.web.http_server, except configure().
"""

from __future__ import annotations

import json
import re

from netproxy.admin.web.http_server import HttpAnswer
from netproxy.config.admin import PROTOCOLS
from netproxy.config.schema import ConditionsConfig
from netproxy.config.url import HOST_NAME
from netproxy.errors import ConfigError
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.protocol.http1 import field_values
from netproxy.router.patterns import (
    APEX,
    BELOW,
    KEYWORD,
    REGEX,
    DomainPattern,
    is_address,
    parse_domain,
    parse_network,
    parse_ports,
)
from netproxy.typed import TYPE_CHECKING, Iterator

if TYPE_CHECKING:
    from netproxy.config.schema import Config, ListenerConfig, RuleConfig
    from netproxy.interfaces.networks import IpNetwork
    from netproxy.protocol.http1 import HttpRequest

PATHS = (b"/proxy.pac", b"/wpad.dat")
IPV4_SIZE = 4
CONTENT_TYPE = "application/x-ns-proxy-autoconfig"
_HOST = "PROXY-HOST"
"""Stands for the host of the proxy until a browser asks: no host name has capitals here."""
_KNOWN = frozenset({"domain", "ip", "port", "network"})
"""Conditions that a script can tell."""
_BEGIN = """\
function FindProxyForURL(url, host) {
  var parts = /^(\\w+):\\/\\/(?:[^\\/]*@)?(?:\\[[^\\]]*\\]|[^:\\/]*)(?::(\\d+))?/.exec(url) || [];
  var port = +(parts[2] || {http: 80, ws: 80, ftp: 21}[parts[1]] || 443);
  var literal = /^\\d+\\.\\d+\\.\\d+\\.\\d+$/.test(host);
  host = host.toLowerCase().replace(/\\.$/, "");
  var name = !literal && host.indexOf(":") < 0;
  function below(name) { return host.slice(-name.length - 1) === "." + name; }
  if (host === "localhost" || below("localhost")) return "DIRECT";
"""


class PacSite:
    """Answers with the script of the configuration in force."""

    def __init__(self) -> None:
        """Begin without a script: configure() must follow."""
        self._script = self._host = ""

    def configure(self, config: Config) -> None:
        """Answer with the script of a configuration.  Thread: any."""
        self._script, self._host = make_script(config), config.pac.host

    def answer(self, request: HttpRequest, peer: str) -> HttpAnswer:
        """Answer a request of the client with the address `peer`."""
        if request.method not in (b"GET", b"HEAD"):
            return HttpAnswer(405, fields=((b"Allow", b"GET, HEAD"),))
        if request.target.partition(b"?")[0] not in PATHS:
            return HttpAnswer(404)
        host = self._host or _asked_host(request)
        if not host:
            return HttpAnswer(400, b"the request names no host (or set pac.host)\n")
        text = self._script.replace(_HOST, f"[{host}]" if ":" in host else host)
        return HttpAnswer(200, text.encode(), CONTENT_TYPE)


def make_script(config: Config) -> str:
    """Return the script of a configuration.

    Raises ConfigError if a pattern of `pac.direct` is unusable, or the listener's port is not
    known.
    """
    lines = [_BEGIN]
    for pattern in config.pac.direct:
        try:
            is_network = "/" in pattern or is_address(pattern)
            empty = ConditionsConfig()
            given = empty._replace(ip=(pattern,)) if is_network else None
            test = _test(given or empty._replace(domain=(pattern,)))
        except ValueError as error:
            raise ConfigError(f"pac.direct: {error}", config.pac.place) from error
        if test:
            lines.append(f'  if ({test}) return "DIRECT";\n')
    lines.extend(_rules(config.rules))
    lines.append("  return proxy();\n")
    proxy = json.dumps(_proxy(config))
    lines.append(f"  function proxy() {{ return {proxy}; }}\n}}\n")
    return "".join(lines)


def _proxy(config: Config) -> str:
    """Return the proxy as the script names it, with _HOST for its host."""
    wanted, name = config.pac, config.pac.listener
    listener: ListenerConfig = next(
        listener
        for listener in config.listeners
        if listener.protocol in PROTOCOLS and name in ("", listener.name)
    )
    port = next((at.port for at in listener.addresses if isinstance(at, Address) and at.port), 0)
    if not port:
        message = f"pac: the listener '{listener.name}' has no port that browsers could know"
        raise ConfigError(message, wanted.place)
    where = f"{_HOST}:{port}"
    if listener.protocol == "socks5":
        return f"SOCKS5 {where}; SOCKS {where}"
    return f"HTTPS {where}" if listener.tls is not None else f"PROXY {where}"


def _rules(rules: tuple[RuleConfig, ...]) -> Iterator[str]:
    """Yield what the script does for rules, up to the first one that it cannot tell."""
    for rule in rules:
        is_direct = rule.upstream is None and rule.via is not None and rule.via.text == "direct"
        if rule.conditions.network and "tcp" not in rule.conditions.network:
            continue
        test = "" if _is_unknown(rule) else _test(rule.conditions)
        if is_direct and test:
            yield f'  if ({test}) return "DIRECT";\n'
        elif not is_direct and (not test or rule.conditions.ip):
            return
        elif test:
            yield f"  if ({test}) return proxy();\n"


def _is_unknown(rule: RuleConfig) -> bool:
    """Return whether a rule looks at something that a script cannot tell."""
    given = {key for key, value in rule.conditions._asdict().items() if value}
    return bool(given - _KNOWN) or any(rule.but_not)


def _test(conditions: ConditionsConfig) -> str:
    """Return an expression of the script, "" if there is none.  Raises ValueError.

    A name is not looked up: networks match addresses alone.
    """
    tests = []
    if conditions.domain:
        patterns = [parse_domain(text) for text in conditions.domain]
        if any(pattern.kind == REGEX for pattern in patterns):
            return ""
        tests.append(" || ".join(map(_name_test, patterns)))
    if conditions.ip:
        networks = [parse_network(text) for text in conditions.ip]
        in_networks = [
            f'literal && isInNet(host, "{str(network).partition("/")[0]}", "{_mask(network)}")'
            for network in networks
            if network.size == IPV4_SIZE
        ]
        if not in_networks:
            return ""
        tests.append(" || ".join(in_networks))
    if conditions.port:
        ranges = map(parse_ports, conditions.port)
        tests.append(" || ".join(f"port >= {r.start} && port < {r.stop}" for r in ranges))
    return " && ".join(f"({test})" for test in tests)


def _name_test(pattern: DomainPattern) -> str:
    text = json.dumps(pattern.text)
    if pattern.kind == KEYWORD:
        # As in rules, addresses have no name: "keyword:10" is not in 10.0.0.1.
        return f"name && host.indexOf({text}) >= 0"
    tests = [f"host === {text}"] if pattern.kind & APEX else []
    return " || ".join(tests + ([f"below({text})"] if pattern.kind & BELOW else []))


def _mask(network: IpNetwork) -> str:
    number = (0xFFFFFFFF << network.shift) & 0xFFFFFFFF
    return ".".join(str(number >> shift & 0xFF) for shift in (24, 16, 8, 0))


def _asked_host(request: HttpRequest) -> str:
    """Return the host that a browser has asked, without its port; "" if it is not valid."""
    text = next(iter(field_values(request.fields, b"host")), b"").decode("latin-1")
    host = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    is_valid = pack_ip(host) is not None or re.match(HOST_NAME, host)
    return host.lower() if is_valid else ""
