"""Makes the external check of logins from the configuration."""

from __future__ import annotations

import os

from netproxy.access.external.logins import CheckTimes, ExternalDependencies, ExternalLogins
from netproxy.errors import ConfigError
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.access.external.checker import Checker
    from netproxy.access.external.logins import AnswerParser, Granted
    from netproxy.config.schema import AuthConfig
    from netproxy.interfaces.fairness import FairSubmit
    from netproxy.interfaces.routing import Resolver
    from netproxy.interfaces.services import Log


class ExternalMaker:
    """Makes ExternalLogins with what the daemon has for them."""

    def __init__(
        self,
        parser: AnswerParser,
        submit: FairSubmit,
        granted: Granted,
        resolver: Resolver,
        log: Log,
        key: bytes,
    ) -> None:
        """`resolver` finds the service.  `key`: as in ExternalDependencies."""
        self._parser, self._submit, self._granted = parser, submit, granted
        self._resolver, self._log, self._key = resolver, log, key

    def make(self, config: AuthConfig, previous: ExternalLogins | None) -> ExternalLogins:
        """Return the check of a configuration.  `previous`: that of the one before.

        Raises ConfigError if the program cannot be run.
        """
        dependencies = ExternalDependencies(
            (config.command, config.url),
            self._checker(config),
            self._parser,
            self._submit,
            self._granted,
            self._key,
        )
        times = CheckTimes(config.timeout, config.cache, config.cache_failures)
        return ExternalLogins(dependencies, times, previous)

    def _checker(self, config: AuthConfig) -> Checker:
        if config.url:
            # late: 3 MiB, and few configurations have a service
            from netproxy.access.external.service import ServiceChecker

            return ServiceChecker(config.url, self._resolver)
        program = config.command[0]
        if not (os.path.isfile(program) and os.access(program, os.X_OK)):
            # A command in one text may hold a secret behind its first word.
            path, blank, _ = program.partition(" ")
            hint = " (write the program and its arguments as a list)" if blank else ""
            message = f"auth.command: {path} is not a program that can be run{hint}"
            raise ConfigError(message, config.place)
        # late: as above
        from netproxy.access.external.command import CommandChecker

        return CommandChecker(config.command, self._log)
