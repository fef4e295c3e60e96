"""The users of a configuration as a login knows them, and what stands for none.  Thread: any."""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from netproxy.access.users import Announce


class KnownUsers(Protocol):
    """The users of a configuration (access.users.Users), or nobody."""

    announce: Announce | None
    """Tells other processes of a first right login; None if there are none."""

    @property
    def are_hashed(self) -> bool:
        """True if any password is hashed: every check takes time then."""

    def stamp(self, user: str) -> object:
        """Return what stays equal while a login is valid, None for an unknown user."""

    def check(self, name: bytes, password: bytes, is_suspect: bool = False) -> str | None:
        """Return the user's name if the password is right, else None.  Raises LoginUnavailable.

        `is_suspect`: the check may not hold the memory that first logins wait for.
        """

    def recall(self, user: str, password: bytes) -> bool | None:
        """Return whether a password was right before; None if none of the user was."""

    def learn(self, user: str, key: bytes, seen: bytes) -> None:
        """Remember a login that was right in another process."""


class Nobody:
    """The KnownUsers of a configuration without users, which never loads access.users."""

    announce: Announce | None = None
    are_hashed = False

    def stamp(self, user: str) -> None:
        """Return None: every user is unknown."""

    def check(self, name: bytes, password: bytes, is_suspect: bool = False) -> None:
        """Return None: no password is right."""

    def recall(self, user: str, password: bytes) -> None:
        """Return None: no password was right."""

    def learn(self, user: str, key: bytes, seen: bytes) -> None:
        """Remember nothing."""
