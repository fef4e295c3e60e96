"""Users and passwords: checks, timing towards unknown users, and invalid hashes."""

from __future__ import annotations

import _hashlib
import base64
import hashlib
import hmac
import importlib
import sys
import threading
from typing import Any

import pytest

from netproxy.access import users as users_module
from netproxy.access.factory import make_users
from netproxy.access.users import Users, _parse, hash_password, parse_cost
from netproxy.config.schema import Config
from netproxy.errors import LoginUnavailable

CHEAP = "scrypt$1024$1$1$AAECAwQFBgcICQoLDA0ODw==$"
"""The parameters of a hash whose check takes little time."""


def cheap_hash(password: str) -> str:
    """Return a hash with the parameters of CHEAP."""
    salt = bytes(range(16))
    digest = hashlib.scrypt(password.encode(), salt=salt, n=1024, r=1, p=1, dklen=32)
    return CHEAP + base64.b64encode(digest).decode()


@pytest.fixture(params=["plain", "hashed", "mixed"])
def users(request: pytest.FixtureRequest) -> Users:
    hashed = request.param != "plain"
    return Users(
        {
            "alice": cheap_hash("secret") if hashed else "secret",
            "bob": cheap_hash("b\u00fcrste") if request.param == "hashed" else "b\u00fcrste",
        }
    )


class TestCheck:
    @pytest.mark.parametrize(
        "name, password, user",
        [
            ("alice", "secret", "alice"),
            ("bob", "b\u00fcrste", "bob"),
            ("alice", "Secret", None),
            ("alice", "", None),
            ("alice", "secret ", None),
            ("Alice", "secret", None),
            ("", "", None),
            ("", "secret", None),
            ("bob", "secret", None),
            ("eve", "secret", None),
            ("eve", "", None),
            ("alice\0", "secret", None),
            ("a" * 255, "b" * 255, None),
        ],
    )
    def test_check_accepts_only_the_right_password(
        self, users: Users, name: str, password: str, user: str | None
    ) -> None:
        for _ in range(2):
            assert users.check(name.encode(), password.encode()) == user

    def test_check_refuses_bytes_that_are_not_utf8(self, users: Users) -> None:
        assert users.check(b"\xff\xfe", b"\xff") is None
        assert users.check(b"alice", b"\xff") is None

    def test_check_refuses_everyone_if_there_are_no_users(self) -> None:
        assert Users({}).check(b"", b"") is None
        assert not len(Users({}))

    def test_check_refuses_a_wrong_password_after_the_right_one(self, users: Users) -> None:
        assert users.check(b"alice", b"secret") == "alice"
        assert users.check(b"alice", b"wrong") is None
        assert users.check(b"bob", b"secret") is None
        assert users.check(b"alice", b"secret") == "alice"


class TestTiming:
    """Hazard 109: a check does the same for an unknown user as for a wrong password."""

    @pytest.fixture
    def compared(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
        """The comparisons that were made."""
        calls: list[tuple[Any, Any]] = []
        real = hmac.compare_digest

        def compare_digest(left: Any, right: Any) -> bool:
            calls.append((left, right))
            return real(left, right)

        monkeypatch.setattr(hmac, "compare_digest", compare_digest)
        return calls

    @pytest.fixture
    def hashed(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
        """The parameters of the hashes that were computed."""
        calls: list[tuple[int, int, int]] = []
        real = _hashlib.scrypt

        def scrypt(password: bytes, *, n: int, r: int, p: int, **more: Any) -> bytes:
            calls.append((n, r, p))
            return real(password, n=n, r=r, p=p, **more)

        monkeypatch.setattr(_hashlib, "scrypt", scrypt)
        return calls

    def test_plain_password_is_compared_for_known_and_unknown_users(
        self, compared: list[Any]
    ) -> None:
        users = Users({"alice": "secret"})
        users.check(b"alice", b"wrong")
        users.check(b"eve", b"wrong")
        assert len(compared) == 2

    def test_hash_is_computed_and_compared_for_known_and_unknown_users(
        self, compared: list[Any], hashed: list[Any]
    ) -> None:
        users = Users({"alice": cheap_hash("secret")})
        hashed.clear()
        users.check(b"alice", b"wrong")
        users.check(b"eve", b"wrong")
        assert hashed == [(1024, 1, 1)] * 2
        assert len(compared) == 4

    def test_right_password_is_remembered_and_a_wrong_one_is_not(self, hashed: list[Any]) -> None:
        users = Users({"alice": cheap_hash("secret")})
        hashed.clear()
        for password, computed in (
            (b"secret", 1),
            (b"secret", 1),
            (b"wrong", 2),
            (b"wrong", 3),
            (b"secret", 3),
        ):
            users.check(b"alice", password)
            assert len(hashed) == computed

    def test_unknown_user_costs_as_much_as_the_costliest_hash(self, hashed: list[Any]) -> None:
        """A machine whose hashes are cheap has no memory for the default cost."""
        users = Users({"alice": hash_password("a", 1024), "bob": hash_password("b", 2048)})
        hashed.clear()
        users.check(b"eve", b"wrong")
        assert hashed == [(2048, 8, 1)]

    def test_remembered_digest_does_not_contain_the_password(self) -> None:
        users = Users({"alice": cheap_hash("secret")})
        users.check(b"alice", b"secret")
        assert "secret" not in repr(vars(users))


class TestMemory:
    """Hazard 145: machines with little memory."""

    @pytest.mark.parametrize("error", [MemoryError(), ValueError("malloc failure"), ImportError()])
    def test_check_without_memory_is_unavailable(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        users = Users({"alice": cheap_hash("secret")})
        real = _hashlib.scrypt

        def scrypt(*_: Any, **__: Any) -> bytes:
            raise error

        monkeypatch.setattr(_hashlib, "scrypt", scrypt)
        with pytest.raises(LoginUnavailable, match="no memory .* --cost 4096"):
            users.check(b"alice", b"secret")
        monkeypatch.setattr(_hashlib, "scrypt", real)
        # The memory that the check took is free again, and nothing is decided.
        assert users.check(b"alice", b"secret") == "alice"

    def test_check_without_libcrypto_is_unavailable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "hmac", None)
        with pytest.raises(LoginUnavailable, match="no memory to check the password"):
            Users({"alice": "secret"}).check(b"alice", b"secret")

    @pytest.mark.parametrize("meanwhile", [False, True])
    def test_login_works_as_soon_as_libcrypto_can_be_loaded(
        self, monkeypatch: pytest.MonkeyPatch, meanwhile: bool
    ) -> None:
        """Also if another part of the daemon has imported hmac while it could not be loaded."""
        users = Users({"alice": cheap_hash("secret")})
        for module in ("hashlib", "hmac"):
            monkeypatch.delitem(sys.modules, module)
        # An import of a module that is None is refused, as if its library could not be mapped.
        monkeypatch.setitem(sys.modules, "_hashlib", None)
        for _ in range(2):
            with pytest.raises(LoginUnavailable, match="no memory to check the password"):
                users.check(b"alice", b"secret")
            if meanwhile:
                assert not hasattr(importlib.import_module("hmac")._hashlib, "scrypt")
        monkeypatch.setitem(sys.modules, "_hashlib", _hashlib)
        assert users.check(b"alice", b"secret") == "alice"
        assert users.check(b"alice", b"wrong") is None

    def run(
        self, monkeypatch: pytest.MonkeyPatch, cost: int, checks: int, suspects: int = 0
    ) -> int:
        """Run checks side by side; return how many were computed at the same time at most."""
        limit = users_module.MEMORY_LIMIT // (cost << 10) * (2 if suspects else 1)
        together = threading.Barrier(min(checks, limit or 1), timeout=60)
        lock, running, most = threading.Lock(), 0, 0

        def scrypt(*_: Any, **__: Any) -> bytes:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            together.wait()
            with lock:
                running -= 1
            return bytes(32)

        users = Users({"alice": hash_password("secret", 1024).replace("$1024$", f"${cost}$")})
        monkeypatch.setattr(_hashlib, "scrypt", scrypt)
        threads = [
            threading.Thread(target=users.check, args=(b"alice", b"wrong", number < suspects))
            for number in range(checks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return most

    def test_cheap_checks_run_side_by_side(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(users_module, "MEMORY_LIMIT", 9 << 20)
        assert self.run(monkeypatch, 4096, 1) == 1
        monkeypatch.setattr(users_module, "MEMORY_LIMIT", (4 << 20) * 2 + (3 << 20))
        assert self.run(monkeypatch, 4096, 2) == 2

    def test_checks_that_do_not_fit_wait_for_each_other(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.run(monkeypatch, 16384, 6) == 1
        assert self.run(monkeypatch, 32768, 3) == 1

    def test_first_login_does_not_wait_for_the_check_of_a_suspect(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.run(monkeypatch, 16384, 2, suspects=1) == 2

    def test_checks_beyond_the_memory_limit_run_alone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.run(monkeypatch, 32768, 3, suspects=2) == 1


class TestHash:
    @pytest.mark.parametrize("cost", [1024, 4096, 16384])
    def test_hash_password_is_accepted_by_check(self, cost: int) -> None:
        value = hash_password("pa$$word \u00e9", cost)
        assert value.startswith(f"scrypt${cost}$8$1$")
        assert Users({"alice": value}).check(b"alice", "pa$$word \u00e9".encode()) == "alice"

    def test_hash_password_uses_a_new_salt_each_time(self) -> None:
        assert hash_password("secret", 1024) != hash_password("secret", 1024)

    @pytest.mark.parametrize("text", ["1024", "4096", "131072"])
    def test_cost_of_a_new_hash_is_a_power_of_two(self, text: str) -> None:
        assert parse_cost(text) == int(text)
        _parse(f"scrypt${text}$8$1$AAEC$" + "A" * 43 + "=")

    @pytest.mark.parametrize(
        "text", ["", "0", "-1024", "512", "1000", "5000", "262144", "x", "1e4", "9" * 50, "\u0661"]
    )
    def test_other_costs_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="not a power of two from 1024 to 131072"):
            parse_cost(text)

    @pytest.mark.parametrize(
        "value",
        [
            "scrypt$",
            "scrypt$1$2$3",
            "scrypt$1024$1$1$AAECAwQFBgcICQoLDA0ODw==$",
            "scrypt$1024$1$1$!$" + "A" * 44,
            "scrypt$1024$1$1$AAECAwQFBgcICQoLDA0ODw==$AAAA",
            "scrypt$1000$1$1$AAEC$" + "A" * 44,
            "scrypt$-1024$1$1$AAEC$" + "A" * 44,
            "scrypt$1024$0$1$AAEC$" + "A" * 44,
            "scrypt$x$1$1$AAEC$" + "A" * 44,
            "scrypt$1024$1$1$AAEC$" + "A" * 44 + "$x",
        ],
    )
    def test_invalid_hash_is_refused_when_users_are_built(self, value: str) -> None:
        with pytest.raises(
            ValueError, match="not a hash made by 'netproxyctl hash-password'"
        ) as caught:
            Users({"alice": value})
        assert value not in str(caught.value)

    def test_hash_that_costs_too_much_is_refused_when_users_are_built(self) -> None:
        with pytest.raises(
            ValueError, match=r"costs too much .* above 1048576 .* --cost', .* at most 131072\)"
        ):
            Users({"alice": "scrypt$1048576$8$1$AAEC$" + "A" * 44})

    @pytest.mark.parametrize("cost", ["1$8$1", "65536$1$1"])
    def test_hash_that_scrypt_cannot_compute_is_refused_when_users_are_built(
        self, cost: str
    ) -> None:
        """scrypt needs 1 < N < 2^(16 r): an error must not wait for the first login."""
        try:
            users = Users({"alice": f"scrypt${cost}$AAEC$" + "A" * 43 + "="})
        except ValueError:
            return
        assert users.check(b"alice", b"secret") is None


def test_repr_of_users_contains_no_password() -> None:
    assert "secret" not in repr(Users({"alice": "secret"}))


def test_reload_remembers_right_passwords_that_it_does_not_change() -> None:
    hashed = hash_password("secret", 1024)
    earlier = Users({"alice": hashed, "bob": hashed, "carol": "plain", "dave": "plain"})
    for user, password in (("alice", b"secret"), ("bob", b"secret")):
        assert earlier.check(user.encode(), password) == user
    for user in ("carol", "dave"):
        assert earlier.check(user.encode(), b"plain") == user
    newer = Users({"alice": hashed, "bob": hash_password("secret", 1024), "carol": "plain"})
    newer.take_over(earlier)
    assert newer.recall("alice", b"secret") is True
    assert newer.recall("alice", b"wrong") is False
    assert newer.recall("carol", b"plain") is True
    assert newer.recall("carol", b"wrong") is False
    assert newer.recall("bob", b"secret") is None
    assert newer.recall("dave", b"plain") is None


def test_right_password_is_known_to_the_worker_that_is_told_of_it() -> None:
    hashed = hash_password("secret", 1024)
    here, there = Users({"alice": hashed, "bob": "plain"}), Users({"alice": hashed, "bob": "plain"})
    there.take_over(here)  # the key of both is that of their parent
    here.announce = there.learn
    for user, password in (("alice", b"secret"), ("bob", b"plain")):
        assert there.recall(user, password) is None
        assert here.check(user.encode(), password) == user
        assert there.recall(user, password) is True
        assert there.recall(user, b"wrong") is False


def test_password_of_an_earlier_configuration_is_not_learned() -> None:
    """A worker may not have put a reload into force yet that changes the password."""
    before = Users({"alice": hash_password("old", 1024)})
    after = Users({"alice": hash_password("new", 1024)})
    after.take_over(before)
    before.announce = after.learn
    assert before.check(b"alice", b"old") == "alice"
    assert not after.recall("alice", b"old")
    assert after.check(b"alice", b"old") is None
    assert after.check(b"alice", b"new") == "alice"


def test_configuration_without_users_knows_nobody() -> None:
    users = make_users(Config(()), Users({"alice": "secret"}))
    users.learn("alice", b"key", b"")
    assert not users.are_hashed and users.announce is None
    assert users.stamp("alice") is None and users.recall("alice", b"secret") is None
    assert users.check(b"alice", b"secret") is None
