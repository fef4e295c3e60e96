"""The log: which records are written, in which form, and always one record a line."""

from __future__ import annotations

import json
import os
import re
import time
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow, Record
from netproxy.observe import log as log_module
from netproxy.observe.writing import repeats
from netproxy.observe.incidents import Incidents
from netproxy.observe.log import Log
from netproxy.observe.writing.repeats import LIMITED_KEYS
from netproxy.observe.records import CALLS_LIMIT, LineFormat, access_fields, access_text, as_text
from tests.support.sockets import SECONDS

# Seconds for the thread that writes.
EVIL = "a\r\nb\tc\0d\x1b[31me\x7ff\x85g\u2028h\u2029i\udcffj\u202ek\u200bl\u2066m\ufeffn"
SAFE = r"a\r\nb\tc\x00d\x1b[31me\x7ff\x85g\u2028h\u2029i\udcffj\u202ek\u200bl\u2066m\ufeffn"
RECORD = Record(
    Flow("tcp", Address("192.0.2.1", 5000), Address("example.com", 443), "main", "alice"),
    "direct",
    10,
    20,
    1.23456,
    "closed",
)


class Written:
    """The descriptor of logs; read() returns the lines that were written so far."""

    def __init__(self) -> None:
        self._read, self.write = os.pipe()
        os.set_blocking(self._read, False)
        self._logs: list[Log] = []

    def make_log(self, *arguments: Any) -> Log:
        self._logs.append(Log(*arguments, descriptor=self.write))
        return self._logs[-1]

    def read(self) -> list[str]:
        for log in self._logs:
            assert log.close(SECONDS)
        try:
            data = os.read(self._read, 1 << 20)
        except BlockingIOError:
            return []
        assert data.endswith(b"\n")
        return data.decode().split("\n")[:-1]

    def close(self) -> None:
        for log in self._logs:
            assert log.close(SECONDS)
        os.close(self._read)
        os.close(self.write)


@pytest.fixture
def written() -> Iterator[Written]:
    written = Written()
    yield written
    written.close()


@pytest.fixture
def make(written: Written, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Log]:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    return written.make_log


class TestText:
    def test_text_line_has_time_and_level(self, make: Callable[..., Log], written: Written) -> None:
        make().info("%s of %d", "one", 2)
        (line,) = written.read()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} info one of 2", line)

    @pytest.mark.parametrize(
        "level, lines", [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
    )
    def test_level_hides_records_below_it(
        self, make: Callable[..., Log], written: Written, level: str, lines: int
    ) -> None:
        log = make(level)
        for call in (log.debug, log.info, log.warning, log.error):
            call("x")
        assert len(written.read()) == lines

    def test_message_without_values_is_not_formatted(
        self, make: Callable[..., Log], written: Written
    ) -> None:
        make().info("100% of %s")
        assert written.read()[0].endswith("info 100% of %s")

    def test_log_can_be_configured_again(self, make: Callable[..., Log], written: Written) -> None:
        log = make("error")
        log.configure("debug", "json", False, 10)
        log.debug("x")
        log.finished(RECORD)
        (line,) = written.read()
        assert json.loads(line)["msg"] == "x"

    def test_line_for_systemd_has_priority_and_no_time(
        self, written: Written, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("JOURNAL_STREAM", "8:1")
        log = written.make_log("debug")
        for call in (log.debug, log.info, log.warning, log.error):
            call("x")
        assert written.read() == ["<7>x", "<6>x", "<4>x", "<3>x"]


class TestEscaping:
    """Hazards 112 and 143: CR, LF, ESC, U+2028, U+202E, U+200B in what a peer has sent."""

    def test_message_is_escaped(self, make: Callable[..., Log], written: Written) -> None:
        make().info("user %s", EVIL)
        (line,) = written.read()
        assert line.endswith(f" info user {SAFE}")

    def test_access_record_is_escaped(self, make: Callable[..., Log], written: Written) -> None:
        flow = RECORD.flow._replace(user=EVIL, target=Address(EVIL, 443))
        make().finished(RECORD._replace(flow=flow))
        (line,) = written.read()
        assert f"target={SAFE}:443" in line and f"user={SAFE}" in line

    def test_json_is_escaped(self, make: Callable[..., Log], written: Written) -> None:
        log = make("info", "json")
        log.info("user %s", EVIL)
        log.finished(RECORD._replace(ended=EVIL))
        lines = written.read()
        assert len(lines) == 2
        assert json.loads(lines[1])["ended"] == EVIL
        assert all(line.isascii() and line.isprintable() for line in lines)

    def test_exception_is_escaped(self, make: Callable[..., Log], written: Written) -> None:
        try:
            raise ValueError(EVIL)
        except ValueError:
            make().exception("testing")
        (line,) = written.read()
        assert f"internal error while testing: ValueError: {SAFE} (test_log.py:" in line


class TestLimited:
    @staticmethod
    def lines(written: Written) -> list[str]:
        """Return the new lines without their time."""
        return [line.split(" ", 1)[1] for line in written.read()]

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """The time of the log, though not of the thread that writes it."""
        now = [1000.0]
        clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
        for module in (log_module, repeats):
            monkeypatch.setattr(module, "time", clock)
        return now

    def test_limited_warning_is_written_once_a_minute_for_each_key(
        self, make: Callable[..., Log], written: Written, clock: list[float]
    ) -> None:
        log = make()
        for _ in range(100):
            log.limited(("a", 1), "a")
            log.limited(("b", 1), "b")
        assert self.lines(written) == ["warning a", "warning b"]
        clock[0] += 59.9
        log.limited(("a", 1), "a")
        assert not written.read()
        clock[0] += 0.1
        log.limited(("a", 1), "a")
        assert self.lines(written) == ["warning suppressed 100 similar messages: a", "warning a"]

    def test_limited_warning_is_written_right_after_boot(
        self, make: Callable[..., Log], written: Written, clock: list[float]
    ) -> None:
        clock[0] = 0.5
        make().limited("a", "a")
        assert len(written.read()) == 1

    def test_number_of_limited_keys_is_bounded(
        self, make: Callable[..., Log], clock: list[float]
    ) -> None:
        """A key may hold a name that a stranger has chosen."""
        log = make("error")
        for number in range(3 * LIMITED_KEYS):
            log.limited(number, "x")
        assert len(log._repeats) <= LIMITED_KEYS


class TestRecords:
    def test_access_record_of_a_connection(
        self, make: Callable[..., Log], written: Written
    ) -> None:
        make().finished(RECORD)
        assert written.read()[0].endswith(
            " info msg=finished listener=main client=192.0.2.1:5000 user=alice network=tcp"
            " target=example.com:443 rule=- upstream=direct"
            " sent=10 received=20 seconds=1.235 ended=closed"
        )

    def test_access_record_of_a_udp_session_has_datagrams(
        self, make: Callable[..., Log], written: Written
    ) -> None:
        make().finished(
            RECORD._replace(
                flow=RECORD.flow._replace(network="udp", user=""),
                datagrams_sent=3,
                datagrams_received=4,
            )
        )
        (line,) = written.read()
        assert " user=- network=udp " in line and line.endswith(
            " datagrams_sent=3 datagrams_received=4"
        )

    @pytest.mark.parametrize(
        "value, shown",
        [("two words", '"two words"'), ('a "b"', r'"a \"b\""'), ("", '""'), ("a\\ b", r'"a\\ b"')],
    )
    def test_value_with_blank_or_quotation_mark_is_quoted(
        self, make: Callable[..., Log], written: Written, value: str, shown: str
    ) -> None:
        make().finished(RECORD._replace(ended=value))
        assert written.read()[0].endswith(f" ended={shown}")

    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"rule": "rules[2]", "seconds": 0.0},
            {"ended": "connection refused"},
            {"ended": "x rule=forged"},
            {"ended": ""},
            {"upstream": "a= b"},
            {"upstream": '"a"'},
            {"upstream": "\x1b[2J"},
            {"upstream": "\u202e"},
            {"member": "second"},
            {"decided": "rules[2]"},
        ],
    )
    def test_access_text_is_that_of_the_fields(self, change: dict[str, Any]) -> None:
        """It is made without them only if no value has to be escaped."""
        record = RECORD._replace(**change)
        expected = as_text(access_fields(record))
        assert access_text(record) in ("", expected)
        assert LineFormat(False).access_line(record).decode().endswith(f" {expected}\n")
        is_simple = '"' not in expected and "\\" not in expected
        assert bool(access_text(record)) == (is_simple and not record.decided and not record.member)

    @pytest.mark.parametrize("field", ["listener", "user"])
    @pytest.mark.parametrize("name", ["", "two words", "a=b", "b ended=x"])
    def test_access_text_of_other_names_is_that_of_the_fields(self, field: str, name: str) -> None:
        record = RECORD._replace(flow=RECORD.flow._replace(**{field: name}))
        assert access_text(record) in ("", as_text(access_fields(record)))

    def test_access_record_as_json(self, make: Callable[..., Log], written: Written) -> None:
        make("info", "json").finished(RECORD)
        record = json.loads(written.read()[0])
        assert record.pop("time")
        assert record == {
            "level": "info",
            "msg": "finished",
            "listener": "main",
            "client": "192.0.2.1:5000",
            "user": "alice",
            "network": "tcp",
            "target": "example.com:443",
            "rule": "-",
            "upstream": "direct",
            "sent": 10,
            "received": 20,
            "seconds": 1.235,
            "ended": "closed",
        }

    @pytest.mark.parametrize("arguments", [("info", "text", False), ("warning", "text", True)])
    def test_access_records_can_be_switched_off(
        self, make: Callable[..., Log], written: Written, arguments: tuple
    ) -> None:
        make(*arguments).finished(RECORD)
        assert not written.read()


class TestRepeats:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """The time of the log, though not of the thread that writes it."""
        now = [1000.0]
        clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
        for module in (log_module, repeats):
            monkeypatch.setattr(module, "time", clock)
        return now

    @staticmethod
    def texts(written: Written) -> list[str]:
        return [line.split(" ", 2)[2] for line in written.read()]

    def test_next_warning_of_a_key_reports_suppressed_ones(
        self, make: Callable[..., Log], written: Written, clock: list[float]
    ) -> None:
        log = make()
        for at in range(4):
            log.limited("key", "no room for %d", at)
        log.limited("other", "once")
        clock[0] += 61
        log.limited("key", "no room for %d", 9)
        log.limited("other", "once")
        assert self.texts(written) == [
            "no room for 0",
            "once",
            "suppressed 3 similar messages: no room for 0",
            "no room for 9",
            "once",
        ]

    def test_expire_reports_suppressed_warnings(
        self, make: Callable[..., Log], written: Written, clock: list[float]
    ) -> None:
        log = make()
        log.limited("key", "full")
        log.limited("key", "full")
        log.limited("quiet", "once")
        assert log.expire(clock[0] + 59) == []
        for say in log.expire(clock[0] + 60):
            say()
        assert not log.expire(clock[0] + 120)
        assert self.texts(written) == ["full", "once", "suppressed 1 similar messages: full"]

    def test_evicted_key_reports_suppressed_warnings(
        self, make: Callable[..., Log], written: Written, clock: list[float]
    ) -> None:
        log = make()
        log.limited("first", "first")
        log.limited("first", "first")
        for number in range(LIMITED_KEYS):
            log.limited(number, "x")
        assert "suppressed 1 similar messages: first" in self.texts(written)

    def test_repeated_exception_is_suppressed(
        self, make: Callable[..., Log], written: Written, clock: list[float]
    ) -> None:
        log = make()
        for _ in range(3):
            try:
                raise OSError("gone")
            except OSError:
                log.exception("testing")
        for say in log.expire(clock[0] + 60):
            say()
        assert self.texts(written)[1:] == [
            "suppressed 2 similar messages: internal error while testing"
        ]


def test_level_can_be_set_at_run_time(make: Callable[..., Log], written: Written) -> None:
    log = make()
    assert log.level == "info"
    log.debug("hidden")
    log.level = "debug"
    log.debug("seen")
    log.level = "error"
    log.warning("hidden")
    assert [line.split(" ", 2)[2] for line in written.read()] == ["seen"]
    log.configure("info", "text", True, 10)
    assert log.level == "info"


def test_only_the_newest_warnings_and_errors_are_remembered(make: Callable[..., Log]) -> None:
    log = make()
    log.info("nothing")
    for at in range(30):
        log.warning("warning %d\n", at)
    log.error("an error")
    assert [(notice.level, notice.text) for notice in log.recent][-2:] == [
        ("warning", r"warning 29\n"),
        ("error", "an error"),
    ]
    assert len(log.recent) == log_module.RECENT


@pytest.mark.parametrize(
    "user, shown",
    [
        ("bob", "bob"),
        ("", "-"),
        ("a b", '"a b"'),
        (
            "x\nmsg=auth_failed client=192.0.2.9 user=y",
            r'"x\\nmsg=auth_failed client=192.0.2.9 user=y"',
        ),
    ],
)
def test_failed_login_is_one_line_that_begins_with_the_client(
    make: Callable[..., Log], written: Written, user: str, shown: str
) -> None:
    """Hazard 112: whatever the user's name is, the line begins with the true client."""
    make("warning").auth_failed("203.0.113.9", user, "main")
    (line,) = written.read()
    assert (
        line.split(" ", 1)[1]
        == f"warning msg=auth_failed client=203.0.113.9 user={shown} listener=main"
    )


def test_failed_login_is_an_incident_with_the_id_of_its_line(
    make: Callable[..., Log], written: Written
) -> None:
    for level in ("warning", "error"):
        log = make(level)
        log.incidents = Incidents()
        log.auth_failed("203.0.113.9", "bob", "main")
        (row,) = log.incidents.rows()
        assert (row["kind"], row["client"], row["user"]) == ("login", "203.0.113.9", "bob")
        # The level hides the line, not the incident.
        ends = [line.endswith(f" id={row['id']}") for line in written.read()]
        assert ends == ([True] if level == "warning" else [])


def test_exception_is_one_line_with_its_traceback(
    make: Callable[..., Log], written: Written
) -> None:
    def inner() -> None:
        raise KeyError("gone")

    try:
        inner()
    except KeyError:
        make().exception("serving 127.0.0.1:5")
    (line,) = written.read()
    assert re.search(
        r"error internal error while serving 127\.0\.0\.1:5: KeyError: 'gone' "
        r"\(test_log\.py:\d+ inner < test_log\.py:\d+ test_exception_is",
        line,
    )


def test_exception_without_exception_is_one_line(
    make: Callable[..., Log], written: Written
) -> None:
    make().exception("nothing")
    assert len(written.read()) == 1


def test_endless_recursion_is_one_record_with_its_last_calls(
    make: Callable[..., Log], written: Written
) -> None:
    def recur() -> None:
        recur()

    try:
        recur()
    except RecursionError:
        make().exception("recurring")
    (line,) = written.read()
    assert line.count(" < ") == CALLS_LIMIT - 1


def test_exception_of_an_earlier_moment_can_be_written(
    make: Callable[..., Log], written: Written
) -> None:
    make("error").fault("waiting", ValueError("gone"))
    assert written.read()[0].endswith("error internal error while waiting: ValueError: gone ()")


def test_answer_is_an_info_record_that_no_level_hides(
    make: Callable[..., Log], written: Written
) -> None:
    make("error").answer("connections=%d", 3)
    assert written.read()[0].endswith(" info connections=3")


@pytest.mark.parametrize("end", [lambda log: log.expire(0.0), lambda log: log.close()])
def test_postponed_error_is_written_by_the_janitor_or_at_the_end(
    make: Callable[..., Log], written: Written, end: Callable[[Log], object]
) -> None:
    log = make()
    log.later("100% gone")
    end(log)
    assert written.read()[0].endswith(" error 100% gone")


@pytest.mark.parametrize(
    "zone, offset", [("UTC0", "+0000"), ("XYZ3:30", "-0330"), ("ABC-14", "+1400")]
)
def test_time_has_the_offset_of_the_time_zone(
    make: Callable[..., Log],
    written: Written,
    monkeypatch: pytest.MonkeyPatch,
    zone: str,
    offset: str,
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        make().info("x")
        stamp = written.read()[0].split(" ")[0]
        assert stamp.endswith(offset)
        assert abs(time.mktime(time.strptime(stamp[:-5], "%Y-%m-%dT%H:%M:%S")) - time.time()) < 3600
    finally:
        monkeypatch.undo()
        time.tzset()
