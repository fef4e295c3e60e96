"""DNS messages and names, and what dnspython makes of them when they are written anew."""

from __future__ import annotations

import ipaddress
import struct

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype

from netproxy.protocol import dns as codec
from netproxy.protocol import dns_message
from netproxy.protocol.dns import Question
from tests.fuzz.target import Target, accepted

_TRAILING = b"\xc0\x0c\0\1"
_LIMIT = 512
# A record takes 11 bytes at least: the root and the fixed fields.
_RECORD_LEAST = 11
# One octet of a name takes four letters: \DDD.
_TEXT_LIMIT = 4 * 255
_PLAIN = set(range(0x21, 0x7F)) - set(b".:\\")


def _text(labels: tuple[bytes, ...]) -> str:
    """Write the labels of dnspython as codec.Question has them."""
    return ".".join(
        "".join(chr(octet) if octet in _PLAIN else f"\\{octet:03}" for octet in label.lower())
        for label in labels[:-1]
    )


def _check_name(data: bytes) -> None:
    """A name in a question, in a CNAME behind it, and as text."""
    _check_question(data)
    _check_alias(data)
    text = data.decode("latin-1")
    try:
        query = codec.encode_query(1, Question(text, codec.A, codec.IN))
    except ValueError:
        return
    message = dns.message.from_wire(query)
    assert message.question[0].name.to_wire() == query[codec.HEADER_SIZE : -4 - codec.OPT_SIZE]
    question, end = codec.parse_question(query)
    assert end == len(query) - codec.OPT_SIZE
    assert (
        codec.encode_query(1, question) == query.lower()[:12] + query[12:end].lower() + query[end:]
    )


def _check_question(data: bytes) -> None:
    header = struct.pack(">6H", 1, codec.RD, 1, 0, 0, 0)
    message = header + data
    question = accepted(codec.parse_question, message)
    try:
        name, size = dns.name.from_wire(message, codec.HEADER_SIZE)
        # Nothing precedes the question that a pointer could lead to.
        whole = len(message) >= codec.HEADER_SIZE + size + 4 and len(name.to_wire() or b"") == size
    except dns.exception.DNSException:
        whole = False
    assert (question is not None) == whole, (question, message)
    if question is not None:
        (text, qtype, qclass), end = question
        assert (text, end) == (_text(name.labels), codec.HEADER_SIZE + size + 4)
        assert (qtype, qclass) == struct.unpack_from(">HH", message, end - 4)
        assert len(text) <= _TEXT_LIMIT
        assert codec.parse_question(message + _TRAILING) == question


def _check_alias(data: bytes) -> None:
    """An answer with one CNAME, whose target is followed by an address of that name."""
    question = Question("a.example", codec.A, codec.IN)
    query = codec.encode_query(1, question, edns=False)
    flags = struct.pack(">H", codec.QR)
    record = b"\xc0\x0c" + struct.pack(">HHIH", codec.CNAME, codec.IN, 60, len(data)) + data
    at = len(query) + len(record) - len(data)
    address = struct.pack(">HHHIH4s", 0xC000 | at, codec.A, codec.IN, 30, 4, b"\x7f\0\0\1")
    counts = struct.pack(">4H", 1, 2, 0, 0)
    message = query[:2] + flags + counts + query[12:] + record + address
    answer = accepted(codec.parse_answer, message, question)
    try:
        target, size = dns.name.from_wire(message, at)
    except dns.exception.DNSException:
        assert answer is None, (answer, message)
        return
    if size != len(data):
        assert answer is None
    elif answer is not None and _text(target.labels) != question.name:
        # dnspython follows a pointer into the header, too: we refuse that name.
        assert answer == (codec.NOERROR, ["127.0.0.1"], 30), (answer, target)


def _check_message(data: bytes) -> None:
    """A message of a client or a server, as the forwarder and the resolver treat it."""
    header = accepted(codec.parse_header, data)
    assert (header is None) == (len(data) < codec.HEADER_SIZE)
    records = accepted(_records, data)
    if records is not None:
        assert len(records) * _RECORD_LEAST <= len(data)
        assert all(record.start < record.rdata <= record.end <= len(data) for record in records)
        _check_against_dnspython(data, records)
        _check_kept(data)
    if header is not None:
        _check_as_query(data)
        _check_as_answer(data)


def _records(data: bytes) -> list[codec.Record]:
    return list(codec.parse_records(data))


def _parse(data: bytes) -> dns.message.Message | None:
    try:
        # dnspython has rules of its own for updates and the like.
        query = data[:2] + bytes((data[2] & 0x87,)) + data[3:]
        return dns.message.from_wire(query, ignore_trailing=True, one_rr_per_rrset=True)
    except (dns.exception.DNSException, ValueError):
        # It reads more of a message than we do: every type's RDATA.
        return None


def _check_against_dnspython(data: bytes, records: list[codec.Record]) -> None:
    message = _parse(data)
    if message is None or data[2] & 0x78:
        return
    for section, rrsets in ((codec.ANSWER, message.answer), (codec.AUTHORITY, message.authority)):
        ours = [(record.rtype, record.ttl) for record in records if record.section == section]
        theirs = [(int(rrset.rdtype), int(rrset.ttl)) for rrset in rrsets]
        assert ours == theirs, (ours, theirs)
    opt = accepted(codec.find_opt, data)
    if opt is not None:
        assert message.edns == 0 or data[opt.rdata - 5]
        assert message.payload == opt.rclass


def _check_as_query(data: bytes) -> None:
    """A query: its key, errors that answer it, and what fits in a datagram."""
    for code in (codec.FORMERR, codec.SERVFAIL):
        error = codec.encode_error(data, code)
        if data[2] & 0x78:
            # dnspython has rules of its own for updates.
            continue
        message = dns.message.from_wire(error)
        assert message.id == int.from_bytes(data[:2], "big")
        assert message.flags & dns.flags.QR and (int(message.rcode()) == code)
        assert error[codec.HEADER_SIZE :].startswith(data[codec.HEADER_SIZE : _end(data)])
    assert dns_message.udp_size(data) >= codec.UDP_LIMIT
    key = dns_message.cache_key(data)
    if key is not None:
        # Another ID and spelling: the same question.
        assert dns_message.cache_key(b"\xff\xff" + data[2:]) == key
        assert len(key) <= len(data)
        question, _ = codec.parse_question(data)
        assert codec.parse_question(dns_message.aged(data, (), data, 0))[0] == question


def _end(data: bytes) -> int:
    end: int | None = accepted(codec.question_end, data)
    return codec.HEADER_SIZE if end is None else end


def _check_kept(data: bytes) -> None:
    """An answer that is kept: without options, later, and truncated."""
    plain = dns_message.without_options(data)
    assert len(plain) <= len(data)
    assert accepted(_records, plain) is not None
    offsets = dns_message.ttl_offsets(plain)
    aged = dns_message.aged(plain, offsets, data, 7)
    before, after = _records(plain), _records(aged)
    assert [record[:4] for record in before] == [record[:4] for record in after]
    for old, new in zip(before, after, strict=True):
        expected = old.ttl if old.rtype == codec.OPT else max(0, old.ttl - 7)
        assert new.ttl == expected or (old.rtype == codec.OPT and new.ttl == old.ttl)
    least = dns_message.least_ttl(plain)
    assert least is None or 0 <= least < codec.TTL_LIMIT
    if _parse(data) is not None:
        # A later one may not be read: a name can point into the TTL of another record.
        assert _parse(plain) is not None
    short = dns_message.truncate(data, _LIMIT)
    assert len(short) <= max(_LIMIT, min(len(data), _LIMIT))
    if short != data:
        assert short[2] & 2
        # Options pass through as they are, even if they cannot be read.
        assert _parse(data) is None or _parse(short) is not None


def _check_as_answer(data: bytes) -> None:
    """An answer, to its own question."""
    question = accepted(codec.parse_question, data)
    if question is None:
        return
    asked = question[0]._replace(qtype=(codec.A, codec.AAAA)[data[0] & 1], qclass=codec.IN)
    fixed = struct.pack(">HH", asked.qtype, asked.qclass)
    message = data[: question[1] - 4] + fixed + data[question[1] :]
    try:
        query = codec.encode_query(int.from_bytes(data[:2], "big"), asked)
    except ValueError:
        return
    answer = accepted(codec.parse_answer, message, asked)
    is_answer = codec.is_answer(message, query)
    if answer is None:
        return
    assert is_answer or message[2] & 0x78, "an answer that would not be waited for"
    assert 0 <= answer.ttl < codec.TTL_LIMIT
    _check_addresses(message, asked, answer)


def _check_addresses(message: bytes, asked: Question, answer: codec.AddressAnswer) -> None:
    parsed = _parse(message)
    if parsed is None or not isinstance(parsed, dns.message.QueryMessage):
        return
    assert int(parsed.rcode()) == answer.rcode
    rdtype = dns.rdatatype.RdataType(asked.qtype)
    owners = {_text(rrset.name.labels) for rrset in parsed.answer if rrset.rdtype == rdtype}
    listed = {
        _packed(rdata.address)
        for rrset in parsed.answer
        if rrset.rdtype == rdtype and rrset.rdclass == dns.rdataclass.IN
        for rdata in rrset
    }
    ours = list(map(_packed, answer.addresses))
    assert set(ours) <= listed or not owners, (answer, listed)
    if asked.name in owners and answer.rcode == codec.NOERROR:
        direct = [
            _packed(rdata.address)
            for rrset in parsed.answer
            if rrset.rdtype == rdtype
            and rrset.rdclass == dns.rdataclass.IN
            and _text(rrset.name.labels) == asked.name
            for rdata in rrset
        ]
        assert ours == direct, (answer, direct)


def _packed(address: str) -> bytes:
    """Return the bytes of an address, of a v4-mapped one those of the IPv4 address."""
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).packed


_QUESTION = b"\0\1\x81\x80\0\1\0\1\0\0\0\1\1a\7example\0\0\1\0\1"
_WORDS = (
    *(b"\xc0\x0c", b"\xc0\x0d", b"\xff\xff", b"\3www", b"\7example\0", b"\0\1\0\1", b"\0\x1c\0\1"),
    *(b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\x7f\0\0\1", b"\xc0\x0c\0\5\0\1\0\0\0\x3c\0\2\xc0\x0c"),
    *(b"\0\0\x29\4\xd0\0\0\0\0\0\0", b"\0\0\x29\4\xd0\1\0\x80\0\0\x0c\0\x0a\0\x08", bytes(12)),
    *(_QUESTION, b"\0\6\0\1", b"\0\x0a\0\x08", b"\x3f" + b"a" * 63, b"\x80", b"\\046", b".", b":"),
)

TARGETS = (
    Target("dns-name", _check_name, _WORDS, 600),
    Target("dns-message", _check_message, _WORDS, 1024),
)
