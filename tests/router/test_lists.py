"""List files: the patterns and networks that their lines stand for, and errors."""

from __future__ import annotations

import os
import tracemalloc
from collections import deque
from pathlib import Path
from typing import Callable, Iterable

import pytest

from netproxy.errors import ConfigError
from netproxy.interfaces.networks import IpNetwork, NetworkSet
from netproxy.router import lists
from netproxy.router.lists import LINE_LIMIT, read_domains, read_networks
from netproxy.router.matchers import DomainSet
from netproxy.router.patterns import EXCERPT_LIMIT, parse_domain

Reader = Callable[[str], Iterable[object]]

# A line of a file of domains: the patterns that it stands for.
LINES = {
    # Patterns as in rules.
    "ads.example": "ads.example",
    "  ADS.example.\t": "ads.example",
    "*.tracker.example": "*.tracker.example",
    ".corp.example": ".corp.example",
    "keyword:ads": "keyword:ads",
    r"regex:^ad(?=[0-9])": r"regex:^ad(?=[0-9])",
    "bücher.example": "xn--bcher-kva.example",
    # Comments.
    "": "",
    "   \t": "",
    "# ads.example": "",
    "  #ads.example": "",
    "! Title: ads": "",
    "ads.example # since May": "ads.example",
    "ads.example\t#": "ads.example",
    "regex:^ad[#=] #": "regex:^ad[#=]",
    r"regex:^server=/x/": r"regex:^server=/x/",
    # Lines of hosts(5) are single names.
    "0.0.0.0 ads.example": "ads.example",
    "0.0.0.0\tads.example  Other.example # both": "ads.example other.example",
    "127.0.0.1 ads.example.": "ads.example",
    "::1 ads.example": "ads.example",
    ":: ads.example": "ads.example",
    "192.168.1.9 printer.lan printer": "printer.lan printer",
    "0.0.0.0 bücher.example": "xn--bcher-kva.example",
    # Names of the machine itself are no entries.
    "127.0.0.1 localhost": "",
    "127.0.0.1 localhost.localdomain localhost4 Local ads.example": "ads.example",
    "255.255.255.255 broadcasthost": "",
    "::1 localhost ip6-localhost ip6-loopback": "",
    "fe80::1%lo0 localhost": "",
    "ff02::1 ip6-allnodes": "",
    "0.0.0.0 0.0.0.0": "",
    # Lines of dnsmasq are names and all names below them.
    "server=/corp.example/10.0.0.1": ".corp.example",
    "server=/corp.example/10.0.0.1#5353": ".corp.example",
    "server=/corp.example/other.example/": ".corp.example .other.example",
    "server=/corp.example/10.0.0.1#5353 # by VPN": ".corp.example",
    "address=/ads.example/0.0.0.0": ".ads.example",
    "address=/.Ads.example/": ".ads.example",
    "local=/lan/": ".lan",
    "ipset=/a.example/b.example/set4,set6": ".a.example .b.example",
    "nftset=/a.example/b.example/4#inet#filter#set": ".a.example .b.example",
    "address = /ads.example/::": ".ads.example",
}


@pytest.mark.parametrize("line", LINES)
def test_line_of_domains_stands_for_its_patterns(tmp_path: Path, line: str) -> None:
    path = written(tmp_path, line.encode())
    assert list(read_domains(path)) == [parse_domain(pattern) for pattern in LINES[line].split()]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_formats_mix_with_any_line_ends(tmp_path: Path, start: bytes, end: bytes) -> None:
    lines = [
        b"first.example",
        b"",
        b"# x",
        b"0.0.0.0 host.example",
        b"server=/corp.example/10.0.0.1",
        b"*.below.example",
        b"last.example",
    ]
    for final in (b"", end):
        domains = DomainSet(read_domains(written(tmp_path, start + end.join(lines) + final)))
        asked = [
            f"{below}{name}.example"
            for name in ("first", "host", "corp", "below", "last")
            for below in ("", "www.")
        ]
        assert [name for name in asked if name in domains] == [
            "first.example",
            "host.example",
            "corp.example",
            "www.corp.example",
            "www.below.example",
            "last.example",
        ]


# A line: the message about it behind file and number.
BAD_LINES = {
    b"no domain": "'no domain' is not a valid domain name",
    b"example 0.0.0.0": "'example 0.0.0.0' is not a valid domain name",
    b"0.0.0.0": "'0.0.0.0' is an address, not a domain name",
    b"0.0.0.0 *.ads.example": "'*.ads.example' is not a valid domain name",
    b"0.0.0.0 .ads.example": "'.ads.example' is not a valid domain name",
    b"0.0.0.0 good.example bad..example": "'bad..example' is not a valid domain name",
    b"10.0.0.0/8": "'10.0.0.0/8' is not a valid domain name",
    b"||ads.example^": "'||ads.example^' is not a valid domain name",
    b"ads.example#comment": "'ads.example#comment' is not a valid domain name",
    b"server=10.0.0.1": "'server=10.0.0.1' names no domain (expected option=/name/value)",
    b"server=/10.0.0.1": "'server=/10.0.0.1' names no domain (expected option=/name/value)",
    b"server=x/a.example/10.0.0.1": "'server=x/a.example/10.0.0.1' names no domain"
    " (expected option=/name/value)",
    b"server=": "'server=' names no domain (expected option=/name/value)",
    b"server=//10.0.0.1": "'' is not a valid domain name",
    b"address=/#/0.0.0.0": "'#' is not a valid domain name",
    b"cname=/a.example/b.example": "'cname=/a.example/b.example' is not a valid domain name",
    b"regex:(": "'regex:(' is not a valid regular expression: "
    "missing ), unterminated subpattern at position 0",
    b"a\0b": "'a\\x00b' is not a valid domain name",
    b"::1\0 a.example": "'::1\\x00 a.example' is not a valid domain name",
    b"\xff\xfea": "not UTF-8",
    b"b\xfccher.example": "not UTF-8",
    b"# b\xfccher": "not UTF-8",
    b"a" * 300: f"'{'a' * (EXCERPT_LIMIT - 3)}...' is not a valid domain name",
    b"a" * (LINE_LIMIT + 1): f"the line is longer than {LINE_LIMIT} bytes",
    b"#" * (LINE_LIMIT * 3): f"the line is longer than {LINE_LIMIT} bytes",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: ascii(line)[:40])
def test_any_other_line_of_domains_is_an_error_with_its_number(tmp_path: Path, line: bytes) -> None:
    path = written(tmp_path, b"good.example\r\n\n# comment\n" + line + b"\nother.example\n")
    with pytest.raises(ConfigError) as caught:
        DomainSet(read_domains(path))
    assert str(caught.value) == f"{path}:4: {BAD_LINES[line]}"


def test_list_of_networks_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        b"\xef\xbb\xbf10.0.0.0/8\r\n# office\n! home\n\n"
        b" 192.0.2.7 # printer\nfd00::/8\t#\n2001:DB8::1",
    )
    assert list(read_networks(path)) == [
        IpNetwork.parse(text) for text in ("10.0.0.0/8", "192.0.2.7", "fd00::/8", "2001:db8::1")
    ]
    networks = NetworkSet(read_networks(path))
    assert "10.1.2.3" in networks and "2001:db8::1" in networks and "192.0.2.8" not in networks


BAD_NETWORKS = {
    b"10.0.0.1/8": "'10.0.0.1/8' is not a valid network: bits behind the prefix are set"
    " (write 10.0.0.0/8)",
    b"10.0.0.0/33": "'10.0.0.0/33' is not a valid network: the prefix is longer than 32 bits",
    b"\xff": "not UTF-8",
    b"1" * (LINE_LIMIT + 1): f"the line is longer than {LINE_LIMIT} bytes",
} | {
    line: f"'{excerpt}' is not a valid network (expected an address or CIDR, such as 10.0.0.0/8)"
    for line, excerpt in {
        b"10.0.0.0/8 11.0.0.0/8": "10.0.0.0/8 11.0.0.0/8",
        b"ads.example": "ads.example",
        b"10.0.0.0-10.0.0.9": "10.0.0.0-10.0.0.9",
        b"10.0.0.1\0": "10.0.0.1\\x00",
    }.items()
}


@pytest.mark.parametrize(
    ("line", "message"), BAD_NETWORKS.items(), ids=lambda value: ascii(value)[:40]
)
def test_line_that_is_no_network_is_an_error_with_its_number(
    tmp_path: Path, line: bytes, message: str
) -> None:
    """Hazard 79."""
    path = written(tmp_path, b"10.0.0.0/8\n" + line + b"\n")
    with pytest.raises(ConfigError) as caught:
        NetworkSet(read_networks(path))
    assert str(caught.value) == f"{path}:2: {message}"


@pytest.mark.parametrize("reader", [read_domains, read_networks])
def test_file_that_cannot_be_read_is_an_error_with_its_path(tmp_path: Path, reader: Reader) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, reason in (
        (tmp_path / "missing", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "fifo", "it is not a regular file"),
    ):
        with pytest.raises(ConfigError) as caught:
            list(reader(str(path)))
        assert str(caught.value) == f"{path}: cannot be read: {reason}"


@pytest.mark.parametrize("reader", [read_domains, read_networks])
def test_empty_file_has_no_entries(tmp_path: Path, reader: Reader) -> None:
    for text in (b"", b"\n", b"\xef\xbb\xbf", b"# nothing\n\n"):
        assert list(reader(written(tmp_path, text))) == []


@pytest.mark.parametrize(
    ("reader", "lines", "line"),
    [
        (read_domains, [b"a.example", b"0.0.0.0 b.example c.example", b"d.example"], 3),
        (read_domains, [b"server=/a/b/c/d/10.0.0.1"], 1),
        (read_networks, [b"10.0.0.1", b"10.0.0.2", b"# more", b"10.0.0.3", b"10.0.0.4"], 5),
    ],
)
def test_too_many_entries_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Reader, lines: list[bytes], line: int
) -> None:
    path = written(tmp_path, b"\n".join(lines))
    monkeypatch.setattr(lists, "ENTRY_LIMIT", 4)
    assert len(list(reader(path))) == 4
    monkeypatch.setattr(lists, "ENTRY_LIMIT", 3)
    with pytest.raises(ConfigError) as caught:
        list(reader(path))
    assert str(caught.value) == f"{path}:{line}: the file has more than 3 entries"


def test_list_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = written(tmp_path, b"".join(b"ads%d.example.com\n" % number for number in range(5000)))
    # The first pass fills the caches of the library.
    deque(read_domains(path), 1)
    tracemalloc.start()
    try:
        assert deque(read_domains(path), 1)[0].text == "ads4999.example.com"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert Path(path).stat().st_size > 90_000
    assert peak < 50_000


def test_abandoned_reader_closes_its_file(tmp_path: Path) -> None:
    """A check after each test counts descriptors."""
    reader = iter(read_domains(written(tmp_path, b"a.example\nb.example\n")))
    assert next(reader) == parse_domain("a.example")


def written(folder: Path, text: bytes) -> str:
    """Write a list and return its path."""
    path = folder / "list.txt"
    path.write_bytes(text)
    return str(path)
