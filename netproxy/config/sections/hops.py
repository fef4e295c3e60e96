"""Reads one hop of the file: a proxy's URL, and the options beside it.

Chains, groups and names are read by upstreams.py.
"""

from __future__ import annotations

import re
from typing import Container

from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.config.schema import HopConfig, Place, UpstreamTlsConfig
from netproxy.config.sections.binds import read_bind
from netproxy.config.sections.tls import read_client_tls
from netproxy.config.units import parse_duration
from netproxy.config.url import PLAIN_SCHEMES, parse_hop

MARK_LIMIT = 1 << 32
"""SO_MARK has 32 bits."""
KEEPALIVE_LIMIT = 32767
"""Seconds: the most that the kernel accepts for TCP_KEEPIDLE."""
# An expression as text: `re` compiles it when it is first needed, in most daemons never.
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
        """Return the hop of a mapping with a url; None if there is an error in the url."""
        url = section.peek("url")
        if url is None:
            section.add_error("", "needs url or members")
        hop = section.read("url", lambda _: self.parse(url) if url else None, None)
        if hop is None:
            # Options of an unknown scheme cannot be checked.
            section.rest()
            return None
        hop = hop._replace(
            udp=section.choice("udp", ("auto", "uot", "none"), hop.udp),
            timeout=section.duration("timeout", None),
            bind=read_bind(section),
            mark=section.read("mark", _mark, 0),
            keepalive=section.read("keepalive", _keepalive, None),
            tls=self._tls(section, hop),
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


def _check_options(section: MapReader, hop: HopConfig) -> None:
    """Report options that the scheme cannot use."""
    if hop.scheme in PLAIN_SCHEMES and (hop.udp != "auto" or hop.timeout is not None):
        key = "udp" if hop.udp != "auto" else "timeout"
        section.add_error(key, f"{hop.scheme} is not a proxy")
    dials = hop.bind or hop.mark or hop.keepalive is not None
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
