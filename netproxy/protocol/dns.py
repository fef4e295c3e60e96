"""The codec of DNS messages (RFC 1035) and EDNS (RFC 6891).

Encodes the queries of our own resolver, parses addresses out of answers, and reads the
parts of any message that a forwarder needs (dns_message.py).  Types, flags and options
that are not named here pass through.  A message is given without the length that precedes
it in a stream.  Pure; any thread.
"""

from __future__ import annotations

import re
import struct

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import ip_text
from netproxy.typed import Iterable, Iterator, NamedTuple, Sequence

# Types, classes and response codes.
A, CNAME, SOA, PTR, AAAA, OPT = 1, 5, 6, 12, 28, 41
SVCB, HTTPS = 64, 65
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5
# Bytes of the RDATA of an address record, by type.
ADDRESS_SIZES = {A: 4, AAAA: 16}

# Bytes of a datagram for a client that announces no size, RFC 1035 section 2.3.4.
UDP_LIMIT = 512
# The size that we announce: 1280, which every IPv6 path carries whole, minus 40 bytes of IPv6
# header and 8 bytes of UDP header.
EDNS_SIZE = 1232
# Bytes of a message: what the length in a stream can express.
MESSAGE_LIMIT = 65535
# Octets of a name with its length octets, and of a label, RFC 1035 section 2.3.4.
NAME_LIMIT, LABEL_LIMIT = 255, 63
HEADER_SIZE = 12

# Bits of the second 16 bits of the header.
QR, OPCODE, TC, RD, RA, CD, RCODE = 0x8000, 0x7800, 0x0200, 0x0100, 0x0080, 0x0010, 0x000F
# A bit of the flags of an OPT: the sender understands DNSSEC.
DO = 0x8000
# Sections of a message, in order, after the question.
ANSWER, AUTHORITY, ADDITIONAL = 0, 1, 2
# From this value on a TTL counts as 0, RFC 2181 section 8.
TTL_LIMIT = 1 << 31
# The beginning of an OPT: the name of the root and the type; its bytes without options.
OPT_START, OPT_SIZE = b"\0\0\x29", 11

_POINTER = 0xC0
# Bytes of the shortest RDATA of a SOA: two names of the root and five numbers.
_SOA_LEAST = 22
# Bytes that stand for themselves in a name's text.  A colon would make an address of a name.
_PLAIN = bytes(set(range(0x21, 0x7F)) - set(b".:\\"))

HEADER = struct.Struct(">6H")
TYPE_AND_CLASS = struct.Struct(">HH")
TTL = struct.Struct(">I")
_TYPE_CLASS_TTL = struct.Struct(">HHI")


class DnsHeader(NamedTuple):
    """The header of a message."""

    id: int
    response: bool
    """QR: False in a query."""
    opcode: int
    truncated: bool
    """TC."""
    recursion_desired: bool
    """RD."""
    rcode: int
    """The lower four bits of the response code; EDNS adds upper bits (see rcode())."""
    qdcount: int
    ancount: int
    nscount: int
    arcount: int


class Question(NamedTuple):
    """The question of a message."""

    name: str
    r"""In lower case, without a final dot, "" for the root.  A dot, a colon and any byte that is
    not printable ASCII within a label is \DDD, its decimal value."""
    qtype: int
    qclass: int


class AddressAnswer(NamedTuple):
    """What a server says to a question for A or AAAA."""

    rcode: int
    """The response code with the bits of EDNS."""
    addresses: list[str]
    """Canonical, in the server's order."""
    ttl: int
    """Seconds that the answer may be kept, with or without addresses."""


class Record(NamedTuple):
    """Where a resource record stands in a message, and its fixed fields."""

    section: int
    """ANSWER, AUTHORITY or ADDITIONAL."""
    start: int
    """The offset of its name."""
    rtype: int
    rclass: int
    ttl: int
    """Seconds; 0 if the upper bit is set."""
    rdata: int
    """The offset of RDATA.  The six bytes before it are TTL and RDLENGTH."""
    end: int
    """The offset behind the record."""


#   0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
# +--+--+--+--+--+--+--+--+--+--+--+--+--+--+--+--+   RFC 1035 section 4.1.1,
# |                      ID                       |   RFC 4035 section 3.2 (AD, CD)
# |QR|   OPCODE  |AA|TC|RD|RA| Z|AD|CD|   RCODE   |
# |  QDCOUNT, ANCOUNT, NSCOUNT, ARCOUNT: 16 bits  |
# +--+--+--+--+--+--+--+--+--+--+--+--+--+--+--+--+
def parse_header(message: bytes) -> DnsHeader:
    """Parse the header.  Raises ProtocolError for a message that is shorter."""
    if len(message) < HEADER_SIZE:
        raise ProtocolError("a DNS message is shorter than its header")
    id, flags, *counts = HEADER.unpack_from(message)
    return DnsHeader(
        id,
        flags & QR != 0,
        (flags & OPCODE) >> 11,
        flags & TC != 0,
        flags & RD != 0,
        flags & RCODE,
        *counts,
    )


# +-------+-------+--------+   RFC 1035 section 4.1.2
# | QNAME | QTYPE | QCLASS |
# |       |   2   |   2    |
# +-------+-------+--------+
def parse_question(message: bytes) -> tuple[Question, int]:
    """Return the question of a message and the offset behind it.

    Raises ProtocolError if there is not exactly one question.
    """
    end = question_end(message)
    name, _ = _parse_name(message, HEADER_SIZE)
    return Question(name, *TYPE_AND_CLASS.unpack_from(message, end - 4)), end


def question_end(message: bytes) -> int:
    """Return the offset behind the one question.

    Its name cannot be compressed, as nothing precedes it.  Raises ProtocolError if there is
    not exactly one question.
    """
    if len(message) < HEADER_SIZE or message[4:6] != b"\0\1":
        raise ProtocolError("a DNS message without exactly one question")
    end = _name_end(message, HEADER_SIZE, LABEL_LIMIT)
    if end + 4 > len(message) or end - HEADER_SIZE > NAME_LIMIT:
        raise ProtocolError("a DNS question that does not end, or whose name is too long")
    return end + 4


def encode_query(id: int, question: Question, edns: bool = True) -> bytes:
    """Encode a query with RD.  Raises ValueError for a name that cannot be sent."""
    header = HEADER.pack(id, RD, 1, 0, 0, edns)
    type_and_class = TYPE_AND_CLASS.pack(question.qtype, question.qclass)
    return header + encode_name(question.name) + type_and_class + encode_opt(0) * edns


def parse_answer(message: bytes, question: Question) -> AddressAnswer:
    """Parse a server's answer to a question for A or AAAA.  Raises ProtocolError.

    CNAMEs are followed within the message.  The TTL is the least of the records used;
    without addresses it is that of RFC 2308 section 5, or 0 without a SOA.  It is 0 for
    every code except NOERROR and NXDOMAIN.  An error may come without the question, from a
    server that cannot read EDNS.  The caller looks at ID and TC.
    """
    header = parse_header(message)
    if not header.response or header.opcode:
        raise ProtocolError("not an answer to a DNS query")
    if header.rcode and not header.qdcount:
        return AddressAnswer(header.rcode, [], 0)
    if parse_question(message)[0] != question:
        raise ProtocolError("a DNS answer to another question")
    records = list(parse_records(message))
    code = rcode(message, records)
    if code not in (NOERROR, NXDOMAIN):
        return AddressAnswer(code, [], 0)
    owned, cname_ttls = _follow(message, question, records)
    if code == NXDOMAIN or not owned:
        return AddressAnswer(code, [], min([*cname_ttls, negative_ttl(message, records) or 0]))
    addresses = [ip_text(message[record.rdata : record.end]) for record in owned]
    return AddressAnswer(code, addresses, min([*cname_ttls, *(record.ttl for record in owned)]))


def is_answer(message: bytes, query: bytes) -> bool:
    """Return whether a message may be a server's answer to a query as it was sent.

    It has the query's ID, opcode and question.  An error may come without the question.
    Raises ProtocolError for a query without exactly one question.
    """
    name_end = question_end(query) - 4
    if len(message) < HEADER_SIZE or message[:2] != query[:2]:
        return False
    if (message[2] ^ query[2]) & 0xF8 != 0x80:
        return False
    if message[3] & RCODE and message[4:6] == b"\0\0":
        return True
    return _question_key(message, name_end) == _question_key(query, name_end)


def _question_key(message: bytes, name_end: int) -> bytes:
    """Return QDCOUNT and the question, its name (up to `name_end`) in lower case."""
    name = message[HEADER_SIZE:name_end].lower()
    return message[4:6] + name + message[name_end : name_end + 4]


def encode_error(query: bytes, code: int) -> bytes:
    """Encode an answer that has only a code, 0 to 15.

    Question and EDNS are repeated as far as they can be read.  An answer must never be
    answered.  Raises ProtocolError for a query that is shorter than a header.
    """
    parse_header(query)
    opt = find_opt(query)
    repeated = int.from_bytes(query[2:4], "big") & (OPCODE | RD | CD)
    flags = repeated | QR | RA | code
    edns = encode_opt(query[opt.rdata - 4] << 8 & DO) if opt else b""
    return without_records(query, flags, edns)


def without_records(message: bytes, flags: int, opt: bytes) -> bytes:
    """Return the ID and the question of a message with other flags and another OPT.

    The question is left out if it cannot be read.  `opt` may be empty.
    """
    try:
        question = message[HEADER_SIZE : question_end(message)]
    except ProtocolError:
        question = b""
    header = HEADER.pack(0, flags, bool(question), 0, 0, bool(opt))
    return message[:2] + header[2:] + question + opt


# +--------+-------+-----+   RFC 1035 sections 3.1 and 4.1.4: labels up to an empty one, or up
# | LENGTH | LABEL | ... |   to a pointer to the rest of the name
# +--------+-------+-----+
# +----+-----------------+
# | 11 | OFFSET, 14 bits |
# +----+-----------------+
def _parse_name(message: bytes, at: int) -> tuple[str, int]:
    """Return a name as Question has it, and the offset behind it."""
    labels: list[str] = []
    end, size = 0, 1
    # A pointer leads to before the labels that precede it, so that none leads in a circle.
    run = at
    # A name has 127 labels at most, and as many pointers: more pointers would save no bytes.
    for _ in range(NAME_LIMIT + 1):
        length = message[at] if at < len(message) else -1
        if not length:
            return ".".join(labels), end or at + 1
        if length < _POINTER:
            label = message[at + 1 : at + 1 + length].lower()
            at += 1 + length
            size += 1 + length
            if not 0 < length <= LABEL_LIMIT or at > len(message) or size > NAME_LIMIT:
                raise ProtocolError("a DNS name that does not end, or is too long")
            labels.append(
                "".join(chr(byte) if byte in _PLAIN else f"\\{byte:03}" for byte in label)
            )
        else:
            end = end or at + 2
            offset = int.from_bytes(message[at : at + 2], "big") & 0x3FFF
            if not HEADER_SIZE <= offset < run or at + 2 > len(message):
                raise ProtocolError("a pointer in a DNS name that does not lead back")
            run = at = offset
    raise ProtocolError("too many pointers in a DNS name")


def encode_name(name: str) -> bytes:
    """Encode a name as Question has it.  Raises ValueError for a name that cannot be sent."""
    raw = b""
    for text in name.split(".") if name else ():
        label = re.sub(rb"\\([0-9]{0,3})", _unescape, text.encode("ascii"))
        if not 0 < len(label) <= LABEL_LIMIT:
            raise ValueError("a DNS label has 1 to 63 octets")
        raw += bytes((len(label),)) + label
    if len(raw) >= NAME_LIMIT:
        raise ValueError("a DNS name has at most 255 octets")
    return raw + b"\0"


def _unescape(escape: re.Match[bytes]) -> bytes:
    return bytes((int(escape[1]),))


def _name_end(message: bytes, at: int, limit: int = 0xFF) -> int:
    """Return the offset behind a name, whatever its pointer leads to.

    `limit` is for the first byte of each part; LABEL_LIMIT allows no pointer.
    """
    size = len(message)
    while at < size and ((length := message[at]) <= LABEL_LIMIT or _POINTER <= length <= limit):
        if length >= _POINTER:
            return at + 2
        at += 1 + length
        if not length:
            return at
    raise ProtocolError("a DNS name that does not end")


# +------+------+-------+-----+----------+-------+   RFC 1035 section 4.1.3
# | NAME | TYPE | CLASS | TTL | RDLENGTH | RDATA |
# |      |  2   |   2   |  4  |    2     |       |
# +------+------+-------+-----+----------+-------+
def parse_records(message: bytes) -> Iterator[Record]:
    """Yield the records behind the one question.  Bytes behind the last are ignored.

    Raises ProtocolError.
    """
    at, size = question_end(message), len(message)
    for section, count in enumerate(HEADER.unpack_from(message)[3:]):
        for _ in range(count):
            start, fixed = at, _name_end(message, at)
            rdata = fixed + 10
            at = rdata + int.from_bytes(message[rdata - 2 : rdata], "big")
            if at > size:
                raise ProtocolError("a DNS message ends within a record")
            rtype, rclass, ttl = _TYPE_CLASS_TTL.unpack_from(message, fixed)
            yield Record(section, start, rtype, rclass, ttl if ttl < TTL_LIMIT else 0, rdata, at)


# OPT, RFC 6891 section 6.1: NAME is the root; CLASS is the size of datagrams that the sender
# accepts; TTL is 8 upper bits of RCODE, 8 bits of version and 16 flags; RDATA are options.
def encode_opt(flags: int) -> bytes:
    """Encode an OPT without options that announces EDNS_SIZE."""
    return OPT_START + struct.pack(">HIH", EDNS_SIZE, flags, 0)


def find_opt(message: bytes) -> Record | None:
    """Return the OPT of a message; None if there is none, or if the records cannot be read."""
    try:
        return _first_opt(parse_records(message))
    except ProtocolError:
        return None


def _first_opt(records: Iterable[Record]) -> Record | None:
    return next(filter(is_opt, records), None)


def is_opt(record: Record) -> bool:
    """Return whether a record is the message's OPT, which stands among the additionals."""
    return record.rtype == OPT and record.section == ADDITIONAL


def rcode(message: bytes, records: Sequence[Record]) -> int:
    """Return the response code with the upper bits of an OPT.

    Without the upper bits, BADVERS looks like NOERROR.
    """
    opt = _first_opt(records)
    return (message[opt.rdata - 6] if opt else 0) << 4 | message[3] & RCODE


def negative_ttl(message: bytes, records: Sequence[Record]) -> int | None:
    """Return the seconds that an answer without data may be kept, RFC 2308 section 5.

    Returns None without a SOA among the authorities.
    """
    return min(
        (
            # MINIMUM is the last field of RDATA.
            min(record.ttl, *TTL.unpack_from(message, record.end - 4))
            for record in records
            if record.rtype == SOA
            and record.section == AUTHORITY
            and record.end - record.rdata >= _SOA_LEAST
        ),
        default=None,
    )


def _follow(
    message: bytes, question: Question, records: Sequence[Record]
) -> tuple[list[Record], list[int]]:
    """Return the addresses at the end of the chain of CNAMEs, and the TTLs of the CNAMEs.

    Each CNAME is followed once at most.
    """
    aliases: dict[str, tuple[str, int]] = {}
    addresses: dict[str, list[Record]] = {}
    for record in records:
        if record.section != ANSWER or record.rclass != question.qclass:
            continue
        if record.rtype == CNAME:
            target, end = _parse_name(message, record.rdata)
            if end != record.end:
                raise ProtocolError("a CNAME that is not one name")
            aliases.setdefault(_parse_name(message, record.start)[0], (target, record.ttl))
        elif record.rtype == question.qtype:
            if record.end - record.rdata != ADDRESS_SIZES[record.rtype]:
                raise ProtocolError("an address record with a wrong length")
            addresses.setdefault(_parse_name(message, record.start)[0], []).append(record)
    name = question.name
    ttls: list[int] = []
    while name not in addresses and name in aliases:
        name, ttl = aliases.pop(name)
        ttls.append(ttl)
    return addresses.get(name, []), ttls
