"""Nothing waits for the reader of the log, and a log that cannot be written stops nothing."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Callable, Iterator

import pytest

from netproxy.observe.writing import log_writer
from netproxy.observe.log import DROPPED, Log
from netproxy.observe.metrics import Counters
from tests.support.sockets import SECONDS, Task, wait_until

RECORDS = 10_000
REPORT = re.compile(rf' warning msg="{re.escape(DROPPED)}" records=(\d+)(.*)$')


class Reader:
    """A pipe that a log writes and that nobody reads before read()."""

    def __init__(self) -> None:
        self._read, self.write = os.pipe()
        self._filled = 0

    def fill(self) -> None:
        """Fill the pipe, so that the next write blocks."""
        os.set_blocking(self.write, False)
        for size in (4096, 1):
            try:
                while True:
                    self._filled += os.write(self.write, b"." * size)
            except BlockingIOError:
                pass
        os.set_blocking(self.write, True)

    def read(self) -> Iterator[str]:
        """Yield the lines as they come, without what filled the pipe."""
        with open(os.dup(self._read), "rb", buffering=0) as file:
            while self._filled:
                self._filled -= len(file.read(self._filled))
            rest = b""
            while data := file.read(65536):
                *lines, rest = (rest + data).split(b"\n")
                yield from (line.decode() for line in lines)
            assert not rest, "a line has no end"

    def close_write(self) -> None:
        """The reader then sees the end of the log."""
        os.close(self.write)

    def close(self) -> None:
        for descriptor in (self._read, self.write):
            try:
                os.close(descriptor)
            except OSError:
                pass


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


@pytest.fixture
def make(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Log]]:
    """Make logs that write to the reader's pipe, or to `descriptor`."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    monkeypatch.setattr(log_writer, "RETRY_SECONDS", 0.01)
    logs: list[Log] = []

    def make_log(queue: int = 8192, level: str = "debug", descriptor: int = -1) -> Log:
        descriptor = reader.write if descriptor < 0 else descriptor
        logs.append(Log(level, "text", True, queue, descriptor=descriptor))
        logs[-1].counter = Counters()
        return logs[-1]

    yield make_log
    for log in logs:
        assert log.close(SECONDS), "something is still to be written"


def all_lines(log: Log, reader: Reader) -> list[str]:
    """Close a log and return all its lines."""
    reading = Task(lambda: list(reader.read()))
    assert log.close(SECONDS)
    reader.close_write()
    return reading.result(SECONDS)


def texts(lines: list[str]) -> list[str]:
    """Return lines without time and level."""
    return [line.split(" ", 2)[2] for line in lines]


def dropped(log: Log) -> dict[str, int]:
    """Return how many records were counted as dropped, by level."""
    assert isinstance(log.counter, Counters)
    return {level: total for name, level, total in log.counter.items() if name == "log_dropped"}


def block(log: Log, reader: Reader) -> None:
    """Have the thread of a log wait for the reader, with a record "first" in its hands."""
    reader.fill()
    log.info("first")
    wait_until(lambda: not log._writer._queue, SECONDS)


class TestThread:
    def test_thread_begins_with_the_first_record_and_ends_with_close(
        self, make: Callable[..., Log], reader: Reader
    ) -> None:
        log = make(level="error")
        log.info("hidden")
        log.warning("hidden")
        assert log._writer._thread is None
        log.error("seen")
        thread = log._writer._thread
        assert thread is not None and thread.name == "log"
        assert log.close(SECONDS)
        wait_until(lambda: not thread.is_alive(), SECONDS)
        log.error("after the end")
        assert texts(all_lines(log, reader)) == ["seen", "after the end"]

    def test_close_without_a_record_does_nothing(self, make: Callable[..., Log]) -> None:
        assert make().close(SECONDS)

    def test_records_wait_for_a_thread_that_cannot_start(
        self, make: Callable[..., Log], reader: Reader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 94."""
        log = make()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", _fail_to_start)
            log.info("first")
            log.info("second")
            assert log.close(SECONDS)
            log.info("third")
        log.info("fourth")
        assert texts(all_lines(log, reader)) == ["first", "second", "third", "fourth"]

    def test_close_without_a_thread_does_not_wait_for_the_reader(
        self, make: Callable[..., Log], reader: Reader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = make()
        reader.fill()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", _fail_to_start)
            log.info("x")
            assert not log.close(0.05)
            assert dropped(log) == {"info": 1}
        log.info("y")
        assert [bool(REPORT.search(line)) for line in all_lines(log, reader)] == [True, False]


def _fail_to_start(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_records_of_many_threads_are_whole_lines_and_in_their_order(
    make: Callable[..., Log], reader: Reader
) -> None:
    log = make()

    def write(name: str) -> None:
        for number in range(500):
            (log.info, log.error)[number % 2]("%s %d %s", name, number, "x" * (number % 300))

    reading = Task(lambda: list(reader.read()))
    writers = [Task(write, name) for name in "abcdef"]
    for writer in writers:
        writer.result(SECONDS)
    assert log.close(SECONDS)
    reader.close_write()
    lines = texts(reading.result(SECONDS))
    for name in "abcdef":
        assert [line for line in lines if line.startswith(name)] == [
            f"{name} {number} {'x' * (number % 300)}" for number in range(500)
        ]
    assert len(lines) == 3000 and not dropped(log)


class TestStoppedReader:
    """Hazard 133."""

    def test_records_pass_and_the_dropped_ones_are_counted_and_told_in_their_place(
        self, make: Callable[..., Log], reader: Reader
    ) -> None:
        log = make(queue=100)
        block(log, reader)
        for number in range(RECORDS):
            log.info("record %d", number)
        lost = RECORDS - 100
        assert dropped(log) == {"info": lost}
        assert not log.close(0.05)
        log.info("last")
        first, *kept, report, last = all_lines_later(log, reader)
        assert first.endswith(" info first")
        assert texts(kept) == [f"record {number}" for number in range(100)]
        found = REPORT.search(report)
        assert found and found.groups() == (str(lost + 1), f" info={lost + 1}")
        assert last == ""

    def test_errors_are_dropped_last(self, make: Callable[..., Log], reader: Reader) -> None:
        log = make(queue=50)
        block(log, reader)
        for number in range(1000):
            log.debug("debug")
            log.info("info")
            log.limited(number, "warning")
            if number % 20 == 0:
                log.error("error %d", number)
        lines = all_lines(log, reader)
        errors = [line for line in texts(lines) if line.startswith("error")]
        assert errors == [f"error {number}" for number in range(0, 1000, 20)]
        assert dropped(log) == {"debug": 1000, "info": 1000, "warning": 1000}
        reports = [found for line in lines if (found := REPORT.search(line))]
        assert sum(int(found[1]) for found in reports) == 3000

    def test_records_read_and_records_told_as_dropped_are_all_records(
        self, make: Callable[..., Log], reader: Reader
    ) -> None:
        """The reader stops and goes on while records come."""
        log = make(queue=20)
        told: Counter[str] = Counter()
        reading = Task(_count_slowly, reader, told)
        for number in range(RECORDS):
            (log.debug, log.info, log.warning)[number % 3]("record")
        assert log.close(SECONDS)
        reader.close_write()
        reading.result(SECONDS)
        assert told["dropped"] == sum(dropped(log).values())
        assert told["record"] + told["dropped"] == RECORDS

    def test_report_is_a_warning_of_the_status_page(
        self, make: Callable[..., Log], reader: Reader
    ) -> None:
        log = make(queue=1, level="error")
        block_with_error(log, reader)
        for _ in range(3):
            log.error("x")
        all_lines(log, reader)
        assert log.recent[-1].level == "warning"
        assert log.recent[-1].text == f'msg="{DROPPED}" records=2 error=2'


def all_lines_later(log: Log, reader: Reader) -> list[str]:
    """As all_lines(), with "" at the end of a log that ends with a whole line."""
    return [*all_lines(log, reader), ""]


def block_with_error(log: Log, reader: Reader) -> None:
    reader.fill()
    log.error("first")
    wait_until(lambda: not log._writer._queue, SECONDS)


def _count_slowly(reader: Reader, told: Counter[str]) -> None:
    for number, line in enumerate(reader.read()):
        if found := REPORT.search(line):
            told["dropped"] += int(found[1])
        else:
            assert line.endswith(" record")
            told["record"] += 1
        if number % 50 == 0:
            time.sleep(0.001)


class TestFailingDescriptor:
    """Hazard 102: a full disk, a closed standard error."""

    def test_closed_descriptor_costs_the_records(
        self, make: Callable[..., Log], reader: Reader
    ) -> None:
        descriptor = os.dup(reader.write)
        log = make(descriptor=descriptor)
        os.close(descriptor)
        log.error("lost")
        log.info("lost")
        wait_until(lambda: dropped(log) == {"error": 1, "info": 1}, SECONDS)
        os.dup2(reader.write, descriptor)
        log.info("seen")
        assert log.close(SECONDS)
        os.close(descriptor)
        report, seen = all_lines(log, reader)
        assert report.endswith(" records=2 info=1 error=1") and seen.endswith(" info seen")

    def test_pipe_without_reader_costs_the_records(self, make: Callable[..., Log]) -> None:
        """EPIPE: Python ignores SIGPIPE."""
        read, write = os.pipe()
        log = make(descriptor=write)
        os.close(read)
        for _ in range(3):
            log.error("lost")
        assert log.close(SECONDS)
        assert dropped(log) == {"error": 3}
        os.close(write)

    def test_terminal_that_is_gone_costs_the_records(self, make: Callable[..., Log]) -> None:
        """EIO."""
        terminal, line = os.openpty()
        log = make(descriptor=line)
        os.close(terminal)
        log.error("lost")
        assert log.close(SECONDS)
        assert dropped(log) == {"error": 1}
        os.close(line)

    def test_full_disk_is_tried_again(self, make: Callable[..., Log], reader: Reader) -> None:
        """ENOSPC."""
        descriptor = os.open("/dev/full", os.O_WRONLY)
        log = make(queue=2, descriptor=descriptor)
        log.info("first")
        wait_until(lambda: not log._writer._queue, SECONDS)
        for text in ("second", "third", "dropped"):
            log.info(text)
        assert not log.close(0.05)
        os.dup2(reader.write, descriptor)
        assert log.close(SECONDS)
        os.close(descriptor)
        *lines, report = all_lines(log, reader)
        assert texts(lines) == ["first", "second", "third"]
        assert report.endswith(" records=1 info=1")

    def test_reader_that_is_not_ready_is_waited_for(
        self, make: Callable[..., Log], reader: Reader
    ) -> None:
        """EAGAIN: another process has made the pipe non-blocking."""
        log = make()
        reader.fill()
        os.set_blocking(reader.write, False)
        for number in range(1000):
            log.info("record %d", number)
        assert texts(all_lines(log, reader)) == [f"record {number}" for number in range(1000)]
        assert not dropped(log)


class ScriptedWrite:
    """os.write(): each call takes the bytes or raises the error of a step of the script.

    After the script it takes everything.  The first call waits for the gate.
    """

    def __init__(self) -> None:
        self.script: list[int | OSError] = []
        self.gate = threading.Event()
        self._data = b""

    def __call__(self, descriptor: int, data: memoryview) -> int:
        assert self.gate.wait(SECONDS)
        step = self.script.pop(0) if self.script else len(data)
        if isinstance(step, OSError):
            raise step
        self._data += bytes(data[:step])
        return min(step, len(data))

    @property
    def lines(self) -> list[str]:
        return self._data.decode().splitlines()


NO_SPACE, INPUT_OUTPUT = OSError(errno.ENOSPC, "no space"), OSError(errno.EIO, "no disk")


class TestPartialWrites:
    """What the kernel takes of a write may end within a line."""

    @pytest.fixture
    def write(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedWrite]:
        write = ScriptedWrite()
        monkeypatch.setattr(log_writer, "os", SimpleNamespace(write=write))
        yield write
        write.gate.set()

    def write_all(self, log: Log, write: ScriptedWrite, *records: str) -> None:
        """Have a record written by itself, then the others in one write."""
        log.info("alone")
        wait_until(lambda: not log._writer._queue, SECONDS)
        for text in records:
            log.info(text)
        write.gate.set()
        assert log.close(SECONDS)

    def test_rest_of_a_line_follows_when_there_is_space_again(
        self, make: Callable[..., Log], write: ScriptedWrite
    ) -> None:
        log = make(descriptor=2)
        write.script = [5, NO_SPACE, 3, NO_SPACE, NO_SPACE]
        self.write_all(log, write, "first", "second")
        assert texts(write.lines) == ["alone", "first", "second"] and not dropped(log)

    def test_line_that_was_torn_swallows_no_other_line(
        self, make: Callable[..., Log], write: ScriptedWrite
    ) -> None:
        log = make(descriptor=2)
        write.script = [9, INPUT_OUTPUT]
        self.write_all(log, write, "second")
        torn, report, second = write.lines
        assert len(torn) == 9 and dropped(log) == {"info": 1}
        assert report.endswith(" records=1 info=1") and second.endswith(" info second")

    def test_whole_lines_before_the_failure_are_not_counted_as_dropped(
        self, make: Callable[..., Log], write: ScriptedWrite
    ) -> None:
        log = make(descriptor=2)
        length = len(log._format.line(20, {"msg": "whole"}))
        write.script = [1000, 2 * length, INPUT_OUTPUT]
        self.write_all(log, write, "whole", "whole", "third")
        assert dropped(log) == {"info": 1}
        assert texts(write.lines) == ["alone", "whole", "whole"]

    def test_report_that_could_not_be_written_is_written_later(
        self, make: Callable[..., Log], write: ScriptedWrite
    ) -> None:
        log = make(queue=1, descriptor=2)
        write.script = [1000, 1000, INPUT_OUTPUT]
        self.write_all(log, write, "first", "dropped", "dropped")
        log.info("last")
        assert log.close(SECONDS)
        assert dropped(log) == {"info": 2}
        alone, first, report, last = write.lines
        assert report.endswith(" records=2 info=2") and last.endswith(" info last")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_process_writes_its_own_records_and_no_others(
    make: Callable[..., Log], reader: Reader
) -> None:
    """At the time of the fork other threads hold the locks, and records wait."""
    log = make()
    block(log, reader)
    log.info("of the parent")
    of_child, to_child = os.pipe()
    with log._repeats._lock, log._writer._lock:
        child = os.fork()
        if not child:
            log.begin_in_child()
            os.dup2(to_child, reader.write)
            log.limited("key", "of the child")
            os._exit(0 if log.close(SECONDS) else 1)
    os.close(to_child)
    with open(of_child, "rb") as file:
        data = file.read()
    assert os.waitpid(child, 0)[1] == 0
    assert data.count(b"\n") == 1 and data.endswith(b" warning of the child\n")
    assert texts(all_lines(log, reader)) == ["first", "of the parent"]


def test_lower_limit_of_a_new_configuration_applies(
    make: Callable[..., Log], reader: Reader
) -> None:
    log = make(queue=100)
    block(log, reader)
    log.configure("info", "text", True, 2)
    for _ in range(5):
        log.info("x")
    assert dropped(log) == {"info": 3}
    all_lines(log, reader)
