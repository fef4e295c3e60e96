"""`clients` and `clients_deny`: networks, exclusions, files, and the place of every error."""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy.config.schema import ClientsConfig, NetworkList
from netproxy.config.url import listener_node
from netproxy.interfaces.networks import IpNetwork
from tests.config.reading import errors, read

pytest.importorskip("yaml")
EXPECTED = "(expected an address or CIDR, such as 10.0.0.0/8)"
OPEN = (
    "c.yaml:1:22: listeners[0].listen: [::]:1 would let everybody in: "
    "set auth, clients, or allow_open: true"
)


def networks(*texts: str) -> NetworkList:
    """Return the list of networks; those with "!" are excluded."""
    return NetworkList(
        tuple(IpNetwork.parse(text) for text in texts if text[0] != "!"),
        tuple(IpNetwork.parse(text[1:]) for text in texts if text[0] == "!"),
    )


def listener(keys: str, listen: str = ":1") -> str:
    """Return a file with one listener."""
    return f"listeners: [{{listen: '{listen}', {keys}}}]"


def clients(keys: str, listen: str = ":1") -> ClientsConfig:
    """Return the clients of a listener with these keys."""
    return read(listener(keys, listen)).listeners[0].clients


def test_all_clients_may_connect_by_default() -> None:
    assert clients("name: a", "127.0.0.1:1") == ClientsConfig()


@pytest.mark.parametrize("text", ["10.0.0.0/8", "[10.0.0.0/8]"])
def test_single_network_needs_no_list(text: str) -> None:
    assert clients(f"clients: {text}") == ClientsConfig(networks("10.0.0.0/8"))


def test_networks_exclusions_and_denied_networks_are_read() -> None:
    assert clients(
        "clients: [192.168.0.0/16, '!192.168.9.0/24', 'fd00::/8'], clients_deny: [192.168.9.1]"
    ) == ClientsConfig(
        networks("192.168.0.0/16", "!192.168.9.0/24", "fd00::/8"), networks("192.168.9.1")
    )


def test_network_that_is_given_twice_is_there_once() -> None:
    assert clients("clients: [10.0.0.1, 10.0.0.1/32]") == ClientsConfig(networks("10.0.0.1"))


def test_url_on_the_command_line_takes_exclusions() -> None:
    url = "sps://:1?clients=192.168.0.0/16,!192.168.9.0/24&clients_deny=192.168.0.1"
    values = listener_node(url, "-l").value
    assert isinstance(values, dict) and isinstance(values["clients"].value, list)
    assert [node.value for node in values["clients"].value] == ["192.168.0.0/16", "!192.168.9.0/24"]


class TestFiles:
    def test_file_has_a_network_or_an_exclusion_a_line(self, tmp_path: Path) -> None:
        path = tmp_path / "office.txt"
        path.write_text("\ufeff# the office\n192.168.0.0/16\n\n!192.168.9.0/24  # guests\n::1\r\n")
        assert clients(f"clients: !file {path}") == ClientsConfig(
            networks("192.168.0.0/16", "!192.168.9.0/24", "::1")
        )

    def test_files_and_networks_may_be_mixed(self, tmp_path: Path) -> None:
        for name, text in (("a", "10.0.0.0/8\n"), ("b", "!10.1.0.0/16"), ("c", "10.2.0.0/16")):
            (tmp_path / name).write_text(text)
        keys = "clients: [!file {0}/a, 192.0.2.1, !file {0}/b], clients_deny: !file {0}/c"
        assert clients(keys.format(tmp_path)) == ClientsConfig(
            networks("10.0.0.0/8", "192.0.2.1", "!10.1.0.0/16"), networks("10.2.0.0/16")
        )

    def test_error_in_a_file_has_its_line(self, tmp_path: Path) -> None:
        path = tmp_path / "office.txt"
        path.write_text("# x\n10.0.0.0/8\noffice\n10.0.0.1/8 # y\n")
        assert errors(listener(f"clients: [192.0.2.1, !file {path}]")) == [
            f"{path}:3: listeners[0].clients[1]: 'office' is not a valid network {EXPECTED}",
            f"{path}:4: listeners[0].clients[1]: '10.0.0.1/8' is not a valid network: bits behind "
            "the prefix are set (write 10.0.0.0/8)",
        ]

    @pytest.mark.parametrize("text", ["", "# nobody yet\n"])
    def test_empty_file_of_clients_is_an_error_and_not_everybody(
        self, tmp_path: Path, text: str
    ) -> None:
        path = tmp_path / "office.txt"
        path.write_text(text)
        assert errors(listener(f"clients: !file {path}", "127.0.0.1:1")) == [
            "c.yaml:1:46: listeners[0].clients: names no network"
        ]

    def test_empty_file_of_denied_clients_denies_nobody(self, tmp_path: Path) -> None:
        path = tmp_path / "banned.txt"
        path.write_text("# nobody yet\n")
        assert clients(f"clients_deny: !file {path}", "127.0.0.1:1") == ClientsConfig()


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            "clients: ['!10.0.0.1/8']",
            "1:38: listeners[0].clients[0]: '10.0.0.1/8' is not a valid network: bits behind the "
            "prefix are set (write 10.0.0.0/8)",
        ),
        ("clients: ['!']", f"1:38: listeners[0].clients[0]: '' is not a valid network {EXPECTED}"),
        (
            "clients: [10.0.0.0/8, '!10.0.0.0/8']",
            "1:50: listeners[0].clients[1]: '10.0.0.0/8' is there with '!' and without",
        ),
        (
            "clients: 10.0.0.0/8, clients_deny: [192.0.2.1, x]",
            f"1:75: listeners[0].clients_deny[1]: 'x' is not a valid network {EXPECTED}",
        ),
        ("clients: [[10.0.0.0/8]]", "1:38: listeners[0].clients[0]: must be a single value"),
        (
            "clients: '10.0.0.0/8,!10.1.0.0/16'",
            "1:37: listeners[0].clients[0]: '10.0.0.0/8,!10.1.0.0/16' is one text: "
            "write a list, [10.0.0.0/8,!10.1.0.0/16]",
        ),
    ],
)
def test_error_has_its_place(keys: str, message: str) -> None:
    assert errors(listener(keys)) == [f"c.yaml:{message}"]


class TestOpenListener:
    """Hazard 80: who is left out does not make the others known."""

    @pytest.mark.parametrize("keys", ["clients: ['!192.0.2.1']", "clients_deny: [192.0.2.1]"])
    def test_listener_that_names_strangers_alone_is_open(self, keys: str) -> None:
        assert errors(listener(keys)) == [OPEN]
        assert read(listener(f"{keys}, allow_open: true")).listeners

    def test_listener_with_networks_and_exclusions_is_not_open(self) -> None:
        assert clients("clients: [10.0.0.0/8, '!10.1.0.0/16'], clients_deny: [10.0.0.1]")
