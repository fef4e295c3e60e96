"""Reads list files: domains and networks by the thousand, one line at a time.

A file of domains may mix patterns as in rules (patterns.py), lines of hosts(5) and lines
of dnsmasq(8).  Any other line is a ConfigError with file and line number: half a list
would let half of what it blocks through.  Files are read at start and reload, on the
thread that builds the configuration, never for a connection.
"""

from __future__ import annotations

from netproxy.errors import ConfigError, open_regular
from netproxy.router.patterns import (
    APEX,
    SUFFIX,
    DomainPattern,
    excerpt,
    is_address,
    parse_domain,
    parse_name,
    parse_network,
)
from netproxy.typed import TYPE_CHECKING, Iterator

if TYPE_CHECKING:
    from netproxy.interfaces.networks import IpNetwork

# Bytes of a line: enough for a hosts line with thirty of the longest names.  A file that is not
# a list ends here.
LINE_LIMIT = 8192
# Ten times a large public list, and 70 MiB: a mistake must not take all memory.
ENTRY_LIMIT = 2_000_000
_BOM = b"\xef\xbb\xbf"
_BLANKS = " \t\r\n"
# Options of dnsmasq(8) that are written as option=/name/name/value.
_DNSMASQ = frozenset(("server", "address", "local", "ipset", "nftset"))
# Names by which hosts files describe the machine itself; they are not entries of a list.
_OWN_NAMES = frozenset(
    (
        "localhost",
        "localhost.localdomain",
        "localhost4",
        "localhost4.localdomain4",
        "localhost6",
        "localhost6.localdomain6",
        "local",
        "broadcasthost",
    )
)


def read_domains(path: str) -> Iterator[DomainPattern]:
    """Yield the patterns of a file of domains.  Raises ConfigError with file and line."""
    entries = 0
    for number, line in _read_lines(path):
        try:
            patterns = _parse_domains(line)
        except ValueError as error:
            raise ConfigError(str(error), f"{path}:{number}") from error
        entries += len(patterns)
        _check_entries(entries, path, number)
        yield from patterns


def read_networks(path: str) -> Iterator[IpNetwork]:
    """Yield the networks of a file with one network or address on each line.

    Raises ConfigError with file and line.
    """
    entries = 0
    for number, line in _read_lines(path):
        try:
            network = parse_network(line)
        except ValueError as error:
            raise ConfigError(str(error), f"{path}:{number}") from error
        entries += 1
        _check_entries(entries, path, number)
        yield network


def _check_entries(entries: int, path: str, number: int) -> None:
    if entries > ENTRY_LIMIT:
        raise ConfigError(f"the file has more than {ENTRY_LIMIT:,} entries", f"{path}:{number}")


def _read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield the lines with content and their numbers, without comments and outer blanks.

    Only one line at a time is in memory.
    """
    number = 0
    try:
        with open_regular(path) as file:
            while raw := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(raw) > LINE_LIMIT:
                    raise ConfigError(
                        f"the line is longer than {LINE_LIMIT} bytes", f"{path}:{number}"
                    )
                if number == 1:
                    raw = raw.removeprefix(_BOM)
                line = raw.decode("utf-8").strip(_BLANKS)
                if line and line[0] not in "#!":
                    yield number, _without_comment(line) if "#" in line else line
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", path) from error
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8", f"{path}:{number}") from error


def _without_comment(line: str) -> str:
    """Return a line without its comment.

    A comment begins with a # behind a blank; a # within a word is dnsmasq's server#port.
    """
    at = line.find("#")
    while at > 0 and line[at - 1] not in _BLANKS:
        at = line.find("#", at + 1)
    return line if at < 0 else line[:at].rstrip(_BLANKS)


def _parse_domains(line: str) -> list[DomainPattern]:
    option, equals, value = line.partition("=")
    if equals and option.rstrip(_BLANKS) in _DNSMASQ:
        return _parse_dnsmasq(line, value.lstrip(_BLANKS))
    words = line.split()
    if len(words) > 1 and is_address(words[0]):
        return [DomainPattern(APEX, parse_name(word)) for word in words[1:] if not _is_own(word)]
    return [parse_domain(line)]


def _parse_dnsmasq(line: str, value: str) -> list[DomainPattern]:
    """Parse /name/name/value: each name, with or without a dot before it, is a suffix."""
    before, *names = value.split("/")[:-1] or [line]
    if before or not names:
        raise ValueError(f"'{excerpt(line)}' names no domain (expected option=/name/value)")
    return [DomainPattern(SUFFIX, parse_name(name.removeprefix("."))) for name in names]


def _is_own(word: str) -> bool:
    return word.lower() in _OWN_NAMES or word.lower().startswith("ip6-") or is_address(word)
