"""What a fuzz target is, and the properties that all of them share.

A target takes any bytes.  It returns if the code under test accepts or refuses them as its
contract says; every exception is a finding.  The streams of the targets are real Streams over
bytes in memory, whole, byte by byte and cut in two.  Work is counted in bytes taken and needs
yielded, never in seconds.
"""

from __future__ import annotations

import importlib
import zlib
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, TypeAlias

from netproxy.errors import EndOfStream, ProtocolError
from netproxy.interfaces.connections import Steps
from netproxy.interfaces.datagrams import Framing
from netproxy.net.stream import Stream

CORPUS = Path(__file__).parent / "corpus"
LONGEST = 4096
"""Bytes of an input, unless a target says otherwise."""
TRAILING = b"\x05\x04\x00\r\n\r\nGET a"
"""Looks like the start of several protocols."""
_PATIENCE = 4
"""Needs that a codec may yield beyond one for each byte."""

Read: TypeAlias = "Callable[[Stream], Steps[Any]]"
"""A codec's function over a Stream.  Any: each codec has its own result."""


class Target(NamedTuple):
    """Code under test, and what helps an engine to reach all of it."""

    name: str
    check: Callable[[bytes], None]
    """Raises for a finding."""
    words: tuple[bytes, ...]
    """Words of the protocol, which engines put into inputs."""
    longest: int = LONGEST
    limits: Mapping[str, int] = {}
    """Smaller values of limits, by "module.NAME", so that short inputs reach them."""
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    """What must run while inputs are checked."""

    def seeds(self) -> dict[str, bytes]:
        """Return the inputs of the corpus by file name."""
        return {path.name: path.read_bytes() for path in sorted((CORPUS / self.name).iterdir())}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Put the smaller limits in force, and start what the target needs."""
        before = {place: _limit(place) for place in self.limits}
        try:
            for place, value in self.limits.items():
                _limit(place, value)
            with self.around():
                yield
        finally:
            for place, value in before.items():
                _limit(place, value)


def _limit(place: str, value: int | None = None) -> int:
    """Return a constant of a module; give it another value first, if there is one."""
    module_name, _, name = place.rpartition(".")
    module = importlib.import_module(f"netproxy.{module_name}")
    if value is not None:
        setattr(module, name, value)
    current: int = getattr(module, name)
    return current


class _Peer:
    """The SocketCalls of a peer that sends some bytes in pieces, and closes."""

    def __init__(self, data: bytes, first: int, then: int) -> None:
        """The first piece has `first` bytes, the others `then`."""
        self._data = data
        self._size = first
        self._then = then
        self.taken = 0
        """Bytes that were received."""

    def receive(self, sock: object, limit: int) -> memoryview:
        size = min(self._size, limit)
        self._size = self._then
        received = memoryview(self._data)[self.taken : self.taken + size]
        self.taken += len(received)
        return received

    def send(self, sock: object, data: bytes | bytearray | memoryview) -> int:
        raise AssertionError("a codec has sent something")

    def shutdown(self, sock: object, how: int) -> None:
        raise AssertionError("a codec has shut a stream down")

    def close(self, sock: object) -> None:
        raise AssertionError("a codec has closed a stream")


class Outcome(NamedTuple):
    """What a codec made of some bytes."""

    accepted: bool
    result: Any
    """What was read, or the type and the text of the error.  Any: as in Read."""
    rest: bytes
    """Bytes that the codec has left alone."""
    taken: int
    """Bytes that it has asked the peer for."""


def read_outcome(read: Read, data: bytes, first: int, then: int) -> Outcome:
    """Run a codec over bytes that come in pieces; only a ProtocolError is a refusal."""
    peer = _Peer(data, first, then)
    stream = Stream(None)  # type: ignore[arg-type]  # only the calls of _Peer are made
    stream.become(stream.socket, peer)
    try:
        result = _drive(read(stream), len(data) + _PATIENCE)
    except ProtocolError as error:
        return Outcome(False, (type(error), str(error)), b"", peer.taken)
    return Outcome(True, result, stream.unread() + data[peer.taken :], peer.taken)


def _drive(steps: Steps[Any], budget: int) -> Any:
    """Run steps that need nothing but bytes.  Any: as in Read."""
    try:
        need = next(steps)
        while True:
            budget -= 1
            assert budget >= 0, "asked for bytes more often than there are bytes"
            need = steps.send(need.proceed({0: 1}))
    except StopIteration as stop:
        return stop.value


def check_reader(read: Read, data: bytes, limit: int) -> Outcome:
    """Check that bytes are read alike however they come, and return the outcome.

    `limit`: bytes that the codec may take.
    """
    whole = read_outcome(read, data, len(data), len(data))
    single = read_outcome(read, data, 1, 1)
    cut = zlib.crc32(data) % (len(data) + 1)
    halves = read_outcome(read, data, cut or 1, len(data))
    assert whole[:3] == single[:3] == halves[:3], (whole, single, halves)
    assert single.taken <= limit, f"took {single.taken} of at most {limit} bytes"
    if whole.accepted:
        # Not one byte is taken that is not needed: it may belong to another protocol.
        assert single.taken == len(data) - len(single.rest)
    longer = read_outcome(read, data + TRAILING, len(data) + len(TRAILING), 1)
    if whole.accepted:
        assert (longer.accepted, longer.result) == whole[:2]
        assert longer.rest == whole.rest + TRAILING
        if cut < single.taken:
            shorter = read_outcome(read, data[:cut], len(data), 1)
            assert not shorter.accepted and issubclass(shorter.result[0], EndOfStream), shorter
    elif not issubclass(whole.result[0], EndOfStream):
        assert longer[:2] == whole[:2], (longer, whole)
    return whole


Frame = tuple[bytes, "bytes | None"]
"""A payload and its raw address."""


def check_framing(make: Callable[[], Framing], data: bytes, room: int) -> list[Frame]:
    """Check that frames are found alike however their bytes come, and return them.

    `make` returns the framing of a new stream.  `room`: bytes in which every frame fits, so that
    a buffer of this size never fills up.
    """
    whole = _find_frames(make(), data, len(data) or 1)
    for size in (1, 1 + zlib.crc32(data) % 64):
        pieces = _find_frames(make(), data, size)
        assert pieces == whole, (pieces, whole)
    if whole.rest:
        try:
            frame = make().find(bytearray(whole.rest + bytes(room)), 0, len(whole.rest) + room)
        except ProtocolError:
            pass
        else:
            assert frame is not None, "a frame that never ends fills the buffer"
    return whole.frames


class _Frames(NamedTuple):
    frames: list[Frame]
    error: str
    """The type of the error that ends the stream; "" if none does."""
    rest: bytes
    """The incomplete frame."""


def _find_frames(framing: Framing, data: bytes, size: int) -> _Frames:
    """Find the frames in bytes that come `size` at a time.

    Does as net.frames.framed.FramedStream: a frame without an address is skipped.
    """
    frames: list[Frame] = []
    memory = bytearray()
    start = skip = filled = 0
    while filled < len(data):
        memory += data[filled : filled + size]
        filled = len(memory)
        while True:
            step = min(skip, filled - start)
            start, skip = start + step, skip - step
            if start >= filled:
                break
            try:
                frame = framing.find(memory, start, filled)
            except ProtocolError as error:
                return _Frames(frames, type(error).__name__, b"")
            if frame is None:
                break
            payload, end, address = frame
            assert start < payload <= end, frame
            if address is None:
                skip, start = max(0, end - filled), min(end, filled)
                continue
            assert end <= filled and end - payload <= framing.payload_limit, frame
            frames.append((bytes(memory[payload:end]), address))
            start = end
    return _Frames(frames, "", bytes(memory[start:]))


def accepted(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a parser returns, None for its refusal.  Any: as in Read.

    ProtocolError is the contract of codecs, ValueError that of parsers of what users write.
    """
    try:
        return call(*arguments)
    except (ProtocolError, ValueError) as error:
        if isinstance(error, UnicodeError):
            # Not a refusal in words: the parser has not thought of these letters.
            raise
        return None
