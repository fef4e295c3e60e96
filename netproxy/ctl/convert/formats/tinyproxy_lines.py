"""The lines of tinyproxy.conf, and what becomes of those that stand alone."""

from __future__ import annotations

import re

from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.source import Source

UNNEEDED = {
    "user": "the service manager chooses the user (the unit has User=netproxy)",
    "group": "the service manager chooses the group",
    "pidfile": "the service manager knows the process",
    "syslog": "the service manager takes the log from standard error",
    "stathost": "netproxyctl status has the statistics",
    "viaproxyname": "netproxyd has a name of its own in Via",
    "basicauthrealm": "netproxyd has a realm of its own",
    "filterextended": "is read with Filter",
    "filtertype": "is read with Filter",
    "filtercasesensitive": "names are compared in lower case",
    "filterdefaultdeny": "is read with Filter",
    **dict.fromkeys(
        ("maxspareservers", "minspareservers", "startservers", "maxrequestsperchild"),
        "netproxyd starts threads as it needs them",
    ),
}
NO_PAGES = "netproxyd has no templates of pages; its errors are a line of text"
_NO_FIELDS = "netproxyd does not change the fields of requests"
_NO_REVERSE = "netproxyd is no reverse proxy for paths"
LOST = {
    "errorfile": (NO_PAGES, ""),
    "addheader": (_NO_FIELDS, ""),
    "xtinyproxy": (_NO_FIELDS, "send_proxy of an upstream names the client to it"),
    "anonymous": (_NO_FIELDS, "programs such as privoxy filter fields"),
    "disableviaheader": ("RFC 9110 asks for Via, which netproxyd always adds", ""),
    "filterurls": ("netproxyd sees no paths within TLS, and compares names alone", ""),
    "reversepath": (_NO_REVERSE, "use a web server"),
    "reverseonly": (_NO_REVERSE, "use a web server"),
    "reversemagic": (_NO_REVERSE, "use a web server"),
    "reversebaseurl": (_NO_REVERSE, "use a web server"),
}
# Switches that change nothing unless they are on.
SWITCHES = ("xtinyproxy", "disableviaheader", "filterurls", "reverseonly", "reversemagic")
TEMPLATES = {"defaulterrorfile": "default.html", "statfile": "stats.html"}
LEVELS = {
    **{"critical": "error", "error": "error", "warning": "warning"},
    **{"notice": "info", "connect": "info", "info": "info"},
}
_WORDS = re.compile(r'"([^"]*)"|(\S+)')


class Line(NamedTuple):
    """A directive and its words."""

    directive: Directive
    key: str
    """In lower case."""
    words: list[str]
    text: str
    """What follows the key."""

    @property
    def word(self) -> str:
        """The first word, "" for none."""
        return self.words[0] if self.words else ""


def read_lines(source: Source, notes: Notes) -> list[Line]:
    """Return the directives of a file."""
    lines = []
    for number, text in enumerate(source.text.splitlines(), 1):
        key, _, rest = text.strip().partition(" ") if "\t" not in text else _at_blank(text.strip())
        if not key or key.startswith("#"):
            continue
        words = [quoted or plain for quoted, plain in _WORDS.findall(rest)]
        shown = f"{key} {rest.strip()}"
        if key.lower() in ("basicauth", "upstream"):
            shown = re.sub(r"(:)[^@\s]*@", r"\1***@", shown)
        if key.lower() == "basicauth":
            shown = f"{key} {words[0] if words else ''} ***"
        lines.append(Line(notes.directive(source.name, number, shown), key.lower(), words, rest))
    return lines


def _at_blank(text: str) -> tuple[str, str, str]:
    key, *rest = text.split(None, 1)
    return key, " ", rest[0] if rest else ""
