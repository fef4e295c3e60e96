"""The arguments of `netproxyctl convert`, without the converters, which no other command needs."""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import ArgumentParser

NAMES = ("dante", "3proxy", "frp", "goproxy", "gost", "redsocks", "squid", "tinyproxy", "url")
"""The formats, as the keys of netproxy.ctl.convert.registry.FORMATS."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add(
        "--from",
        dest="format",
        metavar="FORMAT",
        default="",
        help=f"{', '.join(NAMES)} (default: by the name of the file, else by its content)",
    )
    add("-o", "--output", metavar="FILE", help="a new file to write (default: standard output)")
    add("--json", action="store_true", help="print the configuration and the notes as JSON")
    add(
        "words",
        metavar="FILE|URL|-- COMMAND",
        nargs="...",
        help="a file, - for standard input, URLs of proxies, or behind -- a command of gost or "
        "goproxy",
    )
