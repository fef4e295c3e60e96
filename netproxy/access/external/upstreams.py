"""The upstreams of users: configured ones, and those that an external check has named."""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, Collection, Mapping

if TYPE_CHECKING:
    from netproxy.access.external.answers import Answers
    from netproxy.interfaces.routing import Dialer, UserUpstreams

LABEL = "auth.upstream"
"""What records call the decision."""


class GrantedUpstreams:
    """A UserUpstreams that asks the remembered answers for users that are not configured."""

    def __init__(
        self,
        configured: UserUpstreams,
        users: Collection[str],
        answers: Answers,
        named: Mapping[str, Dialer],
        missing: Dialer,
    ) -> None:
        """Return what is `configured` for `users`, else what answers name.

        `named`: what answers may name.  `missing` serves users whose upstream has gone.
        """
        self._configured, self._users, self._answers = configured, users, answers
        self._named, self._missing = named, missing

    def get(self, user: str, /) -> tuple[str, Dialer] | None:
        """Return what decides and the dialer, None if the user has no upstream."""
        # A reload may add a user for whom an answer is remembered.
        if user in self._users:
            return self._configured.get(user)
        name = self._answers.upstream(user)
        return (LABEL, self._named.get(name, self._missing)) if name else None
