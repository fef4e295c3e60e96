"""Who may use SOCKS: passwords plain and hashed, and what a wrong one costs."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import pytest

from netproxy.access.users import hash_password
from tests.handler.test_socks5 import ACCEPTED, ALICE, ASKED, CONNECT, FAILED, LOGIN, check_refused
from tests.support.handlers import Conversation, HandlerDependencies


@pytest.fixture(scope="module")
def stored() -> dict[str, str]:
    """How alice's password is kept."""
    return {"plain": "secret", "hash": hash_password("secret")}


@pytest.mark.parametrize("kept", ["plain", "hash"])
@pytest.mark.parametrize("auth", ["optional", "required"])
def test_a_right_password_names_the_user_each_time(
    stored: dict[str, str], kept: str, auth: str
) -> None:
    dependencies = HandlerDependencies({"alice": stored[kept]}, auth)
    handler = dependencies.socks5()
    for _ in range(2):
        with Conversation(handler) as client:
            client.send(LOGIN + ALICE + CONNECT)
            client.expect(ASKED + ACCEPTED)
            dependencies.dialer.target().close()
    assert [flow.user for flow in dependencies.router.flows] == ["alice", "alice"]


@pytest.mark.parametrize("kept", ["plain", "hash"])
def test_a_remembered_password_does_not_let_another_one_in(
    stored: dict[str, str], kept: str
) -> None:
    dependencies = HandlerDependencies({"alice": stored[kept], "bob": stored[kept]}, "required")
    with Conversation(dependencies.socks5()) as client:
        client.send(LOGIN + ALICE)
        client.expect(ASKED + ACCEPTED)
    for wrong in (b"\1\5alice\5wrong", b"\1\5alice\1s", b"\1\5mallo\6secret"):
        check_refused(dependencies, LOGIN + wrong + CONNECT, ASKED + FAILED)
    assert dependencies.untouched()


def test_the_hash_is_not_the_password(stored: dict[str, str]) -> None:
    dependencies = HandlerDependencies({"alice": stored["hash"]}, "required")
    raw = stored["hash"].encode()
    check_refused(dependencies, LOGIN + b"\1\5alice" + bytes((len(raw),)) + raw, ASKED + FAILED)


@pytest.mark.parametrize("users", [("plain",), ("hash",), ("plain", "hash")])
def test_hazard_109_an_unknown_user_costs_what_a_wrong_password_does(
    stored: dict[str, str], users: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    compare, scrypt = hmac.compare_digest, hashlib.scrypt

    def spy(name: str, call: Any) -> Any:
        return lambda *values, **options: (calls.append(name), call(*values, **options))[1]

    monkeypatch.setattr(hmac, "compare_digest", spy("compare", compare))
    monkeypatch.setattr(hashlib, "scrypt", spy("scrypt", scrypt))
    dependencies = HandlerDependencies({kept: stored[kept] for kept in users}, "required")
    ways = []
    for name in (b"nobody", users[-1].encode()):
        calls.clear()
        check_refused(
            dependencies, LOGIN + b"\1" + bytes((len(name),)) + name + b"\5wrong", ASKED + FAILED
        )
        ways.append(list(calls))
    assert ways[0] == ways[1]
    assert "compare" in ways[0]
    assert ("scrypt" in ways[0]) == ("hash" in users)
