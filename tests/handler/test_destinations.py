"""Denied targets, over every protocol: special addresses, their names, the daemon's own ports."""

from __future__ import annotations

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
from tests.support.ports import free_port
from tests.support.relays import Running, UdpClient, UdpPort, running
from tests.support.sockets import HAS_IPV6, SECONDS

pytest.importorskip("yaml")

# An address of this machine that the configuration allows: the targets of the tests.
OTHER = "127.0.0.77"
GUARDED = (
    "listeners: [{name: main, listen: '127.0.0.1:0'}]\n"
    "destinations: {deny: [loopback, private, link-local, metadata, multicast],"
    f" allow: [{OTHER}]}}"
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
ATON_SPELLINGS = ["127.1", "0x7f.1", "2130706433", "0177.0.0.1"]


class NameServer:
    """Replaces getaddrinfo(3) in the daemon.

    `answers` holds the answers for a name in their order; the last one is repeated.
    """

    def __init__(self) -> None:
        self._real = socket.getaddrinfo
        self.answers: dict[str, list[list[str]]] = {}
        self.asked: list[str] = []

    def getaddrinfo(self, host: bytes | str, *arguments: Any, **more: Any) -> list[Any]:
        if isinstance(host, str):
            # The test's client asks.
            return self._real(host, *arguments, **more)
        name = host.decode()
        self.asked.append(name)
        answers = self.answers.get(name)
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        hosts = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            (
                socket.AF_INET6 if ":" in address else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                (address, 0),
            )
            for address in hosts
        ]


@pytest.fixture(scope="module")
def names() -> Iterator[NameServer]:
    """Return a name server whose answers the daemon does not cache."""
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
    """Listens on TCP and UDP, and counts the connections."""

    def __init__(self, host: str = OTHER, port: int = 0) -> None:
        self.port = port or free_port(host)
        self.tcp = socket.create_server((host, self.port), backlog=32)
        self.udp = UdpPort(host, self.port)
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
        """Return whether a connection or a datagram has come; receive the datagram."""
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
    with Target() as listening:
        yield listening


@pytest.fixture
def trapped() -> Iterator[tuple[Target, Target]]:
    """Yield a target, and a trap at the same port of an address that is denied."""
    with ExitStack() as stack:
        target = stack.enter_context(Target(OTHER, free_port("0.0.0.0")))
        yield target, stack.enter_context(Target(LOCALHOST, target.port))


@pytest.mark.parametrize("door", DOORS)
class TestSpecialAddresses:
    """Hazard 73."""

    @pytest.mark.parametrize("what", DENIED)
    def test_special_address_is_denied_as_literal(
        self, door: str, what: str, guarded: Running
    ) -> None:
        assert DOORS[door](guarded, DENIED[what], 9) == "denied"

    @pytest.mark.parametrize("what", DENIED)
    def test_special_address_is_denied_as_answer_for_a_name(
        self, door: str, what: str, guarded: Running, names: NameServer
    ) -> None:
        names.answers["trap.test"] = [[DENIED[what]]]
        assert DOORS[door](guarded, "trap.test", 9) == "denied"

    @pytest.mark.parametrize("host", ATON_SPELLINGS)
    def test_loopback_is_denied_in_every_spelling_of_inet_aton(
        self, door: str, host: str, guarded: Running
    ) -> None:
        assert DOORS[door](guarded, host, 9) == "denied"

    @pytest.mark.parametrize("host", ["localhost", "LocalHost.", "a.localhost"])
    def test_localhost_is_denied_in_every_spelling(
        self, door: str, host: str, guarded: Running
    ) -> None:
        assert DOORS[door](guarded, host, 9) == "denied"

    def test_allowed_address_is_reached(self, door: str, guarded: Running, target: Target) -> None:
        assert DOORS[door](guarded, OTHER, target.port) == "open"


@pytest.mark.parametrize("door", DOORS)
class TestNameWithDeniedAddress:
    """Hazard 74."""

    def test_allowed_address_of_a_name_is_dialled(
        self, door: str, guarded: Running, names: NameServer, trapped: tuple[Target, Target]
    ) -> None:
        names.answers["both.test"] = [["127.0.0.1", OTHER, "::1"]]
        target, trap = trapped
        assert DOORS[door](guarded, "both.test", target.port, target.arrived) == "open"
        if door in STREAMS:
            eventually(target.arrived)
        assert trap.untouched()

    def test_name_with_only_denied_addresses_is_denied(
        self, door: str, guarded: Running, names: NameServer
    ) -> None:
        names.answers["all.test"] = [["127.0.0.1", "::1", "10.0.0.1"]]
        assert DOORS[door](guarded, "all.test", 9) == "denied"


@pytest.mark.parametrize("door", DOORS)
class TestSecondAnswerDiffers:
    """Hazard 75: a name server whose second answer differs."""

    @pytest.mark.parametrize(
        "answers, outcome",
        [([[OTHER], ["127.0.0.1"]], "open"), ([["127.0.0.1"], [OTHER]], "denied")],
    )
    def test_name_is_looked_up_once_and_the_checked_address_dialled(
        self,
        door: str,
        answers: list[list[str]],
        outcome: str,
        guarded: Running,
        names: NameServer,
        trapped: tuple[Target, Target],
    ) -> None:
        names.answers["flip.test"] = list(answers)
        names.asked.clear()
        target, trap = trapped
        assert DOORS[door](guarded, "flip.test", target.port, target.arrived) == outcome
        assert names.asked == ["flip.test"]
        if outcome == "open" and door in STREAMS:
            eventually(target.arrived)
        assert trap.untouched()

    def test_rule_on_addresses_makes_no_second_lookup(
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


class TestDefaultPolicy:
    """Hazards 41 and 73: a listener for other machines, without `destinations` in the file."""

    @pytest.fixture
    def lan(self, names: NameServer) -> Iterator[Running]:
        with running(
            "listeners: [{name: lan, listen: '0.0.0.0:0', clients: 127.0.0.0/8}]"
        ) as daemon:
            yield daemon

    @pytest.mark.parametrize("door", DOORS)
    def test_other_machines_do_not_reach_this_machine(self, door: str, lan: Running) -> None:
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

    def test_denied_target_in_live_association_drops_only_its_datagram(
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

    def test_local_clients_may_reach_this_machine(self, names: NameServer) -> None:
        with running() as daemon, Target(LOCALHOST) as target:
            assert (
                by_socks5(daemon, LOCALHOST, target.port)
                == by_socks5(daemon, "localhost", target.port)
                == "open"
            )


OWN = (
    "listeners: [{name: main, listen: 'ADDRESS:0', clients: [127.0.0.0/8, '::1'],"
    " announce: 203.0.113.5}]\ndestinations: {deny: []}"
)


def own_addresses() -> list[str]:
    """Return the address of this machine's default route, if there is one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
            return [probe.getsockname()[0]]
        except OSError:
            return []


class TestOwnListeners:
    """Hazard 77: the daemon's own listeners, at any address that leads there."""

    @pytest.fixture(params=["0.0.0.0", "[::]"])
    def wildcard(self, request: pytest.FixtureRequest, names: NameServer) -> Iterator[Running]:
        if request.param == "[::]" and not HAS_IPV6:
            pytest.skip("no IPv6")
        with running(OWN.replace("ADDRESS", request.param)) as daemon:
            yield daemon

    @pytest.mark.parametrize("door", DOORS)
    def test_wildcard_listener_is_denied_at_every_address(
        self, door: str, wildcard: Running, names: NameServer
    ) -> None:
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

    def test_same_port_of_another_address_is_not_denied(self, names: NameServer) -> None:
        with running(OWN.replace("ADDRESS", "127.0.0.1")) as daemon:
            assert by_socks5(daemon, "127.0.0.2", daemon.port) == "5"
            assert by_socks5(daemon, "127.0.0.1", daemon.port) == "denied"

    def test_loop_is_refused_counted_and_recorded(self, names: NameServer) -> None:
        with running(OWN.replace("ADDRESS", "127.0.0.1")) as daemon:
            assert by_connect(daemon, "127.0.0.1", daemon.port) == "denied"
            assert daemon.count("dial_failures", Reason.LOOP.value) == 1
            assert [record.ended for record in daemon.log.records] == [Reason.LOOP.value]

    def test_datagram_to_the_relay_port_is_dropped_as_loop(self, names: NameServer) -> None:
        """Hazard 41."""
        with running(OWN.replace("ADDRESS", "127.0.0.1")) as daemon:
            assert by_socks5_udp(daemon, "127.0.0.1", daemon.port) == "denied"
            assert daemon.drops() == {Reason.LOOP.value: 1}

    def test_reload_adds_and_removes_own_listeners(self, names: NameServer) -> None:
        with running(OWN.replace("ADDRESS", "127.0.0.1")) as daemon:
            with Target(LOCALHOST) as reserved:
                port = reserved.port
            text = OWN.replace("ADDRESS", "127.0.0.1")
            daemon.reload(text.replace("[", f"[{{name: more, listen: '127.0.0.1:{port}'}}, ", 1))
            assert by_socks5(daemon, "127.0.0.1", port) == "denied"
            daemon.reload(text)
            assert by_socks5(daemon, "127.0.0.1", port) == "5"


def test_fixed_target_on_loopback_is_reached(names: NameServer) -> None:
    with (
        Target(LOCALHOST) as target,
        running(
            "listeners: [{protocol: tcp, name: in, listen: '0.0.0.0:0', "
            f"target: '127.0.0.1:{target.port}', clients: 127.0.0.0/8}}]"
        ) as daemon,
    ):
        socket.create_connection((LOCALHOST, daemon.port), SECONDS).close()
        eventually(lambda: target.came)


def test_connection_of_removed_listener_keeps_its_policy(names: NameServer) -> None:
    """An HTTP connection that outlives its listener keeps the policy of that listener."""
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


class TestProxyLoop:
    """Hazard 78: two proxies that use each other as upstream.

    SOCKS and CONNECT do not detect the loop; the limits of connections bound it.
    """

    LIMIT = 16
    TEXT = (
        "listeners: [{listen: '127.0.0.1:%d', network: tcp, limits: {connections: %d}}]\n"
        "timeouts: {connect: 300ms}\n"
        "default: '%s://127.0.0.1:%d'"
    )

    @pytest.mark.parametrize("scheme, door", [("socks5h", "SOCKS5"), ("http", "HTTP CONNECT")])
    def test_loop_takes_no_more_than_the_limits_and_ends_after_a_reload(
        self, scheme: str, door: str, names: NameServer
    ) -> None:
        here, there = free_port("0.0.0.0"), free_port("0.0.0.0")
        with (
            running(self.TEXT % (here, self.LIMIT, scheme, there)) as first,
            running(self.TEXT % (there, self.LIMIT, scheme, here)),
        ):
            before = descriptors()
            assert DOORS[door](first, "a.test", 80) not in ("open", "denied")
            # Both ends of each connection, and of one that waits to be accepted.
            assert descriptors() <= before + 6 * self.LIMIT
            first.reload(self.TEXT.partition("default")[0] % (here, self.LIMIT) + "default: block")
            eventually(lambda: descriptors() <= before)
