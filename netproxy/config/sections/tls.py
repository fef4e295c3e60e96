"""Reads the TLS options of the file: those of listeners, and those towards servers.

Checks which keys need each other.  Reads no certificate: netproxy.net.tls does that.
"""

from __future__ import annotations

import re

from netproxy.config.tree.node import MapReader
from netproxy.config.schema import Place, TlsConfig, UpstreamTlsConfig
from netproxy.config.url import HOST_NAME
from netproxy.interfaces.addresses import pack_ip


def read_tls(section: MapReader) -> TlsConfig | None:
    """Return the TLS of a listener; None if there is no certificate."""
    tls = TlsConfig(
        section.path_of("certificate"),
        section.path_of("key"),
        section.path_of("client_ca"),
        Place(section.place),
    )
    if (tls.key or tls.client_ca) and not tls.certificate:
        section.add_error("certificate", "is missing")
    section.finish()
    return tls if tls.certificate else None


def read_client_tls(section: MapReader, may_be_insecure: bool = True) -> UpstreamTlsConfig:
    """Return the TLS towards a proxy, a name server or a bridge.

    Without `may_be_insecure` the section has no key `insecure`.
    """
    tls = UpstreamTlsConfig(
        section.path_of("ca"),
        section.path_of("certificate"),
        section.path_of("key"),
        section.read("server_name", _server_name, ""),
        may_be_insecure and section.flag("insecure", False),
        Place(section.place),
    )
    if tls.key and not tls.certificate:
        section.add_error("certificate", "is missing")
    section.finish()
    return tls


def _server_name(text: str) -> str:
    if pack_ip(text) is None and not re.match(HOST_NAME, text):
        raise ValueError(f"'{text}' is not the name of a server")
    return text
