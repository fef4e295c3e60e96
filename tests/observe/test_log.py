"""The log: one record a line whatever is in it, and a log that cannot be written stops nothing."""

from __future__ import annotations

import json
import os
import re
from typing import Callable, Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow, Record
from netproxy.observe import log as log_module
from netproxy.observe.log import LIMITED_KEYS, Log, escape

EVIL = "a\r\nb\tc\0d\x1b[31me\x7ff\x85g\u2028h\u2029i\udcffj"
SAFE = r"a\r\nb\tc\x00d\x1b[31me\x7ff\x85g\u2028h\u2029i\udcffj"
RECORD = Record(
    Flow("tcp", Address("192.0.2.1", 5000), Address("example.com", 443), "main", "alice"),
    "direct",
    10,
    20,
    1.23456,
    "closed",
)


class Written:
    """A log whose descriptor is a pipe; read() gives what it wrote so far."""

    def __init__(self) -> None:
        self._read, self.write = os.pipe()
        os.set_blocking(self._read, False)

    def read(self) -> list[str]:
        try:
            data = os.read(self._read, 1 << 20)
        except BlockingIOError:
            return []
        assert data.endswith(b"\n")
        return data.decode().split("\n")[:-1]

    def close(self) -> None:
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
    return lambda *arguments: Log(*arguments, descriptor=written.write)


class TestText:
    def test_a_line_has_its_time_and_level(
        self, make: Callable[..., Log], written: Written
    ) -> None:
        make().info("%s of %d", "one", 2)
        (line,) = written.read()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} info one of 2", line)

    @pytest.mark.parametrize(
        "level, lines", [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
    )
    def test_a_level_leaves_out_what_is_below_it(
        self, make: Callable[..., Log], written: Written, level: str, lines: int
    ) -> None:
        log = make(level)
        for call in (log.debug, log.info, log.warning, log.error):
            call("x")
        assert len(written.read()) == lines

    def test_a_message_without_values_is_no_format(
        self, make: Callable[..., Log], written: Written
    ) -> None:
        make().info("100% of %s")
        assert written.read()[0].endswith("info 100% of %s")

    def test_can_be_set_anew(self, make: Callable[..., Log], written: Written) -> None:
        log = make("error")
        log.configure("debug", "json", False)
        log.debug("x")
        log.finished(RECORD)
        (line,) = written.read()
        assert json.loads(line)["msg"] == "x"

    def test_under_systemd_a_line_has_its_priority_and_no_time(
        self, written: Written, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("JOURNAL_STREAM", "8:1")
        log = Log("debug", descriptor=written.write)
        for call in (log.debug, log.info, log.warning, log.error):
            call("x")
        assert written.read() == ["<7>x", "<6>x", "<4>x", "<3>x"]


class TestEscaping:
    """HAZARDS 112: CR, LF, ESC, U+2028 in what a peer sent."""

    def test_of_a_message(self, make: Callable[..., Log], written: Written) -> None:
        make().info("user %s", EVIL)
        (line,) = written.read()
        assert line.endswith(f" info user {SAFE}")

    def test_of_a_record(self, make: Callable[..., Log], written: Written) -> None:
        flow = RECORD.flow._replace(user=EVIL, target=Address(EVIL, 443))
        make().finished(RECORD._replace(flow=flow))
        (line,) = written.read()
        assert f"target={SAFE}:443" in line and f"user={SAFE}" in line

    def test_of_json(self, make: Callable[..., Log], written: Written) -> None:
        log = make("info", "json")
        log.info("user %s", EVIL)
        log.finished(RECORD._replace(ended=EVIL))
        lines = written.read()
        assert len(lines) == 2
        assert json.loads(lines[1])["ended"] == EVIL
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "".join(lines))

    def test_of_an_exception(self, make: Callable[..., Log], written: Written) -> None:
        try:
            raise ValueError(EVIL)
        except ValueError:
            make().exception("testing")
        (line,) = written.read()
        assert f"internal error while testing: ValueError: {SAFE} (test_log.py:" in line

    @pytest.mark.parametrize(
        "code", [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0xD800, 0xDFFF]
    )
    def test_leaves_no_control_character(self, code: int) -> None:
        assert escape(chr(code)).isascii() and escape(chr(code)).isprintable()

    def test_leaves_text_as_it_is(self) -> None:
        assert escape('Zo\u00eb \u4e2d\u6587 \\ "') == 'Zo\u00eb \u4e2d\u6587 \\ "'


class TestLimited:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [1000.0]
        monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
        return now

    def test_once_a_minute_for_each_key(
        self, make: Callable[..., Log], written: Written, clock: list[float]
    ) -> None:
        log = make()
        for _ in range(100):
            log.limited(("a", 1), "a")
            log.limited(("b", 1), "b")
        assert [line[-9:] for line in written.read()] == ["warning a", "warning b"]
        clock[0] += 59.9
        log.limited(("a", 1), "a")
        assert not written.read()
        clock[0] += 0.1
        log.limited(("a", 1), "a")
        assert [line[-9:] for line in written.read()] == ["is one: a", "warning a"]

    def test_right_after_the_machine_has_started(
        self, make: Callable[..., Log], written: Written, clock: list[float]
    ) -> None:
        clock[0] = 0.5
        make().limited("a", "a")
        assert len(written.read()) == 1

    def test_memory_for_keys_is_bounded(self, make: Callable[..., Log], clock: list[float]) -> None:
        """A key may hold what strangers chose."""
        log = make("error")
        for number in range(3 * LIMITED_KEYS):
            log.limited(number, "x")
        assert len(log._said) <= LIMITED_KEYS


class TestRecords:
    def test_of_a_connection(self, make: Callable[..., Log], written: Written) -> None:
        make().finished(RECORD)
        assert written.read()[0].endswith(
            " info msg=finished listener=main client=192.0.2.1:5000 user=alice network=tcp target=example.com:443 upstream=direct "
            "sent=10 received=20 seconds=1.235 ended=closed"
        )

    def test_of_a_udp_session_has_its_datagrams(
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
    def test_a_value_with_spaces_is_quoted(
        self, make: Callable[..., Log], written: Written, value: str, shown: str
    ) -> None:
        make().finished(RECORD._replace(ended=value))
        assert written.read()[0].endswith(f" ended={shown}")

    def test_in_json(self, make: Callable[..., Log], written: Written) -> None:
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
            "upstream": "direct",
            "sent": 10,
            "received": 20,
            "seconds": 1.235,
            "ended": "closed",
        }

    @pytest.mark.parametrize("arguments", [("info", "text", False), ("warning", "text", True)])
    def test_are_left_out_where_they_are_not_wanted(
        self, make: Callable[..., Log], written: Written, arguments: tuple
    ) -> None:
        make(*arguments).finished(RECORD)
        assert not written.read()


class TestADescriptorThatFails:
    """HAZARDS 102: a full disk, a closed standard error."""

    def test_because_it_is_closed(self) -> None:
        read, write = os.pipe()
        os.close(read)
        os.close(write)
        log = Log("debug", descriptor=write)
        log.error("x")
        log.finished(RECORD)

    def test_because_nobody_reads(self) -> None:
        read, write = os.pipe()
        os.close(read)
        Log(descriptor=write).error("x")  # EPIPE: Python ignores SIGPIPE
        os.close(write)

    def test_because_it_is_full(self) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            Log(descriptor=full.fileno()).error("x")


class TestRepeats:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [1000.0]
        monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
        return now

    @staticmethod
    def texts(written: Written) -> list[str]:
        return [line.split(" ", 2)[2] for line in written.read()]

    def test_the_next_of_its_kind_says_how_many_were_left_out(
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
            "3 more like this one: no room for 0",
            "no room for 9",
            "once",
        ]

    def test_where_no_other_comes_the_janitor_asks(
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
        assert self.texts(written) == ["full", "once", "1 more like this one: full"]

    def test_what_must_be_forgotten_is_said_first(
        self, make: Callable[..., Log], written: Written, clock: list[float]
    ) -> None:
        log = make()
        log.limited("first", "first")
        log.limited("first", "first")
        for number in range(LIMITED_KEYS):
            log.limited(number, "x")
        assert "1 more like this one: first" in self.texts(written)

    def test_of_an_exception_too(
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
        assert self.texts(written)[1:] == ["2 more like this one: internal error while testing"]


def test_the_level_changes_at_run_time(make: Callable[..., Log], written: Written) -> None:
    log = make()
    assert log.level == "info"
    log.debug("hidden")
    log.level = "debug"
    log.debug("seen")
    log.level = "error"
    log.warning("hidden")
    assert [line.split(" ", 2)[2] for line in written.read()] == ["seen"]
    log.configure("info", "text", True)
    assert log.level == "info"


def test_warnings_and_errors_are_remembered_the_newest_only(make: Callable[..., Log]) -> None:
    log = make()
    log.info("nothing")
    for at in range(30):
        log.warning("warning %d\n", at)
    log.error("an error")
    assert [(one.level, one.text) for one in log.recent][-2:] == [
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
def test_a_failed_login_is_one_line_for_programs_that_ban(
    make: Callable[..., Log], written: Written, user: str, shown: str
) -> None:
    """Hazard 112: whatever the user's name is, the line begins with the true client."""
    make("warning").auth_failed("203.0.113.9", user, "main")
    (line,) = written.read()
    assert (
        line.split(" ", 1)[1]
        == f"warning msg=auth_failed client=203.0.113.9 user={shown} listener=main"
    )


def test_an_exception_is_one_line_with_its_stack(
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
        r"\(test_log\.py:\d+ inner < test_log\.py:\d+ test_an_exception",
        line,
    )


def test_an_exception_without_one_is_a_line_as_well(
    make: Callable[..., Log], written: Written
) -> None:
    make().exception("nothing")
    assert len(written.read()) == 1
