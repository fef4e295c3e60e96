"""The external check of logins: what is remembered, who waits, and what an answer may say."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import types
from typing import Any, Iterator

import pytest

from netproxy.access.backoff import BackOff, Penalty
from netproxy.access.external import answers as answers_module
from netproxy.access.external.answers import Answer, Answers, LoginKey
from netproxy.access.checks.queue import TOO_MANY, Outcome
from netproxy.access.external.checker import Verdict
from netproxy.access.external.logins import CheckTimes, ExternalDependencies, ExternalLogins
from netproxy.access.external.upstreams import GrantedUpstreams
from netproxy.access.login import Credentials, Login, LoginCalls
from netproxy.access.permission import USER_REMOVED, Permission
from netproxy.access.removals import end_removed
from netproxy.access.users import Users
from netproxy.config.schema import Config, UserLimitsConfig
from netproxy.config.sections.auth import AnswerReader
from netproxy.daemon.plan import make_fallbacks
from netproxy.errors import ClientLeft, LoginPenalised, LoginUnavailable
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Events
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.listeners import ALL_CLIENTS
from netproxy.net.stream import Stream
from tests.config.reading import read
from tests.support.accounts import standing
from tests.support.doubles import Counts
from tests.support.logins import Recorder, Running, Tasks

CLIENT = Address("192.0.2.1", 4000)
KEY = b"k" * 32


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
        dependencies = ExternalDependencies(source, self.checker, parser, self.tasks, grants, KEY)
        self.logins = ExternalLogins(dependencies, CheckTimes(60.0, 60.0, 60.0), previous)
        self.penalties: list[LoginPenalised] = []
        """Raised in turn when a check begins."""
        self.absent: list[Outcome] = []
        """The outcomes that logins got after their end."""

    def begin(self) -> None:
        if self.penalties:
            raise self.penalties.pop()

    def login(
        self, user: str, password: bytes, stream: Stream, where: str = "192.0.2.1 main"
    ) -> Running:
        """Return the running login.  `where` is a host and a listener."""
        host, _, listener = where.partition(" ")
        credentials = Credentials(user, password, host, listener)
        calls = LoginCalls(self.begin, self.absent.append, lambda: None)
        return Running(self.logins.authenticate(credentials, stream, calls))

    def ask(self, user: str, stream: Stream, password: bytes = b"x") -> bool:
        """Return whether a login is right; the check runs at once."""
        running = self.login(user, password, stream)
        self.tasks.run()
        return running.go_on() is not None


@pytest.fixture
def stream() -> Iterator[Stream]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    made = Stream(ours)
    with theirs:
        yield made
    made.close()


# -- answers


def key(answers: Answers, user: str, password: bytes, where: str = "192.0.2.1 main") -> LoginKey:
    """Return the key of a login from a host to a listener."""
    host, _, listener = where.partition(" ")
    return answers.key(Credentials(user, password, host, listener))


def test_answers_are_remembered_until_their_time() -> None:
    answers = Answers(KEY, "a")
    right, wrong = key(answers, "alice", b"x"), key(answers, "alice", b"y")
    answers.allow(right, "office", 10.0)
    answers.refuse(wrong, 10.0)
    assert (answers.find(right, 9.0), answers.find(wrong, 9.0)) == (True, False)
    assert (answers.find(right, 10.0), answers.find(wrong, 10.0)) == (None, None)
    assert answers.is_valid("alice", right.stamp) and not answers.is_valid("alice", wrong.stamp)
    assert (answers.upstream("alice"), answers.upstream("bob")) == ("office", "")
    assert answers.stamp("a", b"bc") != answers.stamp("ab", b"c") != right.stamp
    assert Answers(bytes(32), "a").stamp("alice", b"x") != right.stamp


def test_refusal_withdraws_that_login_and_no_other_one() -> None:
    answers = Answers(KEY, "a")
    phone, desk = key(answers, "alice", b"phone"), key(answers, "alice", b"desk")
    answers.allow(phone, "", 10.0)
    answers.allow(desk, "office", 10.0)
    answers.refuse(key(answers, "alice", b"guess"), 10.0)
    answers.refuse(phone, 10.0)
    assert not answers.is_valid("alice", phone.stamp) and answers.is_valid("alice", desk.stamp)
    answers.refuse(desk, 10.0)
    assert answers.upstream("alice") == ""


def test_answer_of_another_worker_counts_as_its_own() -> None:
    here, there = Answers(KEY, "a"), Answers(KEY, "a")
    right, wrong = key(here, "alice", b"x"), key(here, "alice", b"y")
    for answer in (Answer(right, True, 10.0, "office"), Answer(wrong, False, 10.0)):
        sent = json.dumps(here.fields(answer))
        assert there.learn(json.loads(sent)) == "alice"
    assert (there.find(right, 9.0), there.find(wrong, 9.0)) == (True, False)
    assert there.upstream("alice") == "office" and there.is_valid("alice", right.stamp)
    there.learn(here.fields(Answer(right, False, 10.0)))
    assert there.find(right, 9.0) is False and not there.is_valid("alice", right.stamp)


def test_answer_to_another_question_is_ignored() -> None:
    """Of a worker that has not the same program or service: before or after a reload."""
    here = Answers(KEY, "a")
    for there in (Answers(KEY, "b"), Answers(bytes(32), "a")):
        assert not there.learn(here.fields(Answer(key(here, "alice", b"x"), True, 10.0)))
        assert not len(there)


@pytest.mark.parametrize(
    "change", [{"answer": None}, {"answer": ["alice", "no hex", "", True, 1.0]}]
)
def test_malformed_answer_of_another_worker_is_not_remembered(change: dict[str, object]) -> None:
    answers = Answers(KEY, "a")
    fields = {**answers.fields(Answer(key(answers, "alice", b"x"), True, 10.0)), **change}
    with contextlib.suppress(ValueError):
        assert not answers.learn(fields)
    assert not len(answers)


def test_other_workers_are_told_of_each_answer(stream: Stream) -> None:
    check, told = Check(), []
    check.checker.verdicts["alice"] = Verdict(True, '{"upstream": "office"}')
    check.logins.answers.announce = told.append
    assert check.ask("alice", stream) and not check.ask("bob", stream)
    check.checker.verdicts["carol"] = LoginUnavailable("no answer")
    with pytest.raises(LoginUnavailable):
        check.ask("carol", stream)
    seen = [(answer.key.user, answer.is_right, answer.upstream) for answer in told]
    assert seen == [("alice", True, "office"), ("bob", False, "")]


@pytest.mark.parametrize("elsewhere", ["192.0.2.1 guests", "192.0.2.2 main"])
def test_answer_counts_for_its_host_and_listener_alone(elsewhere: str) -> None:
    answers = Answers(KEY, "a")
    here, there = key(answers, "alice", b"x"), key(answers, "alice", b"x", elsewhere)
    assert here.stamp == there.stamp
    answers.allow(here, "office", 10.0)
    assert (answers.find(here, 9.0), answers.find(there, 9.0)) == (True, None)
    answers.refuse(there, 10.0)
    assert (answers.find(here, 9.0), answers.find(there, 9.0)) == (True, False)
    assert answers.is_valid("alice", here.stamp) and answers.upstream("alice") == "office"


def test_latest_positive_answer_decides_which_refusal_withdraws_a_grant() -> None:
    answers = Answers(KEY, "a")
    here, there = key(answers, "alice", b"x"), key(answers, "alice", b"x", "192.0.2.2 main")
    answers.allow(here, "", 10.0)
    answers.allow(there, "", 10.0)
    answers.refuse(here, 10.0)
    assert answers.is_valid("alice", here.stamp)
    answers.allow(here, "", 10.0)
    answers.allow(there, "", 10.0)
    answers.refuse(there, 10.0)
    # What is fresh is checked again once the grant is gone.
    assert not answers.is_valid("alice", here.stamp) and answers.find(here, 9.0) is None


def test_memory_of_answers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "USERS_LIMIT", 3)
    monkeypatch.setattr(answers_module, "FRESH_LIMIT", 4)
    monkeypatch.setattr(answers_module, "REFUSED_LIMIT", 2)
    answers = Answers(KEY, "a")
    for number in range(20):
        answers.allow(key(answers, f"user{number}", b"x"), "", 10.0)
        answers.refuse(key(answers, f"guess{number}", b"x"), 10.0)
        answers.allow(key(answers, "alice", b"%d" % number), "", 10.0)
    assert len(answers) == 3 + 4 + 2
    stamps = [answers.stamp("alice", b"%d" % number) for number in range(20)]
    assert [answers.is_valid("alice", stamp) for stamp in stamps] == [False] * 12 + [True] * 8


# -- checks


def test_login_is_asked_once_and_then_remembered(stream: Stream) -> None:
    check = Check()
    check.checker.verdicts["alice"] = Verdict(True)
    assert check.ask("alice", stream) and not check.ask("mallory", stream)
    assert check.ask("alice", stream) and not check.ask("mallory", stream)
    assert check.checker.asked == ["alice", "mallory"]


def test_logins_of_a_client_to_a_listener_share_a_check(stream: Stream) -> None:
    check = Check()
    check.checker.verdicts["alice"] = Verdict(True)
    logins = [check.login("alice", b"x", stream) for _ in range(5)]
    logins.append(check.login("alice", b"x", stream, "192.0.2.2 main"))
    logins.append(check.login("alice", b"x", stream, "192.0.2.1 guests"))
    clients = [task.client for task in check.tasks.waiting]
    assert clients == ["192.0.2.1", "192.0.2.2", "192.0.2.1"]
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


def test_login_after_a_check_that_nobody_waited_for_begins_a_new_one(stream: Stream) -> None:
    check = Check()
    check.login("alice", b"x", stream).steps.close()
    late = []

    class Late:
        """Joins as soon as the first check has found that nobody waits."""

        client = "192.0.2.1"

        def run(self) -> None:
            late.append(check.login("alice", b"x", stream))

        def drop(self) -> None:
            """Nothing waits."""

    check.checker.verdicts["alice"] = Verdict(True)
    check.tasks.waiting.append(Late())
    check.tasks.run()
    assert late[0].go_on() is not None
    assert check.checker.asked == ["alice"] and check.absent == []


def test_wrong_login_counts_although_its_client_left_during_the_check(stream: Stream) -> None:
    """Hazard 110."""
    check, recorder, back_off = Check(), Recorder(), BackOff(0.0)
    back_off.rules = Penalty(2, 60.0, 60.0)
    login = Login(Users({}), "required", recorder, back_off, "main", check.logins)
    check.checker.verdicts["carol"] = LoginUnavailable("gone")

    def leave(credentials: Credentials, deadline: float) -> Verdict:
        """End all logins during the check."""
        for running in leaving:
            running.steps.close()
        return real(credentials, deadline)

    real = check.checker.check
    check.checker.check = leave  # type: ignore[method-assign]
    for user in (b"carol", b"mallory"):
        assert not back_off.penalty(CLIENT.host, time.monotonic())
        leaving = [Running(login.authenticate(user, b"x", CLIENT, stream)) for _ in range(2)]
        check.tasks.run()
    host = CLIENT.host
    assert recorder.told == [(host, "carol", "gone")] * 2 + [(host, "mallory")] * 2
    assert back_off.penalty(host, time.monotonic())


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
    users = ["dave", "erin"]
    upstreams = GrantedUpstreams(configured, users, check.logins.answers, dialers, missing)
    assert upstreams.get("alice") == ("auth.upstream", "the office")
    assert upstreams.get("bob") is None
    assert upstreams.get("carol") == ("auth.upstream", "direct")
    assert upstreams.get("dave") == ("users.dave.upstream", "own")
    # Remembered from before the reload that has added the user.
    check.logins.answers.allow(key(check.logins.answers, "erin", b"x"), "office", 0.0)
    assert upstreams.get("erin") is None
    del dialers["office"]
    assert upstreams.get("alice") == ("auth.upstream", "missing")


def test_upstreams_of_answers_do_not_count_with_the_option_for_an_upstream(stream: Stream) -> None:
    check = Check()
    check.checker.verdicts["alice"] = Verdict(True, '{"upstream": "office"}')
    assert check.ask("alice", stream)
    text = "listeners: [{listen: ':1'}]\nupstreams: {office: direct}\nauth: {url: 'https://a/'}"
    config: Config = read(text)
    office = config.upstreams["office"]
    assert fallbacks(config, check) == ("auth.upstream", office)
    auth = config.auth._replace(names_upstreams=False)
    assert fallbacks(config._replace(auth=auth), check) is None


def fallbacks(config: Config, check: Check) -> Any:
    """Return what decides for alice without a rule, with the upstream in place of its dialer."""

    def dialer(upstream: Any) -> Any:
        return upstream

    return make_fallbacks(config, dialer, check.logins).by_user.get("alice")


@pytest.mark.parametrize(
    "text, why",
    [
        ("yes", "it is not JSON"),
        ("[]", "it is not a JSON object"),
        ("[" * 8192, "it is not JSON"),
        ('{"connections": ' + "9" * 400 + "}", "connections is too large a number"),
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
    bob = key(answers, "bob", b"x")
    stamp = bob.stamp
    flow = Flow("udp", CLIENT, Address("192.0.2.9", 53), "main", "bob", (), stamp)
    assert permission.refusal(flow) == ""
    assert permission.refusal(flow._replace(stamp=b"forged")) == USER_REMOVED
    answers.refuse(bob, time.monotonic() + 60.0)
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
    bob = key(check.logins.answers, "bob", b"x")
    stamp = bob.stamp
    connection: Any = types.SimpleNamespace(stream=types.SimpleNamespace(login=("bob", stamp)))
    connection.end_because = lambda why: None
    assert end_removed(Users({}), [], [connection], check.logins) == (0, 0)
    check.logins.answers.refuse(bob, 0.0)
    assert end_removed(Users({}), [], [connection], check.logins) == (0, 1)
    assert end_removed(Users({}), [], [connection]) == (0, 1)
