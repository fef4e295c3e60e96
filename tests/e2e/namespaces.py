"""Builds a network on one machine: network namespaces as hosts, veth pairs as cables."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from contextlib import ExitStack, contextmanager
from typing import Any, Iterator

import pytest

from tests.e2e.support import SECONDS, program, wait_for

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
# The names of the namespaces that there are.
_made: set[str] = set()


class Namespace:
    """A network namespace with a loopback interface. Skips the test if it cannot be created."""

    def __init__(self, name: str) -> None:
        self.name = f"netproxy-{os.getpid()}-{name}"
        # Two networks of one module would be told apart by the names of their hosts.
        assert self.name not in _made, f"there is a host '{name}' already"
        # One of a run that was killed, whose number this process has got.
        command = [program("ip"), "netns", "delete", self.name]
        subprocess.run(command, capture_output=True)
        process = subprocess.run(
            [program("ip"), "netns", "add", self.name], capture_output=True, text=True
        )
        if process.returncode:
            pytest.skip(f"ip netns add: {process.stderr.strip()}")
        _made.add(self.name)
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> str:
        """Run ip(8) in the namespace and return its output."""
        return self._run(program("ip"), "-n", self.name, *arguments)

    def run(self, *command: str) -> str:
        """Run a program in the namespace and return its output."""
        path = program(command[0])
        return self._run(program("ip"), "netns", "exec", self.name, path, *command[1:])

    def nft(self, rules: str) -> None:
        """Load nftables rules. Skip the test if the kernel does not take them."""
        path = program("nft")
        process = subprocess.run(
            [program("ip"), "netns", "exec", self.name, path, "-f", "-"],
            input=rules,
            capture_output=True,
            text=True,
        )
        if process.returncode:
            pytest.skip(f"nft: {process.stderr.splitlines()[0]}")

    def nft_list(self, table: str) -> str:
        """Return an nftables table, with its counters, as text."""
        command = ("netns", "exec", self.name, program("nft"), "list", "table", *table.split())
        return self._run(program("ip"), *command)

    def enter(self) -> None:
        """Move the calling thread to the namespace. Can be used as preexec_fn."""
        descriptor = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(descriptor, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(descriptor)

    def socket(self, *arguments: Any) -> socket.socket:
        """Return a socket of this namespace, which any thread may use.

        A short-lived thread enters the namespace and creates it.
        """
        result: list[Any] = []

        def make() -> None:
            try:
                self.enter()
                result.append(socket.socket(*arguments))
            except OSError as error:
                result.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if isinstance(result[0], OSError):
            raise result[0]
        return result[0]

    def remove(self) -> None:
        """Delete the namespace."""
        self._run(program("ip"), "netns", "del", self.name)
        _made.discard(self.name)

    @staticmethod
    def _run(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def connect(
    first: Namespace, first_addresses: list[str], second: Namespace, second_addresses: list[str]
) -> None:
    """Connect two namespaces and wait until the link is up.

    The addresses are ADDRESS/LENGTH, in the order in which the kernel prefers them as sources.
    """
    to_second, to_first = (
        f"to-{second.name.rpartition('-')[2]}",
        f"to-{first.name.rpartition('-')[2]}",
    )
    first.ip("link", "add", to_second, "type", "veth", "peer", to_first, "netns", second.name)
    ends = ((first, to_second, first_addresses), (second, to_first, second_addresses))
    for host, device, addresses in ends:
        for address in addresses:
            options = ("nodad",) if ":" in address else ()
            host.ip("address", "add", address, "dev", device, *options)
        host.ip("link", "set", device, "up")
    wait_for(
        lambda: all("LOWER_UP" in host.ip("link", "show", device) for host, device, _ in ends),
        SECONDS,
        "the link is up",
    )


@contextmanager
def hosts(*names: str) -> Iterator[list[Namespace]]:
    """Create namespaces and delete them at the end. Skip the test without the permission."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    with ExitStack() as stack:
        created = []
        for name in names:
            created.append(Namespace(name))
            stack.callback(created[-1].remove)
        yield created
