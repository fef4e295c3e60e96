"""The login of a listener: its modes, and the report of refused logins."""

from __future__ import annotations

import pytest

from netproxy.access.login import Login
from netproxy.access.users import Users
from netproxy.interfaces.addresses import Address

CLIENT = Address("192.0.2.1", 4000)


@pytest.mark.parametrize(
    "mode, required, offered",
    [("required", True, True), ("optional", False, True), ("none", False, False)],
)
def test_login_checks_passwords_and_reports_refusals_in_every_mode(
    mode: str, required: bool, offered: bool
) -> None:
    refused: list[tuple[str, str]] = []
    login = Login(
        Users({"alice": "secret"}), mode, lambda client, user: refused.append((client, user))
    )
    assert (login.required, login.offered) == (required, offered)
    assert login.check(b"alice", b"secret", CLIENT) == "alice"
    assert login.check(b"alice", b"wrong", CLIENT) is None
    assert login.check(b"b\xff", b"secret", CLIENT) is None
    assert refused == [("192.0.2.1", "alice"), ("192.0.2.1", "b\ufffd")]
