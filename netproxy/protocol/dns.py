"""DNS messages (RFC 1035) and EDNS (RFC 6891): what a resolver of our own needs of them, and what a forwarder does.

The resolver asks for addresses and reads them out of answers.  The forwarder hands on what others wrote, and
alters what it must alone: kinds, flags and options that nobody here knows stay as they are.  What is done for
every answer out of a cache, `cache_key` and `aged`, takes no record apart.  Messages are without the length that
goes before them in a stream.  No I/O, no clock; any thread.
"""

from __future__ import annotations

import re
import struct
from typing import Iterator, NamedTuple, Sequence

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import ip_text

A, CNAME, SOA, AAAA, OPT = 1, 5, 6, 28, 41
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5

UDP_LIMIT = 512  # bytes of a datagram to who announces nothing, RFC 1035 section 2.3.4
EDNS_SIZE = 1232  # what we announce: 1280, which every IPv6 path carries whole, less 40 of IPv6 and 8 of UDP
MESSAGE_LIMIT = 65535  # what the length in a stream can say
NAME_LIMIT, LABEL_LIMIT = 255, 63  # octets, section 2.3.4; a name's with its lengths
HEAD_SIZE = 12

_RESPONSE, _OPCODE, _TRUNCATED, _RECURSION_DESIRED, _RECURSION_AVAILABLE = (
    0x8000,
    0x7800,
    0x0200,
    0x0100,
    0x0080,
)
_CHECKING_DISABLED, _CODE, _DNSSEC_OK = 0x0010, 0x000F, 0x8000  # the last is of an OPT's flags
_ANSWER, _AUTHORITY, _ADDITIONAL = 0, 1, 2
_POINTER = 0xC0
_OPT_HEAD, _OPT_SIZE = b"\0\0\x29", 11  # the root's name and the kind; bytes of it without options
_SOA_LEAST = 22  # two names of the root, five numbers
_COOKIE, _CLIENT_COOKIE = 10, 8  # the option, and its length where it holds no server's half yet
# options that change no record of an answer: DAU, DHU, N3U (RFC 6975), COOKIE, edns-tcp-keepalive, Padding
_SILENT = frozenset({5, 6, 7, _COOKIE, 11, 12})
_TTL_LIMIT = 1 << 31  # from here on it counts as 0, RFC 2181 section 8
_PLAIN = bytes(set(range(0x21, 0x7F)) - set(b".:\\"))  # a colon would make an address of a name
_ADDRESS_SIZES = {A: 4, AAAA: 16}

_HEAD = struct.Struct(">6H")
_KIND_AND_CLASS = struct.Struct(">HH")
_RECORD = struct.Struct(">HHI")
_TTL = struct.Struct(">I")


class Head(NamedTuple):
    id: int
    response: bool
    opcode: int
    truncated: bool
    recursion_desired: bool
    code: int  # its lower four bits, which are all that there is without EDNS
    questions: int
    answers: int
    authorities: int
    additionals: int


class Question(NamedTuple):
    name: str  # lower-case, no dot at the end, "" for the root; a dot, colon or odd byte in a label is \DDD
    kind: int
    klass: int


class Answer(NamedTuple):
    code: int  # with the bits that EDNS adds
    addresses: list[str]  # canonical, in the server's order
    ttl: int  # seconds that it may be kept, also where there are no addresses


class _Record(NamedTuple):
    section: int
    start: int  # of its name
    kind: int
    klass: int
    ttl: int  # seconds
    data: int  # where it begins; TTL and length are the six bytes before it
    end: int


# +----+----+----+----+----+----+----+----+----+----+----+----+----+----+----+----+
# |                                      ID                                       |
# | QR |      OPCODE       | AA | TC | RD | RA | Z  | AD | CD |       RCODE       |
# |                 QDCOUNT, ANCOUNT, NSCOUNT, ARCOUNT: 16 bits each              |
# +----+----+----+----+----+----+----+----+----+----+----+----+----+----+----+----+
def parse_head(message: bytes) -> Head:
    """ProtocolError for what is shorter than a head."""
    if len(message) < HEAD_SIZE:
        raise ProtocolError("a DNS message is shorter than its head")
    id, flags, *counts = _HEAD.unpack_from(message)
    return Head(
        id,
        flags & _RESPONSE != 0,
        (flags & _OPCODE) >> 11,
        flags & _TRUNCATED != 0,
        flags & _RECURSION_DESIRED != 0,
        flags & _CODE,
        *counts,
    )


def parse_question(message: bytes) -> tuple[Question, int]:
    """The one question of a query or an answer, and where it ends; ProtocolError where there is not exactly one."""
    end = _question_end(message)
    return Question(
        _parse_name(message, HEAD_SIZE)[0], *_KIND_AND_CLASS.unpack_from(message, end - 4)
    ), end


def encode_query(id: int, question: Question, edns: bool = True) -> bytes:
    """Recursion desired; ValueError for a name that cannot be sent."""
    head = _HEAD.pack(id, _RECURSION_DESIRED, 1, 0, 0, edns)
    return (
        head
        + _encode_name(question.name)
        + _KIND_AND_CLASS.pack(question.kind, question.klass)
        + _encode_opt(0) * edns
    )


def parse_answer(message: bytes, question: Question) -> Answer:
    """What a server says to a question for A or AAAA; whether it was truncated, and the ID, are the caller's to look at.

    CNAMEs are followed within the message.  The TTL is the least on the way; without addresses that of RFC 2308
    section 5, 0 where no SOA tells it, and 0 for every code but NOERROR and NXDOMAIN.  An error may come without
    the question, as from servers that cannot read EDNS.
    """
    head = parse_head(message)
    if not head.response or head.opcode:
        raise ProtocolError("not an answer to a DNS query")
    if head.code and not head.questions:
        return Answer(head.code, [], 0)
    if parse_question(message)[0] != question:
        raise ProtocolError("a DNS answer to another question")
    records = list(_records(message))
    code = _code(message, records)
    if code not in (NOERROR, NXDOMAIN):
        return Answer(code, [], 0)
    found, lives = _follow(message, question, records)
    if code == NXDOMAIN or not found:
        return Answer(code, [], min([*lives, _negative_ttl(message, records) or 0]))
    addresses = [ip_text(message[one.data : one.end]) for one in found]
    return Answer(code, addresses, min([*lives, *(one.ttl for one in found)]))


def is_answer(message: bytes, query: bytes) -> bool:
    """Whether a message may be a server's answer to a query as it was sent: by its ID, opcode and question.

    An error may come without the question, as parse_answer has it.  ProtocolError for a query without exactly one.
    """
    name_end = _question_end(query) - 4
    if (
        len(message) < HEAD_SIZE
        or message[:2] != query[:2]
        or (message[2] ^ query[2]) & 0xF8 != 0x80
    ):
        return False
    if message[3] & _CODE and message[4:6] == b"\0\0":
        return True
    asked, told = (
        one[4:6] + one[HEAD_SIZE:name_end].lower() + one[name_end : name_end + 4]
        for one in (query, message)
    )
    return asked == told


def cache_key(query: bytes) -> bytes | None:
    """What two queries share that may get the same answer; None for one whose answer is not to be shared.

    That is the question, all flags with those of EDNS, and whether there is EDNS: an answer has an OPT if and only if
    its query had one (RFC 6891 section 7).  A client's half of a cookie, padding and the like are no part of it: they
    are between neighbours, who may ignore them, and what a server says to them is not kept (`without_options`).
    Asked anew is always who has a server's half of a cookie, and waits for it in each answer (RFC 7873 section 5.3);
    who sends any other option, as a client's subnet, which may change the answer, or a signature; and whoever asks
    for kinds 128 to 255, which are none of data: transfers, ANY (RFC 6895 section 3.1).
    """
    try:
        end = _question_end(query)
    except ProtocolError:
        return None
    _, flags, _, answers, authorities, additionals = _HEAD.unpack_from(query)
    kind, _ = _KIND_AND_CLASS.unpack_from(query, end - 4)
    if (
        flags & (_RESPONSE | _OPCODE)
        or answers
        or authorities
        or additionals > 1
        or 128 <= kind < 256
    ):
        return None
    key = query[2:4] + query[HEAD_SIZE : end - 4].lower() + query[end - 4 : end]
    if not additionals:
        return key if len(query) == end else None
    options = end + _OPT_SIZE
    if (
        query[end : end + 3] != _OPT_HEAD
        or int.from_bytes(query[options - 2 : options], "big") != len(query) - options
    ):
        return None
    return key + query[end + 5 : end + 9] if _are_silent(query, options) else None


def least_ttl(message: bytes) -> int | None:
    """Seconds that a whole answer may be kept; None where it must not be.

    The least TTL of all records; where there is nothing of the kind that was asked for, no more than the SOA allows
    (RFC 2308 section 5).  Not kept: errors, what was truncated or cannot be read, and no data without a SOA.
    """
    try:
        records = list(_records(message))
    except ProtocolError:
        return None
    flags, code = int.from_bytes(message[2:4], "big"), _code(message, records)
    if flags & (_RESPONSE | _OPCODE | _TRUNCATED) != _RESPONSE or code not in (NOERROR, NXDOMAIN):
        return None
    lives = [one.ttl for one in records if one.kind != OPT]
    kind, _ = _KIND_AND_CLASS.unpack_from(message, _question_end(message) - 4)
    if code == NXDOMAIN or not any(one.section == _ANSWER and one.kind == kind for one in records):
        negative = _negative_ttl(message, records)
        return None if negative is None else min(negative, *lives)
    return min(lives, default=None)


def without_options(message: bytes) -> bytes:
    """An answer as it may be kept: what its server says to one client, as cookies and padding, is left out.

    Records behind the OPT go with them, for their pointers would be wrong: it is the last in practice, and additional
    records are a courtesy.  ProtocolError for what cannot be read.
    """
    records = list(_records(message))
    for place, record in enumerate(records):
        if record.kind == OPT and record.section == _ADDITIONAL and record.end > record.data:
            count = int.from_bytes(message[10:12], "big") - (len(records) - place - 1)
            return (
                message[:10]
                + count.to_bytes(2, "big")
                + message[HEAD_SIZE : record.data - 2]
                + b"\0\0"
            )
    return message


def ttl_places(message: bytes) -> tuple[int, ...]:
    """Where the TTLs of an answer are, as `aged` takes them; ProtocolError for what cannot be read."""
    return tuple(one.data - 6 for one in _records(message) if one.kind != OPT)


def aged(message: bytes, places: Sequence[int], query: bytes, seconds: int) -> bytes:
    """A kept answer for a query of the same cache_key, `seconds` later: with its ID, and its spelling of the name."""
    end = _question_end(query)
    answer = bytearray(message)
    answer[:2] = query[:2]
    answer[HEAD_SIZE:end] = query[HEAD_SIZE:end]
    for place in places:
        (ttl,) = _TTL.unpack_from(answer, place)
        _TTL.pack_into(answer, place, ttl - seconds if seconds < ttl < _TTL_LIMIT else 0)
    return bytes(answer)


def with_id(message: bytes, id: int) -> bytes:
    return id.to_bytes(2, "big") + message[2:]


def udp_size(query: bytes) -> int:
    """Bytes of a datagram that a client takes: 512, or more where its OPT says so.  No need to ask for what is shorter."""
    opt = _find_opt(query)
    return max(opt.klass, UDP_LIMIT) if opt else UDP_LIMIT


def truncate(message: bytes, limit: int) -> bytes:
    """The answer, if it has at most `limit` bytes (512 or more); else its head, question and OPT, marked as truncated."""
    if len(message) <= limit:
        return message
    opt = _find_opt(message)
    flags = int.from_bytes(message[2:4], "big") | _TRUNCATED
    short = _without_records(message, flags, message[opt.start : opt.end] if opt else b"")
    if opt and len(short) > limit:
        short = _without_records(message, flags, message[opt.start : opt.data - 2] + b"\0\0")
    return short


def encode_error(query: bytes, code: int) -> bytes:
    """An answer to a query that says nothing but `code`, 0 to 15; ProtocolError where the query has no head.

    Question and EDNS are repeated as far as they can be read.  Never to be sent to what is itself an answer.
    """
    parse_head(query)
    opt = _find_opt(query)
    repeated = int.from_bytes(query[2:4], "big") & (
        _OPCODE | _RECURSION_DESIRED | _CHECKING_DISABLED
    )
    flags = repeated | _RESPONSE | _RECURSION_AVAILABLE | code
    return _without_records(
        query, flags, _encode_opt(query[opt.data - 4] << 8 & _DNSSEC_OK) if opt else b""
    )


def _question_end(message: bytes) -> int:
    """Behind the one question, whose name cannot be compressed: nothing stands before it."""
    if len(message) < HEAD_SIZE or message[4:6] != b"\0\1":
        raise ProtocolError("a DNS message without exactly one question")
    end = _name_end(message, HEAD_SIZE, LABEL_LIMIT)
    if end + 4 > len(message) or end - HEAD_SIZE > NAME_LIMIT:
        raise ProtocolError("a DNS question that does not end, or whose name is too long")
    return end + 4


def _without_records(message: bytes, flags: int, opt: bytes) -> bytes:
    """Of a message its ID and, where that can be read, its question, with other flags and another OPT or none."""
    try:
        question = message[HEAD_SIZE : _question_end(message)]
    except ProtocolError:
        question = b""
    return message[:2] + _HEAD.pack(0, flags, bool(question), 0, 0, bool(opt))[2:] + question + opt


# | 00 LENGTH | LABEL | ... up to an empty label, or a pointer to where the rest is, section 4.1.4: | 11 OFFSET, 14 bits |
def _parse_name(message: bytes, at: int) -> tuple[str, int]:
    """A name as Question has it, and where it ends."""
    labels: list[str] = []
    end, size = 0, 1
    run = at  # every pointer goes before the labels that lead to it, so that none leads back
    for _ in range(
        NAME_LIMIT + 1
    ):  # 127 labels, and as many pointers: more of these are no way to save bytes
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
            to = int.from_bytes(message[at : at + 2], "big") & 0x3FFF
            if not HEAD_SIZE <= to < run or at + 2 > len(message):
                raise ProtocolError("a pointer in a DNS name that does not go back")
            run = at = to
    raise ProtocolError("too many pointers in a DNS name")


def _encode_name(name: str) -> bytes:
    raw = b""
    for text in name.split(".") if name else ():
        label = re.sub(
            rb"\\([0-9]{0,3})", lambda match: bytes((int(match[1]),)), text.encode("ascii")
        )
        if not 0 < len(label) <= LABEL_LIMIT:
            raise ValueError("a DNS label has 1 to 63 octets")
        raw += bytes((len(label),)) + label
    if len(raw) >= NAME_LIMIT:
        raise ValueError("a DNS name has at most 255 octets")
    return raw + b"\0"


# +------+------+-------+-----+----------+-------+       OPT (RFC 6891 section 6.1): NAME is the root's, CLASS the
# | NAME | TYPE | CLASS | TTL | RDLENGTH | RDATA |       size of datagrams that its sender takes, TTL 8 more bits
# |      |  2   |   2   |  4  |    2     |       |       of the code, the version and 16 flags, RDATA the options
# +------+------+-------+-----+----------+-------+
def _records(message: bytes) -> Iterator[_Record]:
    """The records behind the one question.  What stands behind the last is nobody's."""
    at, size = _question_end(message), len(message)
    for section, count in enumerate(_HEAD.unpack_from(message)[3:]):
        for _ in range(count):
            start, fixed = at, _name_end(message, at)
            data = fixed + 10
            at = data + int.from_bytes(message[data - 2 : data], "big")
            if at > size:
                raise ProtocolError("a DNS message ends within a record")
            kind, klass, ttl = _RECORD.unpack_from(message, fixed)
            yield _Record(section, start, kind, klass, ttl if ttl < _TTL_LIMIT else 0, data, at)


def _name_end(message: bytes, at: int, limit: int = 0xFF) -> int:
    """Where a name ends, whatever its pointer leads to; `limit` is for the first byte of its parts."""
    size = len(message)
    while at < size and ((length := message[at]) <= LABEL_LIMIT or _POINTER <= length <= limit):
        if length >= _POINTER:
            return at + 2
        at += 1 + length
        if not length:
            return at
    raise ProtocolError("a DNS name that does not end")


def _encode_opt(flags: int) -> bytes:
    return _OPT_HEAD + struct.pack(">HIH", EDNS_SIZE, flags, 0)


def _find_opt(message: bytes) -> _Record | None:
    """The OPT of a message; None without, and where its records cannot be read."""
    try:
        return next(
            (one for one in _records(message) if one.kind == OPT and one.section == _ADDITIONAL),
            None,
        )
    except ProtocolError:
        return None


def _code(message: bytes, records: list[_Record]) -> int:
    """With the bits that an OPT adds: without these, BADVERS looks like NOERROR."""
    upper = next(
        (
            message[one.data - 6]
            for one in records
            if one.kind == OPT and one.section == _ADDITIONAL
        ),
        0,
    )
    return upper << 4 | message[3] & _CODE


def _are_silent(query: bytes, at: int) -> bool:
    """Whether the options from `at` to the end of a query change nothing of the answer."""
    while at + 4 <= len(query):
        code, length = _KIND_AND_CLASS.unpack_from(query, at)
        if code not in _SILENT or code == _COOKIE and length != _CLIENT_COOKIE:
            return False
        at += 4 + length
    return at == len(query)


def _negative_ttl(message: bytes, records: list[_Record]) -> int | None:
    """Seconds that it may be remembered that there is nothing; None where no SOA says so."""
    soas = [
        one
        for one in records
        if one.kind == SOA and one.section == _AUTHORITY and one.end - one.data >= _SOA_LEAST
    ]
    return min(
        (min(one.ttl, *_TTL.unpack_from(message, one.end - 4)) for one in soas), default=None
    )  # MINIMUM is last


def _follow(
    message: bytes, question: Question, records: list[_Record]
) -> tuple[list[_Record], list[int]]:
    """The addresses at the end of the chain of CNAMEs, and the TTLs of the CNAMEs; each is passed once at most."""
    aliases: dict[str, tuple[str, int]] = {}
    found: dict[str, list[_Record]] = {}
    for one in (one for one in records if one.section == _ANSWER and one.klass == question.klass):
        if one.kind == CNAME:
            target, end = _parse_name(message, one.data)
            if end != one.end:
                raise ProtocolError("a CNAME that is not one name")
            aliases.setdefault(_parse_name(message, one.start)[0], (target, one.ttl))
        elif one.kind == question.kind:
            if one.end - one.data != _ADDRESS_SIZES[one.kind]:
                raise ProtocolError("an address record of another length")
            found.setdefault(_parse_name(message, one.start)[0], []).append(one)
    name = question.name
    lives: list[int] = []
    while name not in found and name in aliases:
        name, life = aliases.pop(name)
        lives.append(life)
    return found.get(name, []), lives
