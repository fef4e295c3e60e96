"""The countries of addresses, from a database in MaxMind's format.

The package maxminddb reads it; it is optional and imported only if rules name countries.
"""

from __future__ import annotations

import os

from netproxy.errors import ConfigError, check_regular
from netproxy.typed import Protocol


class _Database(Protocol):
    """An open database of the package maxminddb, which has no types of its own."""

    def get(self, host: str) -> object:
        """Return the record of an address.  Raises ValueError for a family it does not have."""


class CountryDatabase:
    """Countries by address.  Any thread."""

    def __init__(self, path: str, place: str, path_place: str) -> None:
        """Open the database at `path`.

        `place` is where a rule first names a country, `path_place` where the path is written.
        Raises ConfigError.
        """
        try:
            # Late, and optional.
            import maxminddb
        except ImportError as error:
            raise ConfigError(
                "geoip: needs the Python package maxminddb (Debian: python3-maxminddb)", place
            ) from error
        try:
            if os.path.exists(path):
                check_regular(path)
            self._database: _Database = maxminddb.open_database(path)
        except OSError as error:
            raise ConfigError(
                f"geoip_database: {path}: {error.strerror or error}", path_place
            ) from error
        except (ValueError, maxminddb.InvalidDatabaseError) as error:
            raise ConfigError(f"geoip_database: {path}: {error}", path_place) from error

    def country_of(self, host: str) -> str:
        """Return the ISO code of an address's country, "" if it is not known."""
        try:
            record = self._database.get(host.partition("%")[0])
        except ValueError:
            # An IPv6 address in a database of IPv4.
            return ""
        if not isinstance(record, dict):
            return ""
        country = record.get("country") or record.get("registered_country")
        if isinstance(country, dict):
            country = country.get("iso_code")
        # Some databases have the code itself in place of a mapping.
        return str(country or "")
