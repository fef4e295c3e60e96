"""The plug-ins of frpc: listeners of the agent's own, which its services lead to."""

from __future__ import annotations

from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.frp.settings import Table

_PROXIES = {
    "socks5": ("socks5", "username", "password"),
    "http_proxy": ("http", "httpUser", "httpPassword"),
}
"""The plug-ins that are proxies: the protocol of a listener, and the keys of the login."""
_DECRYPTING = ("https2http", "tls2raw")


def stand_in(proxy: Table, port: str, draft: Draft) -> str:
    """Return the address of a service that does what the plug-in does; "" if there is none.

    `port`: that of the bridge; a listener that is needed has the same one.
    """
    plugin = proxy.text("plugin.type")
    if plugin == "http2http":
        return _local_address(proxy)
    settings: dict[str, Value] = {}
    if plugin in _PROXIES:
        settings = _proxy(proxy, plugin, draft)
    elif plugin == "unix_domain_socket" and (path := proxy.text("plugin.unixPath")):
        settings = {"protocol": "tcp", "target": f"unix:{path}"}
    elif plugin in _DECRYPTING and (target := _local_address(proxy)):
        certificate, key = proxy.text("plugin.crtPath"), proxy.text("plugin.keyPath")
        if certificate and key:
            tls: Value = {"certificate": certificate, "key": key}
            settings = {"protocol": "tcp", "target": target, "tls": tls}
    if not settings:
        return ""
    listen = f"127.0.0.1:{port}"
    entry = draft.listener(
        {**settings, "listen": listen, "network": ["tcp"]}, *proxy.origins("name", "plugin.type")
    )
    entry.comments.append(f"the bridge's port {port} leads here")
    return listen


def _proxy(proxy: Table, plugin: str, draft: Draft) -> dict[str, Value]:
    protocol, user_key, password_key = _PROXIES[plugin]
    user, password = proxy.text(f"plugin.{user_key}"), proxy.text(f"plugin.{password_key}")
    if not user or not password:
        return {"protocol": protocol}
    if user not in draft.users:
        draft.user(user, password, *proxy.origins(f"plugin.{user_key}"))
    return {"protocol": protocol, "auth": "required"}


def _local_address(proxy: Table) -> str:
    host, _, port = proxy.text("plugin.localAddr").rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not networks.is_host(host) or not port.isdigit() or not 0 < int(port) <= networks.LAST_PORT:
        return ""
    return networks.listen_text(host, port)
