"""What dns listeners have told their clients, for as long as the daemon runs.

With several workers it is made before they are forked, because they share the memory; a reload
keeps it.  Memory that is not used costs nothing.
"""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, Iterable

if TYPE_CHECKING:
    from netproxy.interfaces.routing import FakeAddresses
    from netproxy.resolver.client_names.fake_table import FakeTable
    from netproxy.resolver.client_names.name_memory import NameMemory


class NameTables:
    """The tables.  Thread: main makes them; any thread uses them."""

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self.fakes_in_force: FakeAddresses | None = None
        """Those of the running configuration.  Main sets it; any thread reads it."""
        self._memory: NameMemory | None = None
        self._fakes: FakeTable | None = None
        if workers > 1:
            self._memory, self._fakes = self.memory, self.fakes

    def become_worker(self, index: int) -> None:
        """Be the worker with this index; call it right after the fork."""
        self.fakes.become_worker(index)

    @property
    def memory(self) -> NameMemory:
        """The names that clients were told.  Thread: main, while a configuration is built."""
        if self._memory is None:
            # late: few configurations remember
            from netproxy.resolver.client_names.name_memory import NameMemory

            self._memory = NameMemory()
        return self._memory

    @property
    def fakes(self) -> FakeTable:
        """The names that have fake addresses.  Thread: main, while a configuration is built."""
        if self._fakes is None:
            # late: few configurations have fake addresses
            from netproxy.resolver.client_names.fake_memory import FakeMemory
            from netproxy.resolver.client_names.fake_table import FakeTable

            self._fakes = FakeTable(FakeMemory(self._workers), 0)
        return self._fakes

    def renew_fake(self, client: str, hosts: Iterable[str]) -> None:
        """Note that a client (its host) goes on to use fake addresses.  Never blocks."""
        fakes = self.fakes_in_force
        if fakes is not None:
            for host in hosts:
                fakes.name(host, client)
