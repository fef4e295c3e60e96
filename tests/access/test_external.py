"""The external check of logins: what is remembered, who waits, and what an answer may say."""

from __future__ import annotations

import socket
import time
import types
from typing import Any, Iterator

import pytest

from netproxy.access.backoff import BackOff, Penalty
from netproxy.access.external import answers as answers_module
from netproxy.access.external.answers import Answers
from netproxy.access.external.checks import TOO_MANY, Verdict
from netproxy.access.external.logins import CheckTimes, ExternalDependencies, ExternalLogins
from netproxy.access.external.upstreams import GrantedUpstreams
from netproxy.access.login import Credentials, Login
from netproxy.access.permission import USER_REMOVED, Permission
from netproxy.access.removals import end_removed
from netproxy.access.users import Users
from netproxy.config.schema import UserLimitsConfig
from netproxy.config.sections.auth import AnswerReader
from netproxy.errors import ClientLeft, LoginPenalised, LoginUnavailable
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Events
from netproxy.interfaces.fairness import ClientTask
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.listeners import ALL_CLIENTS
from netproxy.net.stream import Stream
from tests.support.accounts import standing
from tests.support.doubles import Counts

CLIENT = Address("192.0.2.1", 4000)


class Checker:
    """A Checker with fixed answers that notes what it is asked."""

    def __init__(self, **verdicts: Verdict | LoginUnavailable) -> None:
        self.verdicts = verdicts
        self.asked: list[str] = []

    def check(self, credentials: Credentials, deadline: float) -> Verdict:
        self.asked.append(credentials.user)
        verdict = self.verdicts.get(credentials.user, Verdict(False))
        if isinstance(verdict, LoginUnavailable):
            raise verdict
        return verdict

    def stop(self) -> None:
        self.asked.append("stop")


class Tasks:
    """A FairSubmit that keeps tasks until they are run."""

    def __init__(self) -> None:
        self.waiting: list[ClientTask] = []

    def __call__(self, task: ClientTask, /) -> None:
        self.waiting.append(task)

    def run(self) -> None:
        for task in self.waiting:
            task.run()
        self.waiting.clear()


class Grants:
    """A Granted that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, object]] = []

    def granted(self, user: str, limits: object) -> None:
        self.told.append((user, limits))


class Check:
    """An ExternalLogins with doubles around it."""

    def __init__(self, previous: Any = None, source: str = "a") -> None:
        self.checker, self.tasks, self.grants = Checker(), Tasks(), Grants()
        parser = AnswerReader(["office"])
        grants = self.grants
        dependencies = ExternalDependencies(source, self.checker, parser, self.tasks, grants)
        self.logins = ExternalLogins(dependencies, CheckTimes(60.0, 60.0, 60.0), previous)
        self.penalties: list[LoginPenalised] = []
        """Raised in turn when a check begins."""

    def begin(self) -> None:
        if self.penalties:
            raise self.penalties.pop()

    def login(self, user: str, password: bytes, stream: Stream, client: str = "192.0.2.1") -> Any:
        """Return the running login: what it waits for, or its result."""
        return Running(
            self.logins.authenticate(
                Credentials(user, password, client, "main"), stream, self.begin
            )
        )

    def ask(self, user: str, stream: Stream, password: bytes = b"x") -> bool:
        """Return whether a login is right; the check runs at once."""
        running = self.login(user, password, stream)
        self.tasks.run()
        return running.go_on() is not None


class Running:
    """A login that is under way."""

    def __init__(self, steps: Any) -> None:
        self.steps, self.ended, self.result = steps, False, None
        self.need: Any = None
        self.send(None)

    def send(self, value: Any) -> None:
        try:
            self.need = self.steps.send(value)
        except StopIteration as stop:
            self.ended, self.result = True, stop.value

    def go_on(self) -> Any:
        """Resume after an event; return the result."""
        if not self.ended:
            assert isinstance(self.need, Events)
            self.send({1: 1})
        assert self.ended
        return self.result


@pytest.fixture
def stream() -> Iterator[Stream]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    made = Stream(ours)
    with theirs:
        yield made
    made.close()


# -- answers


def test_answers_are_remembered_until_their_time() -> None:
    answers = Answers()
    right, wrong = answers.digest("alice", b"x"), answers.digest("alice", b"y")
    answers.allow("alice", right, "office", 10.0)
    answers.refuse("alice", wrong, 10.0)
    assert (answers.find("alice", right, 9.0), answers.find("alice", wrong, 9.0)) == (True, False)
    assert (answers.find("alice", right, 10.0), answers.find("alice", wrong, 10.0)) == (None, None)
    assert answers.is_valid("alice", right) and not answers.is_valid("alice", wrong)
    assert (answers.upstream("alice"), answers.upstream("bob")) == ("office", "")
    assert answers.digest("a", b"bc") != answers.digest("ab", b"c") != right
    assert Answers().digest("alice", b"x") != right


def test_refusal_withdraws_that_login_and_no_other_one() -> None:
    answers = Answers()
    phone, desk = answers.digest("alice", b"phone"), answers.digest("alice", b"desk")
    answers.allow("alice", phone, "", 10.0)
    answers.allow("alice", desk, "office", 10.0)
    answers.refuse("alice", answers.digest("alice", b"guess"), 10.0)
    answers.refuse("alice", phone, 10.0)
    assert not answers.is_valid("alice", phone) and answers.is_valid("alice", desk)
    answers.refuse("alice", desk, 10.0)
    assert answers.upstream("alice") == ""


def test_memory_of_answers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "USERS_LIMIT", 3)
    monkeypatch.setattr(answers_module, "REFUSED_LIMIT", 2)
    answers = Answers()
    digests = [answers.digest("u", b"%d" % number) for number in range(20)]
    for number, digest in enumerate(digests):
        answers.allow(f"user{number}", digest, "", 10.0)
        answers.refuse(f"guess{number}", digest, 10.0)
        answers.allow("alice", digest, "", 10.0)
    assert len(answers) <= 3 + 2
    assert [answers.is_valid("alice", digest) for digest in digests].count(True) == 8


# -- checks


def test_login_is_asked_once_and_then_remembered(stream: Stream) -> None:
    check = Check()
    check.checker.verdicts["alice"] = Verdict(True)
    assert check.ask("alice", stream) and not check.ask("mallory", stream)
    assert check.ask("alice", stream) and not check.ask("mallory", stream)
    assert check.checker.asked == ["alice", "mallory"]


def test_logins_of_a_client_share_a_check_and_those_of_others_do_not(stream: Stream) -> None:
    check = Check()
    check.checker.verdicts["alice"] = Verdict(True)
    logins = [check.login("alice", b"x", stream) for _ in range(5)]
    logins.append(check.login("alice", b"x", stream, "192.0.2.2"))
    assert [task.client for task in check.tasks.waiting] == ["192.0.2.1", "192.0.2.2"]
    check.tasks.run()
    assert all(login.go_on() is not None for login in logins)


def test_failure_of_a_check_is_unavailable_and_not_remembered(stream: Stream) -> None:
    check = Check()
    check.checker.verdicts["alice"] = LoginUnavailable("the service is gone")
    for _ in range(2):
        with pytest.raises(LoginUnavailable, match="the service is gone"):
            check.ask("alice", stream)
    assert check.checker.asked == ["alice", "alice"]


def test_login_that_is_dropped_from_the_queue_is_unavailable(stream: Stream) -> None:
    check = Check()
    login = check.login("alice", b"x", stream)
    check.tasks.waiting.pop().drop()
    with pytest.raises(LoginUnavailable, match=TOO_MANY):
        login.go_on()


def test_penalty_that_begins_before_the_check_refuses_the_login(stream: Stream) -> None:
    """Hazard 110."""
    check = Check()
    check.penalties.append(LoginPenalised(5.0))
    with pytest.raises(LoginPenalised) as caught:
        check.ask("alice", stream)
    assert caught.value.seconds == 5.0 and check.checker.asked == []


def test_check_that_nobody_waits_for_is_not_made(stream: Stream) -> None:
    check = Check()
    check.login("alice", b"x", stream).steps.close()
    check.tasks.run()
    assert check.checker.asked == []


def test_login_of_a_client_that_has_left_ends(stream: Stream) -> None:
    check = Check()
    login = check.login("alice", b"x", stream)
    stream.shutdown()
    with pytest.raises(ClientLeft):
        login.go_on()
    # An event of another descriptor's last owner changes nothing.
    check.tasks.run()
    assert check.checker.asked == []


def test_event_without_a_cause_is_waited_out(stream: Stream) -> None:
    login = Check().login("alice", b"x", stream)
    login.send({1: 1})
    assert not login.ended
    login.steps.close()


@pytest.mark.parametrize(
    "user, password",
    [
        ("", b"x"),
        ("alice", b""),
        ("al\nice", b"x"),
        ("alice", b"x\ny"),
        ("alice", b"x\0"),
        ("alice", b"x\r"),
        ("al:ice", b"x"),
        ("b\ufffd", b"x"),
        ("a" * 256, b"x"),
        ("alice", b"x" * 1025),
    ],
)
def test_credentials_that_cannot_be_sent_as_they_are_are_refused(
    stream: Stream, user: str, password: bytes
) -> None:
    login = Check().login(user, password, stream)
    assert login.ended and login.result is None


def test_answers_of_the_same_source_are_kept_over_a_reload(stream: Stream) -> None:
    check = Check()
    check.checker.verdicts["alice"] = Verdict(True)
    assert check.ask("alice", stream)
    assert Check(previous=check.logins).login("alice", b"x", stream).result is not None
    other = Check(previous=check.logins, source="b").login("alice", b"x", stream)
    assert not other.ended
    other.steps.close()


# -- what an answer says


def test_answer_names_the_upstream_of_the_user(stream: Stream) -> None:
    check = Check()
    check.checker.verdicts |= {
        "alice": Verdict(True, '{"upstream": "office"}'),
        "bob": Verdict(True),
        "carol": Verdict(True, '{"upstream": "direct"}'),
    }
    assert all(check.ask(user, stream) for user in ("alice", "bob", "carol"))
    dialers: Any = {"office": "the office", "direct": "direct"}
    configured: Any = {"dave": ("users.dave.upstream", "own")}
    missing: Any = "missing"
    upstreams = GrantedUpstreams(configured, check.logins.answers, dialers, missing)
    assert upstreams.get("alice") == ("auth.upstream", "the office")
    assert upstreams.get("bob") is None
    assert upstreams.get("carol") == ("auth.upstream", "direct")
    assert upstreams.get("dave") == ("users.dave.upstream", "own")
    del dialers["office"]
    assert upstreams.get("alice") == ("auth.upstream", "missing")


@pytest.mark.parametrize(
    "text, why",
    [
        ("yes", "it is not JSON"),
        ("[]", "it is not a JSON object"),
        ('{"upstream": "nowhere"}', "there is no upstream 'nowhere'"),
        ('{"upstream": ["office"]}', "there is no upstream"),
        ('{"speed": "5Mbit/s"}', "unknown key 'speed' (known: upstream, connections"),
    ],
)
def test_answer_that_cannot_be_used_refuses_the_login(stream: Stream, text: str, why: str) -> None:
    check = Check()
    check.checker.verdicts["alice"] = Verdict(True, text)
    with pytest.raises(LoginUnavailable) as caught:
        check.ask("alice", stream)
    assert f"the answer cannot be used: {why}" in str(caught.value)
    assert check.logins.answers.upstream("alice") == "" and not len(check.logins.answers)


def test_limits_of_an_answer_are_handed_over(stream: Stream) -> None:
    check = Check()
    check.checker.verdicts |= {
        "alice": Verdict(True, '{"connections": 5, "rate": "1KiB/s", "connection_rate": "2/s"}'),
        "bob": Verdict(True),
        "carol": Verdict(True, '{"sessions": -1}'),
    }
    assert check.ask("alice", stream) and check.ask("bob", stream)
    limits = UserLimitsConfig(5, None, 2.0, 1024, 1024)
    assert check.grants.told == [("alice", limits), ("bob", UserLimitsConfig())]
    with pytest.raises(LoginUnavailable, match="sessions"):
        check.ask("carol", stream)


# -- the login of a listener


class Recorder:
    """A LoginObserver that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []

    def refused(self, client: str, user: str) -> None:
        self.told.append((client, user))

    def unavailable(self, client: str, user: str, why: str) -> None:
        self.told.append((client, user, why))

    def penalised(self, client: str, user: str) -> None:
        self.told.append((client, user, "penalty"))


def test_unknown_users_are_asked_for_and_known_ones_are_not(stream: Stream) -> None:
    check, recorder = Check(), Recorder()
    check.checker.verdicts |= {"bob": Verdict(True), "carol": LoginUnavailable("gone")}
    users = Users({"alice": "secret"})
    login = Login(users, "required", recorder, None, "main", check.logins)

    def authenticate(name: bytes, password: bytes) -> Any:
        running = Running(login.authenticate(name, password, CLIENT, stream))
        if not running.ended and not isinstance(running.need, Events):
            running.send(running.need.block())
        check.tasks.run()
        return running.go_on()

    assert authenticate(b"alice", b"secret") == ("alice", login.stamp("alice"))
    assert authenticate(b"alice", b"wrong") is None
    assert check.checker.asked == []
    user, stamp = authenticate(b"bob", b"x")
    assert user == "bob" and login.is_granted("bob", stamp)
    assert authenticate(b"mallory", b"x") is None
    with pytest.raises(LoginUnavailable):
        authenticate(b"carol", b"x")
    assert recorder.told == [
        ("192.0.2.1", "alice"),
        ("192.0.2.1", "mallory"),
        ("192.0.2.1", "carol", "gone"),
    ]


def test_login_that_is_refused_later_gets_nothing_new(stream: Stream) -> None:
    check = Check()
    check.checker.verdicts["bob"] = Verdict(True)
    login = Login(Users({}), "required", None, None, "main", check.logins)
    permission = Permission("main", login, ALL_CLIENTS, Counts(), standing())
    assert check.ask("bob", stream)
    answers = check.logins.answers
    stamp = answers.digest("bob", b"x")
    flow = Flow("udp", CLIENT, Address("192.0.2.9", 53), "main", "bob", (), stamp)
    assert permission.refusal(flow) == ""
    assert permission.refusal(flow._replace(stamp=b"forged")) == USER_REMOVED
    answers.refuse("bob", stamp, time.monotonic() + 60.0)
    assert permission.refusal(flow) == USER_REMOVED
    assert not check.ask("bob", stream)


def test_penalty_refuses_unchecked_but_not_who_has_logged_in_before(stream: Stream) -> None:
    """Hazard 110."""
    check, recorder = Check(), Recorder()
    check.checker.verdicts["bob"] = Verdict(True)
    back_off = BackOff(0.0)
    back_off.rules = Penalty(1, 60.0, 60.0)
    login = Login(Users({}), "required", recorder, back_off, "main", check.logins)
    assert check.ask("bob", stream)
    back_off.next_delay(CLIENT.host, time.monotonic())
    assert back_off.penalty(CLIENT.host, time.monotonic())
    with pytest.raises(LoginPenalised):
        Running(login.authenticate(b"mallory", b"x", CLIENT, stream))
    assert recorder.told == [(CLIENT.host, "mallory", "penalty")]
    running = Running(login.authenticate(b"bob", b"x", CLIENT, stream))
    assert running.ended and running.result is not None


def test_removals_leave_those_whom_the_external_check_has_accepted(stream: Stream) -> None:
    check = Check()
    check.checker.verdicts["bob"] = Verdict(True)
    assert check.ask("bob", stream)
    stamp = check.logins.answers.digest("bob", b"x")
    connection: Any = types.SimpleNamespace(stream=types.SimpleNamespace(login=("bob", stamp)))
    connection.end_because = lambda why: None
    assert end_removed(Users({}), [], [connection], check.logins) == (0, 0)
    check.logins.answers.refuse("bob", stamp, 0.0)
    assert end_removed(Users({}), [], [connection], check.logins) == (0, 1)
    assert end_removed(Users({}), [], [connection]) == (0, 1)
