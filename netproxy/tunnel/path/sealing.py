"""Seals and opens the packets of a path: ChaCha20-Poly1305, a counter, a replay window.

The cipher is that of the package python3-cryptography, which is loaded only if a configuration has
paths.  A Sealer and an Opener belong to one connection ID and one key; their owner guards them.
"""

from __future__ import annotations

from netproxy.interfaces.datagrams import Run
from netproxy.protocol.tunnels.path import HEADER, NONCE_START, OVERHEAD, TYPE
from netproxy.tunnel.path.replay import ReplayWindow
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple

if TYPE_CHECKING:
    from netproxy.typed import Sequence

    from netproxy.interfaces.datagrams import Arena

PACKAGE = "python3-cryptography"
MODULE = "cryptography"
"""Debian's package and the module in it."""

TRAIN_PACKETS, TRAIN_BYTES = 64, 65000
"""What the kernel cuts out of one send (net.datagram)."""

REPLAYED, FORGED = "replayed", "forged"
"""Reasons to drop a packet."""


class Cipher(NamedTuple):
    """An AEAD with one key: calls with a nonce, the text and the associated data."""

    encrypt: Callable[[bytes, bytes, bytes], bytes]
    decrypt: Callable[[bytes, bytes, bytes], bytes]
    failure: type[Exception]
    """Raised by decrypt() for what nobody with the key has sealed."""

    def __repr__(self) -> str:
        return "Cipher()"


MakeCipher = Callable[[bytes], Cipher]
"""Returns the cipher of a key."""


def load_cipher() -> MakeCipher | None:
    """Load the cipher; return None if the package is missing, or does not have it."""
    try:
        # late: an optional package, which costs several MiB
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        ChaCha20Poly1305(bytes(32))
    except Exception:  # also pyo3's panics, and algorithms that a policy of OpenSSL forbids
        return None

    def make(key: bytes) -> Cipher:
        aead = ChaCha20Poly1305(key)
        return Cipher(aead.encrypt, aead.decrypt, InvalidTag)

    return make


def trains(run: Run, packet: int) -> Sequence[Run]:
    """Return the parts of a run that each leave with one send, in packets of `packet` bytes."""
    count, most = len(run.offsets), max(1, min(TRAIN_PACKETS, TRAIN_BYTES // packet))
    if count <= most:
        return (run,)
    return [
        Run(
            run.offsets[first : first + most],
            run.length,
            run.last if first + most >= count else run.length,
        )
        for first in range(0, count, most)
    ]


class Sealer:
    """Seals packets to one connection ID."""

    __slots__ = ("counter", "_encrypt", "_start")

    def __init__(self, cipher: Cipher, receiver: bytes) -> None:
        """`receiver`: the connection ID of the other side."""
        self.counter = 0
        """Packets that were sealed; the owner adds what it takes before it seals."""
        self._encrypt = cipher.encrypt
        self._start = bytes((TYPE,)) + receiver

    def seal(self, plain: bytes, counter: int) -> bytes:
        """Return one packet."""
        number = counter.to_bytes(8, "big")
        header = self._start + number
        return header + self._encrypt(NONCE_START + number, plain, header)

    def seal_run(
        self, arena: Arena, run: Run, prefix: bytes, counter: int, into: Arena
    ) -> tuple[Run, int]:
        """Seal each datagram of a run behind `prefix`; lay the packets in a row into an arena.

        Counts from `counter` on.  Returns the packets and their bytes.
        """
        view, encrypt, start = arena.view, self._encrypt, self._start
        offsets, length = run.offsets, run.length
        parts: list[bytes] = []
        final = len(offsets) - 1
        for index, at in enumerate(offsets):
            number = (counter + index).to_bytes(8, "big")
            header = start + number
            parts.append(header)
            size = length if index < final else run.last
            plain = prefix + view[at : at + size]
            parts.append(encrypt(NONCE_START + number, plain, header))
        data = b"".join(parts)
        total, stride = len(data), OVERHEAD + len(prefix) + length
        into.view[:total] = data
        places: Sequence[int] = range(0, final * stride + 1, stride)
        return Run(places, stride, total - final * stride), total


class Opener:
    """Opens packets to one connection ID."""

    __slots__ = ("received", "window", "_decrypt", "_failure")

    def __init__(self, cipher: Cipher) -> None:
        self.received = 0
        """Packets that were authentic and new."""
        self.window = ReplayWindow()
        self._decrypt = cipher.decrypt
        self._failure = cipher.failure

    def open(self, packet: memoryview, counter: int) -> bytes | str:
        """Return what is sealed in a packet, or the reason to drop it.

        `counter`: as its header says.
        """
        if not self.window.is_new(counter):
            return REPLAYED
        header = bytes(packet[: HEADER.size])
        nonce, text = NONCE_START + header[-8:], bytes(packet[HEADER.size :])
        try:
            plain = self._decrypt(nonce, text, header)
        except self._failure:
            return FORGED
        self.window.note(counter)
        self.received += 1
        return plain
