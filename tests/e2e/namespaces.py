"""Hosts on one machine: network namespaces, and cables between them."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from contextlib import ExitStack, contextmanager
from typing import Any, Iterator

import pytest

from tests.e2e.support import program, wait_for

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A host with nothing but its loopback."""

    def __init__(self, name: str) -> None:
        self.name = f"netproxy-{os.getpid()}-{name}"
        done = subprocess.run(
            [program("ip"), "netns", "add", self.name], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"ip netns add: {done.stderr.strip()}")
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> str:
        return self._run(program("ip"), "-n", self.name, *arguments)

    def nft(self, rules: str) -> None:
        path = program("nft")
        done = subprocess.run(
            [program("ip"), "netns", "exec", self.name, path, "-f", "-"],
            input=rules,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"nft: {done.stderr.splitlines()[0]}")

    def enter(self) -> None:
        """The calling thread moves here; for preexec_fn, too."""
        descriptor = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(descriptor, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(descriptor)

    def socket(self, *arguments: Any) -> socket.socket:
        """A socket of this host, which any thread may use: made by a thread that goes there and never comes back."""
        made: list[Any] = []

        def make() -> None:
            try:
                self.enter()
                made.append(socket.socket(*arguments))
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]

    def remove(self) -> None:
        self._run(program("ip"), "netns", "del", self.name)

    @staticmethod
    def _run(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def connect(one: Namespace, addresses: list[str], other: Namespace, others: list[str]) -> None:
    """A cable; the addresses are ADDRESS/LENGTH, in the order in which the kernel prefers them."""
    names = f"to-{other.name.rpartition('-')[2]}", f"to-{one.name.rpartition('-')[2]}"
    one.ip("link", "add", names[0], "type", "veth", "peer", names[1], "netns", other.name)
    for host, name, own in ((one, names[0], addresses), (other, names[1], others)):
        for address in own:
            host.ip("address", "add", address, "dev", name, *(("nodad",) if ":" in address else ()))
        host.ip("link", "set", name, "up")
    wait_for(
        lambda: all(
            "LOWER_UP" in host.ip("link", "show", name)
            for host, name in ((one, names[0]), (other, names[1]))
        ),
        5.0,
        "the cable is up",
    )


@contextmanager
def hosts(*names: str) -> Iterator[list[Namespace]]:
    """Hosts that are gone afterwards, whatever happens.  Skips the test where they cannot be had."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    with ExitStack() as stack:
        made = []
        for name in names:
            made.append(Namespace(name))
            stack.callback(made[-1].remove)
        yield made
