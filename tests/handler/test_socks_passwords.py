"""Logins of SOCKS5: passwords plain and hashed, and the work for a wrong one."""

from __future__ import annotations

import _hashlib
import hmac
from typing import Any

import pytest

from netproxy.access.users import hash_password
from tests.handler.test_socks5 import (
    ACCEPTED,
    ALICE,
    CONNECT,
    FAILED,
    HELLO_PASSWORD,
    PASSWORD,
    check_refused,
)
from tests.support.handlers import Conversation, HandlerDependencies


@pytest.fixture(scope="module")
def passwords() -> dict[str, str]:
    """Return alice's password as it stands in a configuration."""
    return {"plain": "secret", "hash": hash_password("secret")}


@pytest.mark.parametrize("form", ["plain", "hash"])
@pytest.mark.parametrize("auth", ["optional", "required"])
def test_right_password_names_the_user_each_time(
    passwords: dict[str, str], form: str, auth: str
) -> None:
    dependencies = HandlerDependencies({"alice": passwords[form]}, auth)
    handler = dependencies.socks5()
    for _ in range(2):
        with Conversation(handler) as client:
            client.send(HELLO_PASSWORD + ALICE + CONNECT)
            client.expect(PASSWORD + ACCEPTED)
            dependencies.dialer.target().close()
    assert [flow.user for flow in dependencies.router.flows] == ["alice", "alice"]


@pytest.mark.parametrize("form", ["plain", "hash"])
def test_remembered_password_does_not_admit_another_one(
    passwords: dict[str, str], form: str
) -> None:
    dependencies = HandlerDependencies(
        {"alice": passwords[form], "bob": passwords[form]}, "required"
    )
    with Conversation(dependencies.socks5()) as client:
        client.send(HELLO_PASSWORD + ALICE)
        client.expect(PASSWORD + ACCEPTED)
    for wrong in (b"\1\5alice\5wrong", b"\1\5alice\1s", b"\1\5mallo\6secret"):
        check_refused(dependencies, HELLO_PASSWORD + wrong + CONNECT, PASSWORD + FAILED)
    assert dependencies.untouched()


def test_hash_is_not_accepted_as_the_password(passwords: dict[str, str]) -> None:
    dependencies = HandlerDependencies({"alice": passwords["hash"]}, "required")
    raw = passwords["hash"].encode()
    check_refused(
        dependencies, HELLO_PASSWORD + b"\1\5alice" + bytes((len(raw),)) + raw, PASSWORD + FAILED
    )


@pytest.mark.parametrize("users", [("plain",), ("hash",), ("plain", "hash")])
def test_unknown_user_takes_the_same_work_as_a_wrong_password(
    passwords: dict[str, str], users: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 109."""
    calls: list[str] = []
    compare, scrypt = hmac.compare_digest, _hashlib.scrypt

    def spy(name: str, call: Any) -> Any:
        return lambda *values, **options: (calls.append(name), call(*values, **options))[1]

    monkeypatch.setattr(hmac, "compare_digest", spy("compare", compare))
    monkeypatch.setattr(_hashlib, "scrypt", spy("scrypt", scrypt))
    dependencies = HandlerDependencies({form: passwords[form] for form in users}, "required")
    made = []
    for name in (b"nobody", users[-1].encode()):
        calls.clear()
        check_refused(
            dependencies,
            HELLO_PASSWORD + b"\1" + bytes((len(name),)) + name + b"\5wrong",
            PASSWORD + FAILED,
        )
        made.append(list(calls))
    assert made[0] == made[1]
    assert "compare" in made[0]
    assert ("scrypt" in made[0]) == ("hash" in users)
