"""TLS towards proxies: which certificates are trusted and which one is shown.

A TlsTrust keeps the SSL context of one TLS configuration.  A reload reads its files again: all
of them first, so that a file with an error changes nothing, then the contexts are replaced for
the connections to come.  Thread: handshakes on any, everything else on the main thread.
"""

from __future__ import annotations

from netproxy.errors import ConfigError
from netproxy.typed import TYPE_CHECKING, Iterable, NamedTuple

if TYPE_CHECKING:
    from ssl import SSLContext

    from netproxy.interfaces.connections import Stream


class TlsFiles(NamedTuple):
    """Where the certificates are, all in PEM format."""

    ca: str
    """Authorities in place of the system's; "" for the system's."""
    certificate: str
    """Shown to the proxy; "" for none."""
    key: str
    """The certificate's key; "" if it is in the same file."""
    insecure: bool
    """True if any certificate of the proxy is accepted."""


class TlsTrust:
    """The SSL context of one TLS configuration."""

    def __init__(self, label: str, files: TlsFiles, place: str) -> None:
        """Read the files; `label` names the proxy in errors.  Raises ConfigError with `place`."""
        self._label = label
        self._files = files
        self._context = self.read(place)

    def read(self, place: str) -> SSLContext:
        """Read the files into a new context.  Raises ConfigError with `place`."""
        from netproxy.net import tls  # late: ssl costs 3 MiB, and few need it

        try:
            return tls.client_context(*self._files)
        except ValueError as error:
            raise ConfigError(f"{self._label}: tls: {error}", place) from error

    def replace(self, context: SSLContext) -> None:
        """Use a context for the handshakes to come."""
        self._context = context

    def connect(self, stream: Stream, server_name: str) -> None:
        """Make the TLS handshake with a proxy whose certificate must be for `server_name`.

        Raises ProtocolError or StreamError.
        """
        from netproxy.net import tls  # late: see read()

        tls.connect(stream, self._context, server_name)


class TlsRenewal:
    """Contexts that have been read again and are not used yet."""

    def __init__(self, trusts: Iterable[tuple[TlsTrust, str]]) -> None:
        """Read the files of all trusts, each with its place in the configuration.

        Raises ConfigError, and then nothing has changed.
        """
        self._renewed = [(trust, trust.read(place)) for trust, place in trusts]

    def commit(self) -> None:
        """Use the new contexts for the handshakes to come.  Cannot fail."""
        for trust, context in self._renewed:
            trust.replace(context)
