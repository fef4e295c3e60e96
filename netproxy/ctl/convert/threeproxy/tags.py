"""Commands of 3proxy.cfg that need no setting, and those that cannot be carried."""

from __future__ import annotations

_MANAGED = "the service manager does this"
_LOG = "netproxyd writes its log to standard error, which the service manager keeps"
_TUNED = "netproxyd has a fixed value that suits"
_NO_CONTENT = "netproxyd looks at no content"
_PLUGIN = "plug-ins are of 3proxy alone"

UNNEEDED = {
    **dict.fromkeys(
        ("daemon", "service", "pidfile", "setuid", "setgid", "chroot", "stacksize", "config"),
        _MANAGED,
    ),
    **dict.fromkeys(("writable", "monitor"), "netproxyctl reload reads the file again"),
    **dict.fromkeys(("logformat", "rotate", "archiver", "logdump"), _LOG),
    **dict.fromkeys(("backlog", "filtermaxsize", "nscache6", "authcache"), _TUNED),
    **dict.fromkeys(("ssl_certcache", "ssl_nomitm", "ssl_nocli", "ssl_noclient"), "is so"),
    "fakeresolve": "an upstream resolves names itself if its scheme says so",
    "counter": "netproxyd counts what users move (state)",
    "delimchar": "is about FTP and POP3",
}
"""Commands and why they need no setting."""
LOST = {
    **dict.fromkeys(("pcre", "pcre_rewrite", "pcre_extend", "pcre_options"), _NO_CONTENT),
    **dict.fromkeys(("ssl_mitm",), "netproxyd opens no TLS of clients"),
    **dict.fromkeys(("ssl_cli", "ssl_client"), "TLS to targets is not added"),
    **dict.fromkeys(
        ("pop3p", "smtpp", "ftppr", "imapp", "msnpr", "icqpr"),
        "netproxyd speaks no mail and no FTP: use tcppm",
    ),
    "plugin": _PLUGIN,
    "system": "the service manager runs commands (ExecStartPre=)",
    "dialer": "no command is run for a name",
    "radius": "auth.command can ask a program that speaks RADIUS",
    "authnserver": "the names of clients are not looked up",
    "maxseg": "the system chooses the segment size",
    "redirect": "targets are not rewritten",
    "admin": "the statistics are netproxyctl, and the status page of the metrics listener",
    "noconnlim": "limits are those of users",
}
"""Commands and why they cannot be carried."""
