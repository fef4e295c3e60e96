"""Finished flows in a file of their own: each form, a file that was renamed, lost lines."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow, Record
from netproxy.interfaces.services import NO_ACCESS_FILE, AccessFileName
from netproxy.observe.log import Log
from netproxy.observe.metrics import Counters
from netproxy.observe.writing.access_formats import common_line, squid_line, status
from tests.support.sockets import SECONDS

RECORD = Record(
    Flow("tcp", Address("192.0.2.1", 5000), Address("example.com", 443), "main", "alice"),
    "direct",
    10,
    20,
    1.23456,
    "closed",
    number=7,
)
UDP = RECORD._replace(flow=RECORD.flow._replace(network="udp", user=""), upstream="office")
REFUSED = RECORD._replace(
    number=0, received=0, ended="not allowed by the rules", decided="rules[0]"
)
SILENT = RECORD._replace(number=0, received=0, ended="example.com:443: timed out")
TIME = r"\[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\]"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (RECORD, '192.0.2.1 - alice TIME "CONNECT example.com:443 HTTP/1.1" 200 20'),
        (UDP, '192.0.2.1 - - TIME "CONNECT udp://example.com:443 HTTP/1.1" 200 20'),
        (REFUSED, '192.0.2.1 - alice TIME "CONNECT example.com:443 HTTP/1.1" 403 0'),
        (SILENT, '192.0.2.1 - alice TIME "CONNECT example.com:443 HTTP/1.1" 504 0'),
    ],
)
def test_line_in_the_common_log_format(record: Record, expected: str) -> None:
    line = common_line(record).decode()
    assert re.sub(TIME, "TIME", line) == f"{expected}\n"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (RECORD, "TCP_TUNNEL/200 20 CONNECT example.com:443 alice HIER_DIRECT/direct -"),
        (UDP, "UDP_TUNNEL/200 20 CONNECT udp://example.com:443 - FIRSTUP_PARENT/office -"),
        (REFUSED, "TCP_DENIED/403 0 CONNECT example.com:443 alice HIER_NONE/- -"),
        (SILENT, "TCP_MISS/504 0 CONNECT example.com:443 alice HIER_DIRECT/direct -"),
    ],
)
def test_line_in_the_form_of_squid(record: Record, expected: str) -> None:
    line = squid_line(record).decode()
    assert re.fullmatch(r"\d+\.\d{3}   1235 192\.0\.2\.1 (.*)\n", line)[1] == expected  # type: ignore[index]


@pytest.mark.parametrize("user", ['a" 200 1', "a b", "a\nb", "a\u202eb", "a\\", "\udcff"])
def test_name_cannot_forge_a_field(user: str) -> None:
    record = RECORD._replace(flow=RECORD.flow._replace(user=user))
    assert len(squid_line(record).decode().split()) == 10
    line = common_line(record).decode()
    assert (line.count("\n"), line.count('"')) == (1, 2)
    assert len(line.split(" ")) == 10


def test_failed_dial_is_a_bad_gateway_of_squid() -> None:
    assert status(RECORD._replace(number=0, ended="connection refused")) == 503


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Any]:
    """Yield what makes logs whose standard error is the file `log`."""
    made: list[Log] = []
    descriptor = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def make(form: str, level: str = "info") -> Log:
        name = AccessFileName(str(tmp_path / "access"), form)
        made.append(Log(level, "text", True, 100, name, descriptor))
        return made[-1]

    yield make
    for log in made:
        assert log.close(SECONDS)
        # A log keeps its file open until the process ends.
        os.close(log._file.descriptor)  # type: ignore[union-attr]
    os.close(descriptor)


def test_finished_flow_is_in_the_file_alone(logs: Any, tmp_path: Path) -> None:
    log = logs("json", level="error")
    log.finished(RECORD)
    assert log.close(SECONDS)
    (line,) = (tmp_path / "access").read_text().splitlines()
    assert json.loads(line)["target"] == "example.com:443"
    assert (tmp_path / "log").read_text() == ""
    assert (tmp_path / "access").stat().st_mode & 0o777 == 0o640 & ~_umask()


def test_lines_of_text_have_no_priority_for_the_journal(
    logs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    log = logs("text")
    log.finished(RECORD)
    assert log.close(SECONDS)
    assert re.match(r"\d{4}-\d\d-\d\dT\S+ info msg=finished ", (tmp_path / "access").read_text())


def test_renamed_file_gets_no_line_after_reopen(logs: Any, tmp_path: Path) -> None:
    log = logs("squid")
    log.finished(RECORD)
    assert log.close(SECONDS)
    (tmp_path / "access").rename(tmp_path / "access.1")
    log.reopen()
    log.finished(UDP)
    assert log.close(SECONDS)
    assert "udp://" in (tmp_path / "access").read_text()
    assert (tmp_path / "access.1").read_text().count("\n") == 1


def test_reopen_that_fails_keeps_the_file_and_tells(logs: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    log = logs("clf")
    log.configure("info", "text", True, 100, AccessFileName(str(folder / "access"), "clf"))
    (folder / "access").unlink()
    folder.rmdir()
    log.reopen()
    log.finished(RECORD)
    assert log.close(SECONDS)
    text = (tmp_path / "log").read_text()
    assert "error log.file: cannot open it again: No such file or directory" in text


def test_reload_changes_file_and_form_and_ends_the_file(logs: Any, tmp_path: Path) -> None:
    log = logs("squid")
    log.configure("info", "text", True, 100, AccessFileName(str(tmp_path / "other"), "clf"))
    log.finished(RECORD)
    log.configure("info", "text", True, 100, NO_ACCESS_FILE)
    log.finished(UDP)
    assert log.close(SECONDS)
    assert '"CONNECT ' in (tmp_path / "other").read_text()
    assert (tmp_path / "access").read_text() == ""
    assert "msg=finished" in (tmp_path / "log").read_text()


def test_file_that_cannot_be_opened_leaves_the_records_in_the_log(
    logs: Any, tmp_path: Path
) -> None:
    log = logs("squid")
    name = AccessFileName(str(tmp_path / "missing" / "access"), "squid")
    log.configure("info", "text", True, 100, name)
    log.finished(RECORD)
    assert log.close(SECONDS)
    first, second = (tmp_path / "log").read_text().splitlines()
    assert "error log.file: cannot open" in first and "msg=finished" in second


def test_lost_lines_are_told_once_in_the_log_and_counted(logs: Any, tmp_path: Path) -> None:
    """Hazard 102.  The reader of a FIFO ends: no line can be written any more."""
    os.mkfifo(tmp_path / "access")
    reader = os.open(tmp_path / "access", os.O_RDONLY | os.O_NONBLOCK)
    log, counters = logs("squid"), Counters()
    log.counter = counters
    os.close(reader)
    for _ in range(3):
        log.finished(RECORD)
    assert log.close(SECONDS)
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "warning log.file: lines are lost: the disk is full, or nobody reads" in line
    assert counters.value("log_dropped", "info") == 3
    assert len(log.recent) == 1


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
