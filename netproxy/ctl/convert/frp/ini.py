"""Reads the older files of frp, in the form of INI, under the names of the newer ones."""

from __future__ import annotations

import re

from netproxy.ctl.convert.frp.toml import Setting, TomlValue
from netproxy.ctl.convert.source import ConversionError
from netproxy.typed import Iterator

_COMMON = {
    **{"server_addr": "serverAddr", "server_port": "serverPort", "bind_addr": "bindAddr"},
    **{"bind_port": "bindPort", "kcp_bind_port": "kcpBindPort", "quic_bind_port": "quicBindPort"},
    **{"proxy_bind_addr": "proxyBindAddr", "vhost_http_port": "vhostHTTPPort"},
    **{"vhost_https_port": "vhostHTTPSPort", "vhost_http_timeout": "vhostHTTPTimeout"},
    **{"token": "auth.token", "authentication_method": "auth.method"},
    **{"authenticate_heartbeats": "auth.additionalScopes"},
    **{"authenticate_new_work_conns": "auth.additionalScopes"},
    **{"log_file": "log.to", "log_level": "log.level", "log_max_days": "log.maxDays"},
    **{"disable_log_color": "log.disablePrintColor", "login_fail_exit": "loginFailExit"},
    **{"admin_addr": "webServer.addr", "admin_port": "webServer.port"},
    **{"admin_user": "webServer.user", "admin_pwd": "webServer.password"},
    **{"dashboard_addr": "webServer.addr", "dashboard_port": "webServer.port"},
    **{"dashboard_user": "webServer.user", "dashboard_pwd": "webServer.password"},
    **{"dashboard_tls_mode": "webServer.tls", "assets_dir": "webServer.assetsDir"},
    **{"dashboard_tls_cert_file": "webServer.tls.certFile"},
    **{"dashboard_tls_key_file": "webServer.tls.keyFile", "pprof_enable": "webServer.pprofEnable"},
    **{"enable_prometheus": "enablePrometheus", "protocol": "transport.protocol"},
    **{"http_proxy": "transport.proxyURL", "pool_count": "transport.poolCount"},
    **{"max_pool_count": "transport.maxPoolCount", "tcp_mux": "transport.tcpMux"},
    **{"tls_enable": "transport.tls.enable", "tls_only": "transport.tls.force"},
    **{"tls_cert_file": "transport.tls.certFile", "tls_key_file": "transport.tls.keyFile"},
    **{"tls_trusted_ca_file": "transport.tls.trustedCaFile"},
    **{"tls_server_name": "transport.tls.serverName", "user": "user", "start": "start"},
    **{"disable_custom_tls_first_byte": "transport.tls.disableCustomTLSFirstByte"},
    **{"connect_server_local_ip": "transport.connectServerLocalIP", "dns_server": "dnsServer"},
    **{"heartbeat_interval": "transport.heartbeatInterval"},
    **{"heartbeat_timeout": "transport.heartbeatTimeout", "udp_packet_size": "udpPacketSize"},
    **{"allow_ports": "allowPorts", "max_ports_per_client": "maxPortsPerClient"},
    **{"subdomain_host": "subDomainHost", "custom_404_page": "custom404Page"},
    **{"detailed_errors_to_client": "detailedErrorsToClient", "includes": "includes"},
    **{"nat_hole_analysis_data_reserve_hours": "natholeAnalysisDataReserveHours"},
    **{"nat_hole_stun_server": "natHoleStunServer", "user_conn_timeout": "userConnTimeout"},
    **{"tcpmux_httpconnect_port": "tcpmuxHTTPConnectPort"},
}
_PROXY = {
    **{"type": "type", "local_ip": "localIP", "local_port": "localPort"},
    **{"remote_port": "remotePort", "use_encryption": "transport.useEncryption"},
    **{"use_compression": "transport.useCompression"},
    **{"bandwidth_limit": "transport.bandwidthLimit"},
    **{"bandwidth_limit_mode": "transport.bandwidthLimitMode"},
    **{"proxy_protocol_version": "transport.proxyProtocolVersion"},
    **{"group": "loadBalancer.group", "group_key": "loadBalancer.groupKey"},
    **{"health_check_type": "healthCheck.type", "health_check_url": "healthCheck.path"},
    **{"health_check_timeout_s": "healthCheck.timeoutSeconds"},
    **{"health_check_max_failed": "healthCheck.maxFailed"},
    **{"health_check_interval_s": "healthCheck.intervalSeconds"},
    **{"custom_domains": "customDomains", "subdomain": "subdomain", "locations": "locations"},
    **{"http_user": "httpUser", "http_pwd": "httpPassword", "multiplexer": "multiplexer"},
    **{"host_header_rewrite": "hostHeaderRewrite", "sk": "secretKey", "role": "role"},
    **{"route_by_http_user": "routeByHTTPUser", "server_name": "serverName"},
    **{"server_user": "serverUser", "bind_addr": "bindAddr", "bind_port": "bindPort"},
    **{"plugin": "plugin.type", "plugin_local_addr": "plugin.localAddr"},
    **{"plugin_user": "plugin.username", "plugin_passwd": "plugin.password"},
    **{"plugin_http_user": "plugin.httpUser", "plugin_http_passwd": "plugin.httpPassword"},
    **{"plugin_unix_path": "plugin.unixPath", "plugin_local_path": "plugin.localPath"},
    **{"plugin_strip_prefix": "plugin.stripPrefix", "plugin_crt_path": "plugin.crtPath"},
    **{"plugin_key_path": "plugin.keyPath", "allow_users": "allowUsers"},
    **{"plugin_host_header_rewrite": "plugin.hostHeaderRewrite"},
}
_LISTS = ("customDomains", "locations", "start", "allowUsers", "includes")


def read_ini(text: str, name: str) -> list[Setting]:
    """Return the settings of a file, in its order.  Raises ConversionError."""
    settings: list[Setting] = []
    # Each section but [common] is a proxy.
    section, number = "", -1
    for line_number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        if header := re.fullmatch(r"\[(.+)\]", line):
            section = header[1].strip()
            if section != "common" and not section.startswith("plugin."):
                number += 1
                settings.append(Setting(("proxies", number, "name"), section, line_number))
            continue
        key, sign, value = line.partition("=")
        if not sign or not section:
            raise ConversionError(f"{name}:{line_number}: is not 'key = value' within a section")
        path = tuple(_path(section, number, key.strip()))
        settings.append(Setting(path, _value(path, value.strip()), line_number))
    return settings


def _path(section: str, number: int, key: str) -> Iterator[str | int]:
    if section.startswith("plugin."):
        yield from ("httpPlugins", section[7:], key)
        return
    table = _COMMON if section == "common" else _PROXY
    if section != "common":
        yield from ("proxies", number)
    if match := re.fullmatch(r"(meta|header|plugin_header)_(.+)", key):
        kinds = {"meta": "metadatas", "header": "requestHeaders"}
        yield from (kinds.get(match[1], "plugin.requestHeaders"), match[2])
        return
    if key.startswith("oidc_"):
        yield from ("auth", "oidc", key[5:])
        return
    yield from table.get(key, key).split(".")


def _value(path: tuple[str | int, ...], text: str) -> TomlValue:
    if path[-1] in _LISTS:
        return [part.strip() for part in text.split(",") if part.strip()]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text
