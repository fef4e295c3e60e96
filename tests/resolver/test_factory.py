"""Name servers from the configuration: over what they are asked, by which way, and whom TLS believes."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path
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
from netproxy.daemon.daemon import _plan
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.errors import ConfigError, DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.stream import Stream
from netproxy.resolver import factory
from netproxy.resolver.factory import Means, SystemNames, make_forwarder, make_plan
from netproxy.resolver.forwarder import Forwarder
from netproxy.resolver.resolver import Found, LookupFailed, ask_system
from netproxy.resolver.servers import HttpsServer, ServerError, StreamServer, UdpServer
from netproxy.router.factory import domains
from tests.support.certificates import certificates
from tests.support.dns import a, query, question
from tests.support.doubles import Counts, Lines
from tests.support.nameservers import MAIL, WWW, answer_to, name_server, serve, soon
from tests.support.sockets import SECONDS, Task, read_exactly, read_to_end, server

RIGHT = a(60, b"\xc0\0\2\x01")
OFFICE = UpstreamConfig((HopConfig("socks5", Address("192.0.2.7", 1080)),), "office")


class Permissive:
    def permitted(self, flow: Flow, addresses: Sequence[Address]) -> Sequence[Address]:
        return addresses


class Forbidding:
    def permitted(self, flow: Flow, addresses: Sequence[Address]) -> Sequence[Address]:
        raise DialError(Reason.LOOP, f"{flow.network} {flow.target}")


class Recorded:
    """A Dialer that leads to `address` whatever the target is."""

    def __init__(self, address: Address) -> None:
        self.flows: list[Flow] = []
        self._address = address

    def dial(self, flow: Flow) -> Stream:
        self.flows.append(flow)
        sock = socket.create_connection(self._address, SECONDS)
        sock.setblocking(False)
        return Stream(sock)


def direct(seconds: float) -> Dialer:
    return DirectDialer(
        TargetResolver(SystemNames({}), Permissive()), UdpSocketFactory(Counts(), Lines()), seconds
    )  # type: ignore[arg-type]


def no_way(config: UpstreamConfig) -> Dialer:
    raise AssertionError("no upstream was asked for")


def made(
    *servers: NameServerConfig,
    way: Callable[[UpstreamConfig], Any] = no_way,
    rules: Sequence[DnsRuleConfig] = (),
    **more: Any,
) -> Forwarder:
    forwarder = make_forwarder(
        DnsConfig(servers, tuple(rules), **more), Means(direct, way, domains, Permissive())
    )
    assert forwarder is not None
    return forwarder


def only(forwarder: Forwarder) -> Any:
    (one,) = forwarder._others.servers.servers  # type: ignore[union-attr]
    return one


@pytest.fixture
def pem(request: pytest.FixtureRequest) -> Any:
    return certificates()


def secured(script: Callable[[Any], Any], name: str = "server") -> Callable[[socket.socket], None]:
    """The same script within TLS; a client that does not believe us has left, and that is its business."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates().path(f"{name}.pem"), certificates().path(f"{name}.key"))

    def play(sock: socket.socket) -> None:
        try:
            with context.wrap_socket(sock, server_side=True) as within:
                script(within)
        except (ssl.SSLError, OSError):
            pass

    return play


class TestKinds:
    def test_of_servers(self) -> None:
        address = Address("192.0.2.1", 53)
        kinds = {
            scheme: type(only(made(NameServerConfig(scheme, address, "/q"))))
            for scheme in ("udp", "tcp", "tls", "https")
        }
        assert kinds == {
            "udp": UdpServer,
            "tcp": StreamServer,
            "tls": StreamServer,
            "https": HttpsServer,
        }

    def test_names_for_messages(self) -> None:
        assert (
            only(made(NameServerConfig("https", Address("2001:db8::1", 443), "/q"))).name
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
    def test_the_host_that_is_told(self, server: Address, host: bytes) -> None:
        assert only(made(NameServerConfig("https", server, "/q")))._host == host

    def test_nothing_to_ask_is_left_to_the_system(self) -> None:
        config = Config(
            (), dns=DnsConfig(hosts=(("a.lan", ("192.0.2.1",)),), cache=7, prefer="ipv6")
        )
        plan = _plan(config, None)
        assert (plan.ask, dict(plan.hosts), plan.prefer, plan.cache) == (
            ask_system,
            {"a.lan": ("192.0.2.1",)},
            "ipv6",
            7,
        )


class TestDirect:
    def test_by_udp_then_tcp(self) -> None:
        """As on a server's one port: what does not fit is asked for again by TCP."""
        with server(serve(lambda asked: answer_to(asked, RIGHT))) as address:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(address)
                sock.settimeout(SECONDS)
                forwarder = made(NameServerConfig("udp", address))

                def truncated() -> None:
                    asked, peer = sock.recvfrom(512)
                    sock.sendto(answer_to(asked, flags=0x8380), peer)

                task = Task(truncated)
                assert forwarder.forward(WWW) == answer_to(WWW, RIGHT)
                task.result()
            forwarder.close()

    def test_a_dead_server_leaves_time_for_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A TLS server that accepts and then says nothing has its share of the time and no more."""
        monkeypatch.setattr("netproxy.resolver.forwarder.LOOKUP_SECONDS", 1.0)
        with (
            server(read_to_end) as silent,
            name_server(lambda asked: answer_to(asked, RIGHT)) as alive,
        ):
            forwarder = made(
                NameServerConfig("tls", silent, tls=UpstreamTlsConfig(insecure=True)),
                NameServerConfig("udp", alive),
            )
            assert forwarder.forward(WWW) == answer_to(WWW, RIGHT)
            forwarder.close()

    def test_a_dial_has_no_more_time_than_its_exchange(self) -> None:
        seconds: list[float] = []

        class Late:
            def dial(self, flow: Flow) -> Stream:
                raise DialError(Reason.TIMEOUT, str(flow.target))

        def late(left: float) -> Any:
            seconds.append(left)
            return Late()

        forwarder = make_forwarder(
            DnsConfig((NameServerConfig("tcp", Address("192.0.2.1", 53)),)),
            Means(late, no_way, domains, Permissive()),
        )
        with pytest.raises(ServerError, match="^tcp://192.0.2.1:53: 192.0.2.1:53: timed out$"):
            only(forwarder).exchange([WWW], time.monotonic() + 3)  # type: ignore[arg-type]
        assert 2 < seconds[0] <= 3

    def test_a_servers_name_is_the_systems_to_find(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            factory, "ask_system", lambda host: Found(("192.0.2.1", "2001:db8::1"), 10)
        )
        assert SystemNames({}).resolve(Address("dns.example", 853)) == [
            Address("192.0.2.1", 853),
            Address("2001:db8::1", 853),
        ]
        assert SystemNames({}).resolve(Address("2001:db8::2", 853)) == [Address("2001:db8::2", 853)]

    def test_a_servers_name_may_be_one_of_hosts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(factory, "ask_system", lambda host: Found(("192.0.2.1",), 10))
        names = SystemNames({"dns.example": ("192.0.2.9",), "none.example": ()})
        assert names.resolve(Address("dns.example", 853)) == [Address("192.0.2.9", 853)]
        assert names.resolve(Address("none.example", 853)) == [Address("192.0.2.1", 853)]

    def test_one_of_our_own_listeners_is_not_asked(self) -> None:
        """Or a query would come back here, and be asked again."""
        with name_server(lambda asked: answer_to(asked, RIGHT)) as address:
            forwarder = make_forwarder(
                DnsConfig((NameServerConfig("udp", address),)),
                Means(direct, no_way, domains, Forbidding()),
            )
            with pytest.raises(ServerError) as caught:
                only(forwarder).exchange([WWW], soon())  # type: ignore[arg-type]
        assert (
            str(caught.value)
            == f"udp://{address}: udp {address}: the connection would loop back to this proxy"
        )

    def test_a_servers_name_that_is_not_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def nobody(host: str) -> Found:
            raise LookupFailed

        monkeypatch.setattr(factory, "ask_system", nobody)
        with pytest.raises(DialError, match="dns.example: name not resolved"):
            SystemNames({}).resolve(Address("dns.example", 853))


class TestUpstreams:
    @pytest.mark.parametrize("scheme", ["udp", "tcp"])
    def test_a_server_behind_an_upstream_is_asked_by_tcp(self, scheme: str) -> None:
        with server(serve(lambda asked: answer_to(asked, RIGHT))) as address:
            dialer = Recorded(address)
            ways: list[UpstreamConfig] = []

            def way(config: UpstreamConfig) -> Recorded:
                ways.append(config)
                return dialer

            forwarder = made(
                NameServerConfig(scheme, Address("192.0.2.53", 53), upstream=OFFICE), way=way
            )
            assert forwarder.forward(WWW) == answer_to(WWW, RIGHT)
            forwarder.close()
        assert ways == [OFFICE]
        (flow,) = dialer.flows
        assert (flow.network, flow.target, flow.listener, flow.user) == (
            "tcp",
            Address("192.0.2.53", 53),
            "",
            "",
        )


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
    def test_a_server_is_who_it_says(self, pem: Any, tls: UpstreamTlsConfig, host: str) -> None:
        with server(secured(serve(lambda asked: answer_to(asked, RIGHT)))) as address:
            forwarder = made(
                NameServerConfig(
                    "tls", address._replace(host=host), tls=tls._replace(ca=pem.path("ca.pem"))
                )
            )
            assert forwarder.forward(WWW) == answer_to(WWW, RIGHT)
            assert forwarder.forward(MAIL) == answer_to(MAIL, RIGHT)
            forwarder.close()

    @pytest.mark.parametrize("scheme", ["tls", "https"])
    @pytest.mark.parametrize(
        "name, tls, said",
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
    def test_whoever_else_answers_is_not_believed(
        self, pem: Any, scheme: str, name: str, tls: dict[str, str], said: str
    ) -> None:
        with server(secured(read_to_end, name)) as address:
            only_one = only(
                made(
                    NameServerConfig(
                        scheme, address, "/q", tls=UpstreamTlsConfig(ca=pem.path("ca.pem"), **tls)
                    )
                )
            )
            with pytest.raises(ServerError) as caught:
                only_one.exchange([WWW], soon())
        assert said in str(caught.value).replace("Hostname mismatch, ", "") and str(
            caught.value
        ).startswith(f"{scheme}://{address}")

    def test_unless_that_is_wished(self, pem: Any) -> None:
        with server(secured(serve(lambda asked: answer_to(asked, RIGHT)), "stranger")) as address:
            forwarder = made(NameServerConfig("tls", address, tls=UpstreamTlsConfig(insecure=True)))
            assert forwarder.forward(WWW) == answer_to(WWW, RIGHT)
            forwarder.close()

    def test_a_silent_handshake_ends_with_the_deadline(self) -> None:
        with server(read_to_end) as address, pytest.raises(ServerError, match="out of time"):
            only(
                made(NameServerConfig("tls", address, tls=UpstreamTlsConfig(insecure=True)))
            ).exchange([WWW], time.monotonic() + 0.1)

    def test_a_server_without_tls_is_an_error(self) -> None:
        def script(sock: socket.socket) -> None:
            read_exactly(sock, 1)
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        with server(script) as address, pytest.raises(ServerError, match="TLS: "):
            only(
                made(NameServerConfig("https", address, "/q", tls=UpstreamTlsConfig(insecure=True)))
            ).exchange([WWW], soon())

    @pytest.mark.parametrize(
        "tls",
        [
            {"ca": "missing.pem"},
            {"certificate": "missing.pem"},
            {"certificate": "server.pem", "key": "client.key"},
            {"ca": "broken.pem"},
        ],
    )
    def test_files_that_cannot_be_used_are_errors_with_their_place(
        self, pem: Any, tls: dict[str, str]
    ) -> None:
        paths = UpstreamTlsConfig(**{key: pem.path(name) for key, name in tls.items()})
        with pytest.raises(ConfigError) as caught:
            made(NameServerConfig("tls", Address("192.0.2.1", 853), tls=paths, place="c.yaml:3:14"))
        assert str(caught.value).startswith(
            f"c.yaml:3:14: dns: 192.0.2.1:853: tls: cannot use {next(iter(paths._asdict().values())) or paths.certificate}"
        )


class TestRules:
    def test_names_lead_to_their_servers(self, tmp_path: Path) -> None:
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
            forwarder = made(NameServerConfig("udp", others), rules=rules)
            for host in ("a.lan", "intranet", "home.arpa"):
                assert forwarder.forward(query(question(host))) == answer_to(
                    query(question(host)), RIGHT
                )
            assert forwarder.forward(query(question("lan.example"))) == answer_to(
                query(question("lan.example"))
            )
            blocked = forwarder.answer(query(question("ads.example")))
            assert blocked is not None and blocked[3] & 15 == 3
            forwarder.close()

    @pytest.mark.parametrize(
        "domain, files", [(("regex:(",), ()), ((), ("/nowhere/list",))], ids=["a pattern", "a file"]
    )
    def test_what_cannot_be_read_is_an_error_with_its_place(
        self, domain: tuple[str, ...], files: tuple[str, ...]
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            made(rules=[DnsRuleConfig(domain, files, (), "c.yaml:5:5")])
        assert "c.yaml:5:5" in str(caught.value) or "/nowhere/list" in str(caught.value)


class TestHosts:
    @pytest.fixture
    def hosts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        path = tmp_path / "hosts"
        path.write_bytes(
            b"# a comment\n127.0.0.1\tlocalhost\n::1 localhost ip6-localhost  # another\n\n"
            b"192.0.2.1 Printer.LAN printer\n192.0.2.2 scanner.lan.\nnonsense here\n192.0.2.300 no\nfe80::1%eth0 no\n"
            b"192.0.2.4 caf\xe9.lan\n192.0.2.5\n"
        )
        monkeypatch.setattr(factory, "HOSTS_FILE", str(path))
        yield path

    def known(self, **more: Any) -> dict[str, tuple[str, ...]]:
        config = DnsConfig((NameServerConfig("udp", Address("192.0.2.53", 53)),), **more)
        return dict(
            make_plan(
                config, make_forwarder(config, Means(direct, no_way, domains, Permissive()))
            ).hosts
        )

    def test_are_read_of_the_system(self, hosts: Path) -> None:
        known = self.known()
        assert known.pop("caf\ufffd.lan") == ("192.0.2.4",)
        assert known == {
            "localhost": ("127.0.0.1", "::1"),
            "ip6-localhost": ("::1",),
            "printer.lan": ("192.0.2.1",),
            "printer": ("192.0.2.1",),
            "scanner.lan": ("192.0.2.2",),
        }

    def test_those_of_the_configuration_come_first(self, hosts: Path) -> None:
        known = self.known(hosts=(("printer", ("192.0.2.9",)), ("new.lan", ())))
        assert (known["printer"], known["printer.lan"], known["new.lan"]) == (
            ("192.0.2.9",),
            ("192.0.2.1",),
            (),
        )

    def test_a_file_that_is_not_there_is_no_error(self, hosts: Path) -> None:
        hosts.unlink()
        assert self.known() == {}

    def test_rules_alone_hold_for_our_own_lookups_too(self, hosts: Path) -> None:
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
            forwarder = make_forwarder(config, Means(direct, no_way, domains, Permissive()))
            plan = make_plan(config, forwarder)
            assert plan.ask("a.lan").addresses == ("192.0.2.1",)
            assert plan.hosts["printer.lan"] == ("192.0.2.1",)
