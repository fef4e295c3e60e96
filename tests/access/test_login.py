"""The login of a listener: its modes, and the report of refused logins."""

from __future__ import annotations

import _hashlib
import socket
from types import SimpleNamespace

import pytest

from netproxy.access import login as login_module
from netproxy.access.backoff import BackOff, Penalty
from netproxy.access.login import Login
from netproxy.access.users import Users, hash_password
from netproxy.errors import LoginPenalised, LoginUnavailable
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Blocking
from netproxy.net.stream import Stream
from tests.support.logins import Recorder

CLIENT = Address("192.0.2.1", 4000)


@pytest.mark.parametrize(
    "mode, required, offered",
    [("required", True, True), ("optional", False, True), ("none", False, False)],
)
def test_login_checks_passwords_and_reports_refusals_in_every_mode(
    mode: str, required: bool, offered: bool
) -> None:
    recorder = Recorder()
    login = Login(Users({"alice": "secret"}), mode, recorder)
    assert (login.required, login.offered) == (required, offered)
    assert login.check(b"alice", b"secret", CLIENT) == "alice"
    assert login.check(b"alice", b"wrong", CLIENT) is None
    assert login.check(b"b\xff", b"secret", CLIENT) is None
    assert recorder.told == [("192.0.2.1", "alice"), ("192.0.2.1", "b\ufffd")]


def test_login_without_memory_for_its_check_is_reported_and_not_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hazard 145."""
    recorder = Recorder()
    login = Login(Users({"alice": hash_password("secret", 4096)}), "required", recorder)

    def scrypt(*_: object, **__: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(_hashlib, "scrypt", scrypt)
    with pytest.raises(LoginUnavailable):
        login.check(b"alice", b"secret", CLIENT)
    assert recorder.told == [
        (
            "192.0.2.1",
            "alice",
            "no memory to check the password (5 MiB): "
            "make cheaper hashes with 'netproxyctl hash-password --cost 4096'",
        )
    ]


@pytest.mark.parametrize(
    "password", ["secret", hash_password("secret", 1024)], ids=["plain", "hashed"]
)
def test_login_during_a_penalty_is_refused_unchecked_unless_it_is_remembered(
    monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    """Hazard 110."""
    recorder, back_off = Recorder(), BackOff(0.25)
    back_off.rules = Penalty(1, 600.0, 600.0)
    login = Login(Users({"alice": password, "bob": password}), "required", recorder, back_off)
    assert login.check(b"alice", b"secret", CLIENT) == "alice"
    login.check_penalty(b"bob", b"secret", CLIENT)
    now = 1000.0
    monkeypatch.setattr(login_module, "time", SimpleNamespace(monotonic=lambda: now))
    back_off.next_delay(CLIENT.host, now)
    monkeypatch.setattr(_hashlib, "scrypt", None)  # nothing may call it
    login.check_penalty(b"alice", b"secret", CLIENT)
    assert login.check(b"alice", b"secret", CLIENT) == "alice"
    assert not recorder.told
    for name, given in ((b"bob", b"secret"), (b"alice", b"wrong"), (b"nobody", b"secret")):
        with pytest.raises(LoginPenalised) as refusal:
            login.check_penalty(name, given, CLIENT)
        assert refusal.value.seconds == 600.0
    login.check_penalty(b"bob", b"secret", Address("192.0.2.2", 1))
    told = [("192.0.2.1", name, "penalty") for name in ("bob", "alice", "nobody")]
    assert recorder.told == told


def test_remembered_login_needs_no_thread() -> None:
    """Hazard 110."""
    users = Users({"alice": hash_password("secret", 1024), "bob": "plain"})
    login = Login(users, "required")
    left, right = socket.socketpair()
    with left, right:
        stream = Stream(left)
        for name, password in ((b"alice", b"secret"), (b"bob", b"plain")):
            need = next(login.authenticate(name, password, CLIENT, stream))
            assert isinstance(need, Blocking) and need.block() == name.decode()
            with pytest.raises(StopIteration) as ended:
                next(login.authenticate(name, password, CLIENT, stream))
            assert ended.value.value == (name.decode(), login.stamp(name.decode()))
            need = next(login.authenticate(name, b"wrong", CLIENT, stream))
            assert isinstance(need, Blocking) and need.block() is None
