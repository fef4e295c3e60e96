"""Users and passwords: who is let in, what a broken hash says, and that no check tells users from strangers."""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Any

import pytest

from netproxy.access import users as users_module
from netproxy.access.users import Login, Users, hash_password
from netproxy.interfaces.addresses import Address

# made with a small cost, so that the tests do not wait
CLIENT = Address("192.0.2.1", 4000)
CHEAP = "scrypt$1024$1$1$AAECAwQFBgcICQoLDA0ODw==$"


def cheap_hash(password: str) -> str:
    salt = bytes(range(16))
    made = hashlib.scrypt(password.encode(), salt=salt, n=1024, r=1, p=1, dklen=32)
    return CHEAP + base64.b64encode(made).decode()


@pytest.fixture(autouse=True)
def cheap_decoy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users_module, "COST", 1024)
    monkeypatch.setattr(users_module, "BLOCK", 1)


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
    def test_only_the_right_password_lets_in(
        self, users: Users, name: str, password: str, user: str | None
    ) -> None:
        for _ in range(2):
            assert users.check(name.encode(), password.encode()) == user

    def test_bytes_that_are_no_text(self, users: Users) -> None:
        assert users.check(b"\xff\xfe", b"\xff") is None
        assert users.check(b"alice", b"\xff") is None

    def test_nobody_is_let_in_where_there_are_no_users(self) -> None:
        assert Users({}).check(b"", b"") is None
        assert not len(Users({}))

    def test_a_wrong_password_after_the_right_one(self, users: Users) -> None:
        assert users.check(b"alice", b"secret") == "alice"
        assert users.check(b"alice", b"wrong") is None
        assert users.check(b"bob", b"secret") is None
        assert users.check(b"alice", b"secret") == "alice"


class TestTiming:
    """HAZARDS 109: the same way for an unknown user as for a wrong password."""

    @pytest.fixture
    def compared(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
        found: list[tuple[Any, Any]] = []
        real = hmac.compare_digest

        def compare_digest(left: Any, right: Any) -> bool:
            found.append((left, right))
            return real(left, right)

        monkeypatch.setattr(hmac, "compare_digest", compare_digest)
        return found

    @pytest.fixture
    def hashed(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        real = hashlib.scrypt

        def scrypt(password: bytes, *, n: int, r: int, p: int, **more: Any) -> bytes:
            found.append((n, r, p))
            return real(password, n=n, r=r, p=p, **more)

        monkeypatch.setattr(hashlib, "scrypt", scrypt)
        return found

    def test_plain_text_is_compared_for_both(self, compared: list) -> None:
        users = Users({"alice": "secret"})
        users.check(b"alice", b"wrong")
        users.check(b"eve", b"wrong")
        assert len(compared) == 2

    def test_a_hash_is_made_and_compared_for_both(self, compared: list, hashed: list) -> None:
        users = Users({"alice": cheap_hash("secret")})
        hashed.clear()
        users.check(b"alice", b"wrong")
        users.check(b"eve", b"wrong")
        assert hashed == [(1024, 1, 1)] * 2
        assert len(compared) == 4

    def test_one_that_was_right_is_remembered_and_never_a_wrong_one(self, hashed: list) -> None:
        users = Users({"alice": cheap_hash("secret")})
        hashed.clear()
        for password, made in (
            (b"secret", 1),
            (b"secret", 1),
            (b"wrong", 2),
            (b"wrong", 3),
            (b"secret", 3),
        ):
            users.check(b"alice", password)
            assert len(hashed) == made

    def test_what_is_remembered_is_not_the_password(self) -> None:
        users = Users({"alice": cheap_hash("secret")})
        users.check(b"alice", b"secret")
        assert "secret" not in repr(vars(users))


class TestHash:
    def test_is_what_a_check_takes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = hash_password("pa$$word \u00e9")
        assert made.startswith("scrypt$1024$1$1$")
        assert Users({"alice": made}).check(b"alice", "pa$$word \u00e9".encode()) == "alice"

    def test_is_another_each_time(self) -> None:
        assert hash_password("secret") != hash_password("secret")

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
    def test_that_is_broken_is_refused_at_the_start(self, value: str) -> None:
        with pytest.raises(
            ValueError, match="not a hash made by 'netproxyctl hash-password'"
        ) as caught:
            Users({"alice": value})
        assert value not in str(caught.value)

    def test_that_costs_too_much_is_refused_at_the_start(self) -> None:
        with pytest.raises(ValueError, match="costs too much"):
            Users({"alice": "scrypt$1048576$8$1$AAEC$" + "A" * 44})

    @pytest.mark.parametrize("cost", ["1$8$1", "65536$1$1"])
    def test_that_no_check_could_compute_is_refused_at_the_start(self, cost: str) -> None:
        """scrypt(3) wants N above 1 and below 2^(16 r); a login must not be where that is found out."""
        try:
            users = Users({"alice": f"scrypt${cost}$AAEC$" + "A" * 43 + "="})
        except ValueError:
            return
        assert users.check(b"alice", b"secret") is None


class TestLogin:
    @pytest.mark.parametrize(
        "mode, required, offered",
        [("required", True, True), ("optional", False, True), ("none", False, False)],
    )
    def test_asks_for_what_its_listener_wants(
        self, mode: str, required: bool, offered: bool
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


def test_a_user_is_never_shown_with_a_password() -> None:
    assert "secret" not in repr(Users({"alice": "secret"}))
