"""Builds name servers from configurations: transports, upstreams, TLS, rules and hosts."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Sequence

import pytest

from netproxy.config.schema import (
    Config,
    DnsConfig,
    DnsRuleConfig,
    HopConfig,
    NameServerConfig,
    UpstreamTlsConfig,
    UpstreamConfig,
)
from netproxy.daemon.reachability import make_lookups
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.errors import ConfigError, DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.stream import Stream
from netproxy.resolver import factory
from netproxy.resolver.factory import (
    ResolverDependencies,
    SystemResolver,
    make_forwarder,
    make_lookup_plan,
)
from netproxy.resolver.forwarder import DnsForwarder
from netproxy.resolver.resolver import LookupResult, LookupFailed, ask_system
from netproxy.resolver.servers import HttpsServer, ServerError, StreamServer, UdpServer
from netproxy.router.factory import domains
from tests.support.certificates import certificates
from tests.support.dns import query, question
from tests.support.doubles import Counts, Lines
from tests.support.flows import Anywhere
from tests.support.nameservers import MAIL, RIGHT, WWW, answer_to, far_deadline, name_server, serve
from tests.support.sockets import SECONDS, Task, read_exactly, read_to_end, server

OFFICE = UpstreamConfig((HopConfig("socks5", Address("192.0.2.7", 1080)),), "office")


class ForbiddingGuard(Anywhere):
    """A guard that takes every address for an own listener."""

    def permitted(self, flow: Flow, addresses: Sequence[Address]) -> tuple[Address, ...]:
        raise DialError(Reason.LOOP, f"{flow.network} {flow.target}")


class RecordingDialer:
    """A Dialer that connects to `address` whatever the target, and records the flows."""

    def __init__(self, address: Address) -> None:
        self.flows: list[Flow] = []
        self._address = address

    def dial(self, flow: Flow) -> Stream:
        self.flows.append(flow)
        sock = socket.create_connection(self._address, SECONDS)
        sock.setblocking(False)
        return Stream(sock)


def direct(seconds: float) -> Dialer:
    """Return a real direct dialer."""
    resolver = TargetResolver(SystemResolver({}), Anywhere())
    return DirectDialer(resolver, UdpSocketFactory(Counts(), Lines()), seconds)


def no_dialer(config: UpstreamConfig) -> Dialer:
    """Fail the test."""
    raise AssertionError("no upstream was asked for")


def build(
    *servers: NameServerConfig,
    dialer: Callable[[UpstreamConfig], Any] = no_dialer,
    rules: Sequence[DnsRuleConfig] = (),
    **more: Any,
) -> DnsForwarder:
    """Return the forwarder of a configuration with these servers and rules."""
    config = DnsConfig(servers, tuple(rules), **more)
    return make_forwarder(config, dependencies(dialer=dialer))


def dependencies(
    direct_within: Callable[[float], Dialer] = direct,
    dialer: Callable[[UpstreamConfig], Any] = no_dialer,
    guard: Any = None,
) -> ResolverDependencies:
    """Return dependencies that permit everything, unless there is a guard."""
    return ResolverDependencies(direct_within, dialer, domains, guard or Anywhere(), Counts())


def only(forwarder: DnsForwarder) -> Any:
    """Return the only server of a forwarder."""
    (server,) = forwarder._others.servers.servers  # type: ignore[union-attr]
    return server


@pytest.fixture
def pem(request: pytest.FixtureRequest) -> Any:
    return certificates()


def secured(script: Callable[[Any], Any], name: str = "server") -> Callable[[socket.socket], None]:
    """Return the same script within TLS.  A client that rejects the certificate may leave."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates().path(f"{name}.pem"), certificates().path(f"{name}.key"))

    def play(sock: socket.socket) -> None:
        try:
            with context.wrap_socket(sock, server_side=True) as secured_sock:
                script(secured_sock)
        except (ssl.SSLError, OSError):
            pass

    return play


class TestKinds:
    def test_class_of_a_server_follows_its_scheme(self) -> None:
        address = Address("192.0.2.1", 53)
        kinds = {
            scheme: type(only(build(NameServerConfig(scheme, address, "/q"))))
            for scheme in ("udp", "tcp", "tls", "https")
        }
        assert kinds == {
            "udp": UdpServer,
            "tcp": StreamServer,
            "tls": StreamServer,
            "https": HttpsServer,
        }

    def test_name_of_a_server_is_its_url(self) -> None:
        assert (
            only(build(NameServerConfig("https", Address("2001:db8::1", 443), "/q"))).name
            == "https://[2001:db8::1]:443/q"
        )

    @pytest.mark.parametrize(
        "server, host",
        [
            (Address("dns.example", 443), b"dns.example"),
            (Address("dns.example", 8443), b"dns.example:8443"),
            (Address("2001:db8::1", 443), b"[2001:db8::1]"),
            (Address("2001:db8::1", 4430), b"[2001:db8::1]:4430"),
        ],
    )
    def test_host_field_has_no_default_port(self, server: Address, host: bytes) -> None:
        assert only(build(NameServerConfig("https", server, "/q")))._host == host

    def test_plan_without_servers_asks_the_system(self) -> None:
        config = Config(
            (), dns=DnsConfig(hosts=(("a.lan", ("192.0.2.1",)),), cache=7, prefer="ipv6")
        )
        plan = make_lookups(config.dns, None)
        assert (plan.ask, dict(plan.hosts), plan.prefer, plan.cache) == (
            ask_system,
            {"a.lan": ("192.0.2.1",)},
            "ipv6",
            7,
        )


class TestDirect:
    def test_truncated_answer_is_asked_for_again_over_tcp(self) -> None:
        """UDP and TCP share the port of a server."""
        with server(serve(lambda asked: answer_to(asked, RIGHT))) as address:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(address)
                sock.settimeout(SECONDS)
                forwarder = build(NameServerConfig("udp", address))

                def truncated() -> None:
                    asked, peer = sock.recvfrom(512)
                    sock.sendto(answer_to(asked, flags=0x8380), peer)

                task = Task(truncated)
                assert forwarder.forward(WWW) == answer_to(WWW, RIGHT)
                task.result()
            forwarder.close()

    def test_silent_server_leaves_time_for_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A TLS server that accepts and then is silent has only its share of the time."""
        monkeypatch.setattr("netproxy.resolver.forwarder.LOOKUP_SECONDS", 1.0)
        with (
            server(read_to_end) as silent,
            name_server(lambda asked: answer_to(asked, RIGHT)) as alive,
        ):
            forwarder = build(
                NameServerConfig("tls", silent, tls=UpstreamTlsConfig(insecure=True)),
                NameServerConfig("udp", alive),
            )
            assert forwarder.forward(WWW) == answer_to(WWW, RIGHT)
            forwarder.close()

    def test_dial_has_the_time_left_of_its_exchange(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seconds: list[float] = []

        class Late:
            def dial(self, flow: Flow) -> Stream:
                raise DialError(Reason.TIMEOUT, str(flow.target))

        def late(left: float) -> Any:
            seconds.append(left)
            return Late()

        # A whole number, so that the difference is exact.
        deadline = float(int(time.monotonic()) + 60)
        clock = SimpleNamespace(monotonic=lambda: deadline - 3)
        monkeypatch.setattr(factory, "time", clock)
        config = DnsConfig((NameServerConfig("tcp", Address("192.0.2.1", 53)),))
        forwarder = make_forwarder(config, dependencies(late))
        with pytest.raises(ServerError, match="^tcp://192.0.2.1:53: 192.0.2.1:53: timed out$"):
            only(forwarder).exchange([WWW], deadline)
        assert seconds == [3.0]

    def test_name_of_a_server_is_resolved_by_the_system(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            factory, "ask_system", lambda host: LookupResult(("192.0.2.1", "2001:db8::1"), 10)
        )
        assert SystemResolver({}).resolve(Address("dns.example", 853)) == [
            Address("192.0.2.1", 853),
            Address("2001:db8::1", 853),
        ]
        assert SystemResolver({}).resolve(Address("2001:db8::2", 853)) == [
            Address("2001:db8::2", 853)
        ]

    def test_name_of_a_server_may_be_in_the_hosts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(factory, "ask_system", lambda host: LookupResult(("192.0.2.1",), 10))
        names = SystemResolver({"dns.example": ("192.0.2.9",), "none.example": ()})
        assert names.resolve(Address("dns.example", 853)) == [Address("192.0.2.9", 853)]
        assert names.resolve(Address("none.example", 853)) == [Address("192.0.2.1", 853)]

    def test_own_listener_is_not_asked(self) -> None:
        """A query to it would come back here and be asked again."""
        with name_server(lambda asked: answer_to(asked, RIGHT)) as address:
            forwarder = make_forwarder(
                DnsConfig((NameServerConfig("udp", address),)),
                dependencies(guard=ForbiddingGuard()),
            )
            with pytest.raises(ServerError) as caught:
                only(forwarder).exchange([WWW], far_deadline())  # type: ignore[arg-type]
        assert (
            str(caught.value)
            == f"udp://{address}: udp {address}: the connection would loop back to this proxy"
        )

    def test_name_of_a_server_that_is_not_found_is_a_dial_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(host: str) -> LookupResult:
            raise LookupFailed

        monkeypatch.setattr(factory, "ask_system", fail)
        with pytest.raises(DialError, match="dns.example: name not resolved"):
            SystemResolver({}).resolve(Address("dns.example", 853))


class TestUpstreams:
    @pytest.mark.parametrize("scheme", ["udp", "tcp"])
    def test_server_behind_an_upstream_is_asked_over_tcp(self, scheme: str) -> None:
        with server(serve(lambda asked: answer_to(asked, RIGHT))) as address:
            dialer = RecordingDialer(address)
            upstreams: list[UpstreamConfig] = []

            def recorded(config: UpstreamConfig) -> RecordingDialer:
                upstreams.append(config)
                return dialer

            forwarder = build(
                NameServerConfig(scheme, Address("192.0.2.53", 53), upstream=OFFICE),
                dialer=recorded,
            )
            assert forwarder.forward(WWW) == answer_to(WWW, RIGHT)
            forwarder.close()
        assert upstreams == [OFFICE]
        (flow,) = dialer.flows
        target = Address("192.0.2.53", 53)
        assert (flow.network, flow.target, flow.listener, flow.user) == ("tcp", target, "", "")


class TestTls:
    @pytest.mark.parametrize(
        "tls, host",
        [
            (UpstreamTlsConfig(server_name="localhost"), "127.0.0.1"),
            (UpstreamTlsConfig(), "127.0.0.1"),
            (UpstreamTlsConfig(), "localhost"),
        ],
        ids=["by a name of its own", "by its address", "by its name"],
    )
    def test_server_with_a_valid_certificate_is_asked_over_tls(
        self, pem: Any, tls: UpstreamTlsConfig, host: str
    ) -> None:
        with server(secured(serve(lambda asked: answer_to(asked, RIGHT)))) as address:
            forwarder = build(
                NameServerConfig(
                    "tls", address._replace(host=host), tls=tls._replace(ca=pem.path("ca.pem"))
                )
            )
            assert forwarder.forward(WWW) == answer_to(WWW, RIGHT)
            assert forwarder.forward(MAIL) == answer_to(MAIL, RIGHT)
            forwarder.close()

    @pytest.mark.parametrize("scheme", ["tls", "https"])
    @pytest.mark.parametrize(
        "name, tls, message",
        [
            (
                "server",
                {"server_name": "dns.example"},
                "certificate is not valid for 'dns.example'",
            ),
            ("stranger", {}, "self-signed certificate"),
        ],
        ids=["another name", "of another authority"],
    )
    def test_server_with_an_invalid_certificate_is_an_error(
        self, pem: Any, scheme: str, name: str, tls: dict[str, str], message: str
    ) -> None:
        with server(secured(read_to_end, name)) as address:
            server_with_tls = only(
                build(
                    NameServerConfig(
                        scheme, address, "/q", tls=UpstreamTlsConfig(ca=pem.path("ca.pem"), **tls)
                    )
                )
            )
            with pytest.raises(ServerError) as caught:
                server_with_tls.exchange([WWW], far_deadline())
        error = str(caught.value)
        assert error.startswith(f"{scheme}://{address}")
        assert message in error.replace("Hostname mismatch, ", "")

    def test_insecure_server_may_have_any_certificate(self, pem: Any) -> None:
        with server(secured(serve(lambda asked: answer_to(asked, RIGHT)), "stranger")) as address:
            forwarder = build(
                NameServerConfig("tls", address, tls=UpstreamTlsConfig(insecure=True))
            )
            assert forwarder.forward(WWW) == answer_to(WWW, RIGHT)
            forwarder.close()

    def test_silent_tls_handshake_ends_with_the_deadline(self) -> None:
        with server(read_to_end) as address, pytest.raises(ServerError, match="out of time"):
            only(
                build(NameServerConfig("tls", address, tls=UpstreamTlsConfig(insecure=True)))
            ).exchange([WWW], time.monotonic() + 0.1)

    def test_server_that_does_not_speak_tls_is_an_error(self) -> None:
        def script(sock: socket.socket) -> None:
            read_exactly(sock, 1)
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        with server(script) as address, pytest.raises(ServerError, match="TLS: "):
            only(
                build(
                    NameServerConfig("https", address, "/q", tls=UpstreamTlsConfig(insecure=True))
                )
            ).exchange([WWW], far_deadline())

    @pytest.mark.parametrize(
        "tls",
        [
            {"ca": "missing.pem"},
            {"certificate": "missing.pem"},
            {"certificate": "server.pem", "key": "client.key"},
            {"ca": "broken.pem"},
        ],
    )
    def test_unusable_tls_file_is_an_error_with_its_place(
        self, pem: Any, tls: dict[str, str]
    ) -> None:
        paths = UpstreamTlsConfig(**{key: pem.path(name) for key, name in tls.items()})
        with pytest.raises(ConfigError) as caught:
            build(
                NameServerConfig("tls", Address("192.0.2.1", 853), tls=paths, place="c.yaml:3:14")
            )
        assert str(caught.value).startswith(
            f"c.yaml:3:14: dns: 192.0.2.1:853: tls: cannot use "
            f"{paths.ca or paths.key or paths.certificate}: "
        )


class TestRules:
    def test_rules_lead_names_to_their_servers(self, tmp_path: Path) -> None:
        (tmp_path / "lan.txt").write_text("home.arpa\n")
        with (
            name_server(lambda asked: answer_to(asked, RIGHT)) as of_lan,
            name_server(lambda asked: answer_to(asked)) as others,
        ):
            rules = [
                DnsRuleConfig(
                    ("*.lan", "intranet"),
                    (str(tmp_path / "lan.txt"),),
                    (NameServerConfig("udp", of_lan),),
                ),
                DnsRuleConfig(("ads.example",), (), ()),
            ]
            forwarder = build(NameServerConfig("udp", others), rules=rules)
            for host in ("a.lan", "intranet", "home.arpa"):
                assert forwarder.forward(query(question(host))) == answer_to(
                    query(question(host)), RIGHT
                )
            assert forwarder.forward(query(question("lan.example"))) == answer_to(
                query(question("lan.example"))
            )
            blocked = forwarder.answer(query(question("ads.example")), "192.0.2.1")
            assert blocked is not None and blocked[3] & 15 == 3
            forwarder.close()

    @pytest.mark.parametrize(
        "domain, files", [(("regex:(",), ()), ((), ("/nowhere/list",))], ids=["a pattern", "a file"]
    )
    def test_bad_pattern_or_list_is_an_error_with_its_place(
        self, domain: tuple[str, ...], files: tuple[str, ...]
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            build(rules=[DnsRuleConfig(domain, files, (), "c.yaml:5:5")])
        assert "c.yaml:5:5" in str(caught.value) or "/nowhere/list" in str(caught.value)


class TestHosts:
    @pytest.fixture
    def hosts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        path = tmp_path / "hosts"
        path.write_bytes(
            b"# a comment\n127.0.0.1\tlocalhost\n::1 localhost ip6-localhost  # another\n\n"
            b"192.0.2.1 Printer.LAN printer\n192.0.2.2 scanner.lan.\nnonsense here\n"
            b"192.0.2.300 no\nfe80::1%eth0 no\n192.0.2.4 caf\xe9.lan\n192.0.2.5\n"
        )
        monkeypatch.setattr(factory, "HOSTS_FILE", str(path))
        yield path

    def known(self, **more: Any) -> dict[str, tuple[str, ...]]:
        """Return the hosts of the plan."""
        config = DnsConfig((NameServerConfig("udp", Address("192.0.2.53", 53)),), **more)
        return dict(make_lookup_plan(config, make_forwarder(config, dependencies())).hosts)

    def test_hosts_file_of_the_system_is_read(self, hosts: Path) -> None:
        known = self.known()
        assert known.pop("caf\ufffd.lan") == ("192.0.2.4",)
        assert known == {
            "localhost": ("127.0.0.1", "::1"),
            "ip6-localhost": ("::1",),
            "printer.lan": ("192.0.2.1",),
            "printer": ("192.0.2.1",),
            "scanner.lan": ("192.0.2.2",),
        }

    def test_hosts_of_the_configuration_come_first(self, hosts: Path) -> None:
        known = self.known(hosts=(("printer", ("192.0.2.9",)), ("new.lan", ())))
        assert (known["printer"], known["printer.lan"], known["new.lan"]) == (
            ("192.0.2.9",),
            ("192.0.2.1",),
            (),
        )

    def test_missing_hosts_file_is_no_error(self, hosts: Path) -> None:
        hosts.unlink()
        assert self.known() == {}

    def test_plan_with_rules_only_reads_the_hosts_file(self, hosts: Path) -> None:
        with name_server(
            lambda asked: (
                answer_to(asked, RIGHT)
                if asked.endswith(b"\0\1\0\1" + asked[-11:])
                else answer_to(asked)
            )
        ) as of_lan:
            config = DnsConfig(
                (), (DnsRuleConfig(("*.lan",), (), (NameServerConfig("udp", of_lan),)),)
            )
            forwarder = make_forwarder(config, dependencies())
            plan = make_lookup_plan(config, forwarder)
            assert plan.ask("a.lan").addresses == ("192.0.2.1",)
            assert plan.hosts["printer.lan"] == ("192.0.2.1",)
