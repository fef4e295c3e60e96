"""The login that one listener requires of its clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from netproxy.errors import LoginUnavailable

if TYPE_CHECKING:
    from netproxy.access.users import Users
    from netproxy.interfaces.addresses import Address


class LoginObserver(Protocol):
    """Is told which logins fail.  Thread: any."""

    def refused(self, client: str, user: str) -> None:
        """Note a login with a wrong user name or password; `client` is an address."""

    def unavailable(self, client: str, user: str, why: str) -> None:
        """Note a login that could not be checked."""


class Login:
    """Checks the credentials of a listener's clients.  Thread: any."""

    def __init__(self, users: Users, mode: str, observer: LoginObserver | None = None) -> None:
        """`mode` is "required", "optional" or "none"."""
        self._users = users
        self._observer = observer
        self.required = mode == "required"
        """True if clients without a login are refused."""
        self.offered = mode != "none"
        """True if clients may log in."""

    def check(self, name: bytes, password: bytes, client: Address) -> str | None:
        """Return the user's name if the password is right, else None.

        Takes some 50 ms if passwords are hashed.  Raises LoginUnavailable if there is no memory
        for the check.
        """
        text = name.decode("utf-8", "replace")
        try:
            user = self._users.check(name, password)
        except LoginUnavailable as error:
            if self._observer is not None:
                self._observer.unavailable(client.host, text, str(error))
            raise
        if user is None and self._observer is not None:
            self._observer.refused(client.host, text)
        return user
