"""Messages between the processes of one daemon: a JSON object, bytes and descriptors.

Each message is one packet of a Unix socket (SOCK_SEQPACKET), with its descriptors beside it
(SCM_RIGHTS, unix(7)).  Sending never blocks: a receiver that does not read costs the message.
"""

from __future__ import annotations

import array
import errno
import json
import os
import select
import socket
import time

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.typed import IO, Mapping, NamedTuple, Sequence

MESSAGE_LIMIT = 128 << 10
"""Bytes of a message: less than the default send buffer of a socket holds."""
DESCRIPTORS_LIMIT = 200
"""Descriptors of a message; the kernel takes 253."""
ASSOCIATION = "association"
"""The kind of message that hands the control connection of an association over."""
PAUSE = 0.05
"""Seconds before a message is received again for which the kernel had no memory."""
_NO_MEMORY = (errno.ENOMEM, errno.ENOBUFS)
_PASSED_LIMIT = socket.CMSG_SPACE(DESCRIPTORS_LIMIT * array.array("i").itemsize)


class MessageError(Exception):
    """A message cannot be sent: the receiver is gone or does not read."""


class Message(NamedTuple):
    """A message."""

    fields: Mapping[str, object]
    """JSON values; "kind" tells what the message is."""
    data: bytes = b""
    """Bytes that belong to it."""
    descriptors: Sequence[int] = ()
    """Descriptors: duplicates, which the receiver closes."""
    is_whole: bool = True
    """False if descriptors were lost, because the receiver has no room for them."""

    @property
    def kind(self) -> str:
        """What the message is."""
        return str(self.fields.get("kind", ""))

    def sockets(self) -> list[socket.socket]:
        """Return sockets that own the descriptors."""
        return [socket.socket(fileno=descriptor) for descriptor in self.descriptors]


def message_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets for messages.  Raises OSError."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: Message) -> None:
    """Send a message.  Raises MessageError."""
    data = json.dumps(message.fields).encode() + b"\n" + message.data
    if len(data) > MESSAGE_LIMIT or len(message.descriptors) > DESCRIPTORS_LIMIT:
        raise MessageError("the message is too long")
    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    descriptors = array.array("i", message.descriptors)
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if descriptors else []
    try:
        # Not send_fds(), nor recv_fds() below: they ignore their flags.
        sock.sendmsg([data], passed, flags)
    except OSError as error:
        raise MessageError(error.strerror or "cannot send") from error


def receive(sock: socket.socket, seconds: float | None = None) -> Message | None:
    """Return the next message, None if there is none within `seconds` (None: no limit).

    While the kernel has no memory for it, a message waits.
    Raises EOFError once all senders are gone, OSError.
    """
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        try:
            return _receive(sock, seconds)
        except OSError as error:
            if error.errno not in _NO_MEMORY:
                raise
        time.sleep(PAUSE)
        if end is not None:
            seconds = end - time.monotonic()
            if seconds <= 0:
                return None


def _receive(sock: socket.socket, seconds: float | None) -> Message | None:
    """Return the next message as receive() does, but raise all errors."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if not poll.poll(None if seconds is None else seconds * 1000):
        return None
    try:
        data, passed, flags, _ = sock.recvmsg(
            MESSAGE_LIMIT, _PASSED_LIMIT, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        return None
    if not data:
        raise EOFError
    descriptors = array.array("i")
    for _, _, content in passed:
        descriptors.frombytes(content)
    head, _, rest = data.partition(b"\n")
    fields = json.loads(head)
    if flags & socket.MSG_CTRUNC:
        for descriptor in descriptors:
            os.close(descriptor)
        return Message(fields, rest, is_whole=False)
    return Message(fields, rest, tuple(descriptors))


def file_in_memory(data: bytes) -> IO[bytes]:
    """Return a file without a name that holds `data`, for a message.  Raises OSError."""
    file = os.fdopen(os.memfd_create("netproxyd", os.MFD_CLOEXEC), "w+b")
    file.write(data)
    file.flush()
    return file


def read_file(descriptor: int) -> bytes:
    """Return the content of a file that came with a message, and close it.  Raises OSError.

    All receivers share one position in the file, so it is read by offset.
    """
    with os.fdopen(descriptor, "rb") as file:
        data = b""
        while part := os.pread(file.fileno(), os.fstat(file.fileno()).st_size, len(data)):
            data += part
        return data


def association_fields(
    listener: str, address: Address, flow: Flow, reached: Address
) -> dict[str, object]:
    """Return the fields of a message that hands an association over."""
    stamp = flow.stamp
    return {
        "kind": ASSOCIATION,
        "listener": listener,
        "address": str(address),
        "client": flow.client,
        "target": flow.target,
        "user": flow.user,
        "stamp": {"hex": stamp.hex()} if isinstance(stamp, bytes) else stamp,
        "reached": reached,
    }


def parse_association(message: Message) -> tuple[str, str, Flow, Address]:
    """Return listener, address text, flow and reached address of such a message.

    Raises KeyError, TypeError, ValueError.
    """
    fields = message.fields
    listener, stamp = str(fields["listener"]), fields["stamp"]
    if isinstance(stamp, dict):
        stamp = bytes.fromhex(stamp["hex"])
    client, target = parse_address(fields["client"]), parse_address(fields["target"])
    flow = Flow("tcp", client, target, listener, str(fields["user"]), stamp=stamp)
    return listener, str(fields["address"]), flow, parse_address(fields["reached"])


def close_all(sockets: Sequence[socket.socket]) -> None:
    """Close what came with a message that is not served."""
    for sock in sockets:
        sock.close()


def parse_address(value: object) -> Address:
    """Return the address in a message.  Raises TypeError, ValueError."""
    if not isinstance(value, list):
        raise TypeError("not an address")
    host, port = value
    return Address(str(host), int(port))
