"""Ports at the end of a chain (rtcp, rudp): services of an agent, whose bridge opens the ports."""

from __future__ import annotations

from netproxy.config.url import parse_host_port
from netproxy.ctl.convert.command_lines.gost import tags
from netproxy.ctl.convert.command_lines.gost.nodes import Endpoint
from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.gost.chain import Chain
    from netproxy.ctl.convert.command_lines.gost.nodes import Node
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Notes

AGENT = "gost"
_BRIDGE = (
    "the last proxy must be a netproxyd with tunnel.bridge: gost does not speak its protocol",
    "write the agent, its token and its ports there (docs/TUNNELS.md)",
)
_ANOTHER = "an agent has one bridge: that of the first port"
UNKNOWN_TOKEN = "write here the token of the bridge"


class Tunnels:
    """Adds the services of the agent."""

    def __init__(self, draft: Draft, notes: Notes) -> None:
        self._draft, self._notes = draft, notes
        self._bridge = ""
        self._services: dict[str, Value] = {}

    def add(self, node: Node, chain: Chain) -> None:
        """Add the ports of a service as services of the agent."""
        notes, last = self._notes, chain.nodes[-1]
        is_ssh = "ssh" in last.transport or last.protocol == "sshd"
        node.unneeded("ttl", "sessions end by themselves")
        if is_ssh or last.transport not in ("", "tcp", "tls"):
            why = "ssh -R opens ports" if is_ssh else tags.reason(last.protocol, last.transport)
            notes.lost(node.directive, f"no bridge is at the end of the chain: {why}")
            return
        try:
            bridge = _bridge(last)
        except ValueError as error:
            notes.lost(node.directive, f"the end of the chain is no bridge: {error}")
            return
        targets = node.targets
        if self._bridge and bridge != self._bridge:
            notes.lost(node.directive, _ANOTHER)
            return
        added = {
            self._key(node, port): networks.listen_text(target.host or "127.0.0.1", target.port)
            for end in node.endpoints
            for port in _ports(end.port)
            for target in targets[:1]
            if target.port.isdigit()
        }
        if not added:
            notes.lost(node.directive, "the bridge chooses no port: write one, and a target")
            return
        self._services |= added
        self._put(node, bridge, chain)

    def _put(self, node: Node, bridge: str, chain: Chain) -> None:
        draft, notes = self._draft, self._notes
        notes.changed(node.directive, *_BRIDGE)
        if not self._bridge:
            self._bridge = bridge
            draft.put("tunnel.agent.bridge", bridge, *(hop.directive for hop in chain.nodes))
            draft.put("tunnel.agent.name", AGENT)
            draft.put("tunnel.agent.token", UNKNOWN_TOKEN)
            if authorities := chain.nodes[-1].text("caFile"):
                draft.put("tunnel.agent.tls.ca", authorities)
            if len(chain.nodes) > 1:
                draft.put("tunnel.agent.upstream", chain.via(len(chain.nodes) - 1))
        draft.put("tunnel.agent.services", dict(self._services), node.directive)
        last = chain.nodes[-1]
        if not notes.is_noted(last.directive):
            notes.changed(last.directive, _BRIDGE[0])

    @staticmethod
    def _key(node: Node, port: int) -> str:
        return f"{port}/udp" if node.protocol == "rudp" else str(port)


def _bridge(node: Node) -> str:
    """Return the URL of the bridge.  Raises ValueError if the node has not one address."""
    [server] = node.endpoints or [Endpoint("", "")]
    address = networks.listen_text(server.host or "127.0.0.1", server.port)
    parse_host_port(address)
    return f"{'tls' if node.transport == 'tls' else 'tcp'}://{address}"


def _ports(text: str) -> range:
    try:
        ports = networks.parse_port_range(text)
    except ValueError:
        return range(0)
    return ports if ports[0] else range(0)
