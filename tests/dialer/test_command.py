"""Programs as upstreams: what they are given, how they end, and what is left of them."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Iterator

import pytest

from netproxy.config.schema import HopConfig
from netproxy.dialer.plain import programs as module
from netproxy.dialer.plain.factory import CommandFactory, find_program
from netproxy.dialer.plain.programs import Programs
from netproxy.errors import ConfigError, DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.routing import Dialer
from netproxy.net.stream import Stream, complete
from tests.support.doubles import Lines
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import wait_until

TARGET = Address("target.example", 443)
DialerOf = Callable[..., Dialer]


class Bench:
    """A CommandFactory whose table the test sweeps itself."""

    def __init__(self) -> None:
        self.log = Lines()
        self.tables: list[Programs] = []
        self.factory = CommandFactory(self.log, self.tables.append)  # type: ignore[arg-type]

    def dialer(self, *command: str, processes: int = 4, upstream: str = "up") -> Dialer:
        return self.factory.dialer(
            HopConfig("command", command=command, processes=processes), upstream
        )

    def python(self, script: str, *arguments: str, processes: int = 4) -> Dialer:
        """Return the dialer of a Python program."""
        return self.dialer(sys.executable, "-Sc", script, *arguments, processes=processes)

    @property
    def programs(self) -> Programs:
        return self.tables[0]

    def sweep(self, later: float = 0.0) -> None:
        self.programs.expire(time.monotonic() + later)

    def reaped(self) -> bool:
        self.sweep()
        return not len(self.programs)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.factory.stop()
    if bench.tables:
        assert not len(bench.programs)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def read_all(stream: Stream) -> bytes:
    data = b""
    while piece := complete(stream.read_some(65536)):
        data += piece
    return data


def dial(dialer: Dialer, target: Address = TARGET) -> Stream:
    stream = dialer.dial(tcp_to(target))
    assert isinstance(stream, Stream)
    return stream


def inheritable(descriptor: int) -> bool:
    try:
        return os.get_inheritable(descriptor)
    except OSError:
        return False  # that of the listing


def ignored_signals(status: str) -> set[int]:
    """Return the signals that the process with this text of proc(5) ignores."""
    (mask,) = re.findall(r"SigIgn:\s+(\w+)", status)
    return {number for number in range(1, 65) if int(mask, 16) & 1 << number - 1}


def is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


class TestStream:
    def test_bytes_go_through_and_half_close_reaches_the_program(self, bench: Bench) -> None:
        stream = dial(bench.dialer("cat"))
        data = os.urandom(1 << 20)
        writer = threading.Thread(target=lambda: (stream.write(data), stream.shutdown_write()))
        writer.start()
        assert read_all(stream) == data
        writer.join()
        stream.close()
        wait_until(bench.reaped)

    def test_arguments_have_host_and_port(self, bench: Bench) -> None:
        script = "import sys; print(*sys.argv[1:], sep='|', end='')"
        arguments = ("%h", "[%h]:%p", "%%h", "100%%", "-x", "%h%h")
        stream = dial(bench.python(script, *arguments))
        host = "target.example"
        assert read_all(stream).decode() == f"{host}|[{host}]:443|%h|100%|-x|{host}{host}"
        stream.close()

    def test_addresses_of_both_families_are_arguments(self, bench: Bench) -> None:
        for host in ("192.0.2.1", "2001:db8::1", "fe80::1%2", "a_b-c.example"):
            stream = dial(bench.dialer("echo", "%h"), Address(host, 1))
            assert read_all(stream).decode() == f"{host}\n"
            stream.close()

    @pytest.mark.parametrize(
        "host",
        ["-oProxyCommand=x", "", "a b", "$(id)", "a;b", "a\nb", "\u00e9", "-", "a'b", "x" * 300],
    )
    def test_host_that_is_no_argument_is_refused(self, bench: Bench, host: str) -> None:
        dialer = bench.dialer("printf", "%h")
        with pytest.raises(DialError) as caught:
            dial(dialer, Address(host, 1))
        assert caught.value.reason is Reason.DENIED
        assert not len(bench.programs)

    def test_datagrams_are_unsupported(self, bench: Bench) -> None:
        dialer = bench.dialer("cat")
        assert dialer.carries == {"tcp"} and dialer.fixed_for(tcp_to(TARGET)) is dialer
        with pytest.raises(DialError) as caught:
            dialer.dial_packet(udp_to(TARGET))
        assert caught.value.reason is Reason.UNSUPPORTED


class TestPublicAddressDependencies:
    def test_environment_is_clean(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SECRET", "s3cret")
        monkeypatch.setenv("HOME", "/nowhere")
        stream = dial(bench.dialer("env"))
        lines = read_all(stream).decode().splitlines()
        stream.close()
        names = {line.partition("=")[0] for line in lines}
        assert "HOME=/nowhere" in lines
        assert names <= {"PATH", "HOME", "USER", "LANG"}, names

    def test_program_has_no_blocked_or_ignored_signal_and_no_descriptor(self, bench: Bench) -> None:
        script = (
            "import os, signal; "
            "print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), "
            "sorted(os.listdir('/proc/self/fd')), "
            "os.getpid() == os.getsid(0), "
            "next(l for l in open('/proc/self/status') if l.startswith('SigIgn')))"
        )
        # Whoever has started these tests may ignore signals: a shell does so in the background.
        before = ignored_signals(Path("/proc/self/status").read_text())
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
        try:
            with open("/dev/null"):
                stream = dial(bench.dialer("python3", "-Sc", script))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        mask, rest = read_all(stream).decode().split(" ", 1)
        stream.close()
        assert mask == "set()"
        descriptors, is_leader, _, _ = rest.rsplit(maxsplit=3)
        inherited = {
            number for number in map(int, os.listdir("/proc/self/fd")) if inheritable(number)
        }
        # 3 is that of the listing itself.
        assert {int(number) for number in eval(descriptors)} <= {0, 1, 2, 3} | inherited
        assert is_leader == "True"
        # Python itself ignores SIGPIPE and SIGXFSZ; 32 and 33 belong to the C library.
        assert ignored_signals(rest) <= before | {signal.SIGPIPE, signal.SIGXFSZ, 32, 33}


class TestEnd:
    def test_program_gets_sigterm_when_its_connection_is_closed(self, bench: Bench) -> None:
        stream = dial(bench.dialer("sh", "-c", "echo $$; exec sleep 1000"))
        number = int(complete(stream.read_until(b"\n", 100)))
        stream.close()
        wait_until(bench.reaped)
        assert not is_alive(number)
        assert not bench.log.of("limited")

    def test_group_of_the_program_ends_with_it(self, bench: Bench) -> None:
        stream = dial(bench.dialer("sh", "-c", "sleep 1000 & echo $!; wait"))
        number = int(complete(stream.read_until(b"\n", 100)))
        stream.close()
        wait_until(bench.reaped)
        wait_until(lambda: not is_alive(number))

    def test_rest_of_the_group_ends_with_its_first_process(self, bench: Bench) -> None:
        stream = dial(bench.dialer("sh", "-c", "sleep 1000 & echo $!"))
        number = int(complete(stream.read_until(b"\n", 100)))
        wait_until(bench.reaped)
        assert read_all(stream) == b""
        wait_until(lambda: not is_alive(number))
        stream.close()

    def test_program_that_ignores_sigterm_is_killed_later(self, bench: Bench) -> None:
        script = "trap '' TERM; echo ready; while :; do sleep 1000; done"
        stream = dial(bench.dialer("sh", "-c", script))
        assert complete(stream.read_until(b"\n", 100)) == b"ready\n"
        (program,) = bench.programs._running.values()
        stream.close()
        assert program.kill_at is not None
        bench.sweep()
        wait_until(lambda: bench.sweep(module.KILL_SECONDS + 1) or not len(bench.programs))
        assert program.status == -signal.SIGKILL

    def test_stop_kills_all_and_starts_no_more(self, bench: Bench) -> None:
        dialer = bench.dialer("sleep", "1000")
        streams = [dial(dialer) for _ in range(3)]
        bench.factory.stop()
        assert not len(bench.programs)
        assert all(read_all(stream) == b"" for stream in streams)
        for stream in streams:
            stream.close()
        with pytest.raises(DialError):
            dial(dialer)

    def test_closing_after_the_program_was_reaped_does_nothing(self, bench: Bench) -> None:
        stream = dial(bench.dialer("true"))
        wait_until(bench.reaped)
        stream.close()
        stream.close()


class TestBounds:
    def test_limit_of_programs_is_an_error_of_the_upstream(self, bench: Bench) -> None:
        dialer = bench.dialer("sleep", "1000", processes=2)
        streams = [dial(dialer), dial(dialer)]
        with pytest.raises(DialError) as caught:
            dial(dialer)
        assert (caught.value.reason, caught.value.upstream) == (Reason.LIMIT, True)
        assert "2 programs run already" in str(caught.value)
        streams.pop().close()
        wait_until(lambda: bench.sweep() or len(bench.programs) == 1)
        streams.append(dial(dialer))
        for stream in streams:
            stream.close()

    def test_program_that_has_ended_frees_its_place_at_once(self, bench: Bench) -> None:
        dialer = bench.dialer("true", processes=1)
        for _ in range(5):
            stream = dial(dialer)
            assert read_all(stream) == b""
            (program,) = bench.programs._running.values()
            os.waitid(os.P_PID, program.number, os.WEXITED | os.WNOWAIT)
            stream.close()

    def test_limit_holds_for_dials_at_the_same_time(self, bench: Bench) -> None:
        dialer = bench.dialer("sleep", "1000", processes=3)
        streams: list[Stream] = []
        refused: list[DialError] = []

        def run() -> None:
            try:
                streams.append(dial(dialer))
            except DialError as error:
                refused.append(error)

        threads = [threading.Thread(target=run, name=f"test-{at}") for at in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(streams), len(refused)) == (3, 9)
        for stream in streams:
            stream.close()

    def test_no_descriptor_is_left_by_a_program_that_cannot_be_started(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        program = tmp_path / "program"
        program.write_text("no interpreter")
        program.chmod(0o755)
        dialer = bench.dialer(str(program))
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(6):
            with pytest.raises(DialError) as caught:
                dial(dialer)
        assert str(caught.value).startswith(f"'up' (command:{program}): cannot be started: ")
        assert len(os.listdir("/proc/self/fd")) == before
        assert not bench.programs._counts


class TestLog:
    def test_standard_error_is_in_the_log(self, bench: Bench) -> None:
        stream = dial(bench.dialer("sh", "-c", "echo one >&2; printf 'two\\n\\nthree' >&2"))
        wait_until(bench.reaped)
        stream.close()
        path = find_program("sh")
        assert path and bench.log.of("info") == [
            f"'up' (command:sh): {word}" for word in ("one", "two", "three")
        ]

    def test_many_lines_are_cut(self, bench: Bench) -> None:
        stream = dial(bench.dialer("sh", "-c", "seq 1 50 >&2"))
        (program,) = bench.programs._running.values()
        os.waitid(os.P_PID, program.number, os.WEXITED | os.WNOWAIT)
        bench.sweep()
        stream.close()
        lines = bench.log.of("info")
        assert len(lines) == module.LINES_LIMIT + 1
        assert lines[-1].endswith("40 more lines are left out")

    def test_status_other_than_0_is_in_the_log(self, bench: Bench) -> None:
        stream = dial(bench.dialer("sh", "-c", "exit 255"))
        wait_until(bench.reaped)
        stream.close()
        stream = dial(bench.dialer("sh", "-c", "kill -9 $$"))
        wait_until(bench.reaped)
        stream.close()
        assert bench.log.of("limited") == [
            "'up' (command:sh): the program has ended with status 255",
            "'up' (command:sh): the program has ended by signal 9",
        ]


class TestFactory:
    def test_program_that_cannot_be_run_is_an_error_of_the_configuration(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        for name in ("no-such-program", str(tmp_path), str(tmp_path / "missing")):
            with pytest.raises(ConfigError, match="is not a program that can be run"):
                bench.dialer(name)

    def test_nothing_is_kept_without_a_command(self, bench: Bench) -> None:
        assert not bench.tables
        bench.factory.stop()
