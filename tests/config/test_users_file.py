"""The file of `users_file`: its lines, their errors with place, and its users in the schema."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from netproxy.config.read import check, read_config
from netproxy.config.schema import Config, QuotaConfig, UserLimitsConfig
from netproxy.config.sections import users_file
from netproxy.config.sections.auth import AnswerReader
from netproxy.config.tree.load import load_file
from netproxy.config.tree.problems import Problems
from netproxy.errors import ConfigError
from netproxy.interfaces.networks import IpNetwork
from netproxy.interfaces.routing import Bind
from tests.config.reading import HASH

pytest.importorskip("yaml")

BCRYPT = "$2y$05$" + "a" * 53
WERKZEUG = "scrypt:32768:8:1$salt$" + "0" * 128
FOREIGN = (
    "which NetProxy does not check: make a hash of the password with 'netproxyctl hash-password'"
)


def read(folder: Path, users: str | bytes, more: str = "") -> Config:
    """Return the configuration that names a file with this text.  Raises ConfigError."""
    (folder / "users").write_bytes(users if isinstance(users, bytes) else users.encode())
    (folder / "users").chmod(0o600)
    path = folder / "c.yaml"
    path.write_text(f"users_file: users\nlisteners: [{{listen: ':1080'}}]\n{more}")
    problems = Problems()
    return check(read_config(load_file(str(path)), problems), problems)


def errors(folder: Path, users: str | bytes, more: str = "") -> list[str]:
    """Return the errors of the file, without the folder of their place."""
    with pytest.raises(ConfigError) as caught:
        read(folder, users, more)
    return [line.replace(f"{folder}/", "") for line in str(caught.value).split("\n")]


def test_lines_become_users_with_their_limits(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        f"# people\r\n\n  # more\nalice:{HASH}\r\n"
        f"bob b:{HASH}:connections=5, sessions=6,connection_rate=2/s,rate=1MiB/s,rate_up=1KiB/s,"
        "burst=64KiB,quota_day=1GiB,quota_month=2GiB,quota_total=3GiB,expires=2027-01-31,"
        "upstream=socks5://h:1\n",
    )
    assert list(config.users) == ["alice", "bob b"]
    assert config.users["alice"].password == HASH
    assert config.users["alice"].limits == UserLimitsConfig()
    bob = config.users["bob b"]
    quota = QuotaConfig(1 << 30, 2 << 30, 3 << 30)
    assert bob.limits == UserLimitsConfig(5, 6, 2.0, 1 << 10, 1 << 20, 64 << 10, quota)
    assert bob.expires == "2027-01-31"
    assert bob.upstream is not None and bob.upstream.text == "socks5://h:1"
    assert config.listeners[0].auth == "required"


def test_user_has_a_bind(tmp_path: Path) -> None:
    prefix = "2001:db8:1::/64"
    alice = f"alice:{HASH}:bind={prefix},rotate=10m,connections=5"
    config = read(tmp_path, f"{alice}\nbob:{HASH}:bind=192.0.2.7\n")
    network = IpNetwork.parse(prefix)
    assert [user.bind for user in config.users.values()] == [
        Bind(prefix, prefix=network, rotate="10m", period=600.0),
        Bind("192.0.2.7", address="192.0.2.7"),
    ]


def test_limit_of_0_is_no_limit(tmp_path: Path) -> None:
    """The same in the file, in the section `users` and in the answer of an external check."""
    inline = f"users: {{bob: {{password: '{HASH}', limits: {{connections: 0, sessions: 0}}}}}}"
    config = read(tmp_path, f"alice:{HASH}:connections=0,sessions=0,rate=0\n", inline)
    limits = [user.limits for user in config.users.values()]
    assert limits == [UserLimitsConfig(), UserLimitsConfig()]
    answer = AnswerReader(()).parse('{"connections": 0, "sessions": "0"}')
    assert answer == ("", UserLimitsConfig())


def test_file_without_users_still_requires_a_login(tmp_path: Path) -> None:
    config = read(tmp_path, "# nobody yet\n")
    assert (config.users, config.listeners[0].auth) == ({}, "required")


@pytest.mark.parametrize(
    "line, expected",
    [
        ("alice", "1: is not a user (expected name:hash[:key=value,...])"),
        ("alice:", "7: the password is not a hash: make a hash of the password with"),
        ("alice:secret", "7: the password is not a hash: make a hash of the password with"),
        (f"alice:{BCRYPT}", f"7: the password is a hash of the kind bcrypt, {FOREIGN}"),
        (f"alice:{WERKZEUG}", f"7: the password is a hash of the kind Werkzeug, {FOREIGN}"),
        (f":{HASH}", "1: users.: a user's name has 1 to 255 bytes and no ':'"),
        (f" alice:{HASH}", "1: the name has a blank at its begin or end"),
        (f"a\tb:{HASH}", "1: the name has a blank at its begin or end, or a control character"),
        (f"alice:{HASH}:bind=0.0.0.0", "{5}: users.alice.bind: '0.0.0.0' is the unspecified"),
        (f"alice:{HASH}:rotate=user", "{7}: users.alice.rotate: needs a prefix as bind"),
        (f"alice:{HASH}:speed=5", "{0}: unknown key 'speed'"),
        (f"alice:{HASH}:connection=5", "{0}: unknown key 'connection' (did you mean 'connections'"),
        (f"alice:{HASH}:sessions", "{0}: the key 'sessions' has no value (expected sessions="),
        (f"alice:{HASH}:sessions=1,sessions=2", "{11}: the key 'sessions' is given twice"),
        (f"alice:{HASH}:sessions=1, rate=fast", "{17}: users.alice.limits.rate: "),
        (f"alice:{HASH}:quota_day=x", "{10}: users.alice.limits.quota.day: "),
        (f"alice:{HASH}:expires=soon", "{8}: users.alice.expires: 'soon' is not a date"),
        (f"alice:{HASH}:upstream=nowhere", "{9}: users.alice.upstream: "),
    ],
)
def test_error_of_a_line_has_its_place(tmp_path: Path, line: str, expected: str) -> None:
    # {n}: so many characters behind the second colon.
    for n in range(20):
        expected = expected.replace(f"{{{n}}}", str(len(f"alice:{HASH}:") + 1 + n))
    found = errors(tmp_path, f"# one\n{line}\n")
    assert len(found) == 1 and found[0].startswith(f"users:2:{expected}")
    assert HASH not in found[0] and "secret" not in found[0]


def test_user_that_is_given_twice_is_an_error(tmp_path: Path) -> None:
    users = f"alice:{HASH}\nbob:{HASH}\nalice:{HASH}\n"
    assert errors(tmp_path, users, f'users: {{bob: {{password: "{HASH}"}}}}') == [
        "users:2:1: the user 'bob' is already given in c.yaml:3:25",
        "users:3:1: the user 'alice' is already given in users:1:1",
    ]


def test_file_that_is_not_text_or_not_there_is_an_error(tmp_path: Path) -> None:
    assert errors(tmp_path, b"a\xff:x\n") == ["users:1:2: is not UTF-8"]
    (tmp_path / "users").unlink()
    problems = Problems()
    read_config(load_file(str(tmp_path / "c.yaml")), problems)
    message = f"users_file: {tmp_path}/users cannot be read: No such file or directory"
    assert [str(error) for error in problems.errors] == [f"{tmp_path}/c.yaml:1:13: {message}"]
    (tmp_path / "c.yaml").write_text("users_file:\nlisteners: [{listen: ':1080'}]\n")
    problems = Problems()
    read_config(load_file(str(tmp_path / "c.yaml")), problems)
    assert "users_file: is empty" in str(problems.errors[0])


def test_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / "c.yaml"
    path.write_text("users_file: fifo\nlisteners: [{listen: ':1080'}]\n")
    problems = Problems()
    read_config(load_file(str(path)), problems)
    message = f"users_file: {tmp_path}/fifo cannot be read: it is not a regular file"
    assert [str(error) for error in problems.errors] == [f"{path}:1:13: {message}"]
    path.write_text("users: {alice: {password: !file fifo}}\n")
    with pytest.raises(ConfigError) as caught:
        load_file(str(path))
    assert str(caught.value) == f"{path}:1:27: !file {tmp_path}/fifo: it is not a regular file"


def test_errors_of_many_lines_are_counted(tmp_path: Path) -> None:
    lines = [f"user{number}:{BCRYPT}" for number in range(24)]
    found = errors(tmp_path, "\n".join([f"alice:{HASH}", *lines, "x\n"]))
    assert len(found) == users_file.ERRORS_LIMIT + 1
    assert found[19].startswith("users:21:8: ") and found[20] == "users: and 5 more lines"


def test_hashes_of_other_programs_are_looked_for_in_wrong_lines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(users_file, "foreign_hash", lambda text: seen.append(text) or "")
    read(tmp_path, f"alice:{HASH}\nbob:{HASH}:rate=1MiB/s\n")
    assert seen == []
    errors(tmp_path, "alice:wrong\n")
    assert seen == ["wrong", "wrong"]


def test_file_that_everybody_can_read_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 114."""
    # The folders of a test are private: everybody's right to read the file would not matter.
    monkeypatch.setattr("netproxy.config.sections.users_file.is_exposed", lambda file: True)
    warnings = read(tmp_path, f"alice:{HASH}\nbob:{HASH}\n").warnings
    assert [line for line in warnings if "chmod" in line] == [
        f"{tmp_path}/users:1:7: every user of this machine can read this secret: "
        f"chmod o-r {tmp_path}/users"
    ]
