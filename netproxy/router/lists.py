"""List files: domains and networks by the thousand, a line at a time.

A file of domains may hold patterns as rules do (patterns.py), lines of hosts(5)
and lines of dnsmasq, mixed.  What is none of these is a ConfigError with the
file and the line, since a list that is half read would let half of it through.
Read where the configuration is, at start and reload; never for a connection.
"""

from __future__ import annotations

from typing import Iterator

from netproxy.errors import ConfigError
from netproxy.interfaces.networks import IpNetwork
from netproxy.router.patterns import (
    APEX,
    SUFFIX,
    DomainPattern,
    is_address,
    parse_domain,
    parse_name,
    parse_network,
    shown,
)

LINE_LIMIT = (
    8192  # bytes: a hosts line with thirty of the longest names; a file that is no list ends here
)
ENTRY_LIMIT = 2_000_000  # ten times a large public list, and 70 MiB: a mistake must not take all memory there is
_BOM = b"\xef\xbb\xbf"
_BLANKS = " \t\r\n"
# options of dnsmasq(8) written as option=/name/name/value
_DNSMASQ = frozenset(("server", "address", "local", "ipset", "nftset"))
# what hosts files say of the machine itself
_OWN = frozenset(
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
    """What DomainSet is made of; ConfigError with the place."""
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
    """What NetworkSet is made of: a network or a single address on each line; ConfigError with the place."""
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
        raise ConfigError(f"more than {ENTRY_LIMIT:,} entries", f"{path}:{number}")


def _read_lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines that say something, with their numbers, without comment and blanks around; one in memory at a time."""
    number = 0
    try:
        with open(path, "rb") as file:
            while raw := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(raw) > LINE_LIMIT:
                    raise ConfigError(f"a line of more than {LINE_LIMIT} bytes", f"{path}:{number}")
                line = (
                    (raw.removeprefix(_BOM) if number == 1 else raw).decode("utf-8").strip(_BLANKS)
                )
                if line and line[0] not in "#!":
                    yield number, _without_comment(line) if "#" in line else line
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", path) from error
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8", f"{path}:{number}") from error


def _without_comment(line: str) -> str:
    """A comment begins with a # behind a blank: one within a word is dnsmasq's, server#port."""
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
    """Of /name/name/value: each name means itself and all below it, with a dot before it or without."""
    before, *names = value.split("/")[:-1] or [line]
    if before or not names:
        raise ValueError(f"'{shown(line)}' names no domain: write it as option=/name/value")
    return [DomainPattern(SUFFIX, parse_name(name.removeprefix("."))) for name in names]


def _is_own(word: str) -> bool:
    return word.lower() in _OWN or word.lower().startswith("ip6-") or is_address(word)
