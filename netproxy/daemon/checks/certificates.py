"""Warns of certificates that have expired, or soon will, and of keys that everybody can read.

Whether a file can be used at all is found out where its TLS context is made.
"""

from __future__ import annotations

import binascii
import re
import time

from netproxy.config.tree.problems import Problems
from netproxy.config.tree.parse import is_exposed
from netproxy.errors import open_regular
from netproxy.typed import TYPE_CHECKING, Iterable, Iterator, NamedTuple

if TYPE_CHECKING:
    from netproxy.daemon.checks.configuration import CertificateFiles

NOTICE_SECONDS = 30 * 86400.0
"""How long before its end a certificate is warned of: authorities renew at a third of 90 days."""
SIZE_LIMIT = 1 << 20
"""Bytes of a file that are read: larger than any list of authorities."""
_PEM = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----\s+([A-Za-z0-9+/=\s]+)-----END")
_TIME_TAGS = (0x17, 0x18)
"""UTCTime and GeneralizedTime."""
_VERSION_TAG = 0xA0


class Validity(NamedTuple):
    """The first and the last moment of a certificate: "20261129131100Z", which sorts by time."""

    begin: str
    end: str


def check_certificates(configs: Iterable[CertificateFiles], problems: Problems, now: float) -> None:
    """Warn of certificates that are not valid now or expire soon, and of exposed keys.

    `now`: seconds since the epoch.
    """
    # Report files that several listeners or upstreams name once: all places compare equal.
    for files in dict.fromkeys(configs):
        for path in filter(None, (files.certificate, files.authorities)):
            validities = list(_read_validities(path))
            # A bundle of authorities may hold old ones beside the one that counts.
            if path == files.authorities and validities:
                validities = [max(validities, key=lambda validity: validity.end)]
            for validity in validities:
                if message := _message(validity, now):
                    problems.warn(f"tls: {path}: {message}", files.place)
        key = files.key or files.certificate
        if key and _is_readable_by_all(key):
            message = f"every user of this machine can read the private key: chmod o-r {key}"
            problems.warn(f"tls: {message}", files.place)


def _message(validity: Validity, now: float) -> str:
    """Return what is wrong with a certificate, "" for nothing."""
    today, soon = _text(now), _text(now + NOTICE_SECONDS)
    if validity.end < today:
        return f"the certificate has expired on {_date(validity.end)}"
    if validity.begin > today:
        return f"the certificate is not valid before {_date(validity.begin)}"
    if validity.end < soon:
        return f"the certificate expires on {_date(validity.end)}"
    return ""


def _text(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%SZ", time.gmtime(seconds))


def _date(text: str) -> str:
    return f"{text[:4]}-{text[4:6]}-{text[6:8]}"


# -- files


def _is_readable_by_all(path: str) -> bool:
    try:
        with open_regular(path) as file:
            return is_exposed(file)
    except OSError:
        # It has changed since its context was made.
        return False


def _read_validities(path: str) -> Iterator[Validity]:
    """Yield the validities of the certificates in a PEM file, as far as they can be read."""
    try:
        with open_regular(path) as file:
            raw = file.read(SIZE_LIMIT)
    except OSError:
        return
    for match in _PEM.finditer(raw):
        try:
            yield parse_validity(binascii.a2b_base64(match[1]))
        except ValueError:
            # OpenSSL can use the file: it is not for us to refuse it.
            continue


def parse_validity(der: bytes) -> Validity:
    """Return the validity of a certificate in DER (RFC 5280 section 4.1).  Raises ValueError.

    Certificate ::= SEQUENCE { tbsCertificate SEQUENCE { [0] version, serialNumber, signature,
    issuer, validity SEQUENCE { notBefore, notAfter }, ...
    """
    try:
        _, at, _ = _element(der, 0)
        _, at, _ = _element(der, at)
        tag, _, end = _element(der, at)
        # The version is optional: version 1 has none.
        at = end if tag == _VERSION_TAG else at
        for _ in ("serialNumber", "signature", "issuer"):
            _, _, at = _element(der, at)
        _, at, _ = _element(der, at)
        begin, at = _time(der, at)
        end_text, _ = _time(der, at)
    except IndexError as error:
        raise ValueError("a certificate that ends too early") from error
    return Validity(begin, end_text)


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Return the tag of an element, where its content begins, and where it ends."""
    tag, length = der[at], der[at + 1]
    at += 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(der[at : at + size], "big")
        at += size
    if at + length > len(der):
        raise ValueError("a certificate that ends too early")
    return tag, at, at + length


def _time(der: bytes, at: int) -> tuple[str, int]:
    """Return a time as "20261129131100Z", and where it ends."""
    tag, begin, end = _element(der, at)
    text = der[begin:end].decode("ascii", "replace")
    if tag not in _TIME_TAGS or not re.match(r"([0-9]{2})?[0-9]{12}Z\Z", text):
        raise ValueError("not a time of RFC 5280")
    if len(text) == len("261129131100Z"):
        # RFC 5280 section 4.1.2.5.1: two digits are a year from 1950 to 2049.
        text = ("19" if text[:2] >= "50" else "20") + text
    return text, end
