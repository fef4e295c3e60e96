"""Accounts for tests: a book without limits, or with those of some users."""

from __future__ import annotations

from typing import Any

from netproxy.access.accounts.account import FlowAccount
from netproxy.access.accounts.book import AccountBook
from netproxy.access.accounts.standing import Standing
from netproxy.access.accounts.subject import Limits
from netproxy.access.accounts.usage import UsageBook
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow


def account_book(**users: Limits) -> AccountBook:
    """Return a book with the limits of users by name."""
    usage = UsageBook(None)
    book = AccountBook(usage, Standing(usage))
    book.configure(users, {})
    return book


def standing() -> Standing:
    """Return a standing that refuses nobody."""
    return Standing(UsageBook(None))


def a_flow(user: str = "alice", network: str = "tcp", **fields: Any) -> Flow:
    """Return a flow of a user."""
    client, target = Address("192.0.2.1", 5000), Address("198.51.100.1", 443)
    return Flow(network, client, target, "main", user)._replace(**fields)


def free_account() -> FlowAccount:
    """Return the account of a flow without limits."""
    return account_book().open(a_flow(""))
