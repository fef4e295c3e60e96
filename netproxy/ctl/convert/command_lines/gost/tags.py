"""Parameters of gost that need nothing here, and what cannot be carried, with the reason."""

from __future__ import annotations

_TUNED = "netproxyd has a fixed value that suits"
_NO_CONTENT = "no field of a message is changed"
_OF_TRANSPORT = "is about a transport that is not carried"
_PROGRAM = "no program is run and no service asked for this"

UNNEEDED = {
    **dict.fromkeys(
        ("readBufferSize", "udpBufferSize", "backlog", "nodelay", "rbuf", "wbuf", "retry")
        + ("retries", "readTimeout", "bufferSize", "delay", "dataQueueSize", "tcp", "idle"),
        _TUNED,
    ),
    **dict.fromkeys(("keepAlive", "keepAlivePeriod"), "idle flows end by timeouts"),
    **dict.fromkeys(("notls", "comp"), "is about an addition of gost to SOCKS5"),
    **dict.fromkeys(("relay", "disable4a"), "is the way in which netproxyd does it"),
    **dict.fromkeys(
        ("observePeriod", "observer.resetTraffic", "enableStats", "labels", "logger"),
        "netproxyd counts and records all flows",
    ),
    **dict.fromkeys(("sniffing.timeout", "sniffing.fallback"), "is so"),
    **dict.fromkeys(("sniffing.websocket", "sniffing.websocket.sampleRate"), "records no content"),
    **dict.fromkeys(
        ("limiter.refreshInterval", "limiter.cleanupInterval", "limiter.scope")
        + ("limiterRefreshInterval", "limiterCleanupInterval"),
        _TUNED,
    ),
    **dict.fromkeys(("strategy", "maxFails", "failTimeout"), "there is one target"),
    "async": "expired answers serve while their servers fail (dns.serve_stale)",
}
"""Parameters that need no setting."""
LOST = {
    **dict.fromkeys(("probeResist", "knock"), "a wrong login is answered as such"),
    **dict.fromkeys(
        ("header", "proxyAgent", "authBasicRealm", "agent", "compression"), _NO_CONTENT
    ),
    **dict.fromkeys(
        ("host", "path", "authorizePath", "pushPath", "pullPath", "ping", "secret"), ""
    ),
    **dict.fromkeys(("quotas",), "quotas are those of users (users.NAME.limits.quota)"),
    **dict.fromkeys(("limiter.conn.in", "limiter.conn.out"), "no rate is that of one connection"),
    **dict.fromkeys(("rlimiter",), "the rate of new connections is that of a client or a user"),
    **dict.fromkeys(("netns", "netns.out"), "the service manager chooses the network namespace"),
    **dict.fromkeys(("clientIP",), "servers are not told the clients' addresses"),
    **dict.fromkeys(("tor",), "the commands of Tor are not passed on"),
    **dict.fromkeys(("mitm.certFile", "mitm.keyFile", "mitm.alpn", "mitm.bypass"), _NO_CONTENT),
    **dict.fromkeys(("preUp", "postUp", "preDown", "postDown"), "the unit runs commands"),
    **dict.fromkeys(("peer", "ip"), "a file of nodes is not read: write a group of upstreams"),
    **dict.fromkeys(("rejectUnknownSNI", "serverNames"), "a certificate is shown to all"),
    **dict.fromkeys(("auther", "observer", "recorder", "plugin"), _PROGRAM),
    "fastest_count": "balance: least-latency prefers the members that are fast",
}
"""Parameters that cannot be carried; "" for those of a transport."""
OF_TRANSPORT = _OF_TRANSPORT
UNKNOWN_PARAMETER = "is not a parameter that is known"

_NO_TRANSPORT = "connections are within TCP, or TLS, alone"
_HTTP2 = "HTTP/2 and HTTP/3 are not spoken: write HTTP within TLS (https)"
_SHADOWSOCKS = "netproxyd does not speak Shadowsocks"
_DEVICE = "netproxyd makes no network device"
_SSH = "an SSH server is not what netproxyd is"
PROTOCOLS = {
    **dict.fromkeys(("ss", "ss2", "ssu"), _SHADOWSOCKS),
    **dict.fromkeys(("tun", "tap", "tungo", "router"), _DEVICE),
    **dict.fromkeys(("http2", "masque"), _HTTP2),
    **dict.fromkeys(("sshd",), _SSH),
    "relay": "the protocol relay is gost's own: write socks5 on both sides",
    "forward": "the server names the target: write it here as well",
    "tunnel": "the tunnels of gost are its own: see docs/TUNNELS.md for those of netproxyd",
    "file": "netproxyd serves no files",
    "unix": "a UNIX socket is led on as it is: write protocol: tcp, listen and target",
    "serial": "a serial line is not a network",
    "sni": "a proxy by names alone has no targets that it may lead to",
    "runix": "a UNIX socket is no port of a tunnel",
    "api": "netproxyctl asks the daemon, through its control socket",
    "metrics": "write metrics and metrics_token",
    "stdio": "netproxyd serves sockets",
}
"""Protocols that cannot be carried."""
TRANSPORTS = {
    **dict.fromkeys(("h2", "h2c", "h3", "http2", "http3", "h3-masque"), _HTTP2),
    "ssh": _SSH,
}
"""Transports that cannot be carried, with another reason than the common one."""
NO_TRANSPORT = _NO_TRANSPORT
ADVICE = {
    "sni": "write a listener with protocol: sni, and a route for each name",
    "relay": "or make it a tunnel: tunnel.bridge and tunnel.agent",
    "ss": "write socks5 with TLS on both sides",
    "ssu": "write socks5 with TLS on both sides",
}
"""What to do instead, by protocol."""


def reason(protocol: str, transport: str) -> str:
    """Return why a listener or a proxy of this kind cannot be carried."""
    if protocol in PROTOCOLS:
        return PROTOCOLS[protocol]
    if transport not in ("", "tcp", "tls"):
        return f"{transport}: {TRANSPORTS.get(transport, NO_TRANSPORT)}"
    return f"the protocol {protocol} is not known"
