"""The forms of lines in an access file: text, JSON, the Common Log Format, and squid's own.

A line stands for a flow, whatever its protocol: programs that know HTTP proxies read each as a
CONNECT.  Deceiving characters of names are escaped.  Thread: any.  No file is read here.
"""

from __future__ import annotations

import time

from netproxy.errors import Reason
from netproxy.observe.escaping import escape
from netproxy.observe.records import LineFormat
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.flows import Record

SERVED, FORBIDDEN, UNAVAILABLE, TIMED_OUT = 200, 403, 503, 504
"""The status of HTTP that says how a flow has begun."""

_MONTHS = ("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec").split()
# The characters that would end a field of these forms, or a quoted one.
_BLANK = str.maketrans({" ": "%20", '"': "%22", "\\": "%5C"})


def make_format(form: str) -> Callable[[Record], bytes]:
    """Return what makes the lines of flows, in the form "text", "json", "clf" or "squid"."""
    if form == "clf":
        return common_line
    if form == "squid":
        return squid_line
    lines = LineFormat(journal=False)
    lines.configure(form)
    return lines.access_line


# Common Log Format of the NCSA server, which most analysers read:
#   host ident user [day/month/year:hour:minute:second zone] "request" status bytes
def common_line(record: Record) -> bytes:
    """Return the line of a flow; its time is that of the beginning."""
    flow = record.flow
    began = _common_time(int(time.time() - record.seconds))
    line = (
        f"{_field(flow.client.host)} - {_field(flow.user) or '-'} [{began}] "
        f'"CONNECT {_url(record)} HTTP/1.1" {status(record)} {record.received}\n'
    )
    return line.encode("utf-8", "backslashreplace")


# The native form of squid's access.log, which calamaris, sarg and others read:
#   time elapsed client result/status bytes method URL user hierarchy/peer type
def squid_line(record: Record) -> bytes:
    """Return the line of a flow; its time is that of the end, elapsed time is milliseconds."""
    flow, code = record.flow, status(record)
    result = {SERVED: "TCP_TUNNEL", FORBIDDEN: "TCP_DENIED"}.get(code, "TCP_MISS")
    if flow.network == "udp":
        result = result.replace("TCP", "UDP")
    upstream = record.member or record.upstream
    hierarchy = "HIER_DIRECT" if upstream == "direct" else "FIRSTUP_PARENT"
    if code == FORBIDDEN:
        hierarchy, upstream = "HIER_NONE", "-"
    elapsed = round(record.seconds * 1000)
    line = (
        f"{time.time():.3f} {elapsed:6} {_field(flow.client.host)} {result}/{code} "
        f"{record.received} CONNECT {_url(record)} {_field(flow.user) or '-'} "
        f"{hierarchy}/{_field(upstream)} -\n"
    )
    return line.encode("utf-8", "backslashreplace")


def status(record: Record) -> int:
    """Return the status that a client of HTTP got, or would have got, for a flow."""
    if record.number:
        return SERVED
    if record.decided:
        return FORBIDDEN
    return TIMED_OUT if record.ended.endswith(Reason.TIMEOUT.value) else UNAVAILABLE


def _url(record: Record) -> str:
    target = _field(str(record.flow.target))
    return target if record.flow.network == "tcp" else f"udp://{target}"


def _field(text: str) -> str:
    """Return a value that cannot be taken for several."""
    return escape(text).translate(_BLANK)


def _common_time(second: int) -> str:
    """Return local time.  strftime(3) would look at /etc/localtime each time."""
    local = time.localtime(second)
    sign, minutes = "-" if local.tm_gmtoff < 0 else "+", abs(local.tm_gmtoff) // 60
    return (
        f"{local.tm_mday:02}/{_MONTHS[local.tm_mon - 1]}/{local.tm_year:04}:"
        f"{local.tm_hour:02}:{local.tm_min:02}:{local.tm_sec:02} "
        f"{sign}{minutes // 60:02}{minutes % 60:02}"
    )
