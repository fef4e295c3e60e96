"""Runs a WebRTC call, data channel and audio, by each way that datagrams may go.

    python3 tests/bench/webrtc.py [--messages 500] [--frames 100]

The caller has no address of its own: all its datagrams go through SOCKS5 UDP of a netproxyd behind
a NAT, which announces its public address; then through a chain of two more, and through a tunnel
whose datagrams go by UDP. The other side of the call is a peer without a proxy. Needs root, pytest,
openssl, iproute2, nftables, and the Python package aiortc (`pip install aiortc`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from queue import Queue
from typing import Any, Callable, NamedTuple

from rig import print_row

from tests.e2e import test_public_address as at
from tests.e2e.namespaces import connect, hosts
from tests.e2e.peers import Association, encode
from tests.e2e.support import Netproxyd
from tests.e2e.ways import WAYS, open_way
from tests.support.stun_server import StunServer

# Here is a dns.py, and aioice imports another module of this name.
sys.path.remove(str(Path(__file__).resolve().parent))

SERVER = at.PUBLIC, at.PORT
HEADER = 10
"""Bytes before a payload from an IPv4 address."""
CALL_SECONDS = 60.0
WIDTHS = (14, 10, 10, 10, 10, 12, 12)
RECORD = re.compile(r"network=udp .* datagrams_sent=(\d+) datagrams_received=(\d+)")


class Call(NamedTuple):
    """What is to be sent."""

    messages: int
    frames: int


# -- the caller's datagrams


class SocksTransport(asyncio.DatagramProtocol, asyncio.DatagramTransport):
    """Carries the datagrams of one ICE socket through an association."""

    def __init__(self, protocol: Any, association: Association) -> None:
        super().__init__()
        self._protocol, self._association = protocol, association
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._protocol.connection_made(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._association.control.close()
        self._protocol.connection_lost(error)

    def datagram_received(self, data: bytes, peer: Any) -> None:
        # What others send to the socket itself is not for a client behind a proxy.
        if peer[:2] == self._association.bound and data[:4] == b"\0\0\0\1":
            (port,) = struct.unpack_from("!H", data, 8)
            self._protocol.datagram_received(data[HEADER:], (socket.inet_ntoa(data[4:8]), port))

    def sendto(self, data: Any, addr: Any = None) -> None:
        self._transport.sendto(b"\0\0\0" + encode(addr[:2]) + bytes(data), self._association.bound)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def close(self) -> None:
        self._transport.close()

    def is_closing(self) -> bool:
        return bool(self._transport.is_closing())


class SocksLoop(asyncio.SelectorEventLoop):
    """An event loop whose datagram sockets are behind the proxy."""

    async def create_datagram_endpoint(  # type: ignore[override]  # Any: as aioice calls it
        self, protocol_factory: Callable[[], Any], *arguments: Any, **more: Any
    ) -> Any:
        association = Association(SERVER)
        association.socket.setblocking(False)
        transport = SocksTransport(protocol_factory(), association)
        await super().create_datagram_endpoint(lambda: transport, sock=association.socket)
        return transport, transport._protocol


# -- the two sides


class Side:
    """One side of the call, on a thread of its own."""

    def __init__(self, net: at.Net, call: Call, loop: asyncio.AbstractEventLoop) -> None:
        self.call = call
        self.said: Queue[Any] = Queue()
        """Session descriptions for the other side."""
        self.heard: Queue[Any] = Queue()
        self.frames = 0
        self.error = ""
        self._net, self._loop = net, loop
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self._net.outside.enter()
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(asyncio.wait_for(self.talk(), CALL_SECONDS))
        except Exception as error:
            self.error = f"{type(error).__name__} {error}"
        finally:
            self._loop.close()

    async def talk(self) -> None:
        """Make the call."""
        raise NotImplementedError

    async def hear(self) -> Any:
        """Return what the other side has said."""
        return await asyncio.get_running_loop().run_in_executor(None, self.heard.get)

    async def count_frames(self, track: Any) -> None:
        """Count frames of audio until there are enough."""
        while self.frames < self.call.frames:
            await track.recv()
            self.frames += 1


def connection() -> Any:
    """Return one side's connection, which asks no STUN server."""
    from aiortc import RTCConfiguration, RTCPeerConnection

    return RTCPeerConnection(RTCConfiguration(iceServers=[]))


class Caller(Side):
    """Sends numbered messages, and audio."""

    def __init__(self, net: at.Net, call: Call) -> None:
        super().__init__(net, call, SocksLoop())
        self.answered: list[bytes] = []
        self.trips: list[float] = []

    async def talk(self) -> None:
        from aiortc.mediastreams import AudioStreamTrack

        pc, done, opened = connection(), asyncio.Event(), asyncio.Event()
        channel, tracks = pc.createDataChannel("numbers"), []
        answers: asyncio.Queue[bytes] = asyncio.Queue()
        channel.on("open", opened.set)
        channel.on("message", answers.put_nowait)
        pc.on("track", lambda track: tracks.append(track) or done.set())
        pc.addTrack(AudioStreamTrack())
        await pc.setLocalDescription(await pc.createOffer())
        self.said.put(pc.localDescription)
        await pc.setRemoteDescription(await self.hear())
        await opened.wait()
        await done.wait()
        audio = asyncio.ensure_future(self.count_frames(tracks[0]))
        for number in range(self.call.messages):
            sent = time.monotonic()
            channel.send(number.to_bytes(4, "big") * 100)
            self.answered.append(await answers.get())
            self.trips.append(time.monotonic() - sent)
        await audio
        self.said.put(None)
        await self.hear()
        await pc.close()


class Callee(Side):
    """Sends messages back, and audio."""

    def __init__(self, net: at.Net, call: Call) -> None:
        super().__init__(net, call, asyncio.SelectorEventLoop())

    async def talk(self) -> None:
        from aiortc.mediastreams import AudioStreamTrack

        pc, counting = connection(), []
        pc.addTrack(AudioStreamTrack())

        def echo(channel: Any) -> None:
            channel.on("message", channel.send)

        pc.on("datachannel", echo)
        pc.on(
            "track", lambda track: counting.append(asyncio.ensure_future(self.count_frames(track)))
        )
        await pc.setRemoteDescription(await self.hear())
        await pc.setLocalDescription(await pc.createAnswer())
        self.said.put(pc.localDescription)
        await self.hear()
        await asyncio.gather(*counting)
        self.said.put(None)
        await pc.close()


def run_call(net: at.Net, call: Call) -> tuple[Caller, Callee]:
    """Make a call; return both sides after it."""
    caller, callee = Caller(net, call), Callee(net, call)
    caller.heard, callee.heard = callee.said, caller.said
    for side in (caller, callee):
        side.thread.start()
    for side in (caller, callee):
        side.thread.join(2 * CALL_SECONDS)
    return caller, callee


# -- the ways


def network(stack: ExitStack) -> at.Net:
    """Make the network of the tests of public addresses, and its STUN servers."""
    net = at.Net(*stack.enter_context(hosts("outside", "router", "box")))
    connect(net.outside, [f"{at.CLIENT}/24", f"{at.SECOND}/24"], net.router, [f"{at.PUBLIC}/24"])
    connect(net.router, [f"{at.INSIDE}/24"], net.box, [f"{at.BOX}/24"])
    net.box.ip("route", "add", "default", "via", at.INSIDE)
    net.router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    for host in (at.CLIENT, at.SECOND):
        sock = net.outside.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((host, 3478))
        stack.enter_context(StunServer(sock))
    return net


def starter(directory: Path, started: list[Netproxyd]) -> Any:
    """Return what starts daemons, as the tests have it."""

    def start(*arguments: str, config: str, **more: Any) -> Netproxyd:
        path = directory / f"netproxyd{len(started)}.yaml"
        path.write_text(config)
        log = directory / f"netproxyd{len(started)}.log"
        daemon = Netproxyd(log, "-c", str(path), *arguments, **more)
        started.append(daemon)
        return daemon

    return start


def measure(name: str, call: Call) -> bool:
    """Make a call by one way and print its row; return whether all has arrived."""
    started: list[Netproxyd] = []
    with ExitStack() as stack:
        net = network(stack)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            daemon = open_way(name, starter(directory, started), net)
            caller, callee = run_call(net, call)
        finally:
            for process in reversed(started):
                process.process.terminate()
                process.process.wait()
        carried = [tuple(map(int, found)) for found in RECORD.findall(daemon.log)]
        expected = [number.to_bytes(4, "big") * 100 for number in range(call.messages)]
        trip = f"{statistics.median(caller.trips) * 1e3:.1f}" if caller.trips else "-"
        right = sum(a == b for a, b in zip(caller.answered, expected, strict=False))
        moved = [sum(column) for column in zip(*carried, strict=True)]
        print_row(WIDTHS, name, right, callee.frames, caller.frames, trip, *moved)
        for side in (caller, callee):
            if side.error:
                print(f"  {type(side).__name__}: {side.error}")
        return right == call.messages and min(caller.frames, callee.frames) >= call.frames


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs a WebRTC call by each way of datagrams.")
    parser.add_argument("--messages", type=int, default=500)
    parser.add_argument("--frames", type=int, default=100, help="of audio, 20 ms each")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("network namespaces need root")
    call = Call(options.messages, options.frames)
    print(
        f"{call.messages} messages of 400 bytes there and back, {call.frames} frames of audio\n"
        "each way; sent and received: the caller's datagrams at the proxy\n"
    )
    print_row(WIDTHS, "way", "messages", "frames to", "back", "p50 ms", "sent", "received")
    return 0 if all([measure(name, call) for name in WAYS]) else 1


if __name__ == "__main__":
    sys.exit(main())
