"""The login that one listener requires of its clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.access.users import Users
    from netproxy.interfaces.addresses import Address


class Login:
    """Checks the credentials of a listener's clients, against the users of today.  Thread: any."""

    def __init__(
        self, users: Users, mode: str, refused: Callable[[str, str], None] | None = None
    ) -> None:
        """`mode` is "required", "optional" or "none".

        `refused(client, user)` is called for each refused login, with the client's address and
        the user name that it gave.
        """
        self._users = users
        self._refused = refused
        self.required = mode == "required"
        """True if clients without a login are refused."""
        self.offered = mode != "none"
        """True if clients may log in."""

    def check(self, name: bytes, password: bytes, client: Address) -> str | None:
        """Return the user's name if the password is right, else None.

        Takes some 50 ms if passwords are hashed.
        """
        user = self._users.check(name, password)
        if user is None and self._refused is not None:
            self._refused(client.host, name.decode("utf-8", "replace"))
        return user

    def stamp(self, user: str) -> object:
        """Return the configured password of a user, None if there is no such user.

        It is for comparisons: the login of a connection is valid while its stamp is the same.
        """
        return self._users.stamp(user)

    def follow(self, newer: Login) -> None:
        """Check as the login of a new configuration does."""
        self._users = newer._users
        self._refused = newer._refused
        self.required, self.offered = newer.required, newer.offered
