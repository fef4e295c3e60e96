"""Options of gost beside -L and -F."""

from __future__ import annotations

from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.notes import Directive, Notes

_REMOTE_METRICS = ("other machines need a token for the metrics", "write metrics and metrics_token")
_UNNEEDED = {
    **{"V": "prints the version", "O": "prints the configuration", "h": "prints the options"},
    "help": "prints the options",
    "P": "is for developers of gost",
}
_LOST = {
    "api": "netproxyctl asks the daemon, through its control socket",
    "M": "write mark: into the first upstream (so_mark does so in version 3)",
    "I": "write bind: into the first upstream (interface does so in version 3)",
}


def note_option(name: str, value: str, directive: Directive, draft: Draft, notes: Notes) -> None:
    """Carry an option, or note why it is not carried."""
    if name in ("D", "DD"):
        draft.put("log.level", "debug", directive)
        notes.carried(directive)
    elif name == "metrics":
        address = value.partition("?")[0]
        login, _, address = address.rpartition("@")
        host, _, port = address.rpartition(":")
        if login or not networks.is_loopback(host):
            notes.lost(directive, *_REMOTE_METRICS)
        else:
            draft.put("metrics", networks.listen_text(host.strip("[]"), port), directive)
            notes.carried(directive)
    elif name in _UNNEEDED:
        notes.unneeded(directive, _UNNEEDED[name])
    else:
        notes.lost(directive, _LOST.get(name, "is not an option that is known"))
