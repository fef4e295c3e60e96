"""Settings of frp that need nothing here, and those that cannot be carried, with the reason."""

from __future__ import annotations

_TUNED = "netproxyd has a fixed value that suits"
_LOG = "netproxyd writes its log to standard error, which the service manager keeps"
_ADMIN = "netproxyctl asks the daemon, through its control socket"
_OIDC = "agents prove a token; there is no OIDC"
_NO_PLUGINS = "there are no plug-ins"
_HTTP = "bytes are passed on as they are: no field is looked at or changed"
_PEERS = "there are no connections from peer to peer"

UNNEEDED = {
    **dict.fromkeys(("log.to", "log.maxDays", "log.disablePrintColor"), _LOG),
    **dict.fromkeys(
        ("udpPacketSize", "userConnTimeout", "vhostHTTPTimeout", "maxPortsPerClient")
        + ("transport.tcpMux", "transport.tcpMuxKeepaliveInterval", "transport.tcpKeepalive")
        + ("transport.heartbeatTimeout", "transport.heartbeatInterval", "transport.poolCount")
        + ("transport.maxPoolCount", "transport.dialServerTimeout", "transport.wireProtocol")
        + ("transport.dialServerKeepalive", "transport.tls.disableCustomTLSFirstByte")
        + ("loginFailExit", "detailedErrorsToClient", "clientID", "auth.additionalScopes"),
        _TUNED,
    ),
    **dict.fromkeys(
        ("natHoleStunServer", "natholeAnalysisDataReserveHours", "auth.method"),
        "is about a part that is not carried, or has its only value",
    ),
    **dict.fromkeys(
        ("webServer.assetsDir", "webServer.pprofEnable", "webServer.user", "webServer.password")
        + ("webServer.addr", "webServer.port", "enablePrometheus", "webServer.tls"),
        _ADMIN,
    ),
}
"""Settings of the whole file."""
LOST = {
    "kcpBindPort": "agents connect by TCP",
    "quicBindPort": "agents connect by TCP",
    "tcpmuxHTTPConnectPort": "names are told by TLS and HTTP, not by CONNECT",
    "tcpmuxPassthrough": "names are told by TLS and HTTP, not by CONNECT",
    "subDomainHost": "write whole names into the routes of an sni listener",
    "custom404Page": _HTTP,
    "httpPlugins": _NO_PLUGINS,
    "sshTunnelGateway": "agents are netproxyd alone",
    "featureGates": "there is no virtual network",
    "virtualNet": "there is no virtual network",
    "auth.tokenSource": "write token: !file PATH",
    "auth.oidc": _OIDC,
    "visitors": _PEERS,
}
"""Settings of the whole file, by the beginning of their keys."""
PREFIXES_UNNEEDED = {
    "transport.quic.": "agents connect by TCP",
    "webServer.tls.": _ADMIN,
    "metadatas.": "no plug-in reads them",
    "proxies.metadatas.": "no plug-in reads them",
    "proxies.annotations.": "no dashboard shows them",
}
PROXY_LOST = {
    **dict.fromkeys(
        ("httpUser", "httpPassword", "locations", "hostHeaderRewrite", "routeByHTTPUser")
        + ("requestHeaders", "responseHeaders"),
        _HTTP,
    ),
    **dict.fromkeys(("loadBalancer", "healthCheck"), "a service has one target"),
    "transport.bandwidthLimit": "write limits: {rate: ...} at the port of the bridge",
    "subdomain": "write whole names into the routes of the bridge",
}
"""Settings of proxies, by the beginning of their keys."""
EMPTY = ("", False, 0)
"""Values by which frp means that nothing is wanted."""
