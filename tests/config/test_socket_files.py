"""UNIX sockets in the file: paths, permissions, and what does not fit."""

from __future__ import annotations

import os
import pwd

import pytest

from netproxy.config.schema import ListenerConfig, SocketFileConfig
from netproxy.interfaces.addresses import UnixAddress
from tests.config.reading import errors, read

pytest.importorskip("yaml")


def listener(more: str = "", path: str = "/run/a.sock") -> ListenerConfig:
    return read(f"listeners: [{{listen: 'unix:{path}'{more}}}]").listeners[0]


def error(more: str = "", path: str = "/run/a.sock") -> str:
    (message,) = errors(f"listeners: [{{listen: 'unix:{path}'{more}}}]")
    return message


class TestSocket:
    def test_socket_has_a_path_and_serves_tcp(self) -> None:
        config = listener()
        assert config.addresses == (UnixAddress("unix:/run/a.sock", 0),)
        assert config.addresses[0].path == "/run/a.sock"  # type: ignore[attr-defined]
        assert (config.network, config.name) == (("tcp",), "sps-a.sock")
        assert config.socket_file == SocketFileConfig(0o660, -1, -1)
        assert config.limits.connections_per_client == config.limits.connections

    def test_http_keeps_the_datagrams_within_its_connections(self) -> None:
        config = listener(", protocol: http")
        assert (config.network, config.bound_networks) == (("tcp", "udp"), ("tcp",))

    @pytest.mark.parametrize(
        "text, mode", [("0600", 0o600), ("660", 0o660), ("'0777'", 0o777), ("000", 0)]
    )
    def test_mode_is_octal(self, text: str, mode: int) -> None:
        assert listener(f", mode: {text}").socket_file.mode == mode

    def test_owner_and_group_are_names_or_numbers(self) -> None:
        name = pwd.getpwuid(os.getuid()).pw_name
        assert listener(f", owner: {name}, group: 7").socket_file[1:] == (os.getuid(), 7)

    def test_two_listeners_cannot_have_one_path(self) -> None:
        one = "{listen: 'unix:/run/a.sock'}"
        (message,) = errors(f"listeners: [{one}, {one}]")
        assert "tcp unix:/run/a.sock is already used by listener" in message


class TestMistakes:
    @pytest.mark.parametrize("mode", ["8", "0888", "rw", "07777", "-1"])
    def test_mode_is_wrong(self, mode: str) -> None:
        assert "is not a mode of a file" in error(f", mode: '{mode}'")

    @pytest.mark.parametrize("kind", ["user", "group"])
    def test_nobody_has_the_name(self, kind: str) -> None:
        key = "owner" if kind == "user" else kind
        assert f"there is no {kind} 'no-such-name'" in error(f", {key}: no-such-name")

    @pytest.mark.parametrize("path", ["/", "/run/", "/" + "a" * 107])
    def test_path_is_wrong(self, path: str) -> None:
        assert "is not the path of a socket (at most 107 bytes)" in error(path=path)

    @pytest.mark.parametrize("path", ["run/a.sock", "", "80x"])
    def test_path_is_not_absolute(self, path: str) -> None:
        assert "is not an address to listen on" in error(path=path)

    @pytest.mark.parametrize(
        "more",
        [
            ", clients: [10.0.0.0/8]",
            ", clients_deny: [10.0.0.0/8]",
            ", proxy_protocol: [10.0.0.1]",
            ", announce: 192.0.2.1",
        ],
    )
    def test_key_about_addresses_of_clients(self, more: str) -> None:
        assert "has no meaning for a UNIX socket" in error(more)

    @pytest.mark.parametrize("protocol", ["udp", "dns", "tunnel"])
    def test_protocol_without_streams_of_its_own(self, protocol: str) -> None:
        more = {"udp": ", target: 'h:1'"}.get(protocol, "")
        messages = errors(f"listeners: [{{protocol: {protocol}, listen: 'unix:/a'{more}}}]")
        wanted = f"a UNIX socket cannot serve the protocol {protocol}"
        assert any(wanted in message for message in messages)

    def test_udp(self) -> None:
        assert "a UNIX socket serves tcp alone" in error(", network: [tcp, udp]")

    @pytest.mark.parametrize("key", ["mode: 0660", "owner: 1", "group: 1"])
    def test_permissions_without_a_file(self, key: str) -> None:
        (message,) = errors(f"listeners: [{{listen: '127.0.0.1:1', {key}}}]")
        assert message.endswith("is for UNIX sockets (listen: unix:/path)")


class TestTargetsAndUpstreams:
    """Targets and proxies at UNIX sockets."""

    def test_tcp_listener_leads_to_a_socket(self) -> None:
        for text in ("unix:/run/app.sock", "unix:@app"):
            target = f"{{protocol: tcp, listen: ':0', clients: [10.0.0.0/8], target: '{text}'}}"
            (config,) = read(f"listeners: [{target}]").listeners
            assert config.target == UnixAddress(text, 0)

    @pytest.mark.parametrize(
        "more, message",
        [
            (
                "protocol: udp",
                "target: a UNIX socket takes no datagrams of clients (protocol: tcp)",
            ),
            (
                "protocol: tcp, upstream: direct",
                "upstream: has no meaning: this machine itself connects to a UNIX socket",
            ),
            (
                "protocol: tcp, bind: 192.0.2.1",
                "bind: has no meaning: this machine itself connects to a UNIX socket",
            ),
        ],
    )
    def test_keys_that_do_not_fit_a_target(self, more: str, message: str) -> None:
        (text,) = errors(f"listeners: [{{listen: '127.0.0.1:1', target: 'unix:/a', {more}}}]")
        assert text.endswith(f": listeners[0].{message}")

    def test_route_to_a_socket_has_no_upstream_of_its_own(self) -> None:
        route = "{sni: a.example, target: 'unix:/a', via: direct}"
        (text,) = errors(
            f"listeners: [{{protocol: sni, listen: '127.0.0.1:1', routes: [{route}]}}]"
        )
        assert text.endswith("via: has no meaning: this machine itself connects to a UNIX socket")

    @pytest.mark.parametrize(
        "upstream, message",
        [
            (
                "[socks5://192.0.2.1:1, http://unix:/a]",
                "default[1]: a UNIX socket must be the first hop: no proxy connects to those of "
                "this machine",
            ),
            (
                "[socks5://192.0.2.1:1, {members: [http://unix:/a]}]",
                "default[1]: a UNIX socket must be the first hop: no proxy connects to those of "
                "this machine",
            ),
            (
                "{url: http://unix:/a, mark: 1}",
                "default: bind, mark and keepalive have no meaning for a UNIX socket",
            ),
            (
                "https://unix:/a?udp=none",
                "default.tls.server_name: is missing: a UNIX socket has no name that the "
                "certificate could have",
            ),
        ],
    )
    def test_keys_that_do_not_fit_an_upstream(self, upstream: str, message: str) -> None:
        (text,) = errors(f"default: {upstream}")
        assert text.endswith(f": {message}")
