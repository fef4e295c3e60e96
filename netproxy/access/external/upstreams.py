"""The upstreams of users: configured ones, and those that an external check has named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping

if TYPE_CHECKING:
    from netproxy.access.external.answers import Answers
    from netproxy.interfaces.routing import Dialer, UserUpstreams

LABEL = "auth.upstream"
"""What records call the decision."""


class GrantedUpstreams:
    """A UserUpstreams that asks the remembered answers for users without a configured one."""

    def __init__(
        self,
        configured: UserUpstreams,
        answers: Answers,
        named: Mapping[str, Dialer],
        missing: Dialer,
    ) -> None:
        """`named`: what answers may name.  `missing` serves users whose upstream has gone."""
        self._configured, self._answers = configured, answers
        self._named, self._missing = named, missing

    def get(self, user: str, /) -> tuple[str, Dialer] | None:
        """Return what decides and the dialer, None if the user has no upstream."""
        configured = self._configured.get(user)
        if configured is not None:
            return configured
        name = self._answers.upstream(user)
        return (LABEL, self._named.get(name, self._missing)) if name else None
