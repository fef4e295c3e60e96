"""What is wrong with a whole configuration: certificates, loops, ports, rules, exposed secrets."""

from __future__ import annotations

import base64
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Iterator

import pytest

from netproxy.config.read import check, read_config
from netproxy.config.schema import Place
from netproxy.config.tree.load import load_file
from netproxy.config.tree.problems import Problems
from netproxy.daemon.build import build
from netproxy.daemon.checks import certificates as certificates_module
from netproxy.daemon.checks import sockets
from netproxy.daemon.checks.certificates import check_certificates, parse_validity
from netproxy.daemon.checks.configuration import CertificateFiles
from netproxy.daemon.checks.modules import has_module
from netproxy.daemon.runtime import Runtime
from netproxy.errors import ConfigError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.routing import RouteSelectors
from netproxy.net.local.routes import KernelRoutes
from netproxy.observe.log import Log
from tests.support.certificates import certificates
from tests.config.reading import read

pytest.importorskip("yaml")

LISTEN = "listeners: [{listen: '127.0.0.1:1080', name: main}]\n"
AUTH_URL = "auth: {url: 'https://a/'}"
DAY = 86400.0


def warnings(text: str) -> list[str]:
    """Return the warnings of a file."""
    return list(build(read(text), Runtime(Log("error")), None).warnings)


def error(text: str) -> str:
    """Return the error of a file that can be read but not be used."""
    with pytest.raises(ConfigError) as caught:
        build(read(text), Runtime(Log("error")), None)
    return str(caught.value)


class TestCollisions:
    @pytest.mark.parametrize(
        "first, second",
        [
            ("127.0.0.1:1080", "0.0.0.0:1080"),
            ("0.0.0.0:1080", "127.0.0.1:1080"),
            ("[::]:1080", "127.0.0.1:1080"),
            ("[::1]:1080", "[::]:1080"),
            ("0.0.0.0:1080", "[::]:1080"),
        ],
    )
    def test_listeners_that_share_a_port_of_an_address_are_an_error(
        self, first: str, second: str
    ) -> None:
        text = (
            f"listeners:\n- {{listen: '{first}', name: a, allow_open: true, network: tcp}}\n"
            f"- {{listen: '{second}', allow_open: true}}"
        )
        assert error(text) == (
            f"c.yaml:3:12: listen: tcp {second} is already used by listener 'a' ({first})"
        )

    @pytest.mark.parametrize("listen", ["127.0.0.1:1079-1081", "0.0.0.0:1080"])
    def test_metrics_on_the_port_of_a_listener_are_an_error(self, listen: str) -> None:
        text = f"metrics: 127.0.0.1:1080\nlisteners: [{{listen: '{listen}', name: a, auth: none"
        used = listen.replace("1079-1081", "1080")
        assert error(text + ", allow_open: true}]") == (
            f"c.yaml:1:10: metrics: tcp 127.0.0.1:1080 is already used by listener 'a' ({used})"
        )

    @pytest.mark.parametrize(
        "first, second, metrics",
        [
            ("127.0.0.1:1080", "127.0.0.2:1080", "127.0.0.3:1080"),
            ("127.0.0.1:1080", "[::1]:1080", "127.0.0.1:1081"),
            ("0.0.0.0:1080", "[::1]:1080", "127.0.0.1:1081"),
            ("127.0.0.1:0", "0.0.0.0:0", "127.0.0.1:0"),
            ("proxy.example:1080", "127.0.0.1:1080", "127.0.0.1:1081"),
        ],
    )
    def test_listeners_on_sockets_of_their_own_are_accepted(
        self, first: str, second: str, metrics: str
    ) -> None:
        text = (
            f"metrics: '{metrics}'\n"
            f"listeners:\n- {{listen: '{first}', name: a, clients: 127.0.0.0/8}}\n"
            f"- {{listen: '{second}', name: b, clients: 127.0.0.0/8}}"
        )
        assert not warnings(text)

    def test_udp_listener_beside_an_http_listener_is_accepted(self) -> None:
        text = (
            "listeners: [{listen: '127.0.0.1:1080', protocol: http}, {listen: '127.0.0.1:1080', "
            "protocol: udp, target: '192.0.2.1:53'}]"
        )
        assert not warnings(text)


class TestNames:
    BRIDGE = (
        "tunnel: {bridge: {listen: 'tcp://127.0.0.1:7000', agents: {my-home: {token: "
        "0123456789abcdef, ports: [8022, {port: '9000-9009/udp', limits: {rate: 5MB/s}}]}}}}"
    )

    def build(self, name: str) -> str:
        """Return the text of a file with a listener of this name."""
        return f"listeners: [{{listen: '127.0.0.1:1080', name: {name}}}]\n{self.BRIDGE}"

    @pytest.mark.parametrize("port", ["8022", "9000", "9009"])
    def test_listener_with_the_name_of_an_agents_port_is_refused(self, port: str) -> None:
        assert error(self.build(f"my-home-{port}")).endswith(
            f": name: 'my-home-{port}': the port {port} of the agent 'my-home' has this name"
        )

    @pytest.mark.parametrize("name", ["my-home", "home-8022", "my-home-9010", "my-home-08022"])
    def test_listener_with_another_name_is_accepted(self, name: str) -> None:
        build(read(self.build(name)), Runtime(Log("error")), None)


class TestLoops:
    @pytest.mark.parametrize(
        "listen, server",
        [
            ("127.0.0.1:1080", "127.0.0.1:1080"),
            ("127.0.0.1:1080", "localhost:1080"),
            ("0.0.0.0:1080", "127.0.0.5:1080"),
            (":1080", "127.0.0.1:1080"),
            (":1080", "[::1]:1080"),
            ("127.0.0.1:1080", "[::ffff:127.0.0.1]:1080"),
            ("127.0.0.1:1079-1081", "127.0.0.1:1080"),
        ],
    )
    def test_upstream_that_is_our_own_listener_is_an_error(self, listen: str, server: str) -> None:
        text = (
            f"listeners: [{{listen: '{listen}', allow_open: true}}]\n"
            f"default: 'socks5://u:hunter2@{server}'"
        )
        assert error(text) == (
            f"c.yaml:2:10: the upstream socks5://{server} is a listener of this daemon: "
            "connections would come back to it"
        )

    @pytest.mark.parametrize(
        "default, place",
        [
            ("{members: ['http://192.0.2.1:1', 'http://127.0.0.1:1080']}", "2:43"),
            ("['http://127.0.0.1:1080', 'http://192.0.2.1:1']", "2:11"),
            ("{url: 'http://127.0.0.1:1080', timeout: 1s}", "2:16"),
        ],
    )
    def test_first_proxy_of_a_chain_or_a_group_counts(self, default: str, place: str) -> None:
        assert error(f"{LISTEN}default: {default}").startswith(f"c.yaml:{place}: the upstream")

    @pytest.mark.parametrize(
        "server", ["127.0.0.1:1081", "192.0.2.1:1080", "127.0.0.2:1080", "proxy.example:1080"]
    )
    def test_other_proxies_are_accepted(self, server: str) -> None:
        assert warnings(f"{LISTEN}default: 'socks5://{server}'") == []

    def test_own_socket_as_upstream_or_target_is_an_error(self, tmp_path: Path) -> None:
        """Hazard 165."""
        (tmp_path / "b.sock").symlink_to(tmp_path / "a.sock")
        control, own = tmp_path / "control", f"{{listen: 'unix:{tmp_path}/a.sock'}}"
        for path in ("a.sock", "b.sock", "control"):
            named = f"unix:{tmp_path}/{path}"
            text = f"control: unix:{control}\nlisteners: [{own}]\ndefault: socks5h://{named}"
            assert error(text) == (
                f"c.yaml:3:10: the upstream socks5h://{named} is a socket of this daemon"
            )
            front = f"{{protocol: tcp, listen: '127.0.0.1:1', target: '{named}'}}"
            text = f"control: unix:{control}\nlisteners: [{own}, {front}]"
            assert error(text).endswith(f"target: {named} is a socket of this daemon")

    @pytest.mark.parametrize("local, place", [(0, "3:12"), (5, "4:12")])
    def test_same_proxy_with_another_mark_is_checked_too(
        self, monkeypatch: pytest.MonkeyPatch, local: int, place: str
    ) -> None:
        """Policy routing leads only one of the marks back to this machine."""

        def is_local(_: object, __: str, ___: Address, selectors: RouteSelectors) -> bool:
            return selectors.mark == local

        monkeypatch.setattr(KernelRoutes, "is_local", is_local)
        text = (
            "listeners: [{listen: ':1080', allow_open: true}]\n"
            "upstreams:\n"
            "  a: {url: 'socks5://192.0.2.1:1080'}\n"
            "  b: {url: 'socks5://192.0.2.1:1080', mark: 5}\n"
            "default: {members: [a, b]}\n"
        )
        assert error(text).startswith(f"c.yaml:{place}: the upstream ")

    def test_later_proxy_of_a_chain_is_on_another_machine(self) -> None:
        assert not warnings(f"{LISTEN}default: ['socks5://192.0.2.1:1', 'http://127.0.0.1:1080']")


class TestPorts:
    LOW = "listeners: [{listen: '127.0.0.1:80', network: tcp}]"

    @pytest.fixture(autouse=True)
    def capabilities(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A process without capabilities, whose unprivileged ports begin at 1024."""
        status, start = tmp_path / "status", tmp_path / "start"
        status.write_text("Name:\tx\nCapEff:\t0000000000000000\n")
        start.write_text("1024\n")
        monkeypatch.setattr(sockets, "STATUS", str(status))
        monkeypatch.setattr(sockets, "PORT_START", str(start))
        return tmp_path

    def test_port_below_1024_without_the_capability_gives_a_warning(self) -> None:
        assert warnings(self.LOW) == [
            "c.yaml:1:22: listen: 127.0.0.1:80: ports below 1024 need CAP_NET_BIND_SERVICE, "
            "which this process does not have"
        ]

    def test_process_with_the_capability_gets_no_warning(self, capabilities: Path) -> None:
        (capabilities / "status").write_text("CapEff:\t0000000000000400\n")
        assert warnings(self.LOW) == []

    def test_port_that_the_kernel_gives_to_all_gets_no_warning(self, capabilities: Path) -> None:
        (capabilities / "start").write_text("80\n")
        assert warnings(self.LOW) == []

    def test_machine_that_does_not_tell_gets_no_warning(self, capabilities: Path) -> None:
        (capabilities / "status").unlink()
        assert warnings(self.LOW) == []

    def test_other_ports_get_no_warning(self) -> None:
        assert warnings(LISTEN) == []


def test_rule_that_never_matches_gives_a_warning() -> None:
    text = LISTEN + "rules:\n  - {via: direct}\n  - {domain: a.test, via: block}\n"
    assert warnings(text) == [
        "c.yaml:4:5: rules[1]: can never match: rules[0] (everything) at c.yaml:3:5 takes "
        "all of its flows"
    ]


def test_warnings_of_the_file_come_first_and_all_have_places() -> None:
    text = (
        "users: {alice: {password: x}}\n" + LISTEN + "default: 'http://127.0.0.1:9?udp=none'\n"
        "rules:\n  - {via: direct}\n  - {via: block}\n"
    )
    assert [line.split(" ")[0] for line in warnings(text)] == [
        "c.yaml:1:27:",
        "c.yaml:2:22:",
        "c.yaml:6:5:",
    ]


class TestCertificates:
    def told(self, now: float, **files: str) -> list[str]:
        """Return the warnings about files at a time."""
        problems = Problems()
        certificate, authorities = files.get("certificate", ""), files.get("authorities", "")
        paths = CertificateFiles(certificate, "", authorities, Place("c:1:1"))
        check_certificates([paths], problems, now)
        # The certificates of the tests hold no key.
        return problems.warnings

    def test_certificate_is_warned_of_before_and_after_its_time(self) -> None:
        path = certificates().path("server.pem")
        now = time.time()
        assert self.told(now, certificate=path) == []
        (expired,) = self.told(now + 91 * DAY, certificate=path)
        assert re.match(
            rf"c:1:1: tls: {path}: the certificate has expired on 20\d\d-..-..\Z", expired
        )
        (soon,) = self.told(now + 70 * DAY, certificate=path)
        assert re.match(rf"c:1:1: tls: {path}: the certificate expires on 20\d\d-..-..\Z", soon)
        (early,) = self.told(now - 3 * DAY, certificate=path)
        assert re.search(r": the certificate is not valid before 20\d\d-..-..\Z", early)

    def test_bundle_of_authorities_counts_by_its_last_certificate(self, tmp_path: Path) -> None:
        raw = Path(certificates().path("ca.pem")).read_text()
        bundle = tmp_path / "bundle.pem"
        bundle.write_text(_old(raw) + raw)
        assert self.told(time.time(), authorities=str(bundle)) == []
        assert len(self.told(time.time(), certificate=str(bundle))) == 1

    def test_file_without_certificates_is_left_to_openssl(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pem"
        path.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        assert self.told(0, certificate=str(path)) == []
        assert self.told(0, certificate=str(tmp_path / "none")) == []

    def test_every_truncation_of_a_certificate_is_a_value_error(self) -> None:
        der = _der(Path(certificates().path("ca.pem")).read_text())
        validity = parse_validity(der)
        assert re.match(r"20\d{12}Z\Z", validity.begin) and validity.begin < validity.end
        for length in range(len(der)):
            with pytest.raises(ValueError):
                parse_validity(der[:length])

    def test_plan_of_a_tls_listener_has_the_warnings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(certificates_module, "NOTICE_SECONDS", 100 * DAY)
        tls = certificates().listener()
        (line,) = warnings(f"listeners: [{{listen: '127.0.0.1:0', tls: {tls}}}]")
        assert line.startswith("c.yaml:1:42: tls: ") and "the certificate expires on" in line

    def test_certificate_of_several_listeners_is_warned_of_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(certificates_module, "NOTICE_SECONDS", 100 * DAY)
        tls = certificates().listener()
        one, other = (f"{{listen: '127.0.0.{host}:0', tls: {tls}}}" for host in (1, 2))
        (line,) = warnings(f"listeners: [{one}, {other}]")
        assert line.startswith("c.yaml:1:42: tls: ") and "the certificate expires on" in line

    def test_error_of_a_file_of_an_upstream_has_its_place(self) -> None:
        pem, key = certificates().path("server.pem"), certificates().path("client.key")
        tls = f"{{certificate: '{pem}', key: '{key}'}}"
        assert error(f"{LISTEN}default: {{url: 'https://192.0.2.1:1', tls: {tls}}}") == (
            f"c.yaml:2:44: https://192.0.2.1:1: tls: cannot use {key}: the key does not belong "
            f"to the certificate in {pem}"
        )


def _der(pem: str) -> bytes:
    return base64.b64decode(pem.split("-----")[2])


def _old(pem: str) -> str:
    """Return a certificate that expired in 2001.  Its signature is wrong."""
    der = _der(pem)
    end = parse_validity(der).end[2:].encode()
    text = base64.encodebytes(der.replace(end, b"01" + end[2:])).decode()
    return f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"


class TestExposedSecrets:
    """Hazard 114."""

    @pytest.fixture
    def folder(self) -> Iterator[Path]:
        """A folder that every user may enter; pytest's own are private."""
        path = Path(tempfile.mkdtemp(dir="/tmp", prefix="netproxy-exposed-"))
        path.chmod(0o755)
        yield path
        shutil.rmtree(path)

    def told(self, path: Path) -> list[str]:
        problems = Problems()
        config = check(read_config(load_file(str(path)), problems), problems)
        return [line for line in config.warnings if "every user of this machine" in line]

    @pytest.mark.parametrize(
        "text, place",
        [
            ("users: {alice: {password: hunter2}}", "1:27"),
            ("upstreams: {a: 'socks5://u:hunter2@192.0.2.1:1'}", "1:16"),
            ("upstreams: {a: {url: 'http://u:hunter2@192.0.2.1:1'}}", "1:22"),
            ("default: 'http://u:hunter2@192.0.2.1:1?timeout=1s'", "1:10"),
            ("metrics: 127.0.0.1:1\nmetrics_token: aaaaaaaaaaaaaaaaaaaa", "2:16"),
            (
                "tunnel: {bridge: {agents: {a: {token: aaaaaaaaaaaaaaaaaaaa}}, listen: 'tcp://:1'}}",
                "1:39",
            ),
        ],
    )
    def test_secret_that_every_user_can_read_gives_a_warning(
        self, folder: Path, text: str, place: str
    ) -> None:
        path = folder / "c.yaml"
        path.write_text(text)
        path.chmod(0o644)
        assert self.told(path) == [
            f"{path}:{place}: every user of this machine can read this secret: chmod o-r {path}"
        ]
        path.chmod(0o640)
        assert self.told(path) == []

    def test_one_warning_is_given_for_each_file(self, folder: Path) -> None:
        path = folder / "c.yaml"
        path.write_text("users: {a: {password: x}, b: {password: y}, c: {password: !file pw}}")
        (folder / "pw").write_text("hunter2\n")
        os.chmod(path, 0o644)
        os.chmod(folder / "pw", 0o644)
        assert [line.rpartition(" ")[2] for line in self.told(path)] == [
            str(path),
            str(folder / "pw"),
        ]

    def test_secret_of_the_environment_is_not_in_the_file(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NETPROXY_TEST", "hunter2")
        path = folder / "c.yaml"
        path.write_text("users: {a: {password: '${NETPROXY_TEST}'}}")
        path.chmod(0o644)
        assert self.told(path) == []

    def test_file_without_secrets_may_be_read(self, folder: Path) -> None:
        path = folder / "c.yaml"
        path.write_text("default: direct")
        path.chmod(0o644)
        assert self.told(path) == []

    def test_folder_that_others_may_not_enter_keeps_the_secret(self, folder: Path) -> None:
        path = folder / "c.yaml"
        path.write_text("users: {a: {password: x}}")
        path.chmod(0o644)
        folder.chmod(0o750)
        assert self.told(path) == []

    def test_private_key_that_every_user_can_read_gives_a_warning(self, folder: Path) -> None:
        for name in ("server.pem", "server.key"):
            shutil.copy(certificates().path(name), folder / name)
            (folder / name).chmod(0o644)
        key = folder / "server.key"
        tls = f"{{certificate: '{folder}/server.pem', key: '{key}'}}"
        text = f"listeners: [{{listen: '127.0.0.1:0', tls: {tls}}}]"
        assert warnings(text) == [
            "c.yaml:1:42: tls: every user of this machine can read the private key: "
            f"chmod o-r {key}"
        ]
        key.chmod(0o600)
        assert warnings(text) == []


class TestInterfaces:
    def test_interface_that_does_not_exist_is_warned_of(self) -> None:
        user = f"password: '{TestModules.HASH}'"
        text = (
            "listeners: [{listen: '127.0.0.1:1080', bind: incomming}, "
            "{listen: '127.0.0.1:1081', bind: lo}]\n"
            "default: {url: direct, bind: nonexistent0}\n"
            f"users: {{a: {{{user}, bind: nonexistent1}}}}\n"
        )
        assert warnings(text) == [
            "c.yaml:1:22: bind: there is no interface 'incomming' (did you mean 'incoming'?)",
            "c.yaml:2:16: bind: there is no interface 'nonexistent0'",
            "c.yaml:3:23: bind: there is no interface 'nonexistent1'",
        ]

    def test_announced_interface_that_does_not_exist_is_warned_of(self) -> None:
        text = "listeners: [{listen: '127.0.0.1:1080', announce: [{interface: %s}]}]"
        assert warnings(text % "nonexistent0") == [
            "c.yaml:1:22: announce: there is no interface 'nonexistent0' yet"
        ]
        assert warnings(text % "lo") == []


class TestState:
    def test_missing_folder_is_an_error(self, tmp_path: Path) -> None:
        assert error(LISTEN + f"state: {tmp_path}/none") == (
            f"c.yaml:2:8: state: {tmp_path}/none is not a folder: make it, for the daemon's user"
        )

    def test_check_opens_nothing_in_the_folder(self, tmp_path: Path) -> None:
        assert warnings(LISTEN + f"state: {tmp_path}") == []
        assert not list(tmp_path.iterdir())


class TestModules:
    """Python as small distributions split it."""

    TLS = "{url: 'https://192.0.2.1:1'}"
    HASH = "scrypt$1024$1$1$AAECAwQFBgcICQoLDA0ODw==$" + "A" * 43 + "="

    @pytest.mark.parametrize(
        "module, text, message",
        [
            ("ssl", f"default: {TLS}", "2:16: https://192.0.2.1:1 needs Python's module ssl"),
            (
                "ssl",
                "dns: {servers: ['tls://192.0.2.1']}",
                "2:17: dns: 192.0.2.1:853 needs Python's module ssl",
            ),
            (
                "_hashlib",
                f"users: {{a: {{password: '{HASH}'}}}}",
                "2:23: users.a needs Python's module _hashlib",
            ),
            ("hmac", "users: {a: {password: x}}", "2:23: users.a needs Python's module hmac"),
            ("_sqlite3", "state: /tmp", "2:8: state needs Python's module _sqlite3"),
            (
                "_blake2",
                "default: {url: direct, bind: 192.0.2.0/24, rotate: client}",
                "2:16: rotate: client needs Python's module _blake2",
            ),
            ("_blake2", "auth: {command: [/a]}", "2:17: auth needs Python's module _blake2"),
            *(
                (module, AUTH_URL, f"2:13: auth.url needs Python's module {module}")
                for module in ("http", "email", "urllib")
            ),
            ("ssl", AUTH_URL, "2:13: auth.url needs Python's module ssl"),
        ],
    )
    def test_missing_module_names_its_package_in_one_line(
        self, monkeypatch: pytest.MonkeyPatch, module: str, text: str, message: str
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        packages = {
            **dict.fromkeys(("hmac", "_blake2", "http"), "python3-light"),
            **{name: f"python3-{name}" for name in ("email", "urllib")},
            "_sqlite3": "python3-sqlite3",
        }
        package = packages.get(module, "python3-openssl")
        assert error(LISTEN + text) == f"c.yaml:{message} (Debian: python3, OpenWrt: {package})"

    def test_missing_module_that_nothing_needs_is_no_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (
            *("ssl", "_hashlib", "hashlib", "hmac", "_sqlite3", "_blake2"),
            *("http", "email", "urllib"),
        ):
            monkeypatch.setitem(sys.modules, module, None)
        assert warnings(LISTEN) == []

    def test_missing_ctypes_gives_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ctypes", None)
        assert warnings(LISTEN) == [
            "python3: datagrams take longer without Python's module ctypes "
            "(Debian: python3, OpenWrt: python3-ctypes)"
        ]

    @pytest.mark.parametrize("side", ["bridge", "agent"])
    def test_missing_cryptography_gives_a_warning(
        self, monkeypatch: pytest.MonkeyPatch, side: str
    ) -> None:
        """The datagrams of a tunnel go by TCP then."""
        monkeypatch.setitem(sys.modules, "cryptography", None)
        token, tls = "token: twenty-bytes-of-secret", certificates().listener()
        sections = {
            "bridge": f"listen: '127.0.0.1:7000', tls: {tls}, agents: {{home: {{{token}}}}}",
            "agent": f"bridge: 'tls://localhost:7000', name: home, {token}, exit: true",
        }
        text = f"{LISTEN}tunnel: {{{side}: {{datagrams: true, {sections[side]}}}}}"
        needs = "needs python3-cryptography: until then datagrams go by TCP"
        assert f"tunnel.{side}.datagrams {needs}" in "\n".join(warnings(text))

    def test_module_is_found_without_being_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "wave", raising=False)
        assert has_module("wave") and "wave" not in sys.modules
        assert not has_module("no_such_module")
