"""The formats that can be converted, and how a file tells its format."""

from __future__ import annotations

import os
import re

from netproxy.ctl.convert.command_lines.commands import is_program
from netproxy.ctl.convert.command_lines.goproxy.convert import COMMANDS
from netproxy.ctl.convert.command_lines.goproxy.convert import STYLE as GOPROXY
from netproxy.ctl.convert.command_lines.goproxy.convert import convert as convert_goproxy
from netproxy.ctl.convert.command_lines.gost.convert import STYLE as GOST
from netproxy.ctl.convert.command_lines.gost.convert import convert as convert_gost
from netproxy.ctl.convert.dante.convert import convert as convert_dante
from netproxy.ctl.convert.formats import redsocks, tinyproxy, url
from netproxy.ctl.convert.frp.convert import convert as convert_frp
from netproxy.ctl.convert.source import ConversionError
from netproxy.ctl.convert.squid.convert import convert as convert_squid
from netproxy.ctl.convert.threeproxy.convert import convert as convert_3proxy
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Sequence, TypeAlias

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.source import Source

Converter: TypeAlias = "Callable[[Source, Draft, Notes], None]"
"""Fills a draft with what a source says.  Raises ConversionError."""


class Format(NamedTuple):
    """A format: its converter, and what its files look like."""

    converter: Converter
    names: str
    """An expression for the names of its files."""
    content: str
    """An expression for lines that only its files have."""


FORMATS: dict[str, Format] = {
    "dante": Format(
        convert_dante,
        r"(danted|sockd).*\.conf",
        r"(internal|external|socksmethod|clientmethod|logoutput|user\.\w*privileged):"
        r"|(client|socks) (pass|block)\b",
    ),
    "3proxy": Format(
        convert_3proxy,
        r"3proxy",
        r"(auth (none|iponly|strong)|(allow|deny) [*\w,]+( [*\d./,-]+)*$|(proxy|socks|admin|auto)"
        r"( -\S+)*$|(tcppm|udppm) |nscache \d|users \w+:(CL|CR|NT):|flush$|parent \d+ )",
    ),
    "frp": Format(
        convert_frp,
        r"frp[sc]",
        r"(serverAddr|serverPort|bindPort|localPort|remotePort|auth\.token)\s*=|\[\[proxies\]\]"
        r"|\[common\]|(server_addr|server_port|bind_port|remote_port|local_port)\s*=",
    ),
    "goproxy": Format(
        convert_goproxy,
        r"goproxy",
        rf"(.*[\s/=\"'])?(go)?proxy(\.exe)?[\"']?,?\s+[\"']?({COMMANDS})\b|({COMMANDS})$",
    ),
    "gost": Format(
        convert_gost,
        r"gost",
        r"(.*[\s/=\"'])?gost\S*\s.*-[LF]\b|.*image: \S*gost"
        r"|\"?(ServeNodes|ChainNodes|connector|dialer|forwarder)\"?:",
    ),
    "redsocks": Format(
        redsocks.convert,
        r"redsocks",
        r"(redsocks|redudp|dnstc|dnsu2t|base)\s*\{|local_(ip|port)\s*=|redirector\s*=",
    ),
    "squid": Format(
        convert_squid,
        r"squid.*\.conf",
        r"(acl \S+ \w+ |http_access (allow|deny) |http_port |cache_(peer|dir|mem) |"
        r"refresh_pattern |coredump_dir |auth_param )",
    ),
    "tinyproxy": Format(
        tinyproxy.convert,
        r"tinyproxy",
        r"(?i)(Port \d+|Listen [\d.:]+|Allow \S+|ConnectPort \d+|MaxClients \d+|BasicAuth \S+ \S+"
        r"|LogLevel \w+|Upstream \w+ \S+|Timeout \d+)\s*$",
    ),
    "url": Format(url.convert, r"://", r"\w[\w+.-]*://[^\s/]+:\d+\S*$"),
}
"""By the word for --from."""


def form_of_words(words: Sequence[str]) -> str:
    """Return the format of a command line or of URLs; "" for neither."""
    if all(url.is_url(word) for word in words):
        return "url"
    for name, style in (("gost", GOST), ("goproxy", GOPROXY)):
        if len(words) > 1 and is_program(words[0], style.program):
            return name
    return ""


def guess(source: Source) -> str:
    """Return the format of a source.  Raises ConversionError."""
    base = os.path.basename(source.path)
    for name, form in FORMATS.items():
        if form.names and re.search(form.names, base):
            return name
    lines = [line.strip() for line in source.text.splitlines()]
    scores = {
        name: sum(bool(re.match(form.content, line)) for line in lines)
        for name, form in FORMATS.items()
        if form.content
    }
    best = max(scores, key=scores.__getitem__)
    if not scores[best]:
        raise ConversionError(f"{source.name}: unknown format: say --from {'|'.join(FORMATS)}")
    return best
