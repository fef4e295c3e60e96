"""Reads one hop of the file: a proxy's URL, and the options beside it.

Chains, groups and names are read by upstreams.py.
"""

from __future__ import annotations

import re

from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.config.schema import HopConfig, Place, UpstreamTlsConfig
from netproxy.config.sections.binds import read_bind
from netproxy.config.sections.tls import read_client_tls
from netproxy.config.units import parse_duration
from netproxy.config.url import PLAIN_SCHEMES, parse_hop
from netproxy.typed import Container

MARK_LIMIT = 1 << 32
"""SO_MARK has 32 bits."""
KEEPALIVE_LIMIT = 32767
"""Seconds: the most that the kernel accepts for TCP_KEEPIDLE."""
PROXY_HEADERS = ("v1", "v2")
"""The versions of the PROXY protocol that the daemon sends."""
# Expressions as text: `re` compiles them when they are first needed, in most daemons never.
_WRONG_ESCAPE = r"%(?:[^hp]|\Z)"
_MARK = r"0[xX][0-9A-Fa-f]{1,8}\Z|[0-9]{1,10}\Z"


class HopReader:
    """Reads hops; knows which agents a tunnel may lead to."""

    def __init__(self, problems: Problems, agents: Container[str]) -> None:
        self._problems = problems
        self._agents = agents

    def parse(self, node: Node) -> HopConfig:
        """Return the hop of a URL without query.

        Raises ValueError if it is not a hop, or a tunnel to an unknown agent.
        """
        hop = parse_hop(str(node.value))._replace(place=Place(node.place))
        if hop.password:
            self._problems.check_secret(node)
        if hop.scheme == "tunnel" and hop.server.host not in self._agents:
            raise ValueError(f"tunnel.bridge.agents has no agent '{hop.server.host}'")
        return hop

    def read(self, section: MapReader) -> HopConfig | None:
        """Return the hop of a mapping with a url or a command; None if it has an error."""
        if section.has("command"):
            return _command(section)
        url = section.peek("url")
        if url is None:
            section.add_error("", "needs url, members or command")
        hop = section.read("url", lambda _: self.parse(url) if url else None, None)
        if hop is None:
            # Options of an unknown scheme cannot be checked.
            section.rest()
            return None
        hop = hop._replace(
            udp=section.choice("udp", ("auto", "connect-udp", "uot", "none"), hop.udp),
            timeout=section.duration("timeout", None),
            bind=read_bind(section),
            mark=section.read("mark", _mark, 0),
            keepalive=section.read("keepalive", _keepalive, None),
            send_proxy=section.choice("send_proxy", PROXY_HEADERS, ""),
            tls=self._tls(section, hop),
            direct=section.flag("direct", False),
        )
        _check_options(section, hop)
        return hop

    def _tls(self, section: MapReader, hop: HopConfig) -> UpstreamTlsConfig:
        given = section.has("tls")
        inner = section.mapping("tls")
        if given and not hop.has_tls:
            section.add_error(
                "tls", f"the scheme {hop.scheme} has no TLS (use https or socks5+tls)"
            )
        tls = read_client_tls(inner)
        if tls.insecure:
            inner.warn(
                "insecure",
                f"the certificate of {hop.server} is not checked: "
                "any server that answers there can read all traffic",
            )
        return tls


def _command(section: MapReader) -> HopConfig | None:
    """Return the hop of a program; None if it names none."""
    node = section.peek("command")
    command = section.values("command", str)
    processes = section.whole("processes", HopConfig("command").processes)
    if not command or not command[0] or node is None:
        section.add_error("command", "names no program")
        return None
    if len(command) == 1 and " " in command[0]:
        section.add_error(
            "command", "write the program and its arguments as a list: [ssh, -W, ...]"
        )
        return None
    for argument in command:
        if wrong := re.search(_WRONG_ESCAPE, argument.replace("%%", "")):
            message = f"'{wrong[0]}' is not known (%h is the host, %p the port, %% a percent sign)"
            section.add_error("command", message)
    if "/" in command[0]:
        command = (node.source.resolve(command[0]), *command[1:])
    place = Place(section.place_of("command"))
    return HopConfig("command", command=command, processes=processes, place=place)


def _check_options(section: MapReader, hop: HopConfig) -> None:
    """Report options that the scheme cannot use."""
    if hop.scheme in PLAIN_SCHEMES and (hop.udp != "auto" or hop.timeout is not None):
        key = "udp" if hop.udp != "auto" else "timeout"
        section.add_error(key, f"{hop.scheme} is not a proxy")
    elif hop.udp == "connect-udp" and hop.scheme.startswith("socks"):
        section.add_error("udp", f"connect-udp is for http and https, not for {hop.scheme}")
    if hop.send_proxy and hop.scheme in (*PLAIN_SCHEMES, "tunnel"):
        message = f"{hop.scheme} is not a proxy (a tcp listener has send_proxy for its target)"
        if hop.scheme == "tunnel":
            message = "a tunnel takes no header (services of its agent have proxy_protocol: true)"
        section.add_error("send_proxy", message)
    if hop.direct and (hop.scheme != "https" or hop.udp not in ("auto", "connect-udp")):
        message = "needs the scheme https and connect-udp, by which the bridge tells the keys"
        section.add_error("direct", message)
    dials = hop.bind or hop.mark or hop.keepalive is not None
    if hop.is_local:
        if dials:
            section.add_error("", "bind, mark and keepalive have no meaning for a UNIX socket")
        if hop.has_tls and not (hop.tls.server_name or hop.tls.insecure):
            message = "is missing: a UNIX socket has no name that the certificate could have"
            section.add_error("tls.server_name", message)
    if hop.scheme == "tunnel" and (hop.udp != "auto" or dials):
        section.add_error(
            "", "a tunnel takes no option except timeout: its agent connects to this daemon"
        )


def _keepalive(text: str) -> float:
    seconds = parse_duration(text)
    if seconds > KEEPALIVE_LIMIT:
        raise ValueError(f"must be at most {KEEPALIVE_LIMIT}s")
    return seconds


def _mark(text: str) -> int:
    mark = int(text, 16 if text[1:2] in ("x", "X") else 10) if re.match(_MARK, text) else 0
    if not 0 < mark < MARK_LIMIT:
        raise ValueError(f"'{text}' is not a mark (expected a number above 0, decimal or 0x...)")
    return mark
