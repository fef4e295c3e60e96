"""Where clients are not led, over every protocol: special addresses, names that lead there, and the daemon's own ports."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import ExitStack
from typing import Any, Iterator

import pytest

from netproxy.errors import Reason
from netproxy.interfaces.addresses import Address
from netproxy.resolver import resolver
from tests.support.doors import DATAGRAMS, DOORS, STREAMS, by_connect, by_socks5, by_socks5_udp
from tests.support.handlers import LOCALHOST, descriptors, eventually
from tests.support.relays import Running, UdpClient, UdpPort, running
from tests.support.sockets import HAS_IPV6, SECONDS

pytest.importorskip("yaml")

OTHER = (
    "127.0.0.77"  # an address of this machine that the file allows: where tests have their targets
)
GUARDED = (
    "listeners: [{name: main, listen: '127.0.0.1:0'}]\n"
    f"destinations: {{deny: [loopback, private, link-local, metadata, multicast], allow: [{OTHER}]}}"
)
DENIED = {
    "loopback": "127.0.0.1",
    "loopback by another number": "127.9.9.9",
    "IPv6 loopback": "::1",
    "this host": "0.0.0.0",
    "this IPv6 host": "::",
    "link-local": "169.254.7.7",
    "IPv6 link-local": "fe80::7",
    "unique local": "fc00::7",
    "multicast": "224.0.0.251",
    "IPv6 multicast": "ff02::fb",
    "broadcast": "255.255.255.255",
    "private": "10.7.7.7",
    "metadata": "169.254.169.254",
    "IPv6 metadata": "fd00:ec2::254",
    "Azure's metadata": "168.63.129.16",
    "v4-mapped": "::ffff:127.0.0.1",
    "v4-mapped this host": "::ffff:0.0.0.0",
    "v4-compatible": "::127.0.0.1",
    "NAT64": "64:ff9b::7f00:1",
    "NAT64 metadata": "64:ff9b::a9fe:a9fe",
    "6to4": "2002:7f00:1::1",
    "6to4 private": "2002:a07:707::1",
    "Teredo": "2001:0:808:808::80ff:fffe",
}
LOOSE = ["127.1", "0x7f.1", "2130706433", "0177.0.0.1"]


class NameServer:
    """In the place of getaddrinfo(3) for the daemon: `answers` of a name, one after the other, the last for ever."""

    def __init__(self) -> None:
        self._real = socket.getaddrinfo
        self.answers: dict[str, list[list[str]]] = {}
        self.asked: list[str] = []

    def getaddrinfo(self, host: bytes | str, *arguments: Any, **more: Any) -> list[Any]:
        if isinstance(host, str):
            return self._real(host, *arguments, **more)  # a test's own client
        name = host.decode()
        self.asked.append(name)
        answers = self.answers.get(name)
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        hosts = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0))
            for one in hosts
        ]


@pytest.fixture(scope="module")
def names() -> Iterator[NameServer]:
    """Nothing that it says is remembered."""
    with pytest.MonkeyPatch.context() as patch:
        server = NameServer()
        patch.setattr(socket, "getaddrinfo", server.getaddrinfo)
        patch.setattr(resolver, "SYSTEM_TTL", 0.0)
        yield server


@pytest.fixture(scope="module")
def guarded(names: NameServer) -> Iterator[Running]:
    with running(GUARDED) as daemon:
        yield daemon


class Target:
    """Listens, TCP and UDP, and counts who came."""

    def __init__(self, host: str = OTHER, port: int = 0) -> None:
        self.tcp = socket.create_server((host, port), backlog=32)
        self.udp = UdpPort(host, self.tcp.getsockname()[1])
        self.port = self.udp.address.port
        self.came = 0
        self._thread = threading.Thread(target=self._accept, name="test-target", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.tcp.accept()
            except OSError:
                return
            self.came += 1
            sock.close()

    def arrived(self) -> bool:
        """Whether somebody has come, or a datagram, which is taken."""
        return bool(self.came) or not self.udp.silent()

    def untouched(self) -> bool:
        return not self.arrived()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self.tcp.shutdown(socket.SHUT_RDWR)
        self._thread.join(SECONDS)
        self.tcp.close()
        self.udp.close()


@pytest.fixture
def target() -> Iterator[Target]:
    with Target() as one:
        yield one


@pytest.fixture
def trapped() -> Iterator[tuple[Target, Target]]:
    """A target, and a trap at the same port of an address that is denied."""
    with ExitStack() as stack:
        target = stack.enter_context(Target(OTHER, free_port()))
        yield target, stack.enter_context(Target(LOCALHOST, target.port))


def free_port() -> int:
    """Of all addresses, TCP and UDP, a moment ago; none that the kernel hands out by itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        try:
            with socket.create_server(("", port)), UdpPort("0.0.0.0", port):
                return port
        except OSError:
            continue


@pytest.mark.parametrize("door", DOORS)
class TestHazard73:
    @pytest.mark.parametrize("what", DENIED)
    def test_special_addresses_are_denied_as_literals(
        self, door: str, what: str, guarded: Running
    ) -> None:
        assert DOORS[door](guarded, DENIED[what], 9) == "denied"

    @pytest.mark.parametrize("what", DENIED)
    def test_and_as_what_a_name_leads_to(
        self, door: str, what: str, guarded: Running, names: NameServer
    ) -> None:
        names.answers["trap.test"] = [[DENIED[what]]]
        assert DOORS[door](guarded, "trap.test", 9) == "denied"

    @pytest.mark.parametrize("host", LOOSE)
    def test_and_in_spellings_that_hide_it(self, door: str, host: str, guarded: Running) -> None:
        assert DOORS[door](guarded, host, 9) == "denied"

    @pytest.mark.parametrize("host", ["localhost", "LocalHost.", "a.localhost"])
    def test_and_by_this_machines_names(self, door: str, host: str, guarded: Running) -> None:
        assert DOORS[door](guarded, host, 9) == "denied"

    def test_an_exception_is_reached(self, door: str, guarded: Running, target: Target) -> None:
        assert DOORS[door](guarded, OTHER, target.port) == "open"


@pytest.mark.parametrize("door", DOORS)
class TestHazard74:
    def test_a_name_with_a_denied_and_an_allowed_address_leads_to_the_latter(
        self, door: str, guarded: Running, names: NameServer, trapped: tuple[Target, Target]
    ) -> None:
        names.answers["both.test"] = [["127.0.0.1", OTHER, "::1"]]
        target, trap = trapped
        assert DOORS[door](guarded, "both.test", target.port, target.arrived) == "open"
        if door in STREAMS:
            eventually(target.arrived)
        assert trap.untouched()

    def test_all_denied(self, door: str, guarded: Running, names: NameServer) -> None:
        names.answers["all.test"] = [["127.0.0.1", "::1", "10.0.0.1"]]
        assert DOORS[door](guarded, "all.test", 9) == "denied"


@pytest.mark.parametrize("door", DOORS)
class TestHazard75:
    """A name server whose second answer is another."""

    @pytest.mark.parametrize(
        "answers, said", [([[OTHER], ["127.0.0.1"]], "open"), ([["127.0.0.1"], [OTHER]], "denied")]
    )
    def test_one_lookup_and_the_address_that_was_looked_at_is_dialled(
        self,
        door: str,
        answers: list[list[str]],
        said: str,
        guarded: Running,
        names: NameServer,
        trapped: tuple[Target, Target],
    ) -> None:
        names.answers["flip.test"] = list(answers)
        names.asked.clear()
        target, trap = trapped
        assert DOORS[door](guarded, "flip.test", target.port, target.arrived) == said
        assert names.asked == ["flip.test"]
        if said == "open" and door in STREAMS:
            eventually(target.arrived)
        assert trap.untouched()

    def test_a_rule_that_looks_at_it_makes_no_second(
        self, door: str, names: NameServer, trapped: tuple[Target, Target]
    ) -> None:
        names.answers["flip.test"] = [[OTHER], ["127.0.0.1"]]
        names.asked.clear()
        target, trap = trapped
        with running(
            GUARDED + f"\nrules: [{{ip: {OTHER}, via: direct}}, {{via: block}}]"
        ) as daemon:
            assert DOORS[door](daemon, "flip.test", target.port, target.arrived) == "open"
            assert names.asked == ["flip.test"] and trap.untouched()


class TestTheUsualGuard:
    """Hazards 41 and 73: of a listener for other machines, without a word about destinations in the file."""

    @pytest.fixture
    def lan(self, names: NameServer) -> Iterator[Running]:
        with running(
            "listeners: [{name: lan, listen: '0.0.0.0:0', clients: 127.0.0.0/8}]"
        ) as daemon:
            yield daemon

    @pytest.mark.parametrize("door", DOORS)
    def test_keeps_them_from_this_machine(self, door: str, lan: Running) -> None:
        for host in (
            "127.0.0.1",
            "::1",
            "0.0.0.0",
            "169.254.169.254",
            "224.0.0.1",
            "255.255.255.255",
            "::ffff:127.0.0.1",
        ):
            assert DOORS[door](lan, host, 9) == "denied"

    def test_a_denied_target_in_a_live_association_costs_that_datagram_alone(
        self, names: NameServer
    ) -> None:
        """Hazard 40."""
        with (
            running(GUARDED) as daemon,
            UdpPort(OTHER) as target,
            UdpPort(LOCALHOST) as trap,
            UdpClient(daemon.port) as client,
        ):
            client.check_echo(target)
            for denied in (
                trap.address,
                Address("224.0.0.1", 9),
                Address("255.255.255.255", 9),
                Address("169.254.169.254", 53),
            ):
                client.to(denied, b"x")
            client.to(Address(OTHER, 0), b"x")
            client.check_echo(target, b"again")
            assert daemon.drops() == {Reason.DENIED.value: 4, "bad target": 1} and trap.silent()

    def test_clients_of_this_machine_are_as_free_as_without_us(self, names: NameServer) -> None:
        with running() as daemon, Target(LOCALHOST) as target:
            assert (
                by_socks5(daemon, LOCALHOST, target.port)
                == by_socks5(daemon, "localhost", target.port)
                == "open"
            )


OWN = "listeners: [{name: main, listen: 'ADDRESS:0', clients: [127.0.0.0/8, '::1'], announce: 203.0.113.5}]\ndestinations: {deny: []}"


def own_addresses() -> list[str]:
    """Another one of this machine's, if there is any."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
            return [probe.getsockname()[0]]
        except OSError:
            return []


class TestHazard77:
    """Own listeners by any alias."""

    @pytest.fixture(params=["0.0.0.0", "[::]"])
    def wildcard(self, request: pytest.FixtureRequest, names: NameServer) -> Iterator[Running]:
        if request.param == "[::]" and not HAS_IPV6:
            pytest.skip("no IPv6")
        with running(OWN.replace("ADDRESS", request.param)) as daemon:
            yield daemon

    @pytest.mark.parametrize("door", DOORS)
    def test_of_every_address(self, door: str, wildcard: Running, names: NameServer) -> None:
        before = descriptors()
        aliases = [
            "127.0.0.1",
            "127.0.0.2",
            "127.1",
            "0.0.0.0",
            "::ffff:127.0.0.1",
            "203.0.113.5",
            "localhost",
            *own_addresses(),
        ]
        aliases += ["::1", "::"] if HAS_IPV6 else []
        names.answers["alias.test"] = [["::ffff:0.0.0.0"]]
        for alias in [*aliases, "alias.test"]:
            assert DOORS[door](wildcard, alias, wildcard.port) == "denied", alias
        eventually(lambda: descriptors() <= before)
        assert wildcard.idle() or door in DATAGRAMS

    def test_of_one_address_another_is_somebody_elses(self, names: NameServer) -> None:
        with running(OWN.replace("ADDRESS", "127.0.0.1")) as daemon:
            assert by_socks5(daemon, "127.0.0.2", daemon.port) == "5"
            assert by_socks5(daemon, "127.0.0.1", daemon.port) == "denied"

    def test_the_reply_says_whose_fault_it_is(self, names: NameServer) -> None:
        with running(OWN.replace("ADDRESS", "127.0.0.1")) as daemon:
            assert by_connect(daemon, "127.0.0.1", daemon.port) == "denied"
            assert daemon.count("dial_failures", Reason.LOOP.value) == 1
            assert [record.ended for record in daemon.log.records] == [Reason.LOOP.value]

    def test_a_relays_own_port(self, names: NameServer) -> None:
        """Hazard 41."""
        with running(OWN.replace("ADDRESS", "127.0.0.1")) as daemon:
            assert by_socks5_udp(daemon, "127.0.0.1", daemon.port) == "denied"
            assert daemon.drops() == {Reason.LOOP.value: 1}

    def test_a_listener_that_a_reload_brought_and_one_that_it_took(self, names: NameServer) -> None:
        with running(OWN.replace("ADDRESS", "127.0.0.1")) as daemon:
            with Target(LOCALHOST) as reserved:
                port = reserved.port
            text = OWN.replace("ADDRESS", "127.0.0.1")
            daemon.reload(text.replace("[", f"[{{name: more, listen: '127.0.0.1:{port}'}}, ", 1))
            assert by_socks5(daemon, "127.0.0.1", port) == "denied"
            daemon.reload(text)
            assert by_socks5(daemon, "127.0.0.1", port) == "5"


def test_a_fixed_target_on_loopback_is_what_the_file_says(names: NameServer) -> None:
    with (
        Target(LOCALHOST) as target,
        running(
            f"listeners: [{{protocol: tcp, name: in, listen: '0.0.0.0:0', target: '127.0.0.1:{target.port}', clients: 127.0.0.0/8}}]"
        ) as daemon,
    ):
        socket.create_connection((LOCALHOST, daemon.port), SECONDS).close()
        eventually(lambda: target.came)


def test_what_lives_of_a_listener_that_a_reload_took_away_stays_where_it_was_kept(
    names: NameServer,
) -> None:
    """An HTTP connection outlives its listener; it must not be free because of that."""
    with running(GUARDED) as daemon, Target() as target, Target(LOCALHOST) as trap:
        sock = socket.create_connection((LOCALHOST, daemon.port), SECONDS)
        with sock:

            def ask(host: str, port: int) -> bytes:
                sock.sendall(
                    b"GET http://%b:%d/ HTTP/1.1\r\nHost: a\r\n\r\n" % (host.encode(), port)
                )
                return sock.recv(4096).split(b"\r\n")[0]

            sock.sendall(b"OPTIONS http://a.test/ HTTP/1.1\r\nHost: a\r\nMax-Forwards: 0\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
            daemon.reload(
                "listeners: [{name: another, listen: '127.0.0.1:0'}]\ndestinations: {deny: []}"
            )
            assert ask(LOCALHOST, trap.port) == b"HTTP/1.1 403 Forbidden"
        assert trap.untouched() and target.untouched()


class TestHazard78:
    """Two proxies that lead to each other.  Neither SOCKS nor CONNECT has a word for it: what bounds them is their limits."""

    LIMIT = 16
    TEXT = (
        "listeners: [{listen: '127.0.0.1:%d', network: tcp, limits: {connections: %d}}]\ntimeouts: {connect: 300ms}\n"
        "default: '%s://127.0.0.1:%d'"
    )

    @pytest.mark.parametrize("scheme, door", [("socks5h", "SOCKS5"), ("http", "HTTP CONNECT")])
    def test_take_no_more_than_their_limits_and_end_with_the_mistake(
        self, scheme: str, door: str, names: NameServer
    ) -> None:
        here, there = free_port(), free_port()
        with (
            running(self.TEXT % (here, self.LIMIT, scheme, there)) as first,
            running(self.TEXT % (there, self.LIMIT, scheme, here)),
        ):
            before = descriptors()
            assert DOORS[door](first, "a.test", 80) not in ("open", "denied")
            assert (
                descriptors() <= before + 6 * self.LIMIT
            )  # of each connection its two ends, and one that still waits
            first.reload(self.TEXT.partition("default")[0] % (here, self.LIMIT) + "default: block")
            eventually(lambda: descriptors() <= before)
