"""The tunnels of goproxy: bridge, server and client, which are told apart by keys.

A client is an agent and an exit.  A server is a listener of the bridge that leads through one.
"""

from __future__ import annotations

import re
import secrets

from netproxy.ctl.convert.command_lines import tls
from netproxy.ctl.convert.command_lines.goproxy import listeners
from netproxy.ctl.convert.command_lines.goproxy.parents import Parents
from netproxy.ctl.convert.command_lines.goproxy.proxies import add_listener, listen_text, lose
from netproxy.ctl.convert.command_lines.gost.nodes import Endpoint, parse_endpoint
from netproxy.ctl.convert.draft.listeners import permit
from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.goproxy.options import Options
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Notes

DEFAULT_KEY = "default"
UNKNOWN_TOKEN = "write here the token of the bridge"
_NEW_TOKEN = (
    "goproxy knows its clients by certificates: here each agent has a new token as well",
    "write it into the file of the agent",
)
_NO_TOKEN = ("the bridge will refuse the agent without its token", "write it here, better as !file")
_NO_BRIDGE = (
    "the bridge opens the ports itself",
    "convert the commands of bridge and server together, as one text",
)
_OWN_SERVICES = "the ports of the bridge may lead to services of this machine, as before"
_AGENT_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}\Z")
_ROUTE = re.compile(r"(?:(p?tcp|p?udp)://)?([^@]*)@(?:\[([^\]]*)\])?(.*)\Z")
_KINDS = {"tcp": "tcp", "ptcp": "tcp", "udp": "udp", "pudp": "udp", "": ""}
_CERTIFICATE = "the bridge's certificate must have the name of its host (tls.server_name)"


class Tunnels:
    """Collects the commands of tunnels; the bridge is there when all are known."""

    def __init__(self, draft: Draft, notes: Notes) -> None:
        self._draft, self._notes = draft, notes
        self._bridges: list[Options] = []
        self._servers: list[Options] = []
        self._agents: dict[str, Value] = {}

    def add(self, options: Options) -> None:
        """Add a command."""
        kind = options.command.removeprefix("t")
        if kind == "bridge":
            self._bridges.append(options)
        elif kind == "server":
            self._servers.append(options)
        else:
            self._add_client(options)

    def finish(self) -> None:
        """Make the bridge and the ports that the servers open."""
        for options in self._bridges[1:]:
            lose(options, "a daemon has one bridge", self._notes)
        if not self._bridges:
            for options in self._servers:
                self._notes.lost(options.directive, *_NO_BRIDGE)
                options.lose_all("server is not carried")
            return
        bridge = self._bridges[0]
        self._put_bridge(bridge)
        for options in self._servers:
            self._add_server(options)
        keys = bridge.elements("--client-keys") or []
        for key in keys or ([] if self._agents else [DEFAULT_KEY]):
            self._add_agent(key, bridge)
        self._notes.changed(bridge.directive, *_NEW_TOKEN)
        self._draft.put("tunnel.bridge.agents", self._agents)
        self._draft.sections["tunnel"].comments.append("the token is a secret: better write !file")

    def _put_bridge(self, options: Options) -> None:
        self._notes.carried(options.directive)
        try:
            [end] = listeners.listener_ends(options)
        except ValueError:
            end = Endpoint("", listeners.DEFAULT_PORT)
            self._notes.changed(options.directive, f"one port for agents: {end.port}")
        options.texts("-t")
        certificate, key = options.text("-C") or "proxy.crt", options.text("-K") or "proxy.key"
        keys = {**tls.files(certificate, key), "client_ca": options.text("--ca") or certificate}
        self._draft.put("tunnel.bridge.listen", listen_text(end), *options.origins("-p"))
        self._draft.put("tunnel.bridge.tls", keys, *options.origins("-C", "-K"))

    def _add_agent(self, key: str, options: Options) -> bool:
        if not _AGENT_NAME.match(key):
            self._notes.lost(options.directive, f"the key '{key}' is no name of an agent")
            return False
        # A known token would let everybody be an agent.
        self._agents.setdefault(key, {"token": secrets.token_hex(16)})
        return True

    def _add_server(self, options: Options) -> None:
        self._notes.carried(options.directive)
        for name in ("-P", "-C", "-K", "-T", "-J", "--jumper"):
            options.unneeded(name, "the bridge is this daemon")
        default = options.text("--k", "-k") or DEFAULT_KEY
        is_udp = options.flag("--udp")
        for text in options.texts("-r"):
            match = _ROUTE.match(text.replace(" ", ""))
            end, target = (
                (parse_endpoint(match[2]), parse_endpoint(match[4])) if match else (None,) * 2
            )
            if match is None or end is None or target is None or not end.port.isdigit():
                options.lost("-r", "is not [PROTOCOL://]ADDRESS@[KEY]ADDRESS")
                continue
            if not target.port.isdigit() or not 0 < int(target.port) <= networks.LAST_PORT:
                options.lost("-r", "has no target with a port")
                continue
            key = match[3] or default
            if not self._add_agent(key, options):
                continue
            settings: dict[str, Value] = {
                "protocol": _KINDS[match[1] or ""] or ("udp" if is_udp else "tcp"),
                "listen": listen_text(end),
                "target": networks.listen_text(target.host or "127.0.0.1", target.port),
                "upstream": f"tunnel://{key}",
            }
            entry, _ = add_listener(options, settings, self._draft)
            entry.comes_from(*options.origins("-r"))
            permit(entry, None)

    def _add_client(self, options: Options) -> None:
        self._notes.carried(options.directive)
        end = parse_endpoint(options.text("-P"))
        key = options.text("--k", "-k") or DEFAULT_KEY
        if not end.host or not end.port.isdigit() or not _AGENT_NAME.match(key):
            lose(options, "has no bridge, or a key that is no name of an agent", self._notes)
            return
        put, transport = self._draft.put, options.text("-T") or "tls"
        scheme = "tls" if transport == "tls" else "tcp"
        bridge = f"{scheme}://{networks.listen_text(end.host, end.port)}"
        put("tunnel.agent.bridge", bridge, options.directive, *options.origins("-P"))
        put("tunnel.agent.name", key, *options.origins("--k", "-k"))
        put("tunnel.agent.token", UNKNOWN_TOKEN)
        put("tunnel.agent.exit", True)
        put("destinations.allow", ["loopback"])
        if _OWN_SERVICES not in (comments := self._draft.sections["destinations"].comments):
            comments.append(_OWN_SERVICES)
        self._notes.changed(options.directive, *_NO_TOKEN)
        if scheme == "tls":
            certificate, file = options.text("-C") or "proxy.crt", options.text("-K") or "proxy.key"
            authority = options.text("--ca") or certificate
            put("tunnel.agent.tls", {"ca": authority, **tls.files(certificate, file)})
            self._notes.changed(options.directive, _CERTIFICATE)
        upstream = Parents(options, self._draft, self._notes).jumper()
        if upstream != "direct":
            put("tunnel.agent.upstream", upstream)
