"""netproxyd and netproxyctl: what they print, their exit status, and what signals do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from netproxy import __version__, cli
from netproxy.admin.control import places
from netproxy.config.schema import Config
from netproxy.daemon import main
from netproxy.daemon.process import signals
from netproxy.access.users import Users
from netproxy.daemon.daemon import Daemon
from netproxy.interfaces.addresses import Address
from tests.support.sockets import (
    SECONDS,
    Task,
    address_of,
    listen,
    read_exactly,
    read_to_end,
    wait_until,
)

pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
LISTENER = "sps://127.0.0.1:0"
# Neither the end of a handshake nor that of the drain comes while a test waits.
PATIENT = """
listeners: [{listen: '127.0.0.1:0'}]
timeouts: {drain: 600s, handshake: 600s}
"""


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "netproxyd.yaml").write_text(text)
        return str(tmp_path / "netproxyd.yaml")

    return write


@pytest.fixture(autouse=True)
def unchanged_signals() -> Iterator[None]:
    """A main() that is to serve leaves signals blocked, and handlers that keep them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    # First the handlers: one that keeps a pending signal would run for ever.
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.fixture(autouse=True)
def no_places_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "DEFAULT_FILE", "/nonexistent/netproxyd.yaml")
    monkeypatch.setattr(places, "SYSTEM_SOCKET", "/nonexistent/netproxy/control.sock")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nonexistent")
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [["-x"], ["--lisen"], ["argument"], ["-c"], ["-v", "-q"], ["--log-format", "xml"]],
    )
    def test_wrong_option_is_one_line_and_status_64(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 64
        assert re.fullmatch(r"netproxyd: .+ \(try --help\)\n", capsys.readouterr().err)

    def test_file_without_its_option_is_told_the_option(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(["-t", "netproxyd.yaml"])
        assert caught.value.code == 64
        hint = "(write -c before the name of a configuration file)"
        line = f"netproxyd: unrecognized arguments: netproxyd.yaml {hint}\n"
        assert capsys.readouterr().err == line

    def test_version_is_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(["-V"])
        assert (caught.value.code, capsys.readouterr().out) == (0, f"netproxyd {__version__}\n")

    def test_help_names_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(["--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        for option in (
            "--config",
            "--listen",
            "--upstream",
            "--check",
            "--verbose",
            "--quiet",
            "--log-format",
            "--version",
        ):
            assert option in text

    def test_netproxyctl_needs_a_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in ([], ["nonsense"]):
            with pytest.raises(SystemExit) as caught:
                cli.control_main(arguments)
            assert caught.value.code == 64


class TestCheck:
    @staticmethod
    def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
        """Return status, standard output and standard error of netproxyd -t."""
        status = cli.main(["-t", *arguments])
        return (status, *capsys.readouterr())

    def test_check_without_file_and_options(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.check(capsys) == (
            0,
            "listen 127.0.0.1:1080 tcp+udp sps 'sps-1080' upstream direct\n"
            "upstream default: direct carries bind, tcp, udp\nOK\n",
            "",
        )

    def test_check_of_listeners_and_a_chain_from_options(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out, err = self.check(
            capsys,
            "-l",
            "http://127.0.0.1:8080?name=web",
            "-l",
            "socks5://[::1]:1080?network=tcp",
            "-u",
            "socks5://u:hunter2@10.0.0.1:1080, http://10.0.0.2:3128",
        )
        assert (status, err) == (0, "")
        route = "socks5://10.0.0.1:1080 -> http://10.0.0.2:3128"
        assert out == (
            f"listen 127.0.0.1:8080 tcp+connect-udp http 'web' upstream {route}\n"
            f"listen [::1]:1080 tcp socks5 'socks5-1080' upstream {route}\n"
            f"upstream default: {route} carries tcp, udp by connect-udp\nOK\n"
        )

    def test_options_replace_what_the_file_says(
        self, capsys: pytest.CaptureFixture[str], file: Callable[[str], str]
    ) -> None:
        path = file(
            "listeners: [{listen: '127.0.0.1:1', upstream: a}]\n"
            "upstreams: {a: 'http://h:1'}\ndefault: block\n"
        )
        assert (
            "listen 127.0.0.1:1 tcp+udp sps 'sps-1' upstream http://h:1\n"
            in self.check(capsys, "-c", path)[1]
        )
        status, out, _ = self.check(capsys, "-c", path, "-l", "http://127.0.0.1:2", "-u", "direct")
        assert status == 0
        assert out.startswith("listen 127.0.0.1:2 tcp+connect-udp http 'http-2' upstream direct\n")

    def test_upstream_option_replaces_upstreams_of_listeners(
        self, capsys: pytest.CaptureFixture[str], file: Callable[[str], str]
    ) -> None:
        path = file("listeners: [{listen: '127.0.0.1:1', upstream: 'http://h:1'}]")
        assert " upstream block\n" in self.check(capsys, "-c", path, "-u", "block")[1]

    def test_upstream_option_sets_rules_and_upstreams_of_users_aside(
        self, file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []

        def build(config: Any, *rest: Any) -> Any:
            seen.append(config)
            return real(config, *rest)

        real = main.build
        monkeypatch.setattr(main, "build", build)
        path = file(
            "rules: [{port: 22, via: direct}]\nauth: {url: 'https://a/'}\n"
            "users: {alice: {password: x, upstream: direct}}\n"
        )
        assert (
            cli.main(["-c", path, "-t"])
            == cli.main(["-c", path, "-t", "-u", "socks5://192.0.2.1:1080"])
            == 0
        )
        assert [len(config.rules) for config in seen] == [1, 0]
        assert [config.users["alice"].upstream is None for config in seen] == [False, True]
        assert [config.auth.names_upstreams for config in seen] == [True, False]

    def test_empty_file_has_the_built_in_listener(
        self, capsys: pytest.CaptureFixture[str], file: Callable[[str], str]
    ) -> None:
        assert "listen 127.0.0.1:1080" in self.check(capsys, "-c", file(""))[1]
        assert "listen" not in self.check(capsys, "-c", file("listeners: []"))[1]

    def test_check_prints_warnings_to_standard_error(
        self, capsys: pytest.CaptureFixture[str], file: Callable[[str], str]
    ) -> None:
        path = file("listeners: [{listen: '0.0.0.0:1', allow_open: true}]")
        assert self.check(capsys, "-q", "-c", path) == (
            0,
            "",
            f"warning: {path}:1:22: listeners[0].listen: 0.0.0.0:1 lets everybody in\n",
        )

    def test_listeners_without_a_value_are_the_default_with_a_warning(
        self, capsys: pytest.CaptureFixture[str], file: Callable[[str], str]
    ) -> None:
        path = file("listeners:\n#  - listen: 127.0.0.1:1\n")
        message = f"{path}:1:1: listeners: is empty: sps://127.0.0.1:1080 is served"
        assert self.check(capsys, "-q", "-c", path) == (
            0,
            "",
            f"warning: {message} (for no listener write [])\n",
        )
        assert self.check(capsys, "-q", "-c", path, "-l", "sps://127.0.0.1:2")[2] == ""

    @pytest.mark.parametrize(
        "text, message",
        [
            (
                "listeners:\n  - protcol: sps\n    listen: 127.0.0.1:1\n",
                "2:5: listeners[0].protcol: unknown key (did you mean 'protocol'?)",
            ),
            ("a: [", "1:4: the '[' that opens here is never closed"),
            ("[]", "1:1: must be a mapping of keys to values"),
            (
                "default: nowhere",
                "1:10: default: 'nowhere' is not an upstream: "
                "write scheme://host:port, direct or block",
            ),
        ],
    )
    def test_error_in_the_file_is_one_line_and_status_78(
        self,
        capsys: pytest.CaptureFixture[str],
        file: Callable[[str], str],
        text: str,
        message: str,
    ) -> None:
        path = file(text)
        assert self.check(capsys, "-c", path) == (78, "", f"{path}:{message}\n")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (
                ["-c", "/nonexistent/c.yaml"],
                "/nonexistent/c.yaml: cannot be read: No such file or directory",
            ),
            (["-l", "sps"], "-l[0]: not a listener: write scheme://host:port"),
            (
                ["-l", "sps://127.0.0.1:1?nme=x"],
                "-l[0]: listeners[0].nme: unknown key (did you mean 'name'?)",
            ),
            (
                ["-l", "sps://:1080"],
                "-l[0]: listeners[0].listen: [::]:1080 would let everybody in: "
                "set auth, clients, or allow_open: true",
            ),
            (
                ["-u", "sock5://h:1"],
                "-u: default[0]: 'sock5' is not an upstream scheme (did you mean 'socks5'?)",
            ),
            (
                ["-u", "http://h:1,,http://h:2"],
                "-u: default[1]: not an upstream: write scheme://host:port, direct or block",
            ),
        ],
    )
    def test_error_in_an_option_names_the_option(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        assert self.check(capsys, *arguments) == (78, "", message + "\n")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["-l", "sps://alice:hunter2@127.0.0.1:1"],
            ["-u", "socks5//u:hunter2@h:1"],
            ["-u", "http://u:hunter2@h"],
            ["-u", "x://u:hunter2@h:1"],
            ["-u", "http://u:hunter2@h:1?x=y"],
        ],
    )
    def test_error_shows_no_password(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str]
    ) -> None:
        """Hazard 111."""
        status, out, err = self.check(capsys, *arguments)
        assert status == 78
        assert "hunter2" not in out + err

    def test_names_are_printed_as_their_codes(
        self, capsys: pytest.CaptureFixture[str], file: Callable[[str], str]
    ) -> None:
        """Hazard 143."""
        name = "ma\u202ein"
        path = file(f'listeners: [{{listen: "127.0.0.1:0", name: "{name}", network: tcp}}]')
        status, out, err = self.check(capsys, "-c", path)
        assert (status, err) == (0, "") and r"ma\u202ein" in out and name not in out
        assert cli.main(["-c", path, "--explain", f"tcp -> host:1 on {name}x"]) == 64
        assert capsys.readouterr().err.isascii()
        status, out, err = self.check(capsys, "-c", file('"li\u200bsteners": []\nx\u202e: 1\n'))
        assert status == 78 and err.isascii()
        assert r"li\u200bsteners: unknown key" in err and err.count("\n") == 2

    def test_check_leaves_the_signal_mask_alone(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        cli.main(["-t"])
        with pytest.raises(SystemExit):
            cli.main(["--version"])
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before

    @pytest.mark.parametrize(
        "folder, text, control",
        [
            ("/run/netproxy", "", "/run/netproxy/control.sock"),
            ("/run/one:/run/two", "default: direct", "/run/one/control.sock"),
            ("/run/netproxy", "control: unix:/run/x", "/run/x"),
            ("/run/netproxy", "control: none", ""),
            ("", "", ""),
        ],
    )
    def test_control_socket_is_in_the_runtime_directory_by_default(
        self,
        monkeypatch: pytest.MonkeyPatch,
        file: Callable[[str], str],
        folder: str,
        text: str,
        control: str,
    ) -> None:
        configs: list[Config] = []

        def check(config: Config, quiet: bool) -> int:
            configs.append(config)
            return 0

        monkeypatch.setenv("RUNTIME_DIRECTORY", folder)
        monkeypatch.setattr(main, "_check", check)
        assert cli.main(["-t", "-c", file(text)]) == 0
        assert [config.control for config in configs] == [control]

    def test_check_finds_a_broken_hash(
        self, capsys: pytest.CaptureFixture[str], file: Callable[[str], str]
    ) -> None:
        status, out, err = self.check(
            capsys, "-c", file("users: {alice: {password: 'scrypt$hunter2'}}")
        )
        assert (status, out) == (78, "")
        assert "not a hash made by 'netproxyctl hash-password'" in err and "hunter2" not in err


class Served:
    """main() on this thread, and a test's actions on another one, with SIGTERM at their end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ready = threading.Semaphore(0)
        self.daemons: list[Daemon] = []
        monkeypatch.setattr(signals.notify, "ready", lambda status: self.ready.release())
        start = Daemon.start

        def remember(daemon: Daemon, config: Any) -> None:
            self.daemons.append(daemon)
            start(daemon, config)

        monkeypatch.setattr(Daemon, "start", remember)

    def run(self, arguments: list[str], meanwhile: Callable[[], Any]) -> int:
        def do() -> Any:
            try:
                assert self.ready.acquire(timeout=SECONDS), "it does not serve"
                return meanwhile()
            finally:
                signal_us(signal.SIGTERM)

        task = Task(do)
        status = cli.main(arguments)
        task.result()
        return status

    def hang_up(self) -> None:
        """SIGHUP, and the reload done."""
        signal_us(signal.SIGHUP)
        assert self.ready.acquire(timeout=SECONDS)

    @property
    def address(self) -> Address:
        listeners = self.daemons[-1]._manager.listeners
        return next(listener.address for listener in listeners if listener.network == "tcp")

    def greet(self) -> socket.socket:
        sock = socket.create_connection(self.address, SECONDS)
        sock.sendall(b"\x05\x01\x00")
        assert read_exactly(sock, 2) == b"\x05\x00"
        return sock


def signal_us(number: int) -> None:
    """Signal the main thread: others, such as those of pytest-xdist, may not block the signal."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, number)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Restores what main() changes in the process."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    yield Served(monkeypatch)
    while signal.sigtimedwait(signals.SIGNALS, 0):
        pass
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    threading.stack_size(0)


class TestServing:
    def test_daemon_serves_until_sigterm(
        self, served: Served, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert served.run(["-l", LISTENER], lambda: served.greet().close()) == 0
        lines = capfd.readouterr().err.splitlines()
        assert re.search(
            rf" info netproxyd {re.escape(__version__)} serves "
            r"udp 127\.0\.0\.1:\d+, tcp 127\.0\.0\.1:\d+, upstream direct$",
            lines[0],
        )
        assert lines[-1].endswith(" info stopped")

    def test_first_line_names_the_bridge_of_an_agent(
        self, served: Served, capfd: pytest.CaptureFixture[str], file: Callable[[str], str]
    ) -> None:
        with listen() as bridge:
            path = file(
                f"listeners: []\ntunnel: {{agent: {{bridge: 'tcp://{address_of(bridge)}', "
                f"name: home, token: {'t' * 32}, exit: true}}}}"
            )
            assert served.run(["-c", path], str) == 0
            (line,) = [line for line in capfd.readouterr().err.splitlines() if " serves " in line]
            assert line.endswith(f" nothing, agent 'home' of {address_of(bridge)}, upstream direct")

    def test_plain_daemon_has_a_control_socket_and_a_second_one_serves_without(
        self,
        served: Served,
        capfd: pytest.CaptureFixture[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Hazard 170."""
        path = tmp_path / "netproxy" / "control.sock"
        monkeypatch.setattr(places, "SYSTEM_SOCKET", str(path))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        # A daemon that was killed has left its socket.
        path.parent.mkdir()
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))

        def ask() -> tuple[int, str]:
            status = cli.control_main(["status"])
            return status, capfd.readouterr().out

        answers = []
        assert served.run(["-l", LISTENER], lambda: answers.append(ask())) == 0
        assert answers[0][0] == 0 and answers[0][1].startswith("netproxyd ")
        assert not path.exists()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            assert served.run(["-l", LISTENER], lambda: served.greet().close()) == 0
        (line,) = [line for line in capfd.readouterr().err.splitlines() if " warning " in line]
        assert line.endswith(
            f" warning no control socket: control unix:{path}: Address already in use by another "
            "daemon (set control: to another path)"
        )

    @pytest.mark.parametrize(
        "arguments, wanted",
        [(["-q"], "warning"), (["-v"], "info"), (["--log-format", "json"], "info")],
    )
    def test_serving_line_is_logged_at_every_level(
        self, served: Served, capfd: pytest.CaptureFixture[str], arguments: list[str], wanted: str
    ) -> None:
        served.run(["-l", LISTENER, *arguments], lambda: None)
        line = capfd.readouterr().err.splitlines()[0]
        if "json" in arguments:
            record = json.loads(line)
            assert record["level"] == wanted and " serves " in record["msg"]
        else:
            assert re.search(rf"^\S+ {wanted} netproxyd .* serves ", line)

    def test_error_of_our_own_is_one_record_and_status_70(
        self, served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Hazard 133: a traceback on standard error would wait for its reader."""

        def fail(daemon: Daemon) -> str:
            raise ZeroDivisionError("ours")

        monkeypatch.setattr(Daemon, "summary", fail)
        assert cli.main(["-l", LISTENER]) == 70
        err = capfd.readouterr().err
        assert " error internal error while serving: ZeroDivisionError: ours " in err
        assert "Traceback" not in err
        served.daemons[-1].stop()

    def test_exception_of_a_thread_is_one_record(
        self, served: Served, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def meanwhile() -> None:
            thread = threading.Thread(target=lambda: 1 / 0, name="test-thread")
            thread.start()
            thread.join()

        assert served.run(["-l", LISTENER], meanwhile) == 0
        err = capfd.readouterr().err
        assert " error internal error while running the thread 'test-thread': Zero" in err
        assert "Traceback" not in err

    def test_address_in_use_is_named_and_status_69(
        self, served: Served, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Hazard 108."""
        with listen() as taken:
            assert cli.main(["-l", f"http://{address_of(taken)}"]) == 69
            (line,) = capfd.readouterr().err.splitlines()
            assert line.endswith(
                f" error cannot listen on tcp {address_of(taken)}: Address already in use"
                f" (ss -lnptu 'sport = :{taken.getsockname()[1]}' tells by which program)"
            )

    @pytest.mark.parametrize(
        "name", ["poller", "janitor", "control", "tcp-listener .*", "udp-listener .*"]
    )
    def test_thread_that_cannot_start_is_one_line_and_status_69(
        self,
        served: Served,
        capfd: pytest.CaptureFixture[str],
        file: Callable[[str], str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
    ) -> None:
        """Hazard 94.  The service manager starts the daemon again."""
        start = threading.Thread.start

        def fail(thread: threading.Thread) -> None:
            if re.fullmatch(name, thread.name):
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", fail)
        control = f"control: unix:{tmp_path / 'control'}\n"
        assert cli.main(["-c", file(f"listeners: [{{listen: '127.0.0.1:0'}}]\n{control}")]) == 69
        (line,) = capfd.readouterr().err.splitlines()
        assert re.search(r" error .*: can't start new thread$", line)

    def test_start_with_a_broken_hash_is_status_78(
        self, served: Served, capfd: pytest.CaptureFixture[str], file: Callable[[str], str]
    ) -> None:
        assert cli.main(["-c", file("listeners: []\nusers: {alice: {password: 'scrypt$x'}}")]) == 78
        assert "not a hash" in capfd.readouterr().err

    def test_dead_thread_ends_the_daemon_with_status_70(
        self, served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Hazard 98.  systemd starts the daemon again."""
        monkeypatch.setattr(signals, "LOOK_SECONDS", 0.01)
        monkeypatch.setattr(Daemon, "look", lambda _: "janitor")
        assert cli.main(["-l", LISTENER]) == 70
        assert "error the thread 'janitor' has died" in capfd.readouterr().err


class TestSignals:
    def test_usr1_writes_the_status(
        self, served: Served, capfd: pytest.CaptureFixture[str]
    ) -> None:
        written = threading.Event()

        def meanwhile() -> None:
            signal_us(signal.SIGUSR1)
            assert written.wait(SECONDS)

        status = Daemon.status

        def tell(daemon: Daemon) -> Iterator[str]:
            yield from status(daemon)
            written.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Daemon, "status", tell)
            assert served.run(["-l", LISTENER], meanwhile) == 0
        err = capfd.readouterr().err
        assert re.search(r"info connections=0 .*listeners: udp 127\.0\.0\.1:\d+, tcp", err)

    def test_signals_that_come_with_the_end_are_obeyed(
        self, served: Served, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No connection is left to wait for; SIGHUP comes too late and is refused in the log."""
        stop_accepting = Daemon.stop_accepting

        def meanwhile(daemon: Daemon) -> None:
            monkeypatch.setattr(Daemon, "stop_accepting", stop_accepting)
            for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
                signal_us(number)
            stop_accepting(daemon)

        monkeypatch.setattr(Daemon, "stop_accepting", meanwhile)
        assert served.run(["-l", LISTENER], lambda: None) == 0
        err = capfd.readouterr().err
        assert "info connections=0 " in err
        assert "error not reloaded: the daemon is draining" in err

    def test_hup_applies_the_file_and_keeps_the_sockets(
        self, served: Served, file: Callable[[str], str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = file("listeners: [{listen: '127.0.0.1:0', name: main}]")

        def meanwhile() -> None:
            before = served.address
            with served.greet():
                file(
                    "listeners: [{listen: '127.0.0.1:0', name: main}]\n"
                    "users: {alice: {password: secret}}\n"
                )
                served.hang_up()
                assert served.address == before
                with socket.create_connection(before, SECONDS) as sock:
                    sock.sendall(b"\x05\x01\x00")
                    assert read_exactly(sock, 2) == b"\x05\xff"

        assert served.run(["-c", path], meanwhile) == 0
        err = capfd.readouterr().err
        assert "info reloaded; serves udp 127.0.0.1:" in err
        assert f"warning {path}:2:27: users.alice.password: is plain text" in err

    def test_hup_with_a_broken_file_changes_nothing(
        self, served: Served, file: Callable[[str], str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Hazard 105."""
        path = file("listeners: [{listen: '127.0.0.1:0'}]")

        def meanwhile() -> None:
            file("listeners: [{listen: '127.0.0.1:0', protocol: sip}]\nxyz: 1\n")
            served.hang_up()
            served.greet().close()

        assert served.run(["-c", path], meanwhile) == 0
        err = capfd.readouterr().err
        assert (
            f"error not reloaded: {path}:1:47: listeners[0].protocol: 'sip' is not one of " in err
        )
        assert f"error not reloaded: {path}:2:1: xyz: unknown key" in err

    def test_hup_changes_the_log_format(
        self, served: Served, file: Callable[[str], str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = file("listeners: [{listen: '127.0.0.1:0'}]")

        def meanwhile() -> None:
            file("listeners: [{listen: '127.0.0.1:0'}]\nlog: {format: json}\n")
            served.hang_up()

        assert served.run(["-c", path], meanwhile) == 0
        assert json.loads(capfd.readouterr().err.splitlines()[-1])["msg"] == "stopped"

    @pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
    def test_term_lets_connections_finish_and_a_second_signal_does_not(
        self,
        served: Served,
        first: int,
        file: Callable[[str], str],
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """Hazard 104."""

        def meanwhile() -> None:
            address = served.address
            with served.greet() as sock:
                signal_us(first)
                wait_until(lambda: refuses(address))
                # The connection is still served.
                sock.sendall(b"\x05\x01")
                signal_us(signal.SIGTERM)
                with contextlib.suppress(ConnectionResetError):
                    read_to_end(sock)

        assert served.run(["-c", file(PATIENT)], meanwhile) == 0
        # Connections that only tested whether the port refuses count, too.
        assert " connections may finish within 600 s" in capfd.readouterr().err

    def test_drain_ends_with_the_last_connection(
        self, served: Served, file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop, stopped = Daemon.stop, threading.Event()

        def tell(daemon: Daemon) -> None:
            stopped.set()
            stop(daemon)

        monkeypatch.setattr(Daemon, "stop", tell)

        def meanwhile() -> None:
            sock, address = served.greet(), served.address
            signal_us(signal.SIGTERM)
            wait_until(lambda: refuses(address))
            sock.close()
            # Before Served sends a second signal, which would end the drain.
            assert stopped.wait(SECONDS)

        assert served.run(["-c", file(PATIENT)], meanwhile) == 0

    def test_drain_ends_after_its_timeout(
        self, served: Served, file: Callable[[str], str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        def meanwhile() -> None:
            with served.greet() as sock:
                signal_us(signal.SIGTERM)
                assert read_to_end(sock) == b""

        assert (
            served.run(
                ["-c", file("listeners: [{listen: '127.0.0.1:0'}]\ntimeouts: {drain: 200ms}")],
                meanwhile,
            )
            == 0
        )
        assert " info stopping: 1 connections are cut after 0.2 s\n" in capfd.readouterr().err


def refuses(address: Address) -> bool:
    try:
        socket.create_connection(address, SECONDS).close()
    except OSError:
        return True
    return False


class TestHashPassword:
    @pytest.fixture
    def stdin(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        import io

        def give(text: str) -> None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(text))

        return give

    @pytest.mark.parametrize(
        "given, password",
        [("secret\n", "secret"), ("pa ss\u00fc", "pa ss\u00fc"), (" x \nmore\n", " x ")],
    )
    def test_printed_hash_is_valid_in_the_configuration(
        self,
        stdin: Callable[[str], None],
        capsys: pytest.CaptureFixture[str],
        given: str,
        password: str,
    ) -> None:
        stdin(given)
        assert cli.control_main(["hash-password"]) == 0
        made = capsys.readouterr().out.strip()
        assert Users({"alice": made}).check(b"alice", password.encode()) == "alice"

    def test_cost_of_a_hash_is_chosen(
        self, stdin: Callable[[str], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Hazard 145."""
        stdin("secret\n")
        assert cli.control_main(["hash-password", "--cost", "4096"]) == 0
        assert capsys.readouterr().out.startswith("scrypt$4096$8$1$")
        assert cli.control_main(["hash-password", "--cost", "5000"]) == 64
        assert capsys.readouterr() == (
            "",
            "netproxyctl: --cost: '5000' is not a power of two from 1024 to 131072\n",
        )

    def test_line_of_a_users_file_is_printed(
        self, stdin: Callable[[str], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        stdin("secret\n")
        assert cli.control_main(["hash-password", "--cost", "1024", "--user", "bob b"]) == 0
        assert capsys.readouterr().out.startswith("bob b:scrypt$1024$8$1$")

    @pytest.mark.parametrize("name", ["", "a:b", "#a", " a", "a\n", "x" * 256])
    def test_name_that_no_users_file_can_hold_is_refused(
        self, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        assert cli.control_main(["hash-password", "--user", name]) == 64
        assert capsys.readouterr().err.startswith("netproxyctl: --user: a user's name has ")

    @pytest.mark.parametrize("given", ["", "\n", "x" * 256, "\u00fc" * 128])
    def test_password_that_no_protocol_can_carry_is_refused(
        self, stdin: Callable[[str], None], capsys: pytest.CaptureFixture[str], given: str
    ) -> None:
        stdin(given)
        assert cli.control_main(["hash-password"]) == 64
        assert capsys.readouterr() == ("", "netproxyctl: a password has 1 to 255 bytes\n")


class TestAsAProcess:
    @pytest.mark.parametrize("descriptor", ["stdout", "stderr"])
    def test_reader_of_the_check_that_has_ended_gets_no_traceback(
        self, file: Callable[[str], str], descriptor: str
    ) -> None:
        path = file("listeners: [{listen: '127.0.0.1:1'}]\nusers: {a: {password: x}}")
        reader, writer = os.pipe()
        os.close(reader)
        other = "stderr" if descriptor == "stdout" else "stdout"
        try:
            done = subprocess.run(
                [sys.executable, "-m", "netproxy", "-t", "-c", path],
                cwd=ROOT,
                timeout=SECONDS,
                **{descriptor: writer, other: subprocess.PIPE},  # type: ignore[call-overload]
            )
        finally:
            os.close(writer)
        assert done.returncode == 0
        said = done.stderr if descriptor == "stdout" else done.stdout
        assert b"Traceback" not in said and b"BrokenPipe" not in said

    @pytest.mark.parametrize("descriptor", ["stdout", "stderr"])
    def test_full_disk_gets_no_traceback_from_the_check(
        self, file: Callable[[str], str], descriptor: str
    ) -> None:
        path = file("listeners: [{listen: '127.0.0.1:1'}]\nusers: {a: {password: x}}")
        other = "stderr" if descriptor == "stdout" else "stdout"
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-m", "netproxy", "-t", "-c", path],
                cwd=ROOT,
                timeout=SECONDS,
                **{descriptor: full, other: subprocess.PIPE},  # type: ignore[call-overload]
            )
        assert done.returncode == 0
        said = done.stderr if descriptor == "stdout" else done.stdout
        assert said and b"Traceback" not in said and b"Errno" not in said

    def test_python_m_netproxy_is_netproxyd(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "netproxy", "-V"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, f"netproxyd {__version__}\n", "")

    def test_log_is_written_into_no_socket_if_standard_descriptors_are_closed(
        self, tmp_path: Path
    ) -> None:
        """Hazard 102."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = f"exec {sys.executable} -m netproxy -v -l sps://127.0.0.1:{port} <&- >&- 2>&-"
        environment = {**os.environ, "RUNTIME_DIRECTORY": str(tmp_path)}
        process = subprocess.Popen(["/bin/sh", "-c", command], cwd=ROOT, env=environment)
        try:
            wait_until(lambda: not refuses(Address("127.0.0.1", port)))
            with socket.create_connection(("127.0.0.1", port), SECONDS) as sock:
                sock.sendall(b"\xff")
                assert read_to_end(sock) == b""
            for number in (0, 1, 2):
                assert not os.readlink(f"/proc/{process.pid}/fd/{number}").startswith("socket:")
        finally:
            process.terminate()
            assert process.wait(SECONDS) == 0


def test_signals_are_held_back_before_anything_else_is_imported() -> None:
    """Hazard 142: each import is time in which a signal would end the process."""
    code = (
        "import sys; before = set(sys.modules); import netproxy.cli; "
        "print(*sorted(set(sys.modules) - before))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.stderr == ""
    imported = set(process.stdout.split()) - {"__future__", "_signal", "gc"}
    assert imported == {"netproxy", "netproxy.cli"}
