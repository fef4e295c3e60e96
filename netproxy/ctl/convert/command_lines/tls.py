"""TLS of listeners and upstreams, with the words of netproxyd.yaml.  Pure."""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Value

UNVERIFIED = "insecure: any certificate is accepted, as before: better name an authority, tls.ca"


def upstream_options(options: dict[str, Value], tls: dict[str, Value]) -> dict[str, Value]:
    """Return the options of an upstream with those of TLS, without empty ones."""
    filled: dict[str, Value] = {key: value for key, value in tls.items() if value}
    return {**options, "tls": filled} if filled else options


def files(certificate: str, key: str) -> dict[str, Value]:
    """Return the keys for a certificate and its key; {} without a certificate."""
    if not certificate:
        return {}
    keys: dict[str, Value] = {"certificate": certificate}
    if key and key != certificate:
        keys["key"] = key
    return keys
