"""The configuration is read in a process of its own."""

from __future__ import annotations

import errno
import gc
import marshal
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

from netproxy.admin.control.places import DefaultControl
from netproxy.config.read import read_config
from netproxy.config.schema import Config
from netproxy.config.tree.node import Source
from netproxy.config.tree.parse import parse_text
from netproxy.config.tree.problems import Problems
from netproxy.daemon.process import reading
from netproxy.daemon.process.options import Options
from netproxy.daemon.process.reading import ReadingFailed, configure, configure_apart, pack, unpack
from netproxy.errors import ConfigError, NetProxyError

pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((ROOT / "conf" / "examples").glob("*.yaml"))
DEFAULT = "sps://127.0.0.1:0"


def options(path: object, listen: tuple[str, ...] = ()) -> Options:
    return Options(
        str(path), listen, DEFAULT, DefaultControl(), None, None, False, None, False, False, None
    )


def kinds(value: Any) -> Any:
    """Return the types of a value and of everything in it."""
    if isinstance(value, dict):
        return [(key, kinds(item)) for key, item in value.items()]
    return (type(value), [kinds(item) for item in value] if isinstance(value, tuple) else [])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_packed_configuration_is_the_same(path: Path) -> None:
    text = path.read_text().replace("!file ", "")  # secrets that are not there
    config = read_config(parse_text(text.encode(), Source(str(path))), Problems())
    again = unpack(marshal.loads(marshal.dumps(pack(config))))
    assert again == config and kinds(again) == kinds(config)
    places = str(config.default), [str(listener.place) for listener in config.listeners]
    assert places == (str(again.default), [str(listener.place) for listener in again.listeners])


class TestConfigureApart:
    def test_configuration_is_that_of_this_process(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"
        path.write_text("default: socks5://127.0.0.1:1080\nlog: {level: debug}\n")
        wanted = options(path, ("sps://127.0.0.1:0?clients=10.0.0.0/8",))
        config = configure_apart(wanted)
        assert config == configure(wanted) and f"{config.listeners[0].place}" == "-l[0]"

    def test_file_may_be_a_descriptor_at_the_start(self) -> None:
        reader, writer = os.pipe()
        with open(reader), open(writer, "w") as file:
            file.write("log: {level: debug}\n")
            file.close()
            config = configure_apart(options(f"/dev/fd/{reader}"), is_start=True)
        assert config.log.level == "debug"

    def test_errors_are_those_of_this_process(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"
        path.write_text("defalt: direct\nworkers: many\n")
        texts = []
        for read in (configure, configure_apart):
            with pytest.raises(ConfigError) as caught:
                read(options(path))
            texts.append(str(caught.value))
        assert texts[0] == texts[1] and len(texts[0].split("\n")) == 2

    def test_process_holds_no_descriptor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hazard 181.  What the daemon closes meanwhile is closed for peers and programs."""

        def descriptors(options: Options) -> Config:
            raise ConfigError(str(len(os.listdir("/proc/self/fd"))))

        monkeypatch.setattr(reading, "configure", descriptors)
        one, other = socket.socketpair()
        ends = os.pipe()
        with one, other, pytest.raises(ConfigError) as caught:
            configure_apart(options(""))
        for end in ends:
            os.close(end)
        # The three standard ones, the pipe of the answer, and that of the folder itself.
        assert str(caught.value) == "5"

    def test_process_does_not_end_what_its_parent_has_left(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 181.  A finalizer would close a number that belongs to another file there."""
        monkeypatch.setattr(reading, "configure", collecting)
        gc.collect()
        gc.disable()
        try:
            Litter()
            with pytest.raises(ConfigError) as caught:
                configure_apart(options(""))
        finally:
            gc.enable()
        assert str(caught.value) == "[]"
        gc.collect()
        Litter.ended.clear()

    @pytest.mark.parametrize("missing", ["pipe2", "fork"])
    def test_without_another_process_it_is_read_here(
        self, missing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: object) -> int:
            raise BlockingIOError("the limit of processes")

        monkeypatch.setattr(os, missing, refuse)
        assert configure_apart(options("")) == configure(options(""))

    def test_end_of_the_process_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here = os.getpid()
        monkeypatch.setattr(reading, "configure", ending(here, signal.SIGKILL))
        with pytest.raises(ReadingFailed, match="^a.yaml: cannot be read: signal 9 has ended"):
            configure_apart(options("a.yaml"))

    def test_process_that_does_not_answer_is_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reading, "ANSWER_SECONDS", 0.01)
        monkeypatch.setattr(reading, "LOOK_SECONDS", 0.001)
        monkeypatch.setattr(reading, "configure", ending(os.getpid(), signal.SIGSTOP))
        with pytest.raises(ReadingFailed, match="is not read within 0.01 seconds"):
            configure_apart(options("a.yaml"))
        assert not has_child()

    def test_process_that_answers_bit_by_bit_is_ended(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 181.  The time is that of the whole answer."""
        here, seconds = os.getpid(), iter(range(1000))
        monkeypatch.setattr(reading.time, "monotonic", lambda: next(seconds))
        monkeypatch.setattr(reading.os, "read", lambda *arguments: b"x")
        monkeypatch.setattr(reading.select, "poll", AlwaysReady)
        monkeypatch.setattr(reading, "configure", ending(here, signal.SIGSTOP))
        with pytest.raises(ReadingFailed, match="is not read within 60 seconds"):
            configure_apart(options("a.yaml"))
        assert next(seconds) < 70 and not has_child()

    def test_watch_ends_a_process_that_does_not_answer(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 181."""

        def watch() -> None:
            raise NetProxyError("the daemon stops")

        monkeypatch.setattr(reading, "LOOK_SECONDS", 0.001)
        monkeypatch.setattr(reading, "configure", ending(os.getpid(), signal.SIGSTOP))
        with pytest.raises(NetProxyError, match="the daemon stops"):
            configure_apart(options("a.yaml"), watch)
        assert not has_child()

    def test_pipe_that_cannot_be_read_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hazard 181.  The daemon goes on."""
        here = os.getpid()
        monkeypatch.setattr(reading.select, "poll", WithoutMemory)
        monkeypatch.setattr(reading, "configure", ending(here, signal.SIGSTOP))
        with pytest.raises(ReadingFailed, match="^a.yaml: cannot be read: Cannot allocate memory$"):
            configure_apart(options("a.yaml"))
        assert not has_child()

    def test_fault_is_raised_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(options: Options) -> Config:
            raise ZeroDivisionError(str(os.getpid()))

        monkeypatch.setattr(reading, "configure", fail)
        with pytest.raises(ZeroDivisionError, match=str(os.getpid())):
            configure_apart(options("a.yaml"))


class Litter:
    """What only the collector ends."""

    ended: list[int] = []

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        self.ended.append(1)


def collecting(options: Options) -> Config:
    gc.collect()
    raise ConfigError(str(Litter.ended))


class WithoutMemory:
    def register(self, descriptor: int, events: int) -> None:
        pass

    def poll(self, milliseconds: float) -> bool:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


class AlwaysReady:
    def register(self, descriptor: int, events: int) -> None:
        pass

    def poll(self, milliseconds: float) -> bool:
        return True


def has_child() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def ending(here: int, number: int) -> Callable[[Options], Config]:
    """Return what sends a signal to its own process, unless that is `here`."""

    def end(options: Options) -> Config:
        assert os.getpid() != here
        os.kill(os.getpid(), number)
        raise AssertionError

    return end


NOT_LOADED = (
    *("yaml", "netproxy.config.read", "netproxy.config.sections", "netproxy.config.tree.node"),
    *("argparse", "contextlib", "dataclasses", "inspect", "json", "logging", "pickle", "queue"),
    *("random", "shutil", "ssl", "subprocess", "tempfile", "typing", "weakref"),
    *("netproxy.access.checks.lanes", "netproxy.access.users", "netproxy.daemon.questions"),
    *("netproxy.access.checks.memory_share", "netproxy.net.tls"),
    *("netproxy.protocol.proxy_protocol", "netproxy.resolver.client_names.name_memory"),
)
"""What a daemon with one sps listener, without users, does not need.  Each costs 20 KiB or more."""


def test_idle_daemon_loads_only_what_it_needs() -> None:
    """PyYAML and the readers are in the other process alone: 2 MiB of an idle daemon."""
    path = ROOT / "conf" / "examples" / "minimal.yaml"
    code = f"""
import sys
before = set(sys.modules)
from netproxy.admin.control.places import DefaultControl
from netproxy.daemon.build import build
from netproxy.daemon.main import Runtime, Log, configure_apart
from netproxy.daemon.process.options import Options

options = Options({str(path)!r}, (), "", DefaultControl(), None, None, 0, None, 0, 0, None)
config = configure_apart(options)
build(config, Runtime(Log("error")), None)
print(len(config.listeners), *set({NOT_LOADED!r}) & (set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
