"""The command line of netproxyd."""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.admin.control.places import DefaultControl


class Options(NamedTuple):
    """The command line of netproxyd."""

    config: str  # the file, "" for none
    listen: Sequence[str]
    """URLs of listeners that replace those of the file."""
    default_listener: str
    """The URL of the listener if neither option nor file names one."""
    default_control: DefaultControl
    """The control socket if the file names none."""
    upstream: str | None
    """URLs of a chain that replaces all upstreams of the file, and its rules."""
    workers: str | None
    """Replaces `workers` of the file."""
    check: bool
    explain: str | None
    verbose: bool
    quiet: bool
    log_format: str | None
