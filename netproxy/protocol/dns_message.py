"""What a DNS forwarder reads of a message and changes in it.

A forwarder passes on messages that others wrote and changes only what it must: the ID, the
spelling of the question, the TTLs of a cached answer, the length of a datagram.
cache_key() and aged() run for every cached answer and parse no records.  Pure; any thread.
"""

from __future__ import annotations

from netproxy.errors import ProtocolError
from netproxy.protocol.dns import (
    ANSWER,
    HEADER,
    HEADER_SIZE,
    NOERROR,
    NXDOMAIN,
    OPCODE,
    OPT,
    OPT_SIZE,
    OPT_START,
    QR,
    RCODE,
    TC,
    TTL,
    TTL_LIMIT,
    TYPE_AND_CLASS,
    UDP_LIMIT,
    find_opt,
    is_opt,
    negative_ttl,
    parse_records,
    question_end,
    rcode,
    without_records,
)
from netproxy.typed import Sequence

# The option COOKIE (RFC 7873), and its bytes while it has no server's half.
_COOKIE, _CLIENT_COOKIE = 10, 8
# Options that change no record of an answer: DAU, DHU, N3U (RFC 6975), COOKIE,
# edns-tcp-keepalive (RFC 7828), Padding (RFC 7830).
_NEUTRAL_OPTIONS = frozenset({5, 6, 7, _COOKIE, 11, 12})


def cache_key(query: bytes) -> bytes | None:
    """Return what two queries share if they may get the same answer.

    The key has the question, all flags with those of EDNS, and whether there is EDNS: an
    answer has an OPT if and only if its query has one (RFC 6891 section 7).  A client's half
    of a cookie, padding and the like are not in it: they concern neighbours, which may
    ignore them, and the server's reply to them is not kept (without_options).

    Returns None if the answer must not be shared:
    - The client has a server's half of a cookie, which it expects in each answer (RFC 7873
      section 5.3).
    - The query has any other option, such as a client's subnet, which may change the
      answer, or a signature.
    - The type is 128 to 255, which are not types of data: transfers, ANY (RFC 6895
      section 3.1).
    """
    try:
        end = question_end(query)
    except ProtocolError:
        return None
    _, flags, _, ancount, nscount, arcount = HEADER.unpack_from(query)
    qtype, _ = TYPE_AND_CLASS.unpack_from(query, end - 4)
    if flags & (QR | OPCODE) or ancount or nscount or arcount > 1 or 128 <= qtype < 256:
        return None
    key = query[2:4] + query[HEADER_SIZE : end - 4].lower() + query[end - 4 : end]
    if not arcount:
        return key if len(query) == end else None
    options = end + OPT_SIZE
    rdlength = int.from_bytes(query[options - 2 : options], "big")
    if query[end : end + 3] != OPT_START or rdlength != len(query) - options:
        return None
    # The four bytes are the upper bits of RCODE, the version and the flags.
    return key + query[end + 5 : end + 9] if _are_neutral(query, options) else None


def _are_neutral(query: bytes, at: int) -> bool:
    """Return whether the options from `at` to the end of a query change no answer."""
    while at + 4 <= len(query):
        code, length = TYPE_AND_CLASS.unpack_from(query, at)
        if code not in _NEUTRAL_OPTIONS or (code == _COOKIE and length != _CLIENT_COOKIE):
            return False
        at += 4 + length
    return at == len(query)


def least_ttl(message: bytes) -> int | None:
    """Return the seconds that a whole answer may be kept, None if it must not be kept.

    This is the least TTL of all records.  Without data of the type asked for it is also no
    more than the SOA allows (RFC 2308 section 5).  Errors, truncated answers, answers that
    cannot be read, and answers without data and without a SOA are not kept.
    """
    try:
        records = list(parse_records(message))
    except ProtocolError:
        return None
    flags, code = int.from_bytes(message[2:4], "big"), rcode(message, records)
    if flags & (QR | OPCODE | TC) != QR or code not in (NOERROR, NXDOMAIN):
        return None
    ttls = [record.ttl for record in records if record.rtype != OPT]
    qtype, _ = TYPE_AND_CLASS.unpack_from(message, question_end(message) - 4)
    has_data = any(record.section == ANSWER and record.rtype == qtype for record in records)
    if code == NXDOMAIN or not has_data:
        negative = negative_ttl(message, records)
        return None if negative is None else min(negative, *ttls)
    return min(ttls, default=None)


def without_options(message: bytes) -> bytes:
    """Return an answer as it may be kept: without options, which are for one client.

    Records behind the OPT are removed too, because their pointers would be wrong.  The OPT
    is the last record in practice, and additional records are a courtesy.
    Raises ProtocolError for a message that cannot be read.
    """
    records = list(parse_records(message))
    for number, record in enumerate(records):
        if is_opt(record) and record.end > record.rdata:
            arcount = int.from_bytes(message[10:12], "big") - (len(records) - number - 1)
            header = message[:10] + arcount.to_bytes(2, "big")
            return header + message[HEADER_SIZE : record.rdata - 2] + b"\0\0"
    return message


def ttl_offsets(message: bytes) -> tuple[int, ...]:
    """Return the offsets of the TTLs of an answer, for aged().  Raises ProtocolError."""
    return tuple(record.rdata - 6 for record in parse_records(message) if record.rtype != OPT)


def aged(message: bytes, offsets: Sequence[int], query: bytes, seconds: int) -> bytes:
    """Return a kept answer for a query with the same cache_key, `seconds` later.

    It has the query's ID and spelling of the name, and shorter TTLs at `offsets`.
    """
    end = question_end(query)
    answer = bytearray(message)
    answer[:2] = query[:2]
    answer[HEADER_SIZE:end] = query[HEADER_SIZE:end]
    for offset in offsets:
        (ttl,) = TTL.unpack_from(answer, offset)
        TTL.pack_into(answer, offset, ttl - seconds if seconds < ttl < TTL_LIMIT else 0)
    return bytes(answer)


def with_ttl(message: bytes, offsets: Sequence[int], ttl: int) -> bytes:
    """Return a message with another TTL at `offsets`."""
    changed = bytearray(message)
    for offset in offsets:
        TTL.pack_into(changed, offset, ttl)
    return bytes(changed)


def has_data(message: bytes) -> bool:
    """Return whether an answer has records for its question, or aliases."""
    return message[6:8] != b"\0\0" and message[3] & RCODE == NOERROR


def is_failure(message: bytes) -> bool:
    """Return whether an answer says nothing of its name: it is an error, RFC 8767 section 4."""
    return message[3] & RCODE not in (NOERROR, NXDOMAIN)


def with_id(message: bytes, id: int) -> bytes:
    """Return a message with another ID."""
    return id.to_bytes(2, "big") + message[2:]


def udp_size(query: bytes) -> int:
    """Return the bytes of a datagram that a client accepts: 512, or more by its OPT.

    Shorter answers need no call.
    """
    opt = find_opt(query)
    return max(opt.rclass, UDP_LIMIT) if opt else UDP_LIMIT


def truncate(message: bytes, limit: int) -> bytes:
    """Return an answer of at most `limit` bytes, which is 512 or more.

    An answer that is longer becomes its header, question and OPT, with TC set.
    """
    if len(message) <= limit:
        return message
    opt = find_opt(message)
    flags = int.from_bytes(message[2:4], "big") | TC
    short = without_records(message, flags, message[opt.start : opt.end] if opt else b"")
    if opt and len(short) > limit:
        short = without_records(message, flags, message[opt.start : opt.rdata - 2] + b"\0\0")
    return short
