"""What a listener's clients may do after reloads."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from netproxy.access.login import Login
from netproxy.access.permission import Permission, Permissions
from netproxy.access.users import Users, hash_password
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.listeners import ALL_CLIENTS, AllowedClients
from netproxy.interfaces.networks import IpNetwork
from tests.support.accounts import standing
from tests.support.doubles import Counts

CLIENT = "192.0.2.1"
ROUTER: Any = object()


def flow(user: str = "", stamp: object = None) -> Flow:
    client = Address(CLIENT, 1)
    return Flow("tcp", client, Address("198.51.100.1", 443), "main", user, (), stamp)


def permission(
    users: dict[str, str], mode: str = "required", clients: str = "", listener: str = "main"
) -> Permission:
    networks = [IpNetwork.parse(clients)] if clients else []
    allowed = AllowedClients((networks, ()))
    return Permission(listener, Login(Users(users), mode), allowed, Counts(), standing())


def after(older: Permission, *newer: Permission) -> Permission:
    """Return a permission after the reloads to newer configurations."""
    permissions = Permissions()
    for following in (older, *newer):
        permissions.commit([following], ROUTER)
    return older


def test_login_is_valid_while_its_password_is_the_configured_one() -> None:
    stored = hash_password("secret")
    older = permission({"alice": stored, "bob": "x"})
    alice, bob = older.stamp("alice"), older.stamp("bob")
    assert older.refusal(flow("alice", alice)) == ""
    after(older, permission({"alice": stored, "bob": "y"}))
    assert older.refusal(flow("alice", alice)) == ""
    assert older.refusal(flow("bob", bob)) == "password changed"
    after(older, permission({"alice": hash_password("other")}))
    assert older.refusal(flow("alice", alice)) == "password changed"
    assert older.refusal(flow("bob", bob)) == "user removed"


def test_listener_that_needs_no_login_any_more_asks_for_no_user() -> None:
    older = permission({"alice": "x"})
    stamp = older.stamp("alice")
    assert after(older, permission({}, "none")).refusal(flow("alice", stamp)) == ""


def test_listener_that_requires_a_login_refuses_clients_without_one() -> None:
    older = permission({}, "none")
    assert older.refusal(flow("", None)) == ""
    assert after(older, permission({"alice": "x"}, "optional")).refusal(flow("", None)) == ""
    assert after(older, permission({"alice": "x"})).refusal(flow("", None)) == "login required"


def test_client_that_is_not_allowed_any_more_is_refused_and_counted() -> None:
    older = permission({}, "none")
    older.check_client(CLIENT)
    after(older, permission({}, "none", "198.51.100.0/24"))
    with pytest.raises(DialError) as raised:
        older.check_client(CLIENT)
    assert raised.value.reason is Reason.DENIED
    counts: Any = older._counter
    assert counts.of("requests_refused", "client not allowed") == 1


def test_refused_request_is_counted_and_recorded_once() -> None:
    older = permission({"alice": "x"})
    asked = flow("alice", older.stamp("alice"))
    older.check(asked)
    after(older, permission({"alice": "y"}))
    for question in (None, lambda: "GET host"):
        with pytest.raises(DialError) as raised:
            older.check(asked, question)
        assert raised.value.reason is Reason.DENIED
    counts: Any = older._counter
    assert counts.of("requests_refused", "password changed") == 2
    first, second = counts.refusals
    assert (first.client, first.user, first.decided) == (CLIENT, "alice", "users")
    assert (first.asked, second.asked) == (asked.target, "GET host")


def test_stamp_does_not_show_the_password() -> None:
    stamp = permission({"alice": "secret"}).stamp("alice")
    assert stamp is not None and "secret" not in repr(stamp)


def test_removed_listener_permits_nothing_new_until_it_comes_back() -> None:
    older = permission({}, "none")
    after(older, permission({}, "none", listener="other"))
    assert older.refusal(flow("", None)) == "listener removed"
    assert after(older, permission({}, "none")).refusal(flow("", None)) == ""


def test_each_earlier_configuration_follows_the_newest_router() -> None:
    permissions, parts, kept = Permissions(), [], []
    for number in range(3):
        part = SimpleNamespace(router=number)
        login = Login(Users({}), "none")
        kept.append(Permission("main", login, ALL_CLIENTS, Counts(), standing()))
        kept[-1].set_routed([part])
        parts.append(part)
        permissions.commit(kept[-1:], number)  # type: ignore[arg-type]
    assert [part.router for part in parts] == [2, 2, 2]


def test_permission_that_nobody_uses_is_forgotten() -> None:
    permissions = Permissions()
    for _ in range(3):
        permissions.commit([permission({}, "none")], ROUTER)
    gc.collect()
    assert not len(permissions._followers)
