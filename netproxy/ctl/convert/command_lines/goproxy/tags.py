"""Options of goproxy that need nothing here, and those that cannot be carried, with the reason."""

from __future__ import annotations

_MANAGED = "the service manager runs the daemon"
_LOG = "netproxyd writes its log to standard error, which the service manager keeps"
_TUNED = "netproxyd has a fixed value that suits"
_OWN_CIPHER = "the encryption of goproxy is its own: write tls on both sides"
_COMPRESSED = "the compression of goproxy is its own"
_SHADOWSOCKS = "netproxyd does not speak Shadowsocks"
_PEERS = "there are no connections from peer to peer"

UNNEEDED = {
    **dict.fromkeys(("--daemon", "--forever"), _MANAGED),
    **dict.fromkeys(("--log", "--nolog"), _LOG),
    **dict.fromkeys(
        ("--bind-refresh", "--self-port", "--udp-compat", "--dns-ttl", "-e", "--timeout"), _TUNED
    ),
    **dict.fromkeys(("--disable-ss", "--sniff-domain", "-L", "--local-bind-ips"), "is so"),
    **dict.fromkeys(("-g", "-G"), "a connection that comes back is noticed"),
    **dict.fromkeys(("-i", "--intelligent", "--always"), "there is no parent"),
    **dict.fromkeys(("-b", "-d", "--blocked", "--direct"), "there is no parent to choose"),
    **dict.fromkeys(
        ("--lb-retrytime", "--lb-timeout", "--lb-hashtarget", "--lb-onlyha", "--lb-method"),
        "there is one parent",
    ),
    **dict.fromkeys(("-S", "-A", "-C", "-K", "--ca", "--local-tls-single"), "nothing uses it"),
    **dict.fromkeys(("-T", "--parent-tls-single", "--udp-port", "-t"), "nothing uses it"),
    "--help": "prints the options",
}
"""Options that need no setting, if nothing else has used them."""
LOST = {
    **dict.fromkeys(("-z", "-Z"), _OWN_CIPHER),
    **dict.fromkeys(("-m", "-M", "--c", "--C"), _COMPRESSED),
    **dict.fromkeys(("-h", "-j", "-H", "-J", "--ssudp"), _SHADOWSOCKS),
    **dict.fromkeys(("--p2p",), _PEERS),
    **dict.fromkeys(("--dns-interface",), "name servers are asked by the route of the system"),
    **dict.fromkeys(("--rewrite",), "targets are not rewritten"),
    **dict.fromkeys(("--http-host", "--http-forwarded"), "no field of a message is changed"),
    **dict.fromkeys(("--ip-limit",), "limits are those of listeners and users"),
    **dict.fromkeys(("--auth-cache", "--auth-nouser"), "auth.url is asked in another way"),
    **dict.fromkeys(("--server-id", "--traffic-url", "--traffic-mode"), "flows are in the log"),
    **dict.fromkeys(("--forward",), "write dns.rules, for names that other servers know"),
}
"""Options that cannot be carried."""
COMMANDS = {
    "keygen": "openssl makes certificates (docs/TUNNELS.md)",
    "tools": "netproxyctl nat tells what NAT there is",
    "agent": "it belongs to a control panel",
    "rhttp": "netproxyd is not a reverse proxy: protocol: sni leads by names",
    "help": "prints the options",
    "ss": _SHADOWSOCKS,
    "mapx": "is not known",
}
"""Commands that cannot be carried."""
UNKNOWN_OPTION = "is not an option that is known"
